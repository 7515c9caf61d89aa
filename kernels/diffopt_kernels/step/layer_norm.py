"""LayerNorm of rows, with the residual's sum before it; device side: _rows.py."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from diffopt_kernels.launcher import Pointer, PreparedLaunch, Recent
from diffopt_kernels.step.support import common_reasons, rows_reasons
from diffopt_kernels.step.tiles import VALUES, row_tiles
from diffopt_kernels.support import device_reasons

_PREPARED = Recent(512)
MAX_COLUMNS = 8192
_TILE = 512  # elements: near the fastest on an H100 at 320, 640 and 1280 columns, with 2, 4 and 4 warps


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """LayerNorm over the last dimension; statistics in float32.

    Ba et al., Layer Normalization, 2016. Traceable as one op, capturable in CUDA graphs.

    Args:
        x: [M, C] with rows any distance apart, or [..., C] contiguous; float16, bfloat16 or float32, C at most 8192.
        weight: [C], dtype and device of x. bias: likewise.
        eps: added to the variance.

    Returns:
        As x, contiguous.

    Raises:
        ValueError: an input this op can't take; the text names tensor, value and what is allowed.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        _refuse(x, None, weight, bias)
    return _NORM(x, weight, bias, eps)


def add_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    sum_bias: torch.Tensor | None = None,
    x_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x + x_bias + residual, and its LayerNorm, which is taken from the sum before that is rounded.

    Args and errors as `layer_norm`; residual: contiguous, with x's shape, dtype and device. sum_bias: [C], added to the
    sum that is returned but not to what is normalized: the bias of a product that will be added to that sum. x_bias:
    [C], in both: the bias of the product that made x, which then needs no epilogue.

    Returns:
        The sum (with sum_bias) and the norm, both contiguous.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        _refuse(x, residual, weight, bias, sum_bias, x_bias)
    return _ADD_NORM(x, residual, weight, bias, eps, sum_bias, x_bias)


def layer_norm_reasons(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    sum_bias: torch.Tensor | None = None,
    x_bias: torch.Tensor | None = None,
) -> list[str]:
    """Why `add_layer_norm` (or `layer_norm`, without residual) can't take these inputs; an empty list if it can."""
    reasons = rows_reasons(x)
    if reasons:
        return reasons
    columns = x.shape[-1]
    if not 1 <= columns <= MAX_COLUMNS:
        reasons.append(f"x.shape[-1] is {columns}; allowed: 1 to {MAX_COLUMNS}")
    if residual is not None and not residual.is_contiguous():
        reasons.append(f"residual has strides {residual.stride()}; allowed: contiguous")
    return reasons + common_reasons(
        x,
        ("weight", weight, (columns,)),
        ("bias", bias, (columns,)),
        ("residual", residual, tuple(x.shape)),
        ("sum_bias", sum_bias, (columns,)),
        ("x_bias", x_bias, (columns,)),
    )


def _refuse(x, residual, weight, bias, sum_bias=None, x_bias=None) -> None:
    reasons = layer_norm_reasons(x, residual, weight, bias, sum_bias, x_bias)
    if reasons:
        raise ValueError("; ".join(reasons))


@dataclass(frozen=True)
class LayerNormLaunch:
    """How rows are cut into programs.

    Attributes:
        rows: of one program, a power of two.
        width: columns of one tile, a power of two.
        tiles: of a row; together at least its columns.
        num_warps: of one program.
    """

    rows: int
    width: int
    tiles: int
    num_warps: int


