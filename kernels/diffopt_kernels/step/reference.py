"""One plain PyTorch reference per op: the specification, and what every check compares with."""

import math

import torch


def group_norm_reference(
    x: torch.Tensor,
    groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    *,
    silu: bool = False,
    shift: torch.Tensor | None = None,
    channel_bias: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """GroupNorm of x + shift + channel_bias, then SiLU if asked for.

    Wu and He, Group Normalization, 2018, section 3; variance is biased, as there.

    Args:
        x: [B, C, H, W]. groups: a divisor of C. weight, bias: [C].
        shift: [B, C], added to every pixel. channel_bias: [C], likewise.
        dtype: what everything is computed in and returned as.
    """
    x = x.to(dtype)
    if shift is not None:
        x = x + shift.to(dtype)[:, :, None, None]
    if channel_bias is not None:
        x = x + channel_bias.to(dtype)[:, None, None]
    grouped = x.reshape(x.shape[0], groups, -1)
    centred = grouped - grouped.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    out = normed.reshape(x.shape) * weight.to(dtype)[:, None, None] + bias.to(dtype)[:, None, None]
    return out / (1 + torch.exp(-out)) if silu else out


def layer_norm_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
    x_bias: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x + x_bias + residual and its LayerNorm over the last dimension; Ba et al., Layer Normalization, 2016, section 3.

    Args:
        x: [..., C]. weight, bias: [C]. residual: as x, or None. x_bias: [C] or None.
    """
    total = x.to(dtype)
    for added in (x_bias, residual):
        total = total if added is None else total + added.to(dtype)
    centred = total - total.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return total, normed * weight.to(dtype) + bias.to(dtype)


def geglu_reference(x: torch.Tensor, *, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """hidden · gelu(gate) with hidden, gate = the halves of x [..., 2 D], exact (erf) GELU; out [..., D].

    Shazeer, GLU Variants Improve Transformer, 2020, section 2.
    """
    hidden, gate = x.to(dtype).chunk(2, dim=-1)
    return hidden * gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2)))


def bias_add_reference(
    x: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor | None = None, *, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """x + bias + residual; x and residual [B, C, H, W], bias [C]."""
    out = x.to(dtype) + bias.to(dtype)[:, None, None]
    return out if residual is None else out + residual.to(dtype)


def upsample_reference(x: torch.Tensor, *, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Each pixel of x [B, C, H, W] as two by two, [B, C, 2 H, 2 W]."""
    return x.to(dtype).repeat_interleave(2, 2).repeat_interleave(2, 3)


def convolution_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | None = None,
    *,
    stride: int = 1,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """3×3 convolution, border of one zero; x [B, C, H, W], weight [N, C, 3, 3], bias [N], residual as the result."""
    neighbours = torch.nn.functional.unfold(x.to(dtype), 3, padding=1, stride=stride)  # [B, 9 C, pixels]
    sizes = [(size - 1) // stride + 1 for size in x.shape[2:]]
    out = (weight.to(dtype).flatten(1) @ neighbours).unflatten(2, sizes) + bias.to(dtype)[:, None, None]
    return out if residual is None else out + residual.to(dtype)


def summed_weights_reference(weight: torch.Tensor, *, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """[4, N, 2, 2, C] of a weight [N, C, 3, 3]: what a pixel of each corner of a block of 2×2 equal ones sees.

    In its upper row (and left column) the middle and the last weight meet the same pixel, in its lower row the first
    and the middle one.
    """
    w = weight.to(dtype)
    rows = [(w[:, :, 0], w[:, :, 1] + w[:, :, 2]), (w[:, :, 0] + w[:, :, 1], w[:, :, 2])]  # each [N, C, 3]
    corners = []
    for seen in rows:
        columns = [((r[..., 0], r[..., 1] + r[..., 2]), (r[..., 0] + r[..., 1], r[..., 2])) for r in seen]
        for right in range(2):
            corners.append(torch.stack([torch.stack(row[right], 1) for row in columns], 1))
    return torch.stack(corners)


def geglu_product_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """GEGLU of x weightᵀ + bias; x [..., C], weight [2 D, C], bias [2 D]; out [..., D]."""
    return geglu_reference(x.to(dtype) @ weight.to(dtype).T + bias.to(dtype), dtype=dtype)
