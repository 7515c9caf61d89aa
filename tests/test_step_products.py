"""Products of Hopper GPUs: exact there; everywhere which launches are chosen, that they compile, what they refuse."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from diffopt_kernels.cross_compile import CompiledKernel
from diffopt_kernels.launcher import PreparedLaunch
from diffopt_kernels.step import convolution, geglu_product
from diffopt_kernels.step.check import PRODUCT_CASES, StepCase, check_case
from diffopt_kernels.step.products import (
    SAME,
    STRIDED,
    UPSAMPLED,
    Form,
    ProductLaunch,
    box_of,
    boxes_of,
    convolution_launch,
    geglu_launch,
    has_products,
    prepared_addition,
)

DTYPES = [torch.float16, torch.bfloat16]
H100 = 132
"""Multiprocessors of an H100 and an H200."""


@pytest.fixture(name="hopper")
def _hopper() -> torch.device:
    device = torch.device("cuda")
    if not has_products(device):
        pytest.skip("needs a Hopper GPU")
    return device


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", PRODUCT_CASES, ids=lambda case: f"{case.op}: {case.why}")
def test_cases_are_exact(case: StepCase, dtype: torch.dtype, hopper: torch.device) -> None:
    for result in check_case(case, dtype, hopper):
        assert result.right, result


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case", [x for x in PRODUCT_CASES if "odd" in x.why], ids=lambda case: f"{case.op}: {case.why}"
)
def test_a_planted_fault_is_found(case: StepCase, hopper: torch.device) -> None:
    assert not all(result.right for result in check_case(case, torch.float16, hopper, fault=1.01))


@pytest.mark.gpu
def test_the_same_bits_each_time_and_in_a_graph(hopper: torch.device) -> None:
    with torch.no_grad():
        x = torch.randn(2, 1280, 8, 8, device=hopper, dtype=torch.float16).to(memory_format=torch.channels_last)
        weight = torch.randn(1280, 1280, 3, 3, device=hopper, dtype=torch.float16).to(memory_format=torch.channels_last)
        bias = torch.randn(1280, device=hopper, dtype=torch.float16)
        expected = convolution(x, weight, bias, x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = convolution(x, weight, bias, x)
        for _ in range(20):
            out.fill_(torch.nan)
            graph.replay()
            assert torch.equal(out, expected)


# --- launches -------------------------------------------------------------------------------------------------------


def launch_of(case: StepCase, multiprocessors: int) -> tuple[ProductLaunch, tuple[int, int]]:
    """What runs a case, and its boxes."""
    if case.op == "geglu_product":
        rows = torch.Size(case.shape[:-1]).numel()
        return geglu_launch(rows, case.shape[-1], case.columns, multiprocessors), (1, 64)
    batch, channels, *size = case.shape
    form = form_of(case)
    grid = form.grid(*size)
    boxes, steps = form.corners * boxes_of(batch, *grid), form.neighbours * channels // 64
    return convolution_launch(boxes, case.columns, steps, multiprocessors), box_of(*grid)


def form_of(case: StepCase) -> Form:
    if case.op == "upsampled_convolution":
        return UPSAMPLED
    return SAME if case.stride == 1 else STRIDED


@given(
    boxes=st.integers(1, 70000),
    columns=st.sampled_from((64, 80, 128, 192, 256, 320, 512, 640, 1280)),
    steps=st.integers(1, 60).map(lambda n: 9 * n),
    multiprocessors=st.sampled_from((78, 114, H100)),
)
@example(boxes=1, columns=64, steps=252, multiprocessors=H100)  # 19 shares of 14 steps would leave one without any
def test_launches_cover_the_output_and_fit(boxes: int, columns: int, steps: int, multiprocessors: int) -> None:
    launch = convolution_launch(boxes, columns, steps, multiprocessors)
    assert columns % launch.columns == 0
    per_share = -(-steps // launch.shares)
    assert per_share * (launch.shares - 1) < steps <= per_share * launch.shares, "a share without steps"
    assert 2 <= launch.stages <= 7
    tiles = -(-boxes // 2) * (columns // launch.columns)
    assert launch.shares == 1 or tiles * launch.shares <= 2 * multiprocessors * launch.programs, "sums without end"


@given(
    rows=st.integers(1, 10**6),
    channels=st.sampled_from((8, 320, 640, 1280)),
    columns=st.integers(1, 100).map(lambda n: 64 * n),
)
def test_geglu_launches_fit(rows: int, channels: int, columns: int) -> None:
    launch = geglu_launch(rows, channels, columns, H100)
    assert launch.gated
    assert columns % launch.columns == 0
    assert launch.stages >= 3


def test_geglu_tiles_are_those_that_were_fastest_on_an_h100() -> None:
    """Rows, channels and columns of SDXL's and SD1.5's layers (reports/step-checks-h100.txt)."""
    wide, narrow, alone = ((128, 128), 1), ((64, 64), 2), ((64, 64), 1)
    fastest = {
        (2048, 1280, 5120): wide,
        (8192, 640, 2560): wide,
        (1152, 1280, 5120): wide,
        (8192, 320, 1280): narrow,
        (18432, 320, 1280): narrow,
        (2048, 640, 2560): alone,
        (512, 1280, 5120): alone,
    }
    assert {size: ((x := geglu_launch(*size, H100)).parts, x.programs) for size in fastest} == fastest


@pytest.mark.parametrize(("programs", "registers"), [(1, (168, 240)), (2, (80, 104))])
def test_registers_are_those_that_were_measured(programs: int, registers: tuple[int, int]) -> None:
    """At launch, and of a warpgroup once the loader has given up its own; attention's are in test_attention_support."""
    assert ProductLaunch((64, 64), programs).registers == registers


