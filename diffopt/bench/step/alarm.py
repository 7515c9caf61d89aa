"""A limit on the time of work that can't be asked to stop."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator


class OutOfTime(BaseException):
    """The time is up. Not an `Exception`, which compilers catch and go on."""


@contextlib.contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """A block that ends in `OutOfTime` when it takes longer; without effect outside the main thread and on Windows.

    An alarm that was set before rings after the block at the earliest.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(*_: object) -> None:
        raise OutOfTime

    before, began = signal.signal(signal.SIGALRM, ring), time.monotonic()
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(1e-3, left - (time.monotonic() - began)), interval)
