"""Attention's kernels with their arguments filled in: what one call shares with the next of the same layout."""

import math
from typing import Any

import torch

from diffopt_kernels.launch import AttentionLaunch
from diffopt_kernels.launcher import Pointer, PreparedLaunch, Tiles

Q, K, V, OUT, MASK = range(5)
"""The order of the tensors that a prepared launch is called with; without a mask the first four."""

_LOG2_E = math.log2(math.e)


def prepared_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, launch: AttentionLaunch, mask: torch.Tensor | None
) -> PreparedLaunch:
    """One chosen launch for tensors laid out like these; call it with (q, k, v, out) and the mask if there is one.

    Args:
        q: [B, N_q, H, D]; k and v [B, N_k, H, D], as `attention` takes them, unchecked.
        k: see q.
        v: see q.
        scale: of the scores.
        launch: of the pointers kernel where there is a mask or an address or stride is no multiple of 16 bytes.
        mask: [B, H, N_q, N_k] by its strides, bytes or floats; or None.
    """
    if mask is not None and launch.kernel != "pointers":
        raise ValueError(f"a mask was given with {launch.label}; allowed: launches of the pointers kernel")
    if launch.kernel in ("hopper", "short"):
        from diffopt_kernels.attention_gluon import prepared_gluon_attention

        return prepared_gluon_attention(q, k, v, scale, launch)
    from diffopt_kernels import _attention_fwd as device  # here, so that importing the package needs no triton

    batch, n_q, heads, head_dim = q.shape
    arguments = {
        "o_ptr": Pointer(OUT),
        "N_q": n_q,
        "N_k": k.shape[1],
        "H": heads,
        "D": head_dim,
        "PART_0": launch.parts[0],
        "PART_1": launch.parts[1],
        "BLOCK_M": launch.block_m,
        "BLOCK_N": launch.block_n,
        "WHOLE_KEY_TILES": k.shape[1] % launch.block_n == 0,
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
    }
    if launch.kernel == "descriptors":
        kernel = device.attention_descriptors_kernel
        arguments |= {"scale_log2": scale * _LOG2_E, **_tiles(q, k, v, launch)}
    else:
        kernel = device.attention_pointers_kernel
        arguments |= {"scale": scale * _LOG2_E if mask is None else scale, **_pointers(q, k, v)}
        arguments |= {} if mask is None else _mask_arguments(mask)
    grid = (-(-n_q // launch.block_m) * batch * heads,)
    return PreparedLaunch(kernel, grid, arguments, device=q.device)


def is_aligned(x: torch.Tensor) -> bool:
    """Whether tensor descriptors can address x [B, N, H, D]: 16-byte steps everywhere, and no broadcast dimension."""
    broadcast = (stride == 0 for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1)
    return _in_16_byte_steps(x) and not any(broadcast)


def _in_16_byte_steps(x: torch.Tensor) -> bool:
    unit = 16 // x.element_size()
    steps = (stride for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True) if size > 1)
    return x.data_ptr() % 16 == 0 and all(stride % unit == 0 for stride in steps)


def _pointers(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, Any]:
    unit = 16 // q.element_size() if all(_in_16_byte_steps(x) for x in (q, k, v)) else 1
    arguments: dict[str, Any] = {"q_ptr": Pointer(Q), "k_ptr": Pointer(K), "v_ptr": Pointer(V), "UNIT": unit}
    for name, x in (("q", q), ("k", k), ("v", v)):
        for letter, stride in zip("bnh", x.stride()[:3], strict=True):
            arguments[f"stride_{name}{letter}"] = stride // unit
    return arguments


def _tiles(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, launch: AttentionLaunch) -> dict[str, Tiles | None]:
    tiles = {}
    for i, (name, x, rows) in enumerate((("q", q, launch.block_m), ("k", k, launch.block_n), ("v", v, launch.block_n))):
        for part, columns in enumerate(launch.parts):
            tiles[f"{name}{part}_desc"] = head_tiles(i, x, rows, columns) if columns else None
    return tiles


def head_tiles(tensor: int, x: torch.Tensor, rows: int, columns: int, layout: Any = None) -> Tiles:
    """x [B, N, H, D] as [B, H, N, D] in tiles [1, 1, rows, columns]; `layout` as `Tiles` takes it."""
    batch, n, heads, head_dim = x.shape
    # A dimension of size 1 may carry any stride; the hardware wants a legal one.
    strides = zip(x.shape[:3], x.stride()[:3], strict=True)
    stride_b, stride_n, stride_h = (stride if size > 1 else head_dim for size, stride in strides)
    shape, steps = (batch, heads, n, head_dim), (stride_b, stride_h, stride_n, 1)
    return Tiles(tensor, shape, steps, (1, 1, rows, columns), layout)


def _mask_arguments(mask: torch.Tensor) -> dict[str, Any]:
    """What the pointers kernel is told of a mask [B, H, N_q, N_k]; a broadcast dimension has stride 0."""
    stride_b, stride_h, stride_m, stride_n = mask.stride()
    return {
        "mask_ptr": Pointer(MASK),
        "stride_mb": stride_b,
        "stride_mh": stride_h,
        "stride_mm": stride_m,
        "stride_mn": stride_n,
        "MASK_PER_QUERY": mask.shape[2] > 1 and stride_m != 0,
        "MASK_KEYS_ADJACENT": stride_n == 1,
    }
