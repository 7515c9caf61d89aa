"""Norms, activations, sums and thin convolutions against float64, interpreted on a CPU and compiled on a GPU."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from diffopt_kernels.cross_compile import CompiledKernel
from diffopt_kernels.step import (
    add_layer_norm,
    bias_add,
    geglu,
    group_norm,
    group_norm_joined,
    layer_norm,
    thin_convolution,
    upsample,
)
from diffopt_kernels.step.check import AWKWARD_CASES, MODEL_CASES, OPS, StepCase, check_case
from diffopt_kernels.step.group_norm import group_norm_launch
from diffopt_kernels.step.layer_norm import MAX_COLUMNS, LayerNormLaunch, layer_norm_launch
from diffopt_kernels.step.reference import convolution_reference
from diffopt_kernels.step.thin_convolution import (
    ThinLaunch,
    prepared_thin_convolution,
    thin_convolution_launch,
    thin_convolution_reasons,
)

# The interpreter computes bfloat16 wrongly, so it is tested compiled only.
DTYPES = [torch.float16, torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


def channels_last(*shape: int, **options) -> torch.Tensor:
    return torch.randn(*shape, **options).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", AWKWARD_CASES, ids=lambda case: f"{case.op}: {case.why}")
def test_awkward_cases_are_exact(case: StepCase, dtype: torch.dtype, kernel_device: torch.device) -> None:
    for result in check_case(case, dtype, kernel_device):
        assert result.right, result


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", MODEL_CASES, ids=lambda case: f"{case.op}: {case.why}")
def test_model_cases_are_exact(case: StepCase, dtype: torch.dtype, kernel_device: torch.device) -> None:
    for result in check_case(case, dtype, kernel_device):
        assert result.right, result


@pytest.mark.parametrize("op", OPS)
def test_a_planted_fault_is_found(op: str, kernel_device: torch.device) -> None:
    case = next(case for case in AWKWARD_CASES if case.op == op and not case.offset and case.shape[-1] > 1)
    assert not all(result.right for result in check_case(case, torch.float32, kernel_device, fault=1.01))


def test_layouts(kernel_device: torch.device) -> None:
    x = channels_last(2, 64, 6, 5, device=kernel_device)
    weight, bias = torch.randn(2, 64, device=kernel_device)
    with torch.no_grad():
        assert group_norm(x, 8, weight, bias, 1e-5).is_contiguous(memory_format=torch.channels_last)
        first, second = (part.contiguous(memory_format=torch.channels_last) for part in x.split([40, 24], dim=1))
        normed, joined = group_norm_joined(first, second, 8, weight, bias, 1e-5)
        assert torch.equal(normed, group_norm(x, 8, weight, bias, 1e-5)), "the same program, whatever it reads from"
        assert normed.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(joined, x)
        assert joined.is_contiguous(memory_format=torch.channels_last)
        assert bias_add(x, bias, x).is_contiguous(memory_format=torch.channels_last)
        assert upsample(x).is_contiguous(memory_format=torch.channels_last)
        wide = torch.randn(9, 300, device=kernel_device)
        rows = wide[:, 10:138]  # a view, rows further apart than they are long
        assert torch.equal(geglu(rows), geglu(rows.contiguous()))
        assert torch.equal(
            layer_norm(rows[:, :64], weight, bias, 1e-5), layer_norm(rows[:, :64].clone(), weight, bias, 1e-5)
        )


@pytest.mark.parametrize("size", [1.0, 1e5, 1e10, 1e15])
def test_rows_of_one_value_each_stay_finite(size: float, kernel_device: torch.device) -> None:
    """However coarsely their mean is rounded, a variance is not negative."""
    weight, bias = torch.randn(2, 70, device=kernel_device)
    x = (size * torch.randn(64, 1, device=kernel_device)).expand(64, 70).contiguous()
    with torch.no_grad():
        assert layer_norm(x, weight, bias, 1e-5).isfinite().all()


def rows(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 2, 3, 1)


def kernels(columns: int, channels: int, x: torch.Tensor) -> torch.Tensor:
    """A 3×3 convolution's weight, on the device of x."""
    return channels_last(columns, channels, 3, 3, device=x.device)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x, w: group_norm(x.contiguous(), 8, w, w, 1e-5), "x has strides .* allowed: channels-last memory"),
        (lambda x, w: group_norm(x, 7, w, w, 1e-5), "groups is 7; allowed: divisors of 64"),
        (lambda x, w: group_norm(x, 8, w[:5], w, 1e-5), r"weight.shape is \[5\]; allowed: \[64\]"),
        (lambda x, w: group_norm(x, 8, w, w.double(), 1e-5), "bias.dtype is torch.float64"),
        (lambda x, w: group_norm(x, 8, w, w, 1e-5, shift=w), r"shift.shape is \[64\]; allowed: \[2, 64\]"),
        (lambda x, w: group_norm_joined(x, x, 8, w, w, 1e-5), r"weight.shape is \[64\]; allowed: \[128\]"),
        (
            lambda x, w: group_norm_joined(x[:, :32], x[:, 32:], 8, w, w, 1e-5),
            "x has strides .*; second has strides",
        ),
        (
            lambda x, w: group_norm_joined(x, x[:1], 8, w.repeat(2), w.repeat(2), 1e-5),
            r"second.shape is \[1, 64, 6, 6\]",
        ),
        (
            lambda x, w: group_norm_joined(x, x.double(), 8, w.repeat(2), w.repeat(2), 1e-5),
            "second.dtype is .*float64",
        ),
        (lambda x, w: layer_norm(w, w, w, 1e-5), "x has 1 dimensions; allowed: at least 2"),
        (lambda x, w: add_layer_norm(rows(x), rows(x).transpose(1, 2), w, w, 1e-5), "residual has strides"),
        (
            lambda x, w: add_layer_norm(rows(x), rows(x), w, w, 1e-5, x_bias=w[:5]),
            r"x_bias.shape is \[5\]; allowed: \[64\]",
        ),
        (lambda x, w: geglu(rows(x)[..., :63].contiguous()), r"x.shape\[-1\] is 63; allowed: even"),
        (lambda x, w: geglu(w.double()[None]), "x.dtype is torch.float64"),
        (lambda x, w: bias_add(x, w, x[:1]), r"residual.shape is \[1, 64, 6, 6\]; allowed: \[2, 64, 6, 6\]"),
        (lambda x, w: bias_add(x, w, x.half()), "residual.dtype is torch.float16; allowed: torch.float32"),
        (lambda x, w: bias_add(x, w, x.contiguous()), "residual has strides .* allowed: channels-last memory"),
        (lambda x, w: bias_add(x, w[:5]), r"bias.shape is \[5\]; allowed: \[64\]"),
        (lambda x, w: upsample(x.contiguous()), "x has strides .* allowed: channels-last memory"),
        (lambda x, w: upsample(w), "x has 1 dimensions"),
        (lambda x, w: upsample(x.double()), "x.dtype is torch.float64"),
        (lambda x, w: thin_convolution(x[0], kernels(4, 64, x), w[:4]), "x has 3 dimensions"),
        (
            lambda x, w: thin_convolution(x, kernels(4, 64, x).contiguous(), w[:4]),
            "weight has strides .* channels-last",
        ),
        (
            lambda x, w: thin_convolution(x, kernels(4, 32, x), w[:4]),
            r"weight.shape is \[4, 32, 3, 3\]; allowed: \[N, 64",
        ),
        (
            lambda x, w: thin_convolution(x, kernels(20, 64, x), w[:20]),
            "in and out are 64 and 20; allowed: 1 to 16 in or",
        ),
        (lambda x, w: thin_convolution(x[:, :0], kernels(9, 0, x), w[:9]), "in and out are 0 and 9; allowed: 1 to 16"),
        (lambda x, w: thin_convolution(x.contiguous(), kernels(4, 64, x), w[:4]), "x has strides .* channels-last"),
        (lambda x, w: thin_convolution(x, kernels(4, 64, x), w), r"bias.shape is \[64\]; allowed: \[4\]"),
        (lambda x, w: thin_convolution(x, kernels(4, 64, x).double(), w[:4]), "weight.dtype is torch.float64"),
    ],
)
def test_what_cannot_be_is_refused_in_words(call, words: str, kernel_device: torch.device) -> None:
    x, weight = channels_last(2, 64, 6, 6, device=kernel_device), torch.randn(64, device=kernel_device)
    for _ in range(2):  # the second time is no cached mistake
        with pytest.raises(ValueError, match=words), torch.no_grad():
            call(x, weight)


