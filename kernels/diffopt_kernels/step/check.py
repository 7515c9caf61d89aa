"""Is a step op right? Its error against float64 beside that of PyTorch's own ops, by the rule of attention_check.py.

Whatever an op allocates is poisoned and lies between guard bands. A planted fault must be noticed, else the check
proves nothing.
"""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import product

import torch
import torch.nn.functional as F

from diffopt_kernels.attention_check import PLANTED_FAULT, Errors, allowed_errors, drawn, errors_against
from diffopt_kernels.step import (
    add_layer_norm,
    bias_add,
    convolution,
    geglu,
    geglu_product,
    group_norm,
    group_norm_joined,
    layer_norm,
    products,
    summed_weights,
    thin_convolution,
    upsample,
    upsampled_convolution,
)
from diffopt_kernels.step import reference as exact
from diffopt_kernels.step.guarded import AllocationsMode, Guarded
from diffopt_kernels.step.thin_convolution import FEW


@dataclass(frozen=True)
class StepCase:
    """One call.

    Attributes:
        op: one of `OPS` or `PRODUCTS`.
        why: the model and place it comes from, or what is awkward about it.
        shape: of x: [B, C, H, W], [..., C] or [..., 2 D]; of summed_weights [N, C, 3, 3].
        columns: channels that a product or a convolution makes.
        groups: of group_norm.
        silu: whether SiLU follows group_norm.
        second: so many of a group_norm_joined's channels, the last, lie in a tensor of their own.
        added: whether group_norm gets a shift and a bias, layer_norm and convolution a residual.
        offset: what all values are moved by, in standard deviations: cancellation shows.
        first: what the first pixel of an image is moved by, likewise: it is no pivot for the others.
        stride: of a convolution.
    """

    op: str
    why: str
    shape: tuple[int, ...]
    columns: int = 0
    groups: int = 32
    silu: bool = True
    second: int = 0
    added: bool = False
    offset: float = 0.0
    first: float = 0.0
    stride: int = 1


@dataclass(frozen=True)
class StepResult:
    """Errors of one output of a case in one dtype, stock's, what the rule allows, and whether the bands are intact."""

    case: StepCase
    dtype: str
    ours: Errors
    stock: Errors
    limit: Errors
    overrun: bool

    @property
    def right(self) -> bool:
        return self.ours.within(self.limit) and not self.overrun

    @property
    def near(self) -> bool:
        return self.ours.near(self.limit) and not self.overrun

    @property
    def share(self) -> float:
        """Of the limit: the larger of both errors'."""
        return max(self.ours.relative_l2 / self.limit.relative_l2, self.ours.maximum / self.limit.maximum)


@dataclass(frozen=True)
class OpResult:
    """All cases of one op in one dtype, and the planted fault's. Only an op that is `right` may run.

    `void` says why the check proves nothing: the fault was not noticed, or not looked for. `redrawn` are results that
    came just beyond their limit; in their place `cases` has those of further draws.
    """

    op: str
    dtype: str
    cases: tuple[StepResult, ...]
    faults: tuple[StepResult, ...]
    redrawn: tuple[StepResult, ...] = ()

    @property
    def void(self) -> str:
        if not self.faults:
            return "no fault was planted"
        return f"a planted fault passes in {self.dtype}" if all(fault.right for fault in self.faults) else ""

    @property
    def right(self) -> bool:
        return not self.void and bool(self.cases) and all(case.right for case in self.cases)

    def as_record(self) -> dict:
        return {**asdict(self), "void": self.void, "right": self.right}


