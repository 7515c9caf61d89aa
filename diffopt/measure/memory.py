"""Peak memory of one call: of the process as the driver sees it, and what the allocator reserved and handed out."""

import contextlib
import dataclasses
import gc
from collections.abc import Callable
from pathlib import Path

import torch

from diffopt.measure.environment import STRICT, process_memory
from diffopt.measure.timing import synchronize


@dataclasses.dataclass(frozen=True)
class PeakMemory:
    """Bytes at the peak of a call, weights included; None is what this system doesn't tell.

    Attributes:
        process: GPU memory the driver books on this process after the call, with what the allocator then holds; on
            a CPU the peak resident memory of the process.
        device_used: memory in use on the whole device after the call, other processes included.
        reserved: the allocator's peak of memory taken from the driver.
        allocated: the allocator's peak of memory handed out.
    """

    process: int | None
    device_used: int | None
    reserved: int | None
    allocated: int | None
    __pydantic_config__ = STRICT

    @property
    def headline(self) -> int | None:
        """What ratios are made from: reserved memory on a GPU, the resident peak of the process on a CPU."""
        return self.reserved or self.process


def give_back(device: torch.device) -> None:
    """Return memory that nothing holds any more to the driver."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def peak_memory(run: Callable[[], object], device: torch.device | str) -> PeakMemory:
    """Peak memory of one call of `run`, from caches emptied beforehand."""
    device = torch.device(device)
    give_back(device)
    if device.type != "cuda":
        reset = _reset_resident_peak()
        run()
        return PeakMemory(_resident_peak() if reset else None, None, None, None)
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    synchronize(device)
    free, total = torch.cuda.mem_get_info(device)
    return PeakMemory(
        process=process_memory(device),
        device_used=total - free,
        reserved=torch.cuda.max_memory_reserved(device),
        allocated=torch.cuda.max_memory_allocated(device),
    )


def _reset_resident_peak() -> bool:
    """Set Linux's record of the peak resident memory (VmHWM) back to what is resident now; elsewhere False."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _resident_peak() -> int | None:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None