def test_gradients_are_refused(kernel_device: torch.device) -> None:
    x = torch.randn(4, 64, device=kernel_device, requires_grad=True)
    with pytest.raises(ValueError, match=r"x\.requires_grad is True"):
        geglu(x)


def test_empty_batches(kernel_device: torch.device) -> None:
    x, weight = channels_last(0, 64, 6, 6, device=kernel_device), torch.randn(64, device=kernel_device)
    with torch.no_grad():
        assert group_norm(x, 8, weight, weight, 1e-5).shape == x.shape
        pair = group_norm_joined(x, x, 8, weight.repeat(2), weight.repeat(2), 1e-5)
        assert [out.shape for out in pair] == [(0, 128, 6, 6)] * 2
        assert bias_add(x, weight, x).shape == x.shape
        assert upsample(x).shape == (0, 64, 12, 12)
        assert thin_convolution(x, kernels(4, 64, x), weight[:4]).shape == (0, 4, 6, 6)
        assert geglu(torch.empty(0, 8, device=kernel_device)).shape == (0, 4)
        assert layer_norm(torch.empty(0, 64, device=kernel_device), weight, weight, 1e-5).shape == (0, 64)


def test_fakes_have_the_shapes_and_layouts_of_the_outputs() -> None:
    with FakeTensorMode(), torch.no_grad():
        x, weight = torch.empty(2, 64, 6, 6).to(memory_format=torch.channels_last), torch.empty(64)
        assert group_norm(x, 8, weight, weight, 1e-5, silu=True).stride() == x.stride()
        assert bias_add(x, weight, x).stride() == bias_add(x, weight).stride() == x.stride()
        assert upsample(x).shape == (2, 64, 12, 12)
        assert upsample(x).is_contiguous(memory_format=torch.channels_last)
        wide = torch.empty(128)
        for out in group_norm_joined(x, x, 8, wide, wide, 1e-5):
            assert out.shape == (2, 128, 6, 6)
            assert out.is_contiguous(memory_format=torch.channels_last)
        total, normed = add_layer_norm(torch.empty(2, 9, 64), torch.empty(2, 9, 64), weight, weight, 1e-5)
        assert total.shape == normed.shape == (2, 9, 64)
        total, normed = add_layer_norm(torch.empty(9, 64), torch.empty(9, 64), weight, weight, 1e-5, None, weight)
        assert total.shape == normed.shape == (9, 64)
        assert geglu(torch.empty(2, 9, 64)).shape == (2, 9, 32)
        latents = thin_convolution(x, kernels(4, 64, x), weight[:4])
        assert latents.shape == (2, 4, 6, 6)
        assert latents.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("wide", [(2**29, 1, 2**15, 1), (1, 2**30, 2**15, 1)], ids=["images", "channels"])