def test_boxes_cover_every_picture() -> None:
    assert boxes_of(2, 64, 64) == 128
    assert boxes_of(3, 7, 9) == 3 * 2  # of 8×8


@given(height=st.integers(1, 300), width=st.integers(1, 300))
def test_boxes_are_64_pixels(height: int, width: int) -> None:
    high, wide = box_of(height, width)
    assert high * wide == 64


Selected = tuple[Form | None, tuple[int, int], int, bool]
"""Form of a convolution or None for GEGLU, parts, programs, and whether there are shares."""


def selectable(multiprocessors: int) -> set[Selected]:
    """Whatever Stable Diffusion's shapes select."""
    found = set()
    for boxes in (1, 2, 4, 8, 18, 32, 64, 128, 288, 512, 4096):
        for columns in (64, 80, 128, 256, 320, 512, 640, 1280):
            for channels in (64, 128, 320, 640, 960, 1280, 1920, 2560):
                for form in (SAME, STRIDED, UPSAMPLED) if channels == columns else (SAME,):  # as blocks change sizes
                    steps = form.neighbours * channels // 64
                    launch = convolution_launch(boxes * form.corners, columns, steps, multiprocessors)
                    found.add((form, launch.parts, launch.programs, launch.shares > 1))
    for rows in (64, 512, 2048, 8192, 18432):
        for channels in (320, 640, 1280):
            launch = geglu_launch(rows, channels, 4 * channels, multiprocessors)
            found.add((None, launch.parts, launch.programs, False))
    return found


@pytest.mark.parametrize("multiprocessors", [16, 32, 60, 64, 78, 114, H100])
def test_the_check_runs_every_launch_and_every_form_of_box(multiprocessors: int) -> None:
    """On parts of an H100 (MIG), an H20, an H100 PCIe, and an H100 or H200."""
    launches = [
        (None if case.op == "geglu_product" else form_of(case), *launch_of(case, multiprocessors))
        for case in PRODUCT_CASES
    ]
    checked = {(form, x.parts, x.programs, x.shares > 1) for form, x, _ in launches}
    assert selectable(multiprocessors) <= checked
    for form in (SAME, STRIDED, UPSAMPLED):
        assert {box for other, _, box in launches if other == form} == {(1, 64), (2, 32), (4, 16), (8, 8)}


