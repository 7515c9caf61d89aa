"""Images of twice the size, nearest neighbour; device side: _rows.py."""

from collections.abc import Callable

import torch

from diffopt_kernels.launcher import Pointer, PreparedLaunch, Recent
from diffopt_kernels.step.support import common_reasons, image_reasons
from diffopt_kernels.step.tiles import block_width, tile_rows
from diffopt_kernels.support import device_reasons

_PREPARED = Recent(512)
_NUM_WARPS = 4


def upsample(x: torch.Tensor) -> torch.Tensor:
    """Each pixel as two by two: `F.interpolate(x, scale_factor=2.0, mode="nearest")`, bit for bit.

    Traceable as one op, capturable in CUDA graphs.

    Args:
        x: [B, C, H, W] in channels-last memory, float16, bfloat16 or float32, of any number of elements.

    Returns:
        [B, C, 2 H, 2 W] in channels-last memory.

    Raises:
        ValueError: an input this op can't take; the text names value and what is allowed.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        _refuse(x)
    return _OP(x)


def upsample_reasons(x: torch.Tensor) -> list[str]:
    """Why `upsample` can't take this input on any device: one text per reason, or an empty list."""
    return image_reasons(x) + common_reasons(x)


def _refuse(x: torch.Tensor) -> None:
    reasons = upsample_reasons(x)
    if reasons:
        raise ValueError("; ".join(reasons))


def _empty_output(x: torch.Tensor) -> torch.Tensor:
    batch, channels, height, width = x.shape
    size = (batch, channels, 2 * height, 2 * width)
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _fake(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        _refuse(x)
    return _empty_output(x)


def _run(x: torch.Tensor) -> torch.Tensor:
    key = (x.shape, x.stride(), x.dtype, x.device)
    prepared = _PREPARED.get(key)
    if prepared is None:
        with torch.no_grad():
            _refuse(x)
        prepared = _prepared(x)
        _PREPARED.put(key, prepared)
    out = _empty_output(x)
    prepared(x, out)
    return out


def _prepared(x: torch.Tensor) -> Callable[..., None]:
    reasons = device_reasons(x.device)
    if reasons:
        raise ValueError("; ".join(reasons))
    if x.numel() == 0:
        return lambda *_: None
    from diffopt_kernels.step import _rows as device

    batch, channels, height, width = x.shape
    columns = block_width(channels)
    rows = tile_rows(columns, _NUM_WARPS)
    arguments = {
        "x_ptr": Pointer(0),
        "out_ptr": Pointer(1),
        "W": width,
        "C": channels,
        "ROWS": rows,
        "COLS": columns,
        "num_warps": _NUM_WARPS,
    }
    grid = (batch * height * -(-width // rows) * -(-channels // columns),)
    return PreparedLaunch(device.upsample_kernel, grid, arguments, device=x.device)


_LIBRARY = torch.library.Library("diffopt_kernels", "FRAGMENT")
_LIBRARY.define("upsample(Tensor x) -> Tensor")
_LIBRARY.impl("upsample", _run, "CUDA")
_LIBRARY.impl("upsample", _run, "CPU")
torch.library.register_fake("diffopt_kernels::upsample", _fake, lib=_LIBRARY)
_OP = torch.ops.diffopt_kernels.upsample.default
