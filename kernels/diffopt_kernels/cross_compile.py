"""Compile launches for GPUs that are not here: `python -m diffopt_kernels.cross_compile --chip sm_90 gfx942`.

Prints, and with --json writes, registers, spills and shared memory of each kernel beside the chip's limits. Needs
triton but no GPU, and must run without TRITON_INTERPRET: an interpreted function can't be compiled. That a kernel
compiles says nothing about its results; on AMD chips none was ever run.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

from diffopt_kernels.chips import AMD, CHIPS, Chip
from diffopt_kernels.launch import AttentionLaunch, attention_launches
from diffopt_kernels.launcher import Pointer, PreparedLaunch, Tiles

_TRITON_TYPE = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
_PLAIN_KERNELS = ("pointers", "descriptors")  # in _attention_fwd.py; the others are Gluon
_MATRIX_INSTRUCTIONS = ("tcgen05.mma", "wgmma.mma_async", "mma.sync", "v_mfma")


@dataclass(frozen=True)
class Variant:
    """What a call adds to its launch: which code is compiled in.

    Attributes:
        whole_key_tiles: the keys fill their tiles.
        mask: Triton's type of the mask ("u8" for a boolean one), None without a mask.
        mask_per_query: False if one row of the mask serves all queries.
    """

    whole_key_tiles: bool = False
    mask: str | None = None
    mask_per_query: bool = False


VARIANTS = {
    "whole": Variant(whole_key_tiles=True),
    "tail": Variant(),
    "padding": Variant(mask="u8"),
    "bias": Variant(mask="fp32", mask_per_query=True),
}


@dataclass(frozen=True)
class CompiledKernel:
    """What one kernel takes on one chip: registers and bytes per thread, bytes of shared memory per program.

    `serialized` is true where the assembler makes asynchronous matrix products wait for each other, which it does when
    it can't tell that nobody touches their results too early: right, but up to twice as slow. `reused_barriers` counts
    barriers whose shared memory holds something else, too: the compiler takes it for free where nobody waits for them,
    and what lay there was lost now and then on an H100 (reports/notes/attention.md).
    """

    label: str
    chip: str
    dtype: str
    variant: str
    registers: int
    spill_bytes: int
    threads: int
    shared_bytes: int
    shared_limit: int
    register_limit: int
    matrix_instruction: str
    serialized: bool = False
    reused_barriers: int = 0

    @property
    def misfits(self) -> list[str]:
        """Why one program can't run on the chip; empty if it can."""
        reasons = []
        if self.reused_barriers:
            reasons.append(f"shared memory of {self.reused_barriers} barriers is used otherwise")
        if self.shared_bytes > self.shared_limit:
            reasons.append(f"shared memory {self.shared_bytes} of {self.shared_limit} B")
        taken = -(-self.registers // 8) * 8 * self.threads  # registers are given out in eights
        if taken > self.register_limit:
            reasons.append(f"registers {taken} of {self.register_limit}")
        return reasons


def compile_launch(
    launch: AttentionLaunch, chip: Chip, *, dtype: str = "float16", variant: str = "whole"
) -> CompiledKernel:
    """Compile one launch for `chip`, aligned inputs, and read what it takes; `variant` is one of `VARIANTS`."""
    if launch.kernel in _PLAIN_KERNELS:
        source = _source(launch, "fp32" if launch.float32 else _TRITON_TYPE[dtype], VARIANTS[variant])
        options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    else:
        source, options = _gluon_source(launch, dtype, VARIANTS[variant])
    return compiled(source, options, chip, launch.label, "float32" if launch.float32 else dtype, variant)


def compiled(source: Any, options: dict[str, Any], chip: Chip, label: str, dtype: str, variant: str) -> CompiledKernel:
    """Compile a source with options for `chip` and read what it takes; the names go into the result."""
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget

    is_amd = chip.capability == AMD
    major, minor = chip.capability
    target = GPUTarget("hip" if is_amd else "cuda", chip.name if is_amd else 10 * major + minor, chip.warp_threads)
    log = io.StringIO()
    with knobs.compilation.scope(), knobs.nvidia.scope(), contextlib.redirect_stdout(log):
        knobs.compilation.always_compile = True  # the assembler's log is not cached
        knobs.nvidia.dump_ptxas_log = True
        kernel = triton.compile(source, target=target, options=options)
    registers, spill_bytes = _amd_usage(kernel.asm["amdgcn"]) if is_amd else _nvidia_usage(log.getvalue())
    assembly = kernel.asm["amdgcn" if is_amd else "ptx"]
    return CompiledKernel(
        label=label,
        chip=chip.name,
        dtype=dtype,
        variant=variant,
        registers=registers,
        spill_bytes=spill_bytes,
        threads=_amd_threads(assembly) if is_amd else _nvidia_threads(assembly),
        shared_bytes=kernel.metadata.shared,
        shared_limit=chip.shared_bytes,
        register_limit=chip.registers,
        matrix_instruction=next((name for name in _MATRIX_INSTRUCTIONS if name in assembly), "fma"),
        serialized="wgmma.mma_async instructions are serialized" in log.getvalue(),
        reused_barriers=0 if is_amd else len(_reused_barriers(assembly)),
    )


def _source(launch: AttentionLaunch, element: str, variant: Variant) -> Any:
    """The launch's kernel with the types of its arguments, as Triton's compiler takes it."""
    from triton.compiler import ASTSource

    from diffopt_kernels import _attention_fwd

    kernel = getattr(_attention_fwd, f"attention_{launch.kernel}_kernel")
    constants: dict[str, Any] = {
        "D": launch.head_dim,
        "PART_0": launch.parts[0],
        "PART_1": launch.parts[1],
        "BLOCK_M": launch.block_m,
        "BLOCK_N": launch.block_n,
        "WHOLE_KEY_TILES": variant.whole_key_tiles,
    }
    if launch.kernel == "pointers":
        constants["UNIT"] = 4 if launch.float32 else 8
        constants |= {"MASK_PER_QUERY": variant.mask_per_query, "MASK_KEYS_ADJACENT": True}
    signature = {name: _argument_type(name, launch, element, variant) for name in kernel.arg_names}
    constants |= {name: None for name, kind in signature.items() if kind == "constexpr" and name not in constants}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind[0] == "*"}
    return ASTSource(kernel, signature, constants, aligned)