MODEL_CASES = (
    StepCase("group_norm", "sd15-512 norm2, 64x64", (2, 320, 64, 64), added=True),
    StepCase("group_norm", "sd15-512 up, after the skip", (2, 960, 64, 64)),
    StepCase("group_norm", "sd15-512 up, the skip apart, a group on both sides", (2, 960, 64, 64), second=320),
    StepCase("group_norm", "sd15-512 32x32", (2, 640, 32, 32), added=True),
    StepCase("group_norm", "sd15-512 up 32x32", (2, 1920, 32, 32)),
    StepCase("group_norm", "sd15-512 16x16", (2, 1280, 16, 16), added=True),
    StepCase("group_norm", "sd15-512 up 16x16, the skip apart", (2, 1920, 16, 16), second=640),
    StepCase("group_norm", "sd15-512 up 8x8", (2, 2560, 8, 8)),
    StepCase("group_norm", "sd15-512 up 8x8, the skip apart", (2, 2560, 8, 8), second=1280),
    StepCase("group_norm", "before a transformer", (2, 640, 32, 32), silu=False),
    StepCase("group_norm", "sdxl-1024 128x128", (2, 320, 128, 128), added=True),
    StepCase("group_norm", "sd15-512 decoder, 512x512", (1, 128, 512, 512)),
    StepCase("layer_norm", "sd15-512 64x64", (2, 4096, 320), added=True),
    StepCase("layer_norm", "sdxl-1024 32x32", (2, 1024, 1280), added=True),
    StepCase("layer_norm", "first of a block", (2, 1024, 640)),
    StepCase("geglu", "sd15-512 64x64", (2, 4096, 2560)),
    StepCase("geglu", "sdxl-1024 32x32", (2, 1024, 10240)),
    StepCase("bias_add", "sd15-512 64x64", (2, 320, 64, 64)),
    StepCase("bias_add", "sd15-512 8x8", (2, 1280, 8, 8)),
    StepCase("bias_add", "sdxl-1024 128x128", (2, 320, 128, 128)),
    StepCase("upsample", "sd15-512 8x8", (2, 1280, 8, 8)),
    StepCase("upsample", "sd21-768 24x24", (2, 1280, 24, 24)),
    StepCase("upsample", "sdxl-1024 64x64", (2, 640, 64, 64)),
    StepCase("upsample", "sd15-512 decoder 256x256", (1, 256, 256, 256)),
    StepCase("thin_convolution", "sd15-512 first", (2, 4, 64, 64), 320),
    StepCase("thin_convolution", "sd15-512 inpainting, first", (2, 9, 64, 64), 320),
    StepCase("thin_convolution", "sdxl-1024 first", (2, 4, 128, 128), 320),
    StepCase("thin_convolution", "sd15-512 last", (2, 320, 64, 64), 4),
    StepCase("thin_convolution", "sd15-512 decoder, first", (1, 4, 64, 64), 512),
    StepCase("thin_convolution", "sd15-512 decoder, last", (1, 128, 512, 512), 3),
)

