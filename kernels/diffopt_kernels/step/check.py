"""Is a step op right? Its error against float64 beside that of PyTorch's own ops, by the rule of attention_check.py."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from diffopt_kernels.attention_check import Errors, allowed_errors, errors_against
from diffopt_kernels.step import add_layer_norm, bias_add, geglu, group_norm, layer_norm
from diffopt_kernels.step import reference as exact


@dataclass(frozen=True)
class StepCase:
    """One call.

    Attributes:
        op: "group_norm", "layer_norm", "geglu" or "bias_add".
        why: the model and place it comes from, or what is awkward about it.
        shape: [B, C, H, W], [..., C] or [..., 2 D].
        groups: of group_norm.
        silu: whether SiLU follows group_norm.
        added: whether group_norm gets a shift and a bias, layer_norm a residual.
        offset: what all values are moved by, in standard deviations: cancellation shows.
    """

    op: str
    why: str
    shape: tuple[int, ...]
    groups: int = 32
    silu: bool = True
    added: bool = False
    offset: float = 0.0


@dataclass(frozen=True)
class StepResult:
    """Errors of one output of a case in one dtype."""

    case: StepCase
    dtype: str
    ours: Errors
    stock: Errors
    limit: Errors

    @property
    def right(self) -> bool:
        return self.ours.within(self.limit)


MODEL_CASES = (
    StepCase("group_norm", "sd15-512 norm2, 64x64", (2, 320, 64, 64), added=True),
    StepCase("group_norm", "sd15-512 up, after the skip", (2, 960, 64, 64)),
    StepCase("group_norm", "sd15-512 32x32", (2, 640, 32, 32), added=True),
    StepCase("group_norm", "sd15-512 up 32x32", (2, 1920, 32, 32)),
    StepCase("group_norm", "sd15-512 16x16", (2, 1280, 16, 16), added=True),
    StepCase("group_norm", "sd15-512 up 8x8", (2, 2560, 8, 8)),
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
)

AWKWARD_CASES = (
    StepCase("group_norm", "one pixel", (1, 64, 1, 1), groups=8),
    StepCase("group_norm", "one channel in each group", (2, 32, 3, 5), added=True),
    StepCase("group_norm", "not square, odd sizes", (3, 96, 7, 9), groups=32, added=True),
    StepCase("group_norm", "10 channels in each group, last block not full", (2, 320, 65, 67), added=True),
    StepCase("group_norm", "far from zero", (1, 64, 24, 24), groups=4, offset=30.0),
    StepCase("group_norm", "far from zero, in chunks", (1, 320, 72, 64), offset=30.0),
    StepCase("group_norm", "80 channels in each group, in chunks", (1, 160, 40, 40), groups=2),
    StepCase("layer_norm", "one row", (1, 1, 320), added=True),
    StepCase("layer_norm", "odd sizes, no power of two", (3, 7, 65), added=True),
    StepCase("layer_norm", "far from zero", (2, 9, 320), offset=30.0),
    StepCase("geglu", "odd sizes", (3, 11, 2 * 301)),
    StepCase("geglu", "large gates", (2, 5, 128), offset=10.0),
    StepCase("bias_add", "odd sizes", (3, 67, 5, 7)),
)


def check_case(
    case: StepCase, dtype: torch.dtype, device: torch.device, seed: int = 0, fault: float = 1.0
) -> Iterator[StepResult]:
    """Run one case; `fault` multiplies what comes in, to prove that the rule notices."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, offset: float = 0.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) + offset).to(device, dtype)

    with torch.no_grad():
        for ours, stock, expected in _outputs(case, normal, fault):
            stock_errors = errors_against(stock, expected)
            limit = allowed_errors([stock_errors], expected, dtype)
            name = str(dtype).removeprefix("torch.")
            yield StepResult(case, name, errors_against(ours, expected), stock_errors, limit)


def _outputs(case: StepCase, normal, fault: float):
    """Triples of our output, stock's and the exact one."""
    x = normal(*case.shape, offset=case.offset)
    if case.op == "geglu":
        hidden, gate = x.chunk(2, dim=-1)
        yield geglu(x * fault), hidden * F.gelu(gate), exact.geglu_reference(x)
    elif case.op == "layer_norm":
        yield from _layer_norms(case, x, normal, fault)
    elif case.op == "bias_add":
        x, residual = (image.to(memory_format=torch.channels_last) for image in (x, normal(*case.shape)))
        bias = normal(case.shape[1])
        stock = x + bias[:, None, None] + residual
        yield bias_add(x, bias * fault, residual), stock, exact.bias_add_reference(x, bias, residual)
    else:
        yield from _group_norms(case, x.to(memory_format=torch.channels_last), normal, fault)


def _layer_norms(case: StepCase, x: torch.Tensor, normal, fault: float):
    channels = case.shape[-1]
    weight, bias = normal(channels, offset=1.0), normal(channels)
    residual = normal(*case.shape) if case.added else None
    total, normed = exact.layer_norm_reference(x, weight, bias, 1e-5, residual=residual)
    stock_total = x if residual is None else x + residual
    stock = F.layer_norm(stock_total, (channels,), weight, bias, 1e-5)
    if residual is None:
        yield layer_norm(x, weight * fault, bias, 1e-5), stock, normed
    else:
        ours_total, ours = add_layer_norm(x, residual, weight * fault, bias, 1e-5)
        yield ours_total, stock_total, total
        yield ours, stock, normed


def _group_norms(case: StepCase, x: torch.Tensor, normal, fault: float):
    batch, channels = case.shape[:2]
    weight, bias = normal(channels, offset=1.0), normal(channels)
    shift, channel_bias = (normal(batch, channels), normal(channels)) if case.added else (None, None)
    stock = x
    if shift is not None and channel_bias is not None:
        stock = stock + channel_bias[:, None, None] + shift[:, :, None, None]
    stock = F.group_norm(stock, case.groups, weight, bias, 1e-5)
    stock = F.silu(stock) if case.silu else stock
    options = {"silu": case.silu, "shift": shift, "channel_bias": channel_bias}
    ours = group_norm(x, case.groups, weight * fault, bias, 1e-5, **options)
    yield ours, stock, exact.group_norm_reference(x, case.groups, weight, bias, 1e-5, **options)
