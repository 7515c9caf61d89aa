"""Runs tasks in processes of their own: a CUDA fault ends or poisons only the process it happened in.

The processes are forked from one server that has imported the libraries and never touched a GPU, so that each starts
in milliseconds instead of seconds.
"""

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing import connection
from pathlib import Path
from typing import Any

from diffopt.errors import one_line

Send = Callable[[Any], None]

PRELOADED = ["torch", "triton", "diffopt_kernels", "diffopt.attention.trials"]


@dataclasses.dataclass(frozen=True)
class Failure:
    """A task that gave no result: it raised, its process died, or it was silent for too long; `words` say which."""

    words: str


class Child:
    """A task in a process of its own.

    Args:
        task: a function of a module, called with `send` and the arguments; `send(x)` makes `x` a message. What it
            returns, or the error it raises, is the last message.
        silence: seconds without a message after which the process is ended.
    """

    def __init__(self, task: Callable[..., Any], arguments: Sequence[Any], *, silence: float) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        descriptor, name = tempfile.mkstemp(prefix="diffopt-", suffix=".txt")
        os.close(descriptor)
        self._output = Path(name)
        self._silence = silence
        self.receiver, sender = context.Pipe(duplex=False)
        self._process = context.Process(target=_serve, args=(sender, name, task, arguments), daemon=True)
        self._process.start()
        sender.close()
        self.deadline = time.monotonic() + silence

    def receive(self) -> tuple[bool, Any]:
        """Whether the task is over, and its message: after the last one the result or a `Failure`.

        Call it when `receiver` is ready or `deadline` has passed.
        """
        if not self.receiver.poll() and time.monotonic() >= self.deadline:
            return True, Failure(f"no result within {self._silence:.0f} s")
        try:
            kind, content = self.receiver.recv()
        except (EOFError, OSError):
            self._process.join(10)
            return True, Failure(f"its process ended with {self._process.exitcode}{self._last_words()}")
        self.deadline = time.monotonic() + self._silence
        return kind != "message", Failure(content) if kind == "error" else content

    def close(self) -> None:
        """End the process if it still runs, and forget its output."""
        if self._process.is_alive():
            self._process.kill()
        self._process.join(10)
        self.receiver.close()
        self._output.unlink(missing_ok=True)

    def _last_words(self) -> str:
        lines = self._output.read_text(errors="replace").strip().splitlines()
        return f": {lines[-1][:150]}" if lines else ""


def run_one(task: Callable[..., Any], *arguments: Any, silence: float, on_message: Send | None = None) -> Any:
    """One task in a process of its own: its result, or a `Failure`. `on_message` gets what the task sends."""
    with contextlib.closing(Child(task, arguments, silence=silence)) as child:
        while True:
            connection.wait([child.receiver], timeout=max(0, child.deadline - time.monotonic()))
            over, content = child.receive()
            if over:
                return content
            if on_message is not None:
                on_message(content)


def run_many(
    task: Callable[..., Any], arguments: Iterable[tuple[Any, ...]], *, workers: int, silence: float
) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """A task for each tuple of arguments, `workers` at once: arguments and result or `Failure`, as each ends."""
    waiting, running = list(reversed(list(arguments))), dict[Any, tuple[Child, tuple[Any, ...]]]()
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                those = waiting.pop()
                child = Child(task, those, silence=silence)
                running[child.receiver] = child, those
            first = min(child.deadline for child, _ in running.values())
            ready = connection.wait(list(running), timeout=max(0, first - time.monotonic()))
            late = [receiver for receiver, (child, _) in running.items() if child.deadline <= time.monotonic()]
            for receiver in dict.fromkeys([*ready, *late]):
                child, those = running[receiver]
                over, content = child.receive()
                if over:
                    del running[receiver]
                    child.close()
                    yield those, content
    finally:
        for child, _ in running.values():
            child.close()


def _serve(sender: connection.Connection, output: str, task: Callable[..., Any], arguments: Sequence[Any]) -> None:
    """What a child runs: Ctrl-C is the parent's to handle, and what libraries print goes to a file."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    descriptor = os.open(output, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    try:
        result = task(lambda message: sender.send(("message", message)), *arguments)
    except BaseException as error:
        sender.send(("error", f"{type(error).__name__}: {one_line(error)}"))
    else:
        sender.send(("result", result))
    sys.stdout.flush()
    os._exit(0)  # a poisoned CUDA context can hang or crash on the way out
