"""One stop flag per visitor, so that a stop ends that visitor's job only."""

import contextlib
import threading
from collections.abc import Iterator


class Jobs:
    """The running jobs by visitor; gradio's `cancels=` does not stop a function that runs."""

    def __init__(self) -> None:
        self._flags: dict[str, threading.Event] = {}
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def running(self, visitor: str) -> Iterator[threading.Event]:
        """The stop flag of a visitor's job for the length of the block."""
        flag = threading.Event()
        with self._lock:
            self._flags[visitor] = flag
        try:
            yield flag
        finally:
            with self._lock:
                if self._flags.get(visitor) is flag:
                    del self._flags[visitor]

    def stop(self, visitor: str) -> bool:
        """Ask a visitor's job to stop at its next step; False when none runs."""
        with self._lock:
            flag = self._flags.get(visitor)
        if flag is None:
            return False
        flag.set()
        return True
