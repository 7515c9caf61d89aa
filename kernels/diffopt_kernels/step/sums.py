"""A convolution's bias and the residual in one pass; device side: _rows.py."""

from collections.abc import Callable

import torch

from diffopt_kernels.launcher import Pointer, PreparedLaunch, Recent
from diffopt_kernels.step.support import common_reasons, image_reasons
from diffopt_kernels.support import device_reasons

_PREPARED = Recent(512)
_ROWS, _COLUMNS = 32, 64


def bias_add(x: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """x + bias + residual, added in float32 and rounded once. Traceable as one op, capturable in CUDA graphs.

    Args:
        x: [B, C, H, W] in channels-last memory, float16, bfloat16 or float32.
        bias: [C], dtype and device of x.
        residual: [B, C, H, W] in channels-last memory, likewise.

    Returns:
        [B, C, H, W] in channels-last memory.

    Raises:
        ValueError: an input this op can't take; the text names tensor, value and what is allowed.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        _refuse(x, bias, residual)
    return _OP(x, bias, residual)


def bias_add_reasons(x: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor) -> list[str]:
    """Why `bias_add` can't take these inputs on any device: one text per reason, or an empty list."""
    reasons = image_reasons(x) + image_reasons(residual, "residual")
    if reasons:
        return reasons
    # The residual's last stride is its width's: only shape, dtype and device are left to compare.
    if residual.shape != x.shape or residual.dtype != x.dtype or residual.device != x.device:
        reasons.append(f"residual is {list(residual.shape)} {residual.dtype} on {residual.device}; allowed: as x")
    if residual.requires_grad and torch.is_grad_enabled():
        reasons.append("residual.requires_grad is True; allowed: False, or a call under torch.no_grad()")
    return reasons + common_reasons(x, ("bias", bias, (x.shape[1],)))


def _refuse(x, bias, residual) -> None:
    reasons = bias_add_reasons(x, bias, residual)
    if reasons:
        raise ValueError("; ".join(reasons))


def _fake(x, bias, residual):
    with torch.no_grad():
        _refuse(x, bias, residual)
    return torch.empty_like(x, memory_format=torch.channels_last)


def _run(x, bias, residual):
    key = (
        *(x.shape, x.stride(), x.dtype, x.device, bias.shape, bias.stride(), bias.dtype),
        *(residual.shape, residual.stride(), residual.dtype, residual.device),
    )
    prepared = _PREPARED.get(key)
    if prepared is None:
        with torch.no_grad():
            _refuse(x, bias, residual)
        prepared = _prepared(x)
        _PREPARED.put(key, prepared)
    out = torch.empty_like(x, memory_format=torch.channels_last)
    prepared(x, residual, bias, out)
    return out


def _prepared(x: torch.Tensor) -> Callable[..., None]:
    reasons = device_reasons(x.device)
    if reasons:
        raise ValueError("; ".join(reasons))
    if x.numel() == 0:
        return lambda *_: None
    from diffopt_kernels.step import _rows as device

    channels = x.shape[1]
    count = x.numel() // channels
    arguments = {
        "x_ptr": Pointer(0),
        "residual_ptr": Pointer(1),
        "bias_ptr": Pointer(2),
        "out_ptr": Pointer(3),
        "M": count,
        "C": channels,
        "ROWS": _ROWS,
        "COLS": _COLUMNS,
        "num_warps": 4,
    }
    grid = (-(-count // _ROWS), -(-channels // _COLUMNS))
    return PreparedLaunch(device.bias_add_kernel, grid, arguments, device=x.device)


_LIBRARY = torch.library.Library("diffopt_kernels", "FRAGMENT")
_LIBRARY.define("bias_add(Tensor x, Tensor bias, Tensor residual) -> Tensor")
_LIBRARY.impl("bias_add", _run, "CUDA")
_LIBRARY.impl("bias_add", _run, "CPU")
torch.library.register_fake("diffopt_kernels::bias_add", _fake, lib=_LIBRARY)
_OP = torch.ops.diffopt_kernels.bias_add.default