AWKWARD_CASES = (
    StepCase("group_norm", "one pixel", (1, 64, 1, 1), groups=8),
    StepCase("group_norm", "one channel in each group", (2, 32, 3, 5), added=True),
    StepCase("group_norm", "not square, odd sizes", (3, 96, 7, 9), groups=32, added=True),
    StepCase("group_norm", "10 channels in each group, last block not full", (2, 320, 33, 67), added=True),
    StepCase("group_norm", "far from zero", (1, 64, 24, 24), groups=4, offset=30.0),
    StepCase("group_norm", "far from zero, in chunks", (1, 320, 72, 64), offset=30.0),
    StepCase("group_norm", "first pixel far from the others", (1, 64, 24, 24), groups=4, first=1000.0),
    StepCase("group_norm", "first pixel far from the others, in chunks", (1, 320, 72, 64), first=1000.0),
    StepCase("group_norm", "80 channels in each group, in chunks", (1, 160, 40, 40), groups=2),
    StepCase("group_norm", "two inputs, a group on both sides", (2, 96, 7, 9), groups=8, second=40),
    StepCase("group_norm", "two inputs of odd widths", (3, 60, 5, 3), groups=4, second=37),
    StepCase("group_norm", "two inputs, the second of one channel", (2, 32, 3, 5), groups=1, second=1),
    StepCase("group_norm", "two inputs in chunks, a group on both sides", (2, 480, 33, 65), second=152, silu=False),
    StepCase("group_norm", "two inputs far from zero", (1, 64, 24, 24), groups=4, second=24, offset=30.0),
    StepCase("group_norm", "two inputs in chunks, first pixel far off", (1, 320, 72, 64), second=124, first=1000.0),
    StepCase("group_norm", "small image, more than its tiles, the last ones not full", (1, 64, 7, 11), groups=4),
    StepCase("group_norm", "32 groups in each program, in chunks", (3, 128, 33, 32), added=True),
    StepCase("group_norm", "programs of 15 channels, in chunks", (1, 15, 40, 40), groups=5, added=True),
    StepCase("layer_norm", "one row", (1, 1, 320), added=True),
    StepCase("layer_norm", "odd sizes, no power of two", (3, 7, 65), added=True),
    StepCase("layer_norm", "far from zero", (2, 9, 320), offset=30.0),
    StepCase("layer_norm", "five tiles, programs of several rows", (1, 62, 320), added=True),
    StepCase("layer_norm", "last of three tiles not full", (2, 5, 700), added=True),
    StepCase("layer_norm", "widest", (1, 3, 8192), added=True),
    StepCase("geglu", "odd sizes", (3, 11, 2 * 301)),
    StepCase("geglu", "large gates", (2, 5, 128), offset=10.0),
    StepCase("bias_add", "odd sizes", (3, 67, 5, 7)),
    StepCase("summed_weights", "odd channels, more than one block of them", (5, 301, 3, 3)),
    StepCase("summed_weights", "odd sizes", (3, 7, 3, 3)),
    StepCase("bias_add", "five blocks of channels, last pixels not full", (1, 320, 7, 13)),
    StepCase("upsample", "odd sizes", (3, 67, 5, 7)),
    StepCase("upsample", "one pixel", (2, 8, 1, 1)),
    StepCase("upsample", "five blocks of channels, two of pixels", (2, 320, 2, 19)),
    StepCase("thin_convolution", "odd sizes", (3, 4, 7, 9), 40),
    StepCase("thin_convolution", "one pixel", (1, 9, 1, 1), 24),
    StepCase("thin_convolution", "one channel, far from zero", (2, 1, 16, 20), 64, offset=10.0),
    StepCase("thin_convolution", "3 channels in and 5 out", (2, 3, 5, 21), 5),
    StepCase("thin_convolution", "16 channels in", (1, 16, 6, 10), 72),
    StepCase("thin_convolution", "3 channels out, odd sizes", (2, 72, 9, 13), 3),
    StepCase("thin_convolution", "1 channel out, one pixel", (1, 20, 1, 1), 1),
    StepCase("thin_convolution", "4 channels out, far from zero", (1, 320, 8, 12), 4, offset=10.0),
    StepCase("thin_convolution", "16 channels out", (1, 64, 6, 7), 16),
)

