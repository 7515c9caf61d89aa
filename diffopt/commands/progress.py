"""Progress of a command that works for minutes, on stderr."""

import sys
import time


class ProgressLines:
    """Progress on stderr: a line per stage, its count and time left redrawn in place on a terminal."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._start = time.monotonic()
        self._stage = ""
        self._stage_start = self._start

    def __call__(self, stage: str, done: int, total: int) -> None:
        terminal, now = sys.stderr.isatty(), time.monotonic()
        if stage != self._stage:
            self._stage_start = now
        text = f"{now - self._start:6.1f} s  {self._prefix}{stage}"
        if terminal:
            if self._stage and stage != self._stage:
                print(file=sys.stderr)
            left = f", about {(now - self._stage_start) / done * (total - done):.0f} s left" if done else ""
            print(f"\r{text} {done} of {total}{left}\033[K", end="", file=sys.stderr, flush=True)
        elif stage != self._stage:
            print(text, file=sys.stderr, flush=True)
        self._stage = stage


def end_line() -> None:
    """End the line that `ProgressLines` draws on a terminal."""
    if sys.stderr.isatty():
        print(file=sys.stderr)
