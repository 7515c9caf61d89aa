"""3×3 convolution of an image at twice its size, without that image, on Hopper GPUs; device side: _products.py.

Nearest neighbours make blocks of 2×2 equal pixels. Of the nine that a weight meets, only four differ, so the weights
that meet the same pixel are added up first, apart for each of the four corners of a block: four ninths of the work.
"""

import torch

from diffopt_kernels.launcher import Recent
from diffopt_kernels.step import products
from diffopt_kernels.step.support import common_reasons, empty_image, image_reasons

_PREPARED = Recent(512)


def upsampled_convolution(x: torch.Tensor, sums: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """3×3 convolution of x at twice its size with a border of one zero, and bias, summed in float32 and rounded once.

    `conv2d(interpolate(x, scale_factor=2, mode="nearest"), weight, bias, padding=1)` but for the rounding of summed
    weights. Traceable as one op, capturable in CUDA graphs.

    Args:
        x: [B, C, H, W] in channels-last memory, float16 or bfloat16, C a multiple of 64.
        sums: `summed_weights(weight)`, [4, N, 2, 2, C], dtype and device of x, N a multiple of 64 or 80.
        bias: [N], likewise.

    Returns:
        [B, N, 2 H, 2 W] in channels-last memory.

    Raises:
        ValueError: an input this op can't take; the text names tensor, value and what is allowed.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        _refuse(upsampled_convolution_reasons(x, sums, bias))
    return _OP(x, sums, bias)


def takes_upsampled(x: torch.Tensor, columns: int) -> bool:
    """Whether an image x could be convolved to `columns` channels here: known before weights are summed for it."""
    return x.dtype in products.DTYPES and not x.shape[1] % 64 and products.has_tiles(columns)


def upsampled_convolution_reasons(x: torch.Tensor, sums: torch.Tensor, bias: torch.Tensor) -> list[str]:
    """Why `upsampled_convolution` can't take these inputs on a Hopper GPU: one text per reason, or an empty list."""
    reasons = image_reasons(x)
    if reasons:
        return reasons
    batch, channels, height, width = x.shape
    columns = sums.shape[1] if sums.dim() == 5 else 0
    if tuple(sums.shape) != (4, columns, 2, 2, channels) or not sums.is_contiguous():
        reasons.append(f"sums is {list(sums.shape)}, strides {sums.stride()}; allowed: [4, N, 2, 2, {channels}]")
    elif not products.has_tiles(columns):
        reasons.append(f"sums.shape[1] is {columns}; allowed: multiples of 64 or 80")
    if not channels or channels % 64:
        reasons.append(f"x.shape[1] is {channels}; allowed: multiples of 64")
    if 4 * batch * height * width * max(columns, channels) >= 2**31:
        reasons.append(f"x is {list(x.shape)}; allowed: fewer than 2**31 elements at twice its size, in and out")
    others = (("bias", bias, (columns,)), ("sums", sums, None))
    return reasons + common_reasons(x, *others) + products.product_reasons(x, ("sums", sums), ("bias", bias))


def _refuse(reasons: list[str]) -> None:
    if reasons:
        raise ValueError("; ".join(reasons))


def _fake(x, sums, bias):
    with torch.no_grad():
        _refuse(upsampled_convolution_reasons(x, sums, bias))
    return empty_image(x, sums.shape[1], 2)


def _run(x, sums, bias):
    key = (products.look(x), products.look(sums), products.look(bias))
    prepared = _PREPARED.get(key)
    if prepared is None:
        with torch.no_grad():
            _refuse(products.product_device_reasons(x.device) or upsampled_convolution_reasons(x, sums, bias))
        prepared = products.whole_convolution(x, sums.shape[1], form=products.UPSAMPLED)
        _PREPARED.put(key, prepared)
    out = empty_image(x, sums.shape[1], 2)
    prepared(x, sums, bias, out, out)
    return out


_LIBRARY = torch.library.Library("diffopt_kernels", "FRAGMENT")
_LIBRARY.define("upsampled_convolution(Tensor x, Tensor sums, Tensor bias) -> Tensor")
_LIBRARY.impl("upsampled_convolution", _run, "CUDA")
_LIBRARY.impl("upsampled_convolution", _run, "CPU")  # refuses in words
torch.library.register_fake("diffopt_kernels::upsampled_convolution", _fake, lib=_LIBRARY)
_OP = torch.ops.diffopt_kernels.upsampled_convolution.default
