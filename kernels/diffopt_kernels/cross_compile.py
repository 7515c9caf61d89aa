"""Compile launches for GPUs that are not here: `python -m diffopt_kernels.cross_compile --capability 90`.

Prints, and with --json writes, registers, spills and shared memory of each kernel beside the chip's limit. Needs
triton but no GPU, and must run without TRITON_INTERPRET: an interpreted function can't be compiled.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from diffopt_kernels.launch import AttentionLaunch, attention_launches

# Shared memory one program may use, in bytes (CUDA C++ programming guide, table "Technical specifications").
SHARED_MEMORY_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
_TRITON_TYPE = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}


@dataclass(frozen=True)
class CompiledKernel:
    """What one kernel takes on one chip: registers per thread, bytes of local memory and of shared memory."""

    label: str
    capability: int
    dtype: str
    registers: int
    local_bytes: int
    shared_bytes: int
    shared_limit: int
    matrix_instruction: str


def compile_launch(
    launch: AttentionLaunch, capability: int, *, dtype: str = "float16", whole_key_tiles: bool = True
) -> CompiledKernel:
    """Compile one launch for `capability` (90 means 9.0), aligned inputs, and read what it takes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from diffopt_kernels import _attention_fwd

    kernel = getattr(_attention_fwd, f"attention_{launch.kernel}_kernel")
    element = "fp32" if launch.float32 else _TRITON_TYPE[dtype]
    constants = {
        "D": launch.head_dim,
        "PART_0": launch.parts[0],
        "PART_1": launch.parts[1],
        "BLOCK_M": launch.block_m,
        "BLOCK_N": launch.block_n,
        "WHOLE_KEY_TILES": whole_key_tiles,
    }
    if launch.kernel == "pointers":
        constants["UNIT"] = 4 if launch.float32 else 8
    signature = {name: _argument_type(name, launch, element) for name in kernel.arg_names}
    constants |= {name: None for name, kind in signature.items() if kind == "constexpr" and name not in constants}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name.endswith("_ptr")}
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": launch.num_warps, "num_stages": launch.num_stages},
    )
    registers, local_bytes = _resource_usage(compiled.asm["cubin"])
    return CompiledKernel(
        label=launch.label,
        capability=capability,
        dtype="float32" if launch.float32 else dtype,
        registers=registers,
        local_bytes=local_bytes,
        shared_bytes=compiled.metadata.shared,
        shared_limit=SHARED_MEMORY_LIMIT[capability],
        matrix_instruction=_matrix_instruction(compiled.asm["ptx"]),
    )


def _argument_type(name: str, launch: AttentionLaunch, element: str) -> str:
    if (name.isupper() and name != "H") or name.startswith(("PART_", "BLOCK_")):
        return "constexpr"
    if name.endswith("_desc"):
        columns = launch.parts[int(name[1])]
        rows = launch.block_m if name[0] == "q" else launch.block_n
        return f"tensordesc<{element}[1,1,{rows},{columns}]>" if columns else "constexpr"
    if name.endswith("_ptr"):
        return f"*{element}"
    return "fp32" if name == "scale_log2" else "i32"


def _matrix_instruction(ptx: str) -> str:
    found = [name for name in ("tcgen05.mma", "wgmma.mma_async", "mma.sync") if name in ptx]
    return found[0] if found else "fma"


def _resource_usage(cubin: bytes) -> tuple[int, int]:
    """Registers per thread and bytes of local memory (stack and spills), as cuobjdump reads them."""
    from triton.backends import nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m diffopt_kernels.cross_compile", description=__doc__)
    parser.add_argument("--capability", type=int, nargs="+", default=[80, 86, 89, 90], choices=SHARED_MEMORY_LIMIT)
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16"))
    parser.add_argument("--match", nargs="+", default=[""], help="only launches whose label contains one of these")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    jobs = [
        (launch, capability)
        for capability in arguments.capability
        for launch in attention_launches()
        if any(text in launch.label for text in arguments.match)
        and launch in attention_launches((capability // 10, capability % 10))
    ]
    rows = [compile_launch(launch, capability, dtype=arguments.dtype) for launch, capability in jobs]
    for row in rows:
        print(
            f"sm_{row.capability} {row.label:<44} {row.matrix_instruction:<16} registers {row.registers:>3}  "
            f"local {row.local_bytes:>4} B  shared {row.shared_bytes:>6} of {row.shared_limit} B"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    return int(any(row.shared_bytes > row.shared_limit for row in rows))


if __name__ == "__main__":
    sys.exit(main())
