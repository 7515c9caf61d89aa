"""Chips that kernels are compiled for, by the names compilers give them, and what one program may take on each."""

from dataclasses import dataclass

AMD = (0, 0)
"""Stands for an AMD GPU's compute capability: ROCm's numbers (9.4 for an MI300X) say nothing of NVIDIA's features."""


@dataclass(frozen=True)
class Chip:
    """One target and its limits.

    Attributes:
        name: "sm_90" or "gfx942".
        capability: compute capability that launches are chosen by; `AMD` for an AMD chip.
        shared_bytes: of shared memory (LDS on AMD) for one program.
        registers: 32-bit registers of one multiprocessor (compute unit on AMD), which all threads of a program share.
        registers_per_thread: the most that one thread can name.
        warp_threads: threads of a warp (wavefront on AMD).
    """

    name: str
    capability: tuple[int, int]
    shared_bytes: int
    registers: int = 64 << 10
    registers_per_thread: int = 255
    warp_threads: int = 32


# NVIDIA: CUDA C++ programming guide, "Technical specifications per compute capability". AMD: CDNA 3 instruction set
# architecture guide: 64 KiB of LDS; four SIMDs of 512 registers for 64 lanes, accumulation registers among them.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("sm_80", (8, 0), 163 << 10),
        Chip("sm_86", (8, 6), 99 << 10),
        Chip("sm_89", (8, 9), 99 << 10),
        Chip("sm_90", (9, 0), 227 << 10),
        Chip("sm_100", (10, 0), 227 << 10),
        Chip("sm_120", (12, 0), 99 << 10),
        Chip("gfx942", AMD, 64 << 10, registers=4 * 512 * 64, registers_per_thread=512, warp_threads=64),
    )
}
