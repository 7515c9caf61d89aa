"""Weights of a 3×3 convolution of an image at twice its size, added up; device side: _summed_weights.py."""

from collections.abc import Callable

import torch

from diffopt_kernels.launcher import Pointer, PreparedLaunch, Recent
from diffopt_kernels.step.support import image_reasons
from diffopt_kernels.support import DTYPES, device_reasons

_PREPARED = Recent(512)
_BLOCK = 256  # channels of one program


def summed_weights(weight: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """What `upsampled_convolution` multiplies with: sums of up to four weights, added in float32 and rounded once.

    Traceable as one op, capturable in CUDA graphs.

    Args:
        weight: [N, C, 3, 3] in channels-last memory, float16, bfloat16 or float32.
        out: where to write, as the result; or None.

    Returns:
        [4, N, 2, 2, C], contiguous: for each corner (upper left, upper right, lower left, lower right) of a block of
        output pixels the weights of the 2×2 pixels that it sees.

    Raises:
        ValueError: an input this op can't take; the text names tensor, value and what is allowed.
    """
    if out is None:
        out = weight.new_empty(_shape(weight))
    _OP(weight, out)
    return out


def summed_weights_reasons(weight: torch.Tensor) -> list[str]:
    """Why `summed_weights` can't take a weight on any device: one text per reason, or an empty list."""
    reasons = image_reasons(weight, "weight")
    if not reasons and tuple(weight.shape[2:]) != (3, 3):
        reasons.append(f"weight.shape is {list(weight.shape)}; allowed: [N, C, 3, 3]")
    if weight.dtype not in DTYPES:
        reasons.append(f"weight.dtype is {weight.dtype}; allowed: {', '.join(str(dtype) for dtype in DTYPES)}")
    return reasons


def _shape(weight: torch.Tensor) -> tuple[int, ...]:
    return 4, weight.shape[0], 2, 2, weight.shape[1]


def _refuse(reasons: list[str]) -> None:
    if reasons:
        raise ValueError("; ".join(reasons))


def _run(weight, out) -> None:
    key = (weight.shape, weight.stride(), weight.dtype, weight.device, out.shape, out.stride(), out.dtype, out.device)
    prepared = _PREPARED.get(key)
    if prepared is None:
        with torch.no_grad():
            _refuse(device_reasons(weight.device) or summed_weights_reasons(weight) or _out_reasons(weight, out))
        prepared = _prepared(weight)
        _PREPARED.put(key, prepared)
    prepared(weight, out)


def _out_reasons(weight: torch.Tensor, out: torch.Tensor) -> list[str]:
    shape = _shape(weight)
    if out.shape == shape and out.is_contiguous() and (out.dtype, out.device) == (weight.dtype, weight.device):
        return []
    return [f"out is {list(out.shape)} {out.dtype} on {out.device}; allowed: {list(shape)}, contiguous, as weight"]


def _prepared(weight: torch.Tensor) -> Callable[..., None]:
    """Called with weight and out."""
    if weight.numel() == 0:
        return lambda *_: None
    from diffopt_kernels.step._summed_weights import summed_weights_kernel

    columns, channels = weight.shape[:2]
    arguments = {"weight_ptr": Pointer(0), "out_ptr": Pointer(1), "N": columns, "C": channels, "BLOCK": _BLOCK}
    grid = (columns, -(-channels // _BLOCK))
    return PreparedLaunch(summed_weights_kernel, grid, {**arguments, "num_warps": 1}, device=weight.device)


_LIBRARY = torch.library.Library("diffopt_kernels", "FRAGMENT")
_LIBRARY.define("summed_weights(Tensor weight, Tensor(a!) out) -> ()")
_LIBRARY.impl("summed_weights", _run, "CUDA")
_LIBRARY.impl("summed_weights", _run, "CPU")
torch.library.register_fake("diffopt_kernels::summed_weights", lambda weight, out: None, lib=_LIBRARY)
_OP = torch.ops.diffopt_kernels.summed_weights.default