def _gluon_source(launch: AttentionLaunch, dtype: str, variant: Variant) -> tuple[Any, dict[str, Any]]:
    """A Gluon kernel with the arguments its host code prepares (attention_gluon.py), and its compile options."""
    import torch

    from diffopt_kernels.attention_gluon import prepared_gluon_attention

    n_k = launch.block_n if variant.whole_key_tiles else launch.block_n - 3
    q, k = (torch.empty(1, n, 1, launch.head_dim, dtype=getattr(torch, dtype), device="meta") for n in (512, n_k))
    return prepared_source(prepared_gluon_attention(q, k, k, 1.0, launch), dtype)


def prepared_source(prepared: PreparedLaunch, dtype: str, float32: Sequence[str] = ()) -> tuple[Any, dict[str, Any]]:
    """A prepared launch, of a Gluon kernel or a plain one, as Triton's compiler takes it, and its compile options.

    Tensors are aligned and of one dtype, but for the arguments named in `float32`.
    """
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    arguments, names = prepared.arguments, prepared.kernel.arg_names
    signature, constants, aligned = {}, {}, {}
    for i, (name, parameter) in enumerate(zip(names, prepared.kernel.params, strict=True)):
        argument = arguments[name]
        specialized = isinstance(argument, int) and not parameter.do_not_specialize
        if parameter.is_constexpr or argument is None or (specialized and argument == 1):
            signature[name], constants[name] = "constexpr", argument
        elif isinstance(argument, Tiles):
            block = ", ".join(str(n) for n in argument.block_shape)
            signature[name] = f"tensordesc<{_TRITON_TYPE[dtype]}[{block}],{argument.layout!r}>"
        elif isinstance(argument, Pointer):
            signature[name] = "*fp32" if name in float32 else f"*{_TRITON_TYPE[dtype]}"
            aligned[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if isinstance(argument, float) else "i32"
            if specialized and argument % 16 == 0:
                aligned[(i,)] = [["tt.divisibility", 16]]
    options = {name: value for name, value in arguments.items() if name not in names}
    source = GluonASTSource if prepared.kernel.is_gluon() else ASTSource
    return source(prepared.kernel, signature, constants, aligned), options


def _argument_type(name: str, launch: AttentionLaunch, element: str, variant: Variant) -> str:
    if (name.isupper() and name != "H") or name.startswith(("PART_", "BLOCK_")):
        return "constexpr"
    if name.endswith("_desc"):
        columns = launch.parts[int(name[1])]
        rows = launch.block_m if name[0] == "q" else launch.block_n
        return f"tensordesc<{element}[1,1,{rows},{columns}]>" if columns else "constexpr"
    if name == "mask_ptr":
        return f"*{variant.mask}" if variant.mask else "constexpr"
    if name.endswith("_ptr"):
        return f"*{element}"
    return "fp32" if name.startswith("scale") else "i32"


def _nvidia_usage(log: str) -> tuple[int, int]:
    """Registers per thread and bytes a thread spills (the more of stored and loaded), as the assembler reports them."""
    registers = re.search(r"Used (\d+) registers", log)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    if registers is None or spills is None:
        raise RuntimeError(f"the assembler reported no registers or no spills: {log[:500]!r}")
    return int(registers[1]), max(int(x) for x in spills.groups())


def _nvidia_threads(assembly: str) -> int:
    """Threads of one program, warps that Gluon adds to the launch's own included."""
    found = re.search(r"\.reqntid (\d+)", assembly)
    if found is None:
        raise RuntimeError("the kernel does not say how many threads it takes")
    return int(found[1])


def _reused_barriers(assembly: str) -> list[int]:
    """Offsets in shared memory of barriers (8 bytes) to or from which PTX also stores or loads plainly.

    Told by constant offsets, as Triton writes them: barriers at a sum with the base, other accesses within brackets. An
    access whose address is all in a register is not seen.
    """
    sums = {m[1]: int(m[2]) for m in re.finditer(r"add\.s32\s+(%r\d+), %r\d+, (\d+);", assembly)}
    barriers = {sums[m[1]] for m in re.finditer(r"mbarrier\.init\S* \[(%r\d+)\]", assembly) if m[1] in sums}
    if "mbarrier.init" in assembly and not barriers:
        raise RuntimeError("the barriers' places in shared memory can't be read off the assembly")
    plain = []
    for m in re.finditer(r"(?:st|ld)\.shared(?:\.v(\d))?\.\w(\d+)\s[^\[;]*\[[^\]\[;]*\+(\d+)\]", assembly):
        plain.append((int(m[3]), int(m[3]) + int(m[1] or 1) * int(m[2]) // 8))
    return sorted(at for at in barriers if any(first < at + 8 and at < end for first, end in plain))


def _amd_threads(assembly: str) -> int:
    found = re.search(r"\.max_flat_workgroup_size: *(\d+)", assembly)
    if found is None:
        raise RuntimeError("the kernel does not say how many threads it takes")
    return int(found[1])


def _amd_usage(assembly: str) -> tuple[int, int]:
    """Registers per thread and bytes a thread spills, from the metadata of the code object (spills count registers)."""
    found = {key: int(value) for key, value in re.findall(r"\.([vs]gpr_(?:spill_)?count):\s*(\d+)", assembly)}
    return found["vgpr_count"], 4 * (found["vgpr_spill_count"] + found["sgpr_spill_count"])


def _jobs(arguments: argparse.Namespace) -> list[tuple[AttentionLaunch, str, str]]:
    return [
        (launch, chip, variant)
        for chip in arguments.chip
        for launch in _launches(CHIPS[chip], arguments.candidates)
        for variant in arguments.variant
        if any(text in launch.label for text in arguments.match)
        and (launch.kernel == "pointers" or VARIANTS[variant].mask is None)
    ]


def _launches(chip: Chip, candidates: bool) -> list[AttentionLaunch]:
    """What can be selected on a chip; with `candidates`, the Gluon launches that tuning may find for it."""
    if not candidates:
        return attention_launches(chip.capability)
    from diffopt_kernels.candidates import attention_candidates

    return [x for x in attention_candidates() if x.kernel not in _PLAIN_KERNELS and chip.capability[0] == 9]


def _compile_job(job: tuple[AttentionLaunch, str, str], dtype: str) -> CompiledKernel:
    launch, chip, variant = job
    return compile_launch(launch, CHIPS[chip], dtype=dtype, variant=variant)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 if every kernel fits its chip, else 1."""
    parser = argparse.ArgumentParser(prog="python -m diffopt_kernels.cross_compile", description=__doc__)
    parser.add_argument("--chip", nargs="+", default=list(CHIPS), choices=CHIPS)
    parser.add_argument("--variant", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16"), help="for 16-bit launches")
    parser.add_argument("--match", nargs="+", default=[""], help="only launches whose label contains one of these")
    parser.add_argument("--candidates", action="store_true", help="the Gluon launches that tuning tries, on sm_90")
    parser.add_argument("--workers", type=int, default=min(12, os.cpu_count() or 1), help="processes at once")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there")
    arguments = parser.parse_args(argv)
    rows = []
    with ProcessPoolExecutor(arguments.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for row in pool.map(_compile_job, _jobs(arguments), repeat(arguments.dtype)):
            rows.append(row)
            print(_line(row), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    misfits = [row for row in rows if row.misfits]
    print(f"{len(rows)} kernels compiled, {len(misfits)} do not fit, {sum(row.spill_bytes > 0 for row in rows)} spill")
    return int(bool(misfits))


def _line(row: CompiledKernel) -> str:
    return (
        f"{row.chip:<7} {row.label:<38} {row.variant:<8} {row.matrix_instruction:<15} registers {row.registers:>3} x "
        f"{row.threads:<3} spilled {row.spill_bytes:>4} B  shared {row.shared_bytes:>6} of {row.shared_limit} B"
        + ("  SERIALIZED" if row.serialized else "")
        + "".join(f"  DOES NOT FIT: {reason}" for reason in row.misfits)
    )


if __name__ == "__main__":
    sys.exit(main())
