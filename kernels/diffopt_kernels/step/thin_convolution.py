"""3×3 convolutions with few channels in or out, a model's first and last; device side: _thin_convolution.py."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch

from diffopt_kernels.launcher import Pointer, PreparedLaunch, Recent
from diffopt_kernels.step.support import common_reasons, empty_image, image_reasons
from diffopt_kernels.support import device_reasons

FEW = 16  # channels: a UNet has 4 to 16 of latents, a picture 3
_PREPARED = Recent(128)
_MULTIPROCESSORS = 132  # an H100's


def thin_convolution(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """3×3 convolution with a border of one zero and bias, summed in float32 and rounded once.

    `torch.nn.functional.conv2d(x, weight, bias, padding=1)`, float32 without TF32. Traceable as one op, capturable in
    CUDA graphs.

    Args:
        x: [B, C, H, W], float16, bfloat16 or float32; of up to 16 channels with any strides, of more in channels-last
            memory.
        weight: [N, C, 3, 3] in channels-last memory, dtype and device of x; C or N is at most 16.
        bias: [N], likewise.

    Returns:
        [B, N, H, W] in channels-last memory.

    Raises:
        ValueError: an input this op can't take; the text names tensor, value and what is allowed.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        _refuse(x, weight, bias)
    return _OP(x, weight, bias)


def is_thin(channels: int, columns: int) -> bool:
    """Whether a convolution of so many channels in and out is one for `thin_convolution`."""
    return 0 < min(channels, columns) <= FEW


def thin_convolution_reasons(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> list[str]:
    """Why `thin_convolution` can't take these inputs on any device: one text per reason, or an empty list."""
    reasons = [] if x.dim() == 4 else [f"x has {x.dim()} dimensions; allowed: [B, C, H, W]"]
    reasons += image_reasons(weight, "weight")
    if reasons:
        return reasons
    batch, channels, height, width = x.shape
    columns = weight.shape[0]
    if tuple(weight.shape[1:]) != (channels, 3, 3):
        reasons.append(f"weight.shape is {list(weight.shape)}; allowed: [N, {channels}, 3, 3]")
    if not is_thin(channels, columns):
        reasons.append(f"channels in and out are {channels} and {columns}; allowed: 1 to {FEW} in or out")
    elif channels > FEW:
        reasons += image_reasons(x)
    if batch * height * width * max(columns, channels) >= 2**31:
        reasons.append(f"x is {list(x.shape)}; allowed: fewer than 2**31 elements, in and out")
    elif sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) >= 2**31:
        reasons.append(f"x has strides {x.stride()}; allowed: within 2**31 elements of memory")
    return reasons + common_reasons(x, ("bias", bias, (columns,)), ("weight", weight, None))


def _refuse(x, weight, bias) -> None:
    reasons = thin_convolution_reasons(x, weight, bias)
    if reasons:
        raise ValueError("; ".join(reasons))


@dataclass(frozen=True)
class ThinLaunch:
    """How one convolution is cut into programs.

    Attributes:
        kernel: "gather" for few channels in, "shift" for few channels out.
        tile: high and wide of a program's pixels, powers of two; those of "gather" are in a row, of "shift" the outer
            ones are read only.
        depth: of one product: of "gather" all neighbours' channels, padded; of "shift" channels of one step.
        columns: channels out of one product, padded; "shift" has 16 columns for each.
        blocks: of "gather": products of other columns that a program makes of the same pixels.
        num_warps: of one program.
        num_stages: steps that are loaded ahead.
    """

    kernel: Literal["gather", "shift"]
    tile: tuple[int, int]
    depth: int
    columns: int
    blocks: int = 1
    num_warps: int = 4
    num_stages: int = 3


