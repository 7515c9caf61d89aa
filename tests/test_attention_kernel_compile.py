"""Kernels compile for GPUs that are not here, with matrix instructions and within each chip's limits."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffopt.config import config_folder
from diffopt.gpus import read_gpu
from diffopt_kernels import AttentionLaunch, attention_launches, support
from diffopt_kernels.chips import AMD, CHIPS
from diffopt_kernels.cross_compile import VARIANTS, CompiledKernel, _nvidia_usage, _reused_barriers

MATRIX_INSTRUCTION = {
    **dict.fromkeys(("sm_80", "sm_86", "sm_89", "sm_120"), "mma.sync"),
    "sm_90": "wgmma.mma_async",
    "sm_100": "tcgen05.mma",
    "gfx942": "v_mfma",
}
CHECKED_VARIANTS = ("tail", "bias")  # the two that take most


def representatives() -> list[AttentionLaunch]:
    """The widest and the narrowest launch through pointers, the widest in float32 and through descriptors."""
    by_width = sorted(attention_launches(), key=lambda x: (sum(x.parts), x.head_dim, x.block_m * x.block_n))
    pointers = [x for x in by_width if x.kernel == "pointers"]
    kinds = [
        [x for x in pointers if not x.float32],
        [x for x in pointers if x.float32],
        [x for x in by_width if x.kernel == "descriptors" and not x.parts[1]],
        [x for x in by_width if x.kernel == "descriptors" and x.parts[1]],
    ]
    return [kinds[0][0], *(kind[-1] for kind in kinds)]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[CompiledKernel]:
    """What each representative takes on each chip; processes without the interpreter and with an empty cache."""
    folder = tmp_path_factory.mktemp("cross_compile")
    command = [sys.executable, "-m", "diffopt_kernels.cross_compile", "--json", str(folder / "table.json")]
    command += ["--workers", "2", "--variant", *CHECKED_VARIANTS]
    command += ["--match", *(launch.label for launch in representatives())]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return [CompiledKernel(**row) for row in json.loads((folder / "table.json").read_text())]


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
def test_compiles_within_the_limits(chip: str, compiled: list[CompiledKernel]) -> None:
    rows = [row for row in compiled if row.chip == chip]
    selectable = {launch.label for launch in attention_launches(CHIPS[chip].capability)}
    wanted = {launch.label for launch in representatives()} & selectable
    assert len(wanted) >= 3
    assert wanted == {row.label for row in rows}
    assert {row.variant for row in rows} == set(CHECKED_VARIANTS)
    for row in rows:
        assert not row.misfits
        assert 0 < row.registers <= CHIPS[chip].registers_per_thread
        assert row.shared_bytes > 0
        if row.dtype == "float32":
            assert row.matrix_instruction == ("v_mfma" if chip == "gfx942" else "fma"), "float32 means IEEE products"
        else:
            assert row.matrix_instruction == MATRIX_INSTRUCTION[chip], row
            assert row.spill_bytes == 0, row


@pytest.mark.slow
def test_gluon_launches_of_the_tables_fit_and_use_no_barriers_memory_otherwise(tmp_path: Path) -> None:
    """All that ship, for long and for short keys; the figures are those of the Triton that is installed here."""
    tables = [read_gpu(path).attention for path in (config_folder() / "gpus").glob("*.toml")]
    launches = {row.launch for table in tables if table for row in table.shapes if row.launch}
    labels = sorted(launch.label for launch in launches)
    assert {launch.kernel for launch in launches} == {"hopper", "short"}
    assert len(labels) > 20
    command = [sys.executable, "-m", "diffopt_kernels.cross_compile", "--json", str(tmp_path / "table.json")]
    command += ["--chip", "sm_90", "--candidates", "--workers", "2", "--variant", "whole", "--match", *labels]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [CompiledKernel(**row) for row in json.loads((tmp_path / "table.json").read_text())]
    assert set(labels) <= {row.label for row in rows}
    for row in rows:
        assert not row.misfits, row
        assert (row.matrix_instruction, row.spill_bytes, row.reused_barriers) == ("wgmma.mma_async", 0, 0), row


class TestFigures:
    fits = CompiledKernel(
        label="d40",
        chip="sm_86",
        dtype="float16",
        variant="tail",
        registers=248,
        spill_bytes=0,
        threads=256,
        shared_bytes=99 << 10,
        shared_limit=CHIPS["sm_86"].shared_bytes,
        register_limit=CHIPS["sm_86"].registers,
        matrix_instruction="mma.sync",
    )

    def test_limits_are_met_to_the_last_byte_and_register(self) -> None:
        assert self.fits.misfits == []
        wide = dataclasses.replace(self.fits, threads=512)
        assert wide.misfits == ["registers 126976 of 65536"]
        assert dataclasses.replace(self.fits, registers=121, threads=512).misfits == []
        assert dataclasses.replace(self.fits, registers=129, threads=512).misfits == ["registers 69632 of 65536"]
        over = dataclasses.replace(self.fits, shared_bytes=(99 << 10) + 1)
        assert over.misfits == ["shared memory 101377 of 101376 B"]

    def test_spills_are_told_from_stack(self) -> None:
        log = (
            "ptxas info    : Function properties for attention_pointers_kernel\n"
            "    64 bytes stack frame, 24 bytes spill stores, 36 bytes spill loads\n"
            "ptxas info    : Used 168 registers, used 1 barriers, 64 bytes cumulative stack size\n"
        )
        assert _nvidia_usage(log) == (168, 36)

    def test_an_assembler_that_says_nothing_is_an_error(self) -> None:
        with pytest.raises(RuntimeError, match="reported no registers"):
            _nvidia_usage("")

    def test_a_store_to_a_barriers_memory_is_told(self) -> None:
        assembly = """
            add.s32 %r886, %r901, 81920;
            @%p74 mbarrier.init.shared::cta.b64 [%r886], 1;
            add.s32 %r887, %r901, 81928;
            @%p74 mbarrier.init.shared::cta.b64 [%r887], 2;
            st.shared.v4.b32 [global_smem+81936], {%r1, %r2, %r3, %r4};
            @%p10 st.shared.b32 [ %r437 + 0 ], %r438;
        """
        assert _reused_barriers(assembly) == []
        assert _reused_barriers(assembly + "ld.shared.b32 \t%r1235, [global_smem+81932];") == [81928]
        assert _reused_barriers(assembly + "st.shared.v2.b16 \t[%r1214+81920], {%rs4, 0};") == [81920]
        assert _reused_barriers(assembly + "st.shared.v4.b32 \t[global_smem+81920], {%r1};") == [81920, 81928]
        assert _reused_barriers(assembly + "ld.shared.v2.b32 \t{%r1, %r2}, [%r3+81912];") == []
        with pytest.raises(RuntimeError, match="can't be read off"):
            _reused_barriers("mbarrier.init.shared::cta.b64 [%rd1], 1;")
        assert dataclasses.replace(self.fits, reused_barriers=1).misfits == [
            "shared memory of 1 barriers is used otherwise"
        ]

    def test_every_variant_differs(self) -> None:
        assert len(set(VARIANTS.values())) == len(VARIANTS)


class TestAMD:
    """AMD GPUs report capabilities like 9.4, which must not pass for Hopper's; the self-check decides about them."""

    @pytest.fixture(autouse=True)
    def amd_build(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(torch.version, "hip", "6.4.0")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 4))
        support._device_reasons.cache_clear()
        yield
        support._device_reasons.cache_clear()

    def test_an_amd_build_is_not_refused(self) -> None:
        assert support.device_reasons("cuda") == []

    def test_its_capability_selects_pointer_loads_alone(self) -> None:
        capability = support.compute_capability("cuda")
        assert capability == AMD
        assert {launch.kernel for launch in attention_launches(capability)} == {"pointers"}

    def test_its_launches_are_those_compiled_for_amd(self) -> None:
        assert attention_launches(CHIPS["gfx942"].capability) == attention_launches(support.compute_capability("cuda"))