# Together they run every launch that a Hopper GPU can select for a model, whatever the number of its multiprocessors,
# with boxes of pixels of every form (test_step_products.py).
PRODUCT_CASES = (
    StepCase("convolution", "odd sizes, boxes not full", (3, 64, 7, 9), 64, added=True),
    StepCase("convolution", "one pixel", (1, 128, 1, 1), 128),
    StepCase("convolution", "low and wide", (2, 64, 3, 62), 64, added=True),
    StepCase("convolution", "low and half as wide", (2, 64, 2, 31), 64, added=True),
    StepCase("convolution", "far from zero", (2, 64, 16, 16), 64, offset=10.0),
    StepCase("convolution", "80 columns, odd sizes", (2, 64, 33, 20), 80, added=True),
    StepCase("convolution", "80 columns in shares", (1, 640, 9, 7), 80, added=True),
    StepCase("convolution", "64 columns in shares", (1, 640, 5, 7), 64, added=True),
    StepCase("convolution", "128 columns in shares", (1, 640, 9, 7), 128, added=True),
    StepCase("convolution", "160 columns in shares where multiprocessors are few", (2, 640, 16, 16), 320, added=True),
    StepCase("convolution", "256 columns in shares where multiprocessors are few", (2, 1280, 16, 16), 512, added=True),
    StepCase("convolution", "sd15-512 64x64", (2, 320, 64, 64), 320, added=True),
    StepCase("convolution", "sd15-512 up, first of a block", (2, 960, 64, 64), 320),
    StepCase("convolution", "sd15-512 32x32", (2, 640, 32, 32), 640, added=True),
    StepCase("convolution", "sd15-512 16x16", (2, 1280, 16, 16), 1280, added=True),
    StepCase("convolution", "sd15-512 8x8", (2, 1280, 8, 8), 1280, added=True),
    StepCase("convolution", "sd15-512 up 8x8", (2, 2560, 8, 8), 1280),
    StepCase("convolution", "sd21-768 48x48", (2, 640, 48, 48), 640, added=True),
    StepCase("convolution", "sd21-768 24x24", (2, 2560, 24, 24), 1280),
    StepCase("convolution", "sd21-768 12x12", (2, 1280, 12, 12), 1280, added=True),
    StepCase("convolution", "sdxl-1024 128x128", (2, 320, 128, 128), 320, added=True),
    StepCase("convolution", "sd15-512 decoder 64x64", (1, 512, 64, 64), 512, added=True),
    StepCase("convolution", "sd15-512 decoder 256x256", (1, 512, 256, 256), 256, added=True),
    StepCase("convolution", "stride 2, odd halves, boxes not full", (3, 64, 14, 18), 64, added=True, stride=2),
    StepCase("convolution", "stride 2, four pixels", (1, 128, 2, 2), 128, stride=2),
    StepCase("convolution", "stride 2, low and wide", (2, 64, 6, 124), 64, stride=2),
    StepCase("convolution", "stride 2, down to 10x14", (1, 64, 20, 28), 64, stride=2),
    StepCase("convolution", "256 columns down, even more of them", (4, 256, 128, 128), 256, stride=2),
    StepCase("convolution", "stride 2, low and half as wide", (2, 64, 4, 62), 64, stride=2),
    StepCase("convolution", "stride 2, 80 columns, odd halves", (2, 64, 66, 38), 80, stride=2),
    StepCase("convolution", "stride 2, 80 columns in shares", (1, 640, 18, 14), 80, stride=2),
    StepCase("convolution", "stride 2, 64 columns in shares", (1, 640, 10, 14), 64, stride=2),
    StepCase("convolution", "stride 2, 128 columns in shares", (1, 640, 18, 14), 128, stride=2),
    StepCase("convolution", "stride 2, few multiprocessors", (2, 640, 32, 32), 320, stride=2),
    StepCase("convolution", "stride 2, few multiprocessors", (2, 1280, 32, 32), 512, stride=2),
    StepCase("convolution", "sd15-512 down to 32x32", (2, 320, 64, 64), 320, stride=2),
    StepCase("convolution", "sd15-512 down to 16x16", (2, 640, 32, 32), 640, stride=2),
    StepCase("convolution", "sd15-512 down to 8x8", (2, 1280, 16, 16), 1280, stride=2),
    StepCase("convolution", "sd21-768 down to 24x24", (2, 640, 48, 48), 640, stride=2),
    StepCase("convolution", "sdxl-1024 down to 64x64", (2, 320, 128, 128), 320, stride=2),
    StepCase("convolution", "256 columns down to 64x64", (3, 256, 128, 128), 256, stride=2),
    StepCase("upsampled_convolution", "odd sizes, boxes not full", (3, 64, 7, 9), 64),
    StepCase("upsampled_convolution", "one pixel", (1, 128, 1, 1), 128),
    StepCase("upsampled_convolution", "low and wide", (2, 64, 3, 62), 64),
    StepCase("upsampled_convolution", "10x14 pixels", (1, 64, 10, 14), 64),
    StepCase("upsampled_convolution", "low and half as wide", (2, 64, 2, 31), 64),
    StepCase("upsampled_convolution", "far from zero", (2, 64, 16, 16), 64, offset=10.0),
    StepCase("upsampled_convolution", "80 columns, odd sizes", (2, 64, 33, 20), 80),
    StepCase("upsampled_convolution", "80 columns in shares", (1, 1280, 9, 7), 80),
    StepCase("upsampled_convolution", "64 columns in shares", (1, 1280, 5, 7), 64),
    StepCase("upsampled_convolution", "128 columns in shares", (1, 1280, 9, 7), 128),
    StepCase("upsampled_convolution", "160 columns in shares where multiprocessors are few", (2, 1280, 8, 8), 320),
    StepCase("upsampled_convolution", "256 columns in shares", (2, 1280, 24, 24), 256),
    StepCase("upsampled_convolution", "sd15-512 8x8", (2, 1280, 8, 8), 1280),
    StepCase("upsampled_convolution", "sd15-512 16x16", (2, 1280, 16, 16), 1280),
    StepCase("upsampled_convolution", "sd15-512 32x32", (2, 640, 32, 32), 640),
    StepCase("upsampled_convolution", "sd21-768 24x24", (2, 1280, 24, 24), 1280),
    StepCase("upsampled_convolution", "sdxl-1024 64x64", (2, 640, 64, 64), 640),
    StepCase("upsampled_convolution", "sd15-512 decoder 64x64", (1, 512, 64, 64), 512),
    StepCase("upsampled_convolution", "sd15-512 decoder 256x256", (1, 256, 256, 256), 256),
    StepCase("geglu_product", "odd rows", (3, 37, 328), 192),
    StepCase("geglu_product", "one row", (1, 1, 64), 64),
    StepCase("geglu_product", "large gates", (2, 100, 64), 128, offset=10.0),
    StepCase("geglu_product", "sd15-512 64x64", (2, 4096, 320), 1280),
    StepCase("geglu_product", "sd15-512 32x32", (2, 1024, 640), 2560),
    StepCase("geglu_product", "sd15-512 8x8", (2, 64, 1280), 5120),
    StepCase("geglu_product", "sdxl-1024 32x32", (2, 1024, 1280), 5120),
)

