"""Kernels compile for GPUs that are not here, with matrix instructions and within the chip's shared memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from diffopt_kernels import attention_launches
from diffopt_kernels.cross_compile import SHARED_MEMORY_LIMIT


def one_of_each_variant() -> dict[str, str]:
    """Loads, number of parts and dtype class to the label of the widest launch of that kind."""
    variants: dict[str, str] = {}
    for launch in sorted(attention_launches(), key=lambda x: x.block_m * x.block_n * x.head_dim):
        variants[f"{launch.loads} {1 + bool(launch.parts[1])} {launch.float32}"] = launch.label
    return variants


def compile_for(capability: int, match: str, folder: Path) -> list[dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    record = folder / f"{capability}.json"
    command = [sys.executable, "-m", "diffopt_kernels.cross_compile", "--capability", str(capability)]
    done = subprocess.run(
        [*command, "--match", match, "--json", str(record)],
        env=environment | {"TRITON_CACHE_DIR": str(folder / "cache")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(record.read_text())


EXPECTED_INSTRUCTION = {80: "mma.sync", 86: "mma.sync", 89: "mma.sync", 90: "wgmma", 100: "tcgen05", 120: "mma.sync"}


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_MEMORY_LIMIT)
def test_compiles_within_the_limits(capability: int, tmp_path: Path) -> None:
    compiled = 0
    for variant, label in one_of_each_variant().items():
        if variant.startswith("descriptors") and capability != 90:
            continue
        for row in compile_for(capability, label, tmp_path):
            compiled += 1
            assert row["shared_bytes"] <= row["shared_limit"], row
            instruction = "fma" if row["dtype"] == "float32" else EXPECTED_INSTRUCTION[capability]
            assert row["matrix_instruction"].startswith(instruction), row
            assert 0 < row["registers"] <= 255
            if row["dtype"] != "float32":
                assert row["local_bytes"] == 0, f"spills: {row}"
    assert compiled >= 2