COMPILE = """
import dataclasses, json
import torch
from diffopt_kernels.chips import CHIPS
from diffopt_kernels.cross_compile import compiled, prepared_source
from diffopt_kernels.step.products import STRIDED, UPSAMPLED, ProductLaunch
from diffopt_kernels.step.products import prepared_convolution, prepared_geglu_product

HALF, NOWHERE = torch.float16, torch.device("meta")

def row(launch, prepared):
    source = prepared_source(prepared, "float16", ("sums_ptr",) if launch.shares > 1 else ())
    return dataclasses.asdict(compiled(*source, CHIPS["sm_90"], launch.label, "float16", ""))

wide, shares = ProductLaunch((128, 128)), ProductLaunch((128, 32), shares=4)
gated, wide_gated = ProductLaunch((64, 64), 2, gated=True), ProductLaunch((128, 128), gated=True)
print(json.dumps([
    row(wide, prepared_convolution((2, 12, 12, 1280), 1280, wide, HALF, NOWHERE, residual=True)),
    row(shares, prepared_convolution((2, 16, 16, 1280), 1280, shares, HALF, NOWHERE)),
    row(wide, prepared_convolution((2, 12, 12, 1280), 1280, wide, HALF, NOWHERE, form=UPSAMPLED)),
    row(shares, prepared_convolution((2, 16, 16, 1280), 1280, shares, HALF, NOWHERE, form=UPSAMPLED)),
    row(shares, prepared_convolution((2, 16, 16, 1280), 1280, shares, HALF, NOWHERE, form=STRIDED)),
    row(gated, prepared_geglu_product(8192, 320, 1280, gated, HALF, NOWHERE)),
    row(wide_gated, prepared_geglu_product(2048, 1280, 5120, wide_gated, HALF, NOWHERE)),
]))
"""


@pytest.mark.slow
def test_they_compile_within_the_limits_of_an_h100(tmp_path: Path) -> None:
    """The widest launches, one with shares and GEGLU's, in a process without the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    rows = [CompiledKernel(**row) for row in json.loads(done.stdout.splitlines()[-1])]
    assert len(rows) == 7
    for row in rows:
        programs = 2 if " p2" in row.label else 1
        assert row.matrix_instruction == "wgmma.mma_async"
        assert not row.spill_bytes, row
        assert not row.serialized, row
        assert programs * (row.shared_bytes + 1024) <= 228 << 10, row
        assert programs * row.registers * row.threads <= row.register_limit, row


@pytest.mark.parametrize("wide", [False, True], ids=["", "64-bit offsets"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize(("count", "columns", "shares"), [(7, 80, 3), (13, 64, 2), (1, 1280, 5), (37, 192, 9)])
def test_shares_are_added_up(
    count: int, columns: int, shares: int, residual: bool, wide: bool, kernel_device: torch.device
) -> None:
    """A plain kernel, which runs everywhere; no count is a multiple of a tile's rows."""
    sums = torch.randn(shares, count, columns, device=kernel_device)
    bias, added, out = (torch.randn(n, columns, device=kernel_device).half() for n in (1, count, count))
    prepared = prepared_addition(count, columns, shares, residual, kernel_device)
    assert not prepared.arguments["WIDE"]
    arguments = {**prepared.arguments, "WIDE": wide}
    rows, wide_tile = prepared.arguments["ROWS"], prepared.arguments["COLS"]
    grid = columns // wide_tile * -(-count // rows)
    PreparedLaunch(prepared.kernel, (grid,), arguments, device=kernel_device)(sums, bias, out, added)
    expected = sums.double().sum(0) + bias + (added if residual else 0)
    assert (out - expected).abs().max() <= 2**-11 * expected.abs().max()


@pytest.mark.parametrize(
    ("count", "columns", "shares", "block", "wide"),
    [(128, 1280, 7, 512, False), (2048, 640, 2, 1024, False), (10**6, 640, 4, 1024, True)],
)
def test_offsets_take_64_bits_where_they_must(count: int, columns: int, shares: int, block: int, wide: bool) -> None:
    arguments = prepared_addition(count, columns, shares, True, torch.device("meta")).arguments
    assert (arguments["ROWS"] * arguments["COLS"], arguments["WIDE"]) == (block, wide)


# --- refusals -------------------------------------------------------------------------------------------------------


def image(*shape: int, **options) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float16, **options).to(memory_format=torch.channels_last)


