"""Kernels compiled side by side: work is rehearsed first, so that all that it launches is known at once.

Triton compiles a kernel at its first launch and lets the launch wait, one kernel after another: 62 of them for an SD1.5
picture. In a rehearsal a launch whose kernel is missing hands it to threads instead and leaves its output as it is. Of
compiling, the passes of LLVM, the assembler and the C compiler of Triton 3.6 run side by side; Python's own share, a
fifth, does not.
"""

import contextvars
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Any, TypeVar

import torch

from diffopt_kernels.launcher import compiles_beside
from diffopt_kernels.support import interpreted

_MOST_THREADS = 16
_READING_S = 0.1  # a kernel that was compiled once is read from the disk, in a few milliseconds; compiling takes longer

Result = TypeVar("Result")


def rehearsed(work: Callable[[], Result]) -> Result:
    """The result of work, all of whose kernels are compiled side by side where they are not compiled yet.

    Where nothing is missing, work is done once. Else it is done twice, and the first time, the rehearsal, missing
    kernels leave uninitialized memory. So nothing that work writes may be read after it, but what it writes each time.
    What goes wrong in the rehearsal shows in the work itself, or doesn't matter.

    Only launches of the calling thread on one GPU, the first, are rehearsed, by `PreparedLaunch`. Without Triton's
    `AsyncCompileMode`, and in the interpreter, work is done once.
    """
    if interpreted() or compiles_beside.get() is not None:
        return work()
    try:
        rehearsal = _Rehearsal()
    except (ImportError, AttributeError, TypeError):  # Triton is missing, has no such mode, or another one
        return work()
    with rehearsal:
        result = work()
        if not rehearsal.left_out:
            return result
        del result
    return work()


class _Rehearsal:
    """Inside it launches of missing kernels are left out; at its end these are compiled, or can't be.

    Attributes:
        left_out: whether a launch was.
    """

    def __init__(self) -> None:
        from triton import AsyncCompileMode, FutureKernel

        self.left_out = False
        self._pending = FutureKernel
        self._mode = AsyncCompileMode(self)  # pyright: ignore[reportArgumentType]  (of an executor it wants `submit`)
        self._inside_mode = contextvars.Context()  # kernels that others launch in this thread compile where they are
        self._pool = ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1), "diffopt-compiler")
        self._interrupted = False
        self._device: int | None = None  # whose kernels are compiled beside
        self._inside_mode.run(self._mode.__enter__)

    def __enter__(self) -> None:
        self._token = compiles_beside.set(self._compiles)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        compiles_beside.reset(self._token)
        failed = kind is not None and issubclass(kind, Exception)
        self._interrupted = kind is not None and not failed
        try:
            self._finish()
        except BaseException:  # Ctrl-C while waiting
            self._interrupted = True
            self._finish()
            raise
        return failed and self.left_out

    def _compiles(self, kernel: Any, arguments: Mapping[str, Any]) -> bool:
        """Whether a kernel is being compiled; if it is missing, that begins."""
        device = torch.cuda.current_device()
        self._device = device if self._device is None else self._device
        if device != self._device:  # Triton 3.7 would launch one GPU's loaded kernel on all of its kind
            return False
        try:
            found = self._inside_mode.run(kernel.warmup, grid=None, **arguments)  # any grid: nothing is launched
            if not isinstance(found, self._pending):
                return False
            if not self.left_out and wait([found.future], _READING_S).done:
                found.result()  # Triton has it from here on
                return False
        except Exception:  # the launch will say it
            return False
        self.left_out = True
        return True

    def submit(self, work: Callable[[], Any]) -> Future[Any]:
        """Triton's mode calls this to have a kernel compiled; None stands for one that is still missing afterwards.

        Triton keeps what it gets under the kernel's key, and None there is as good as nothing: so a kernel that can't
        be compiled, or loaded, is tried again where it is launched, and raises there.
        """
        device = torch.cuda.current_device()

        def compiled() -> Any:
            if self._interrupted:
                return None
            try:
                kernel = work()
                with torch.cuda.device(device):
                    _ = kernel.run  # loads it
            except Exception:  # likewise
                return None
            return kernel

        return self._pool.submit(compiled)

    def _finish(self) -> None:
        """Wait for the threads, and let Triton have what they made."""
        self._inside_mode.run(self._mode.__exit__, None, None, None)
        self._pool.shutdown()
