"""A process that is asked things over a pipe. It may crash or hang: that costs an answer, not the caller."""

import contextlib
import dataclasses
import importlib
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, Literal

from diffopt.errors import one_line

START_S = 180.0  # importing torch and a peer from a cold disk
_STARTS = 12

Commands = Mapping[str, Callable[..., Any]]
Factory = Callable[..., tuple[Commands, Callable[[], bool]]]
"""Called in the new process: its commands by name, and whether the process is still sound after an error."""


class RefusedError(Exception):
    """Raised by a command for what it doesn't take; the words say why."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a command returned (`value`), or how it failed (`why`).

    "failed" stands for an exception, a crash and a process that hung; `died` for those after which it is gone.
    """

    status: Literal["ok", "refused", "out of memory", "failed"]
    value: Any = None
    why: str = ""
    died: bool = False


class WorkerProcess:
    """A process with commands, started when first needed and again after a crash, a dozen times at most.

    Args:
        name: for messages.
        factory: "module:function" of a `Factory`; text, so that the module is imported over there only.
        arguments: the factory's; they are pickled.
    """

    def __init__(self, name: str, factory: str, *arguments: Any) -> None:
        self.name = name
        self._factory, self._arguments = factory, arguments
        self._process: SpawnProcess | None = None
        self._pipe: Connection | None = None
        self._ready = False
        self._starts = 0
        self._last_crash = ""
        self._log = tempfile.TemporaryDirectory(prefix="diffopt-worker-")

    def start(self) -> None:
        """Start the process without waiting for it; nothing if it runs."""
        if self._process is not None or self._starts >= _STARTS:
            return
        self._starts += 1
        self._ready = False
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        arguments = (theirs, str(self._log_file), self._factory, self._arguments)
        process = context.Process(target=_serve, args=arguments, name=self.name)
        process.start()
        self._process = process
        theirs.close()  # ours is then the only other end: a dead process reads as the end of the file

    def ask(self, command: str, *arguments: Any, timeout: float) -> Answer:
        """The answer to a command, within `timeout` seconds once the process runs; never raises for its failures."""
        self.start()
        if self._process is None:
            return Answer("failed", why=f"given up after {_STARTS} starts: {self._last_crash}", died=True)
        if not self._ready:
            answer = self._receive(START_S)
            if answer.status != "ok":
                return answer
            self._ready = True
        try:
            self._connection.send((command, arguments))
        except OSError:
            return self._crashed()
        return self._receive(timeout)

    def close(self) -> None:
        """End the process, whatever it is doing, for good."""
        self._starts, self._last_crash = _STARTS, "closed"
        self._kill()
        self._log.cleanup()

    @property
    def _log_file(self) -> Path:
        return Path(self._log.name) / "output"

    def _receive(self, timeout: float) -> Answer:
        try:
            if not self._connection.poll(timeout):
                self._last_crash = f"no answer within {timeout:.0f} s"
                self._kill()
                return Answer("failed", why=self._last_crash, died=True)
            answer: Answer = self._connection.recv()
        except (EOFError, OSError):
            return self._crashed()
        if answer.died:
            self._last_crash = answer.why
            self._kill(grace=5)
        return answer

    @property
    def _connection(self) -> Connection:
        if self._pipe is None:
            raise OSError("closed meanwhile, by another thread")
        return self._pipe

    def _crashed(self) -> Answer:
        if self._process is None:
            return Answer("failed", why=self._last_crash, died=True)
        self._process.join(5)
        code = self._process.exitcode
        lines = self._log_file.read_text(errors="replace").split("\n") if self._log_file.exists() else []
        words = next((line.strip() for line in reversed(lines) if line.strip()), "no output")
        self._last_crash = f"the process ended with {code}: {words[:200]}"
        self._kill()
        return Answer("failed", why=self._last_crash, died=True)

    def _kill(self, grace: float = 0) -> None:
        process, pipe = self._process, self._pipe
        self._process = self._pipe = None
        if process is not None:
            process.join(grace)
            process.kill()
            process.join()
            process.close()
        if pipe is not None:
            pipe.close()


def _serve(pipe: Connection, log: str, factory: str, arguments: tuple[Any, ...]) -> None:
    """The life of the process: output to a log, one command at a time, until the other end is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the caller, who then ends this process
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(file, 1)
    os.dup2(file, 2)
    module, _, function = factory.partition(":")
    commands, sound = getattr(importlib.import_module(module), function)(*arguments)
    with contextlib.suppress(EOFError, OSError):
        pipe.send(Answer("ok"))
        while True:
            command, given = pipe.recv()
            answer = _answer(commands[command], given)
            if answer.status != "ok" and not sound():
                answer = dataclasses.replace(answer, died=True)
            pipe.send(answer)
            if answer.died:
                return


def _answer(command: Callable[..., Any], arguments: tuple[Any, ...]) -> Answer:
    try:
        return Answer("ok", command(*arguments))
    except RefusedError as error:
        return Answer("refused", why=str(error))
    except Exception as error:
        out_of_memory = type(error).__name__ == "OutOfMemoryError"  # torch's, without importing torch
        return Answer("out of memory" if out_of_memory else "failed", why=f"{type(error).__name__}: {one_line(error)}")
