"""The gated activation of transformer blocks; device side: _rows.py."""

from collections.abc import Callable

import torch

from diffopt_kernels.launcher import Pointer, PreparedLaunch, Recent
from diffopt_kernels.step.support import common_reasons, rows_reasons
from diffopt_kernels.support import device_reasons

_PREPARED = Recent(512)
_ROWS, _COLUMNS = 8, 256


def geglu(x: torch.Tensor) -> torch.Tensor:
    """hidden · gelu(gate) of the halves hidden, gate of x's last dimension, exact (erf) GELU, rounded once.

    Shazeer, GLU Variants Improve Transformer, 2020. Traceable as one op, capturable in CUDA graphs.

    Args:
        x: [M, 2 D] with rows any distance apart, or [..., 2 D] contiguous; float16, bfloat16 or float32.

    Returns:
        [..., D], contiguous.

    Raises:
        ValueError: an input this op can't take; the text names value and what is allowed.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        _refuse(x)
    return _OP(x)


def geglu_reasons(x: torch.Tensor) -> list[str]:
    """Why `geglu` can't take this input on any device: one text per reason, or an empty list."""
    reasons = rows_reasons(x)
    if not reasons and x.shape[-1] % 2:
        reasons.append(f"x.shape[-1] is {x.shape[-1]}; allowed: even numbers")
    return reasons + common_reasons(x)


def _refuse(x: torch.Tensor) -> None:
    reasons = geglu_reasons(x)
    if reasons:
        raise ValueError("; ".join(reasons))


def _empty_output(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


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

    count, columns = x.numel() // x.shape[-1], x.shape[-1] // 2
    arguments = {
        "x_ptr": Pointer(0),
        "out_ptr": Pointer(1),
        "stride_x": x.stride(-2) if count > 1 else 2 * columns,
        "M": count,
        "D": columns,
        "ROWS": _ROWS,
        "COLS": _COLUMNS,
        "num_warps": 4,
    }
    grid = (-(-count // _ROWS), -(-columns // _COLUMNS))
    return PreparedLaunch(device.geglu_kernel, grid, arguments, device=x.device)


_LIBRARY = torch.library.Library("diffopt_kernels", "FRAGMENT")
_LIBRARY.define("geglu(Tensor x) -> Tensor")
_LIBRARY.impl("geglu", _run, "CUDA")
_LIBRARY.impl("geglu", _run, "CPU")
torch.library.register_fake("diffopt_kernels::geglu", _fake, lib=_LIBRARY)
_OP = torch.ops.diffopt_kernels.geglu.default