def layer_norm_launch(columns: int) -> LayerNormLaunch:
    """The launch for rows of so many columns, the same for any number of them, so that none compiles anew."""
    width, tiles = row_tiles(columns)
    num_warps = 2 if width == 64 else max(4, width // (32 * VALUES))
    return LayerNormLaunch(max(1, _TILE // width), width, tiles, num_warps)


def _launched(
    x, residual, weight, bias, eps: float, sum_bias=None, x_bias=None
) -> tuple[torch.Tensor | None, torch.Tensor]:
    key = (
        *(eps, x.shape, x.stride(), x.dtype, x.device),
        *(weight.shape, weight.stride(), weight.dtype, bias.shape, bias.stride(), bias.dtype),
        None if residual is None else (residual.shape, residual.stride(), residual.dtype, residual.device),
        None if sum_bias is None else (sum_bias.shape, sum_bias.stride(), sum_bias.dtype, sum_bias.device),
        None if x_bias is None else (x_bias.shape, x_bias.stride(), x_bias.dtype, x_bias.device),
    )
    prepared = _PREPARED.get(key)
    if prepared is None:
        with torch.no_grad():
            _refuse(x, residual, weight, bias, sum_bias, x_bias)
        prepared = _prepared(
            x, residual is not None, eps, has_sum_bias=sum_bias is not None, has_x_bias=x_bias is not None
        )
        _PREPARED.put(key, prepared)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if residual is None:
        prepared(x, out, weight, bias)
        return None, out
    total = torch.empty_like(out)
    extras = (extra for extra in (sum_bias, x_bias) if extra is not None)
    prepared(x, out, weight, bias, residual, total, *extras)
    return total, out


def _prepared(
    x: torch.Tensor,
    has_residual: bool,
    eps: float,
    *,
    has_sum_bias: bool = False,
    has_x_bias: bool = False,
    launch: LayerNormLaunch | None = None,
) -> Callable[..., None]:
    """The launch for x like this, called with x, out, weight, bias; with a residual also that, its sum and the biases.

    The biases are sum_bias and x_bias, in this order and each only if there is one. `launch` if not the usual one.
    """
    reasons = device_reasons(x.device)
    if reasons:
        raise ValueError("; ".join(reasons))
    if x.numel() == 0:
        return lambda *_: None
    from diffopt_kernels.step import _rows as device

    count, columns = x.numel() // x.shape[-1], x.shape[-1]
    launch = launch or layer_norm_launch(columns)
    arguments = {
        "x_ptr": Pointer(0),
        "out_ptr": Pointer(1),
        "weight_ptr": Pointer(2),
        "bias_ptr": Pointer(3),
        "residual_ptr": Pointer(4) if has_residual else None,
        "sum_ptr": Pointer(5) if has_residual else None,
        "sum_bias_ptr": Pointer(6) if has_sum_bias else None,
        "x_bias_ptr": Pointer(6 + has_sum_bias) if has_x_bias else None,
        "eps": eps,
        "stride_x": x.stride(-2) if count > 1 else columns,
        "M": count,
        "C": columns,
        "ROWS": launch.rows,
        "COLS": launch.width,
        "TILES": launch.tiles,
        "num_warps": launch.num_warps,
    }
    return PreparedLaunch(device.layer_norm_kernel, (-(-count // launch.rows),), arguments, device=x.device)


def _norm(x, weight, bias, eps):
    return _launched(x, None, weight, bias, eps)[1]


def _add_norm(x, residual, weight, bias, eps, sum_bias=None, x_bias=None):
    return _launched(x, residual, weight, bias, eps, sum_bias, x_bias)


def _norm_fake(x, weight, bias, eps):
    with torch.no_grad():
        _refuse(x, None, weight, bias)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _add_norm_fake(x, residual, weight, bias, eps, sum_bias=None, x_bias=None):
    with torch.no_grad():
        _refuse(x, residual, weight, bias, sum_bias, x_bias)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    return out, torch.empty_like(out)


_LIBRARY = torch.library.Library("diffopt_kernels", "FRAGMENT")
_LIBRARY.define("layer_norm(Tensor x, Tensor weight, Tensor bias, float eps) -> Tensor")
_LIBRARY.define(
    "add_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps, Tensor? sum_bias=None, "
    "Tensor? x_bias=None) -> (Tensor, Tensor)"
)
for _device in ("CUDA", "CPU"):
    _LIBRARY.impl("layer_norm", _norm, _device)
    _LIBRARY.impl("add_layer_norm", _add_norm, _device)
torch.library.register_fake("diffopt_kernels::layer_norm", _norm_fake, lib=_LIBRARY)
torch.library.register_fake("diffopt_kernels::add_layer_norm", _add_norm_fake, lib=_LIBRARY)
_NORM = torch.ops.diffopt_kernels.layer_norm.default
_ADD_NORM = torch.ops.diffopt_kernels.add_layer_norm.default