SMALL_PRODUCT_CASES = tuple(case for case in PRODUCT_CASES if case.columns <= 192)
"""Those without a model's size."""


def planted_fault(dtype: torch.dtype) -> float:
    """What an input is multiplied by: 1.01, in bfloat16 more, whose rounding hides a percent even from right ops."""
    return max(PLANTED_FAULT, 1 + 8 * torch.finfo(dtype).eps)


def fault_case(op: str) -> StepCase:
    """The case of an op that the fault is planted in."""
    cases = (x for x in AWKWARD_CASES + PRODUCT_CASES if x.op == op)
    return next(x for x in cases if not x.offset and not x.first and x.shape[-1] > 1)


def runs(op: str, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether there is an op in a dtype on a kind of device: products need a Hopper GPU, 16 bits and Triton 3.6."""
    return op in OPS or (dtype in products.DTYPES and products.has_products(device))


def check_op(
    op: str, cases: Iterable[StepCase], dtype: torch.dtype, device: torch.device, *, seed: int = 0
) -> OpResult:
    """Those of the cases that are the op's in one dtype, then the planted fault, which has to fail."""
    cases = [case for case in cases if case.op == op]
    results, redrawn = [], []
    for i, case in enumerate(cases):

        def check(seed: int, case: StepCase = case) -> list[StepResult]:
            return list(check_case(case, dtype, device, seed))

        kept, again = drawn(check, seed + i, len(cases))
        results += kept
        redrawn += again
    faults = check_case(fault_case(op), dtype, device, seed, planted_fault(dtype))
    name = str(dtype).removeprefix("torch.")
    return OpResult(op, name, tuple(results), tuple(faults), tuple(redrawn))


def check_case(
    case: StepCase, dtype: torch.dtype, device: torch.device, seed: int = 0, fault: float = 1.0
) -> Iterator[StepResult]:
    """Run one case; `fault` multiplies what comes in, to prove that the rule notices."""
    guarded = Guarded()
    for ours, stock, expected in case_outputs(case, dtype, device, guarded, seed, fault):
        if not guarded.allocations:
            raise RuntimeError(f"{case.op} allocated nothing that could be guarded")
        stock_errors = errors_against(stock, expected)
        limit = allowed_errors([stock_errors], expected, dtype)
        name = str(dtype).removeprefix("torch.")
        yield StepResult(case, name, errors_against(ours, expected), stock_errors, limit, guarded.overrun)


def case_outputs(
    case: StepCase,
    dtype: torch.dtype,
    device: torch.device,
    mode: AllocationsMode,
    seed: int = 0,
    fault: float = 1.0,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Of each output of a case: ours, run inside `mode`, stock's and the exact one."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, offset: float = 0.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) + offset).to(device, dtype)

    with torch.no_grad():
        yield from _CASE_OUTPUTS[case.op](case, normal(*case.shape, offset=case.offset), normal, fault, mode)


def _geglus(case: StepCase, x: torch.Tensor, normal, fault: float, mode: AllocationsMode):
    hidden, gate = x.chunk(2, dim=-1)
    faulty = x * fault
    with mode:
        ours = geglu(faulty)
    yield ours, hidden * F.gelu(gate), exact.geglu_reference(x)


def _bias_adds(case: StepCase, x: torch.Tensor, normal, fault: float, mode: AllocationsMode):
    x, residual = (image.to(memory_format=torch.channels_last) for image in (x, normal(*case.shape)))
    bias = normal(case.shape[1])
    faulty = bias * fault
    with mode:
        ours, alone = bias_add(x, faulty, residual), bias_add(x, faulty)
    stock = x + bias[:, None, None]
    yield ours, stock + residual, exact.bias_add_reference(x, bias, residual)
    yield alone, stock, exact.bias_add_reference(x, bias)


def _upsamples(case: StepCase, x: torch.Tensor, normal, fault: float, mode: AllocationsMode):
    x = x.to(memory_format=torch.channels_last)
    faulty = x * fault
    with mode:
        ours = upsample(faulty)
    yield ours, F.interpolate(x, scale_factor=2.0, mode="nearest"), exact.upsample_reference(x)


def _layer_norms(case: StepCase, x: torch.Tensor, normal, fault: float, mode: AllocationsMode):
    channels = case.shape[-1]
    weight, bias = normal(channels, offset=1.0), normal(channels)
    faulty = weight * fault
    if not case.added:
        with mode:
            ours = layer_norm(x, faulty, bias, 1e-5)
        stock = F.layer_norm(x, (channels,), weight, bias, 1e-5)
        yield ours, stock, exact.layer_norm_reference(x, weight, bias, 1e-5)[1]
        return
    residual = normal(*case.shape)
    for sum_bias, x_bias in product((None, normal(channels)), (None, normal(channels))):
        with mode:
            ours_total, ours = add_layer_norm(x, residual, faulty, bias, 1e-5, sum_bias, x_bias)
        total, normed = exact.layer_norm_reference(x, weight, bias, 1e-5, residual=residual, x_bias=x_bias)
        stock_total = (x if x_bias is None else x + x_bias) + residual
        yield ours, F.layer_norm(stock_total, (channels,), weight, bias, 1e-5), normed
        if sum_bias is not None:
            stock_total, total = stock_total + sum_bias, total + sum_bias.to(total.dtype)
        yield ours_total, stock_total, total


def _group_norms(case: StepCase, x: torch.Tensor, normal, fault: float, mode: AllocationsMode):
    x = x.to(memory_format=torch.channels_last)
    x[:, :, 0, 0] += case.first
    batch, channels = case.shape[:2]
    weight, bias = normal(channels, offset=1.0), normal(channels)
    shift, channel_bias = (normal(batch, channels), normal(channels)) if case.added else (None, None)
    stock = x
    if shift is not None and channel_bias is not None:
        stock = stock + channel_bias[:, None, None] + shift[:, :, None, None]
    stock = F.group_norm(stock, case.groups, weight, bias, 1e-5)
    stock = F.silu(stock) if case.silu else stock
    options = {"silu": case.silu, "shift": shift, "channel_bias": channel_bias}
    faulty = weight * fault
    expected = exact.group_norm_reference(x, case.groups, weight, bias, 1e-5, **options)
    if not case.second:
        with mode:
            ours = group_norm(x, case.groups, faulty, bias, 1e-5, **options)
        yield ours, stock, expected
        return
    parts = x.split([channels - case.second, case.second], dim=1)
    first, second = (part.contiguous(memory_format=torch.channels_last) for part in parts)
    with mode:
        ours, joined = group_norm_joined(first, second, case.groups, faulty, bias, 1e-5, silu=case.silu)
    yield ours, stock, expected
    yield joined, x, x.double()


def _thin_convolutions(case: StepCase, x: torch.Tensor, normal, fault: float, mode: AllocationsMode):
    channels = case.shape[1]
    weight = (normal(case.columns, channels, 3, 3) / (9 * channels) ** 0.5).to(memory_format=torch.channels_last)
    bias = normal(case.columns)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        stock = F.conv2d(x, weight, bias, padding=1)
    expected = exact.convolution_reference(x, weight, bias)
    faulty = weight * fault
    layouts = [x.to(memory_format=torch.channels_last)]
    if channels <= FEW:
        layouts += [x, torch.stack((x, x), -1)[..., 0]]  # as latents are, and a view
    for image in layouts:
        with mode:
            ours = thin_convolution(image, faulty, bias)
        yield ours, stock, expected


def _convolutions(case: StepCase, x: torch.Tensor, normal, fault: float, mode: AllocationsMode):
    batch, channels, height, width = case.shape
    x = x.to(memory_format=torch.channels_last)
    weight = (normal(case.columns, channels, 3, 3) / (9 * channels) ** 0.5).to(memory_format=torch.channels_last)
    bias = normal(case.columns)
    residual = None
    if case.added:
        shape = batch, case.columns, height // case.stride, width // case.stride
        residual = normal(*shape).to(memory_format=torch.channels_last)
    stock = F.conv2d(x, weight, bias, case.stride, padding=1)
    stock = stock if residual is None else stock + residual
    faulty = weight * fault
    with mode:
        ours = convolution(x, faulty, bias, residual, case.stride)
    yield ours, stock, exact.convolution_reference(x, weight, bias, residual, stride=case.stride)


def _summed_weights(case: StepCase, weight: torch.Tensor, normal, fault: float, mode: AllocationsMode):
    weight = weight.to(memory_format=torch.channels_last)
    faulty = weight * fault
    with mode:
        ours = summed_weights(faulty)
    stock = exact.summed_weights_reference(weight, dtype=weight.dtype)
    yield ours, stock, exact.summed_weights_reference(weight)


def _upsampled_convolutions(case: StepCase, x: torch.Tensor, normal, fault: float, mode: AllocationsMode):
    channels = case.shape[1]
    x = x.to(memory_format=torch.channels_last)
    weight = (normal(case.columns, channels, 3, 3) / (9 * channels) ** 0.5).to(memory_format=torch.channels_last)
    bias = normal(case.columns)
    stock = F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)
    faulty = weight * fault
    with mode:
        ours = upsampled_convolution(x, summed_weights(faulty), bias)
    twice = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    yield ours, stock, exact.convolution_reference(twice, weight, bias)


def _geglu_products(case: StepCase, x: torch.Tensor, normal, fault: float, mode: AllocationsMode):
    channels = case.shape[-1]
    weight, bias = normal(2 * case.columns, channels) / channels**0.5, normal(2 * case.columns)
    hidden, gate = F.linear(x, weight, bias).chunk(2, dim=-1)
    faulty = weight * fault
    with mode:
        ours = geglu_product(x, faulty, bias)
    yield ours, hidden * F.gelu(gate), exact.geglu_product_reference(x, weight, bias)


_CASE_OUTPUTS = {
    "group_norm": _group_norms,
    "layer_norm": _layer_norms,
    "geglu": _geglus,
    "bias_add": _bias_adds,
    "summed_weights": _summed_weights,
    "upsample": _upsamples,
    "thin_convolution": _thin_convolutions,
    "convolution": _convolutions,
    "upsampled_convolution": _upsampled_convolutions,
    "geglu_product": _geglu_products,
}

PRODUCTS = ("convolution", "upsampled_convolution", "geglu_product")
"""What a case's `op` can be, on Hopper GPUs."""

OPS = tuple(op for op in _CASE_OUTPUTS if op not in PRODUCTS)
"""What a case's `op` can be, anywhere."""
