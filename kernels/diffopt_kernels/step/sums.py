"""A bias and, if there is one, the residual in one pass; device side: _rows.py."""

from collections.abc import Callable

import torch

from diffopt_kernels.launcher import Pointer, PreparedLaunch, Recent
from diffopt_kernels.step.support import common_reasons, image_reasons
from diffopt_kernels.step.tiles import block_width, tile_rows
from diffopt_kernels.support import device_reasons

_PREPARED = Recent(512)
_NUM_WARPS = 4
_TILES = 4  # of a program: as many loads of x, and of the residual, on their way in each thread
_TILES_OF_SMALL = (
    2  # where there are channels for wide tiles: images of so many are small ones, the GPU has to be filled
)


def bias_add(x: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
    """x + bias + residual, added in float32 and rounded once. Traceable as one op, capturable in CUDA graphs.

    Args:
        x: [B, C, H, W] in channels-last memory, float16, bfloat16 or float32.
        bias: [C], dtype and device of x.
        residual: [B, C, H, W] in channels-last memory, likewise, or None.

    Returns:
        [B, C, H, W] in channels-last memory.

    Raises:
        ValueError: an input this op can't take; the text names tensor, value and what is allowed.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        _refuse(x, bias, residual)
    return _OP(x, bias, residual)


def bias_add_reasons(x: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor | None = None) -> list[str]:
    """Why `bias_add` can't take these inputs on any device: one text per reason, or an empty list."""
    reasons = image_reasons(x) + ([] if residual is None else image_reasons(residual, "residual"))
    if reasons:
        return reasons
    if residual is not None and residual.shape != x.shape:  # its last stride is its width's: that is looked at already
        reasons.append(f"residual.shape is {list(residual.shape)}; allowed: {list(x.shape)}")
    return reasons + common_reasons(x, ("bias", bias, (x.shape[1],)), ("residual", residual, None))


def _refuse(x, bias, residual) -> None:
    reasons = bias_add_reasons(x, bias, residual)
    if reasons:
        raise ValueError("; ".join(reasons))


def _fake(x, bias, residual=None):
    with torch.no_grad():
        _refuse(x, bias, residual)
    return torch.empty_like(x, memory_format=torch.channels_last)


def _run(x, bias, residual=None):
    key = (
        *(x.shape, x.stride(), x.dtype, x.device, bias.shape, bias.stride(), bias.dtype),
        None if residual is None else (residual.shape, residual.stride(), residual.dtype, residual.device),
    )
    prepared = _PREPARED.get(key)
    if prepared is None:
        with torch.no_grad():
            _refuse(x, bias, residual)
        prepared = _prepared(x, has_residual=residual is not None)
        _PREPARED.put(key, prepared)
    out = torch.empty_like(x, memory_format=torch.channels_last)
    prepared(x, bias, out, *(() if residual is None else (residual,)))
    return out


def _prepared(x: torch.Tensor, *, has_residual: bool) -> Callable[..., None]:
    """The launch for x like this, called with x, bias, out and, if there is one, the residual."""
    reasons = device_reasons(x.device)
    if reasons:
        raise ValueError("; ".join(reasons))
    if x.numel() == 0:
        return lambda *_: None
    from diffopt_kernels.step import _rows as device

    channels = x.shape[1]
    count = x.numel() // channels
    width = block_width(channels)
    rows, blocks = tile_rows(width, _NUM_WARPS), -(-channels // width)
    tiles = _TILES if width < 256 else _TILES_OF_SMALL  # by channels alone: a new size compiles nothing
    arguments = {
        "x_ptr": Pointer(0),
        "bias_ptr": Pointer(1),
        "out_ptr": Pointer(2),
        "residual_ptr": Pointer(3) if has_residual else None,
        "M": count,
        "C": channels,
        "ROWS": rows,
        "COLS": width,
        "TILES": tiles,
        "num_warps": _NUM_WARPS,
    }
    grid = (blocks * -(-count // (rows * tiles)),)
    return PreparedLaunch(device.bias_add_kernel, grid, arguments, device=x.device)


_LIBRARY = torch.library.Library("diffopt_kernels", "FRAGMENT")
_LIBRARY.define("bias_add(Tensor x, Tensor bias, Tensor? residual=None) -> Tensor")
_LIBRARY.impl("bias_add", _run, "CUDA")
_LIBRARY.impl("bias_add", _run, "CPU")
torch.library.register_fake("diffopt_kernels::bias_add", _fake, lib=_LIBRARY)
_OP = torch.ops.diffopt_kernels.bias_add.default