def test_offsets_that_32_bits_do_not_hold_are_refused(wide: tuple[int, ...]) -> None:
    x, bias = torch.empty(1, device="meta"), torch.empty(32, device="meta")
    weight = torch.empty(32, 4, 3, 3, device="meta").to(memory_format=torch.channels_last)
    (reason,) = thin_convolution_reasons(torch.empty_strided((5, 4, 8, 8), wide, device="meta"), weight, bias)
    assert reason.endswith("allowed: within 2**31 elements of memory")
    (reason,) = thin_convolution_reasons(x.expand(4, 4, 4096, 4096), weight, bias)
    assert reason.endswith("allowed: fewer than 2**31 elements, in and out")
    assert not thin_convolution_reasons(x.expand(3, 4, 4096, 4096), weight, bias)


def test_thin_convolutions_are_traced_as_one_op(kernel_device: torch.device) -> None:
    x, bias = torch.randn(1, 4, 5, 6, device=kernel_device), torch.randn(24, device=kernel_device)
    weight = kernels(24, 4, x)
    with torch.no_grad():
        compiled = torch.compile(thin_convolution, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x, weight, bias), thin_convolution(x, weight, bias))


@pytest.mark.parametrize(
    ("channels", "columns", "launch"),
    [
        (4, 40, ThinLaunch("gather", (1, 16), 64, 16, blocks=3)),
        (4, 40, ThinLaunch("gather", (1, 16), 64, 16, blocks=2)),
        (20, 3, ThinLaunch("shift", (4, 16), 16, 4)),
        (20, 3, ThinLaunch("shift", (16, 4), 32, 4)),
    ],
    ids=["columns in turn", "columns in turn, not all in the last", "low tiles, two steps", "high tiles"],
)
def test_other_launches_of_thin_convolutions(
    channels: int, columns: int, launch: ThinLaunch, kernel_device: torch.device
) -> None:
    x = channels_last(2, channels, 5, 19, device=kernel_device)
    weight, bias = kernels(columns, channels, x), torch.randn(columns, device=kernel_device)
    out = channels_last(2, columns, 5, 19, device=kernel_device).fill_(torch.nan)
    prepared_thin_convolution(x, columns, launch)(x, weight, bias, out)
    expected = convolution_reference(x, weight, bias)
    assert (out - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("float32", [False, True], ids=["16 bits", "float32"])
@pytest.mark.parametrize("pixels", [1, 8192, 32768, 2**20])
def test_launches_of_thin_convolutions_cover_what_there_is(pixels: int, float32: bool) -> None:
    for few in range(1, 17):
        for columns in (1, 3, 16, 128, 320, 512):
            launch = thin_convolution_launch(pixels, few, columns, float32=float32)
            assert launch.depth >= 9 * few
            assert min(launch.depth, launch.columns) >= 16, "the least a matrix product takes"
            assert launch.blocks in (1, -(-columns // launch.columns))
        for channels in (17, 128, 320, 512):
            launch = thin_convolution_launch(pixels, channels, few, float32=float32)
            assert launch.columns >= few
            assert launch.depth % 32 == 0


def test_each_traces_as_one_op(kernel_device: torch.device) -> None:
    """Without a break in the graph, fakes in place of tensors, and to the same result."""
    x, weight = channels_last(2, 64, 6, 5, device=kernel_device), torch.randn(64, device=kernel_device)

    def block(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        large = upsample(bias_add(x, weight))
        tokens = rows(bias_add(large, weight, large))
        return *add_layer_norm(tokens, tokens, weight, weight, 1e-5, weight, weight), geglu(tokens)

    with torch.no_grad():
        traced = torch.compile(block, fullgraph=True, backend="aot_eager")(x, weight)
        for ours, plain in zip(traced, block(x, weight), strict=True):
            assert torch.equal(ours, plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(2, 64, 6, 5), (1, 3, 1, 1), (3, 67, 5, 7), (2, 320, 3, 17), (1, 1, 9, 1)], ids=str)
def test_upsample_is_bitwise_pytorchs(shape: tuple[int, ...], dtype: torch.dtype, kernel_device: torch.device) -> None:
    bits = torch.randint(-(2**15), 2**15, (*shape, dtype.itemsize // 2), dtype=torch.int16, device=kernel_device)
    x = bits.view(dtype).squeeze(-1).to(memory_format=torch.channels_last)  # whatever there is, NaNs too
    as_bits = torch.int32 if dtype == torch.float32 else torch.int16
    with torch.no_grad():
        assert torch.equal(upsample(x).view(as_bits), F.interpolate(x, scale_factor=2.0, mode="nearest").view(as_bits))


@pytest.mark.gpu
def test_images_of_more_than_2_31_elements(kernel_device: torch.device) -> None:
    x = torch.zeros(1, 256, 1456, 1456, dtype=torch.float16, device=kernel_device)
    x = x.to(memory_format=torch.channels_last)
    x[:, :, -3:] = torch.randn(1, 256, 3, 1456, device=kernel_device)
    bias = torch.randn(256, dtype=torch.float16, device=kernel_device)
    with torch.no_grad():
        large = upsample(x)
        assert large.numel() > 2**31
        ours = bias_add(large, bias)
        assert torch.equal(large[:, :, -6:], F.interpolate(x[:, :, -3:], scale_factor=2.0, mode="nearest"))
        assert torch.equal(
            ours[:, :, -6:], bias_add(large[:, :, -6:].contiguous(memory_format=torch.channels_last), bias)
        )


@pytest.mark.timeout(60)  # a loop once had no end for many pictures at a time
@pytest.mark.parametrize("batch", [1, 2, 7, 16, 66, 4096])
@pytest.mark.parametrize(
    ("channels", "pixels"),
    [(320, 4096), (2560, 64), (1920, 1024), (2560, 1024), (2560, 576), (512, 4096), (128, 2**20), (64, 1), (8, 9)],
)
def test_launches_cover_every_group_and_pixel(batch: int, channels: int, pixels: int) -> None:
    groups = min(32, channels)
    launch = group_norm_launch(batch, pixels, channels, groups)
    assert launch.groups * (channels // groups) <= launch.columns
    assert launch.pixels * launch.loads * launch.columns <= 32768
    assert launch.chunk * launch.chunks >= pixels > launch.chunk * (launch.chunks - 1)
    assert launch.whole or launch.chunk % (launch.pixels * launch.loads) == 0


@pytest.mark.parametrize("columns", [1, 64, 65, 320, 640, 700, 768, 1024, 1280, 2560, 5000, MAX_COLUMNS])
def test_launches_of_layer_norm_cover_a_row_with_at_most_one_vector_per_thread_and_tile(columns: int) -> None:
    launch = layer_norm_launch(columns)
    assert launch.width * launch.tiles >= columns > launch.width * (launch.tiles - 1)
    assert 4 * 32 * launch.num_warps <= launch.rows * launch.width <= 8 * 32 * launch.num_warps
    assert launch.tiles <= 5
    assert launch.num_warps <= 8


@pytest.mark.parametrize(("columns", "width"), [(320, 64), (640, 128), (768, 256), (1024, 256), (1280, 256)])
def test_widths_of_models_need_no_padding(columns: int, width: int) -> None:
    launch = layer_norm_launch(columns)
    assert launch.width == width
    assert launch.width * launch.tiles == columns


@pytest.mark.parametrize(
    "launch", [LayerNormLaunch(1, 64, 5, 1), LayerNormLaunch(8, 128, 3, 2), LayerNormLaunch(2, 512, 1, 4)]
)
def test_other_launches_give_the_same(launch: LayerNormLaunch, kernel_device: torch.device) -> None:
    """For who looks for faster ones."""
    x, residual = torch.randn(2, 9, 320, device=kernel_device)
    weight, bias, sum_bias, x_bias = torch.randn(4, 320, device=kernel_device)
    prepared = sys.modules["diffopt_kernels.step.layer_norm"]._prepared
    out, total = torch.full((2, 9, 320), torch.nan, device=kernel_device)
    run = prepared(x, True, 1e-5, has_sum_bias=True, has_x_bias=True, launch=launch)
    with torch.no_grad():
        run(x, out, weight, bias, residual, total, sum_bias, x_bias)
        usual_total, usual = add_layer_norm(x, residual, weight, bias, 1e-5, sum_bias, x_bias)
    assert torch.equal(total, usual_total)
    torch.testing.assert_close(out, usual, rtol=1e-5, atol=1e-5)


def compiled_kernels(script: str, tmp_path: Path) -> list[CompiledKernel]:
    """What a script compiles and prints, in a process without the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return [CompiledKernel(**row) for row in json.loads(done.stdout.splitlines()[-1])]


COMPILE_ROWS = """
import dataclasses, json, sys
import torch
import diffopt_kernels.step
from diffopt_kernels.chips import CHIPS
from diffopt_kernels.cross_compile import compiled, prepared_source

layer_norm, geglu, sums, upsample = (sys.modules[f"diffopt_kernels.step.{x}"] for x in
                                     ("layer_norm", "geglu", "sums", "upsample"))
for module in (layer_norm, geglu, sums, upsample):
    module.device_reasons = lambda device: []  # tensors without memory stand for those of a GPU

def empty(*shape):
    return torch.empty(*shape, dtype=torch.float16, device="meta")

image = empty(2, 320, 64, 64).to(memory_format=torch.channels_last)
every = {"has_sum_bias": True, "has_x_bias": True}
prepared = [
    *(layer_norm._prepared(empty(*shape), True, 1e-5, **every) for shape in
      ((8192, 320), (2048, 640), (512, 1280), (64, 8192), (99, 65))),
    layer_norm._prepared(empty(8192, 320), False, 1e-5),
    geglu._prepared(empty(8192, 2560)),
    sums._prepared(image, has_residual=True),
    sums._prepared(image, has_residual=False),
    upsample._prepared(image),
    upsample._prepared(image[:, :, :, :1].contiguous(memory_format=torch.channels_last)),
]
print(json.dumps([
    dataclasses.asdict(compiled(*prepared_source(x, dtype), CHIPS[chip], x.kernel.__name__, dtype, ""))
    for x in prepared for chip, dtype in (("sm_80", "float16"), ("sm_90", "float32"), ("gfx942", "bfloat16"))
]))
"""

COMPILE_THIN = """
import dataclasses, json
import torch
from diffopt_kernels.chips import CHIPS
from diffopt_kernels.cross_compile import compiled, prepared_source
from diffopt_kernels.step.products import prepared_addition
from diffopt_kernels.step.thin_convolution import prepared_thin_convolution, thin_convolution_launch

def row(prepared, chip, dtype, float32=()):
    source = prepared_source(prepared, dtype, float32)
    return dataclasses.asdict(compiled(*source, CHIPS[chip], prepared.kernel.__name__, dtype, ""))

rows = [row(prepared_addition(8192, 320, 4, True, torch.device("meta")), "sm_90", "float16", ("sums_ptr",))]
for chip in ("sm_80", "sm_86", "sm_90", "gfx942"):
    for dtype in ("float16", "float32"):
        for channels, columns, side in ((4, 320, 64), (4, 320, 128), (16, 512, 64), (320, 4, 64), (128, 3, 512)):
            x = torch.empty(2, channels, side, side, dtype=getattr(torch, dtype), device="meta")
            x = x.to(memory_format=torch.channels_last)
            launch = thin_convolution_launch(2 * side * side, channels, columns, float32=dtype == "float32")
            rows.append(row(prepared_thin_convolution(x, columns, launch), chip, dtype))
print(json.dumps(rows))
"""


@pytest.mark.slow
def test_plain_kernels_compile_within_the_limits(tmp_path: Path) -> None:
    """Every kernel of _rows.py."""
    rows = compiled_kernels(COMPILE_ROWS, tmp_path)
    source = Path(sys.modules["diffopt_kernels.step"].__file__ or "").with_name("_rows.py").read_text(encoding="utf-8")
    assert {row.label for row in rows} == set(re.findall(r"def (\w+_kernel)", source))
    for row in rows:
        assert not row.misfits, row
        assert not row.spill_bytes, row


@pytest.mark.slow
def test_thin_convolutions_and_sums_compile_within_the_limits_of_chips(tmp_path: Path) -> None:
    rows = compiled_kernels(COMPILE_THIN, tmp_path)
    assert len(rows) == 1 + 4 * 2 * 5
    for row in rows:
        assert not row.misfits, row
        assert not row.spill_bytes, row