@lru_cache(maxsize=512)
def thin_convolution_launch(pixels: int, channels: int, columns: int, *, float32: bool = False) -> ThinLaunch:
    """The launch for so many pixels, channels in and channels out; predicted, not measured yet."""
    if channels > FEW:
        return _shift_launch(channels, _power_of_two(columns), float32)
    depth = max(16, _power_of_two(9 * channels))
    of_block = min(32 if float32 or depth > 128 else 64, max(16, _power_of_two(columns)))
    tile = 32 if float32 or depth > 128 else 64 if depth > 64 else 128
    # What was gathered serves all columns, where that leaves enough programs; in float32 registers don't suffice.
    together = not float32 and 2 * -(-pixels // tile) >= 3 * _MULTIPROCESSORS
    blocks = -(-columns // of_block) if together else 1
    return ThinLaunch("gather", (1, tile), depth, of_block, blocks)


def _shift_launch(channels: int, columns: int, float32: bool) -> ThinLaunch:
    """As wide as registers and an AMD GPU's 64 KiB of shared memory allow."""
    if float32:
        return ThinLaunch("shift", (8, 8) if columns <= 4 else (4, 8), 32, columns, num_stages=2)
    return ThinLaunch("shift", (8, 8), 64 if channels > 32 and columns <= 8 else 32, columns)


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def _fake(x, weight, bias):
    with torch.no_grad():
        _refuse(x, weight, bias)
    return empty_image(x, weight.shape[0])


def _run(x, weight, bias):
    key = (
        *(x.shape, x.stride(), x.dtype, x.device, weight.shape, weight.stride(), weight.dtype, weight.device),
        *(bias.shape, bias.stride(), bias.dtype, bias.device),
    )
    prepared = _PREPARED.get(key)
    if prepared is None:
        with torch.no_grad():
            _refuse(x, weight, bias)
        prepared = _prepared(x, weight)
        _PREPARED.put(key, prepared)
    out = empty_image(x, weight.shape[0])
    prepared(x, weight, bias, out)
    return out


def _prepared(x: torch.Tensor, weight: torch.Tensor) -> Callable[..., None]:
    reasons = device_reasons(x.device)
    if reasons:
        raise ValueError("; ".join(reasons))
    if x.numel() == 0:
        return lambda *_: None
    batch, channels, height, width = x.shape
    float32 = x.dtype == torch.float32
    launch = thin_convolution_launch(batch * height * width, channels, weight.shape[0], float32=float32)
    return prepared_thin_convolution(x, weight.shape[0], launch)


def prepared_thin_convolution(x: torch.Tensor, columns: int, launch: ThinLaunch) -> PreparedLaunch:
    """A launch for images laid out like x [B, C, H, W], not empty; called with x, weight, bias and out."""
    from diffopt_kernels.step import _thin_convolution as device

    batch, channels, height, width = x.shape
    high, wide = launch.tile
    arguments: dict[str, Any] = {
        "x_ptr": Pointer(0),
        "weight_ptr": Pointer(1),
        "bias_ptr": Pointer(2),
        "out_ptr": Pointer(3),
        "H": height,
        "W": width,
        "C": channels,
        "N": columns,
        "DEPTH": launch.depth,
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
    }
    if launch.kernel == "shift":
        arguments |= {"N_PAD": launch.columns, "HIGH": high, "WIDE": wide}
        tiles = batch * -(-height // (high - 2)) * -(-width // (wide - 2))
        return PreparedLaunch(device.thin_convolution_shift_kernel, (tiles,), arguments, device=x.device)
    arguments |= dict(zip(("stride_b", "stride_c", "stride_h", "stride_w"), x.stride(), strict=True))
    arguments |= {"M": batch * height * width, "PIXELS": wide, "COLUMNS": launch.columns}
    # A float32 launch has one at any size, in 16 bits one number or the other: those share a kernel.
    arguments["BLOCKS"] = None if x.dtype == torch.float32 and launch.blocks == 1 else launch.blocks
    grid = (-(-batch * height * width // wide), -(-columns // (launch.columns * launch.blocks)))
    return PreparedLaunch(device.thin_convolution_gather_kernel, grid, arguments, device=x.device)


_LIBRARY = torch.library.Library("diffopt_kernels", "FRAGMENT")
_LIBRARY.define("thin_convolution(Tensor x, Tensor weight, Tensor bias) -> Tensor")
_LIBRARY.impl("thin_convolution", _run, "CUDA")
_LIBRARY.impl("thin_convolution", _run, "CPU")
torch.library.register_fake("diffopt_kernels::thin_convolution", _fake, lib=_LIBRARY)
_OP = torch.ops.diffopt_kernels.thin_convolution.default