NARROW = image(2, 32, 8, 8)
EMPTY = image(2, 0, 8, 8), image(64, 0, 3, 3)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x, w, b: convolution(x.contiguous(), w, b), "x has strides .* allowed: channels-last memory"),
        (lambda x, w, b: convolution(x, w.contiguous(), b), "weight has strides .* allowed: channels-last memory"),
        (lambda x, w, b: convolution(x, w[:, :, :1, :1].contiguous(), b), r"weight.shape is \[64, 64, 1, 1\]; allowed"),
        (lambda x, w, b: convolution(NARROW, w, b), r"x.shape\[1\] is 32; allowed: multiples of 64"),
        (lambda x, w, b: convolution(*EMPTY, b), r"x.shape\[1\] is 0; allowed: multiples of 64 but 0"),
        (lambda x, w, b: convolution(x, w[:0], b[:0]), r"weight.shape\[0\] is 0; allowed: multiples of 64 or 80 but 0"),
        (lambda x, w, b: convolution(x, w[:60], b[:60]), r"weight.shape\[0\] is 60; allowed: multiples of 64 or 80"),
        (lambda x, w, b: convolution(x, w, b[:5]), r"bias.shape is \[5\]; allowed: \[64\]"),
        (lambda x, w, b: convolution(x, w, b.float()), "bias.dtype is torch.float32; allowed: torch.float16"),
        (lambda x, w, b: convolution(x, w.float(), b), "weight.dtype is torch.float32; allowed: torch.float16"),
        (lambda x, w, b: convolution(x.float(), w.float(), b.float()), "x.dtype is torch.float32; allowed"),
        (lambda x, w, b: convolution(x, w, b, x[:1]), r"residual.shape is \[1, 64, 8, 8\]; allowed"),
        (lambda x, w, b: geglu_product(b[None].float(), b.expand(128, 64).float(), b.float()), "x.dtype is torch.fl"),
        (lambda x, w, b: geglu_product(b.expand(4, 64), w[:, :, 0, 0].contiguous(), b), "x has strides"),
        (lambda x, w, b: geglu_product(b[None, :60], b.expand(128, 64).contiguous(), b), r"x.shape\[-1\] is 60"),
        (lambda x, w, b: geglu_product(b[None], b.expand(64, 64).contiguous(), b), r"weight.shape\[0\] is 64; allowed"),
        (lambda x, w, b: geglu_product(b[None, :0], b.new_empty(128, 0), b), r"weight.shape\[1\] 0; allowed: .* but 0"),
        (lambda x, w, b: geglu_product(b[None], b.new_empty(0, 64), b[:0]), r"weight.shape\[0\] is 0; allowed"),
    ],
)
def test_what_cannot_be_is_refused_in_words(call, words: str) -> None:
    x, weight, bias = image(2, 64, 8, 8), image(64, 64, 3, 3), torch.randn(64, dtype=torch.float16)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), pytest.raises(ValueError, match=words):
        call(x, weight, bias)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
def test_a_cpu_is_refused_in_words() -> None:
    x, bias = image(2, 64, 8, 8), torch.randn(64, dtype=torch.float16)
    for _ in range(2):
        with torch.no_grad(), pytest.raises(ValueError, match=r"can't be interpreted|allowed: a CUDA device"):
            convolution(x, image(64, 64, 3, 3), bias)


def test_gradients_are_refused() -> None:
    x = image(2, 64, 8, 8, requires_grad=True)
    with pytest.raises(ValueError, match=r"x\.requires_grad is True"):
        convolution(x, image(64, 64, 3, 3), torch.randn(64, dtype=torch.float16))


def test_fakes_have_the_shapes_and_layouts_of_the_outputs() -> None:
    with FakeTensorMode(), torch.no_grad():
        x, weight = image(2, 64, 6, 5), image(128, 64, 3, 3)
        out = convolution(x, weight, torch.empty(128, dtype=torch.float16))
        assert out.shape == (2, 128, 6, 5)
        assert out.is_contiguous(memory_format=torch.channels_last)
        rows = torch.empty(2, 9, 64, dtype=torch.float16)
        wide = torch.empty(256, 64, dtype=torch.float16)
        assert geglu_product(rows, wide, torch.empty(256, dtype=torch.float16)).shape == (2, 9, 128)
