"""Starts a command that needs the libraries: seconds of imports, kept as few as can be (reports/notes/start-up.md)."""

import contextlib
import gc
import os
import signal
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

INTERRUPTED = 128 + signal.SIGINT
"""The exit code of a command that Ctrl-C ended, as a shell counts it."""

SPINS = "10000"
"""On two cores with nothing else to do 5% slower than libgomp's 300,000, beside other work eight times faster."""


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """A block in which libraries are imported and models loaded, before anything is computed.

    Hundreds of thousands of objects are made that all stay. Looking for garbage among them costs a fifth of the time,
    so the collector is off for the block, and what was made in it is never looked at again.

    PyTorch's CPU threads also spin for a shorter time while they wait for each other, unless the environment says
    otherwise: libgomp's default wastes milliseconds per operation as soon as other work needs the same cores.

    Ctrl-C ends the process at once, exit code 130: there is nothing to save yet, and an interrupted import can leave a
    library half there, which then fails in strange ways (torch swallowed one and diffusers recursed without end).
    """
    if "OMP_WAIT_POLICY" not in os.environ:  # read once, when torch loads its OpenMP library
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    before = signal.signal(signal.SIGINT, _leave)
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        gc.freeze()
        if enabled:
            gc.enable()


def _leave(_number: int, _frame: FrameType | None) -> NoReturn:
    os.write(2, b"diffopt: interrupted\n")  # the frame may be inside a print, which can't be entered again
    os._exit(INTERRUPTED)
