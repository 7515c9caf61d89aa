"""Kernels compile for GPUs that are not here, with matrix instructions and within the chip's shared memory."""

import json
import os
import subprocess
import sys

import pytest

from diffopt_kernels import AttentionLaunch, attention_launches
from diffopt_kernels.cross_compile import SHARED_MEMORY_LIMIT

MATRIX_INSTRUCTION = {80: "mma.sync", 86: "mma.sync", 89: "mma.sync", 90: "wgmma", 100: "tcgen05", 120: "mma.sync"}


def widest_of_each_variant() -> dict[str, AttentionLaunch]:
    """The widest launch of each way to load, number of parts and dtype class."""
    variants: dict[str, AttentionLaunch] = {}
    for launch in sorted(attention_launches(), key=lambda x: x.block_m * x.block_n * x.head_dim):
        variants[f"{launch.kernel} in {1 + bool(launch.parts[1])}, float32 {launch.float32}"] = launch
    return variants


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each variant takes on each chip; one process without the interpreter and with an empty cache."""
    folder = tmp_path_factory.mktemp("cross_compile")
    command = [sys.executable, "-m", "diffopt_kernels.cross_compile", "--json", str(folder / "record.json")]
    command += ["--capability", *map(str, SHARED_MEMORY_LIMIT)]
    command += ["--match", *(launch.label for launch in widest_of_each_variant().values())]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "record.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_MEMORY_LIMIT)
def test_compiles_within_the_limits(capability: int, compiled: list[dict]) -> None:
    rows = [row for row in compiled if row["capability"] == capability]
    selectable = attention_launches((capability // 10, capability % 10))
    wanted = {launch.label for launch in widest_of_each_variant().values() if launch in selectable}
    assert len(wanted) >= 2
    assert wanted <= {row["label"] for row in rows}
    for row in rows:
        assert row["shared_bytes"] <= row["shared_limit"], row
        assert 0 < row["registers"] <= 255
        if row["dtype"] == "float32":
            assert row["matrix_instruction"] == "fma", "float32 means IEEE products"
        else:
            assert row["matrix_instruction"].startswith(MATRIX_INSTRUCTION[capability]), row
            assert row["local_bytes"] == 0, f"spills: {row}"
