"""Attention for [B, N, H, D] tensors; device side: _attention_fwd.py."""

import math
from functools import lru_cache
from typing import Any

import torch

from diffopt_kernels.launch import AttentionLaunch, LaunchKey, attention_launch
from diffopt_kernels.support import compute_capability, device_reasons, input_reasons

_LOG2_E = math.log2(math.e)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """softmax(scale · q kᵀ + mask) v per batch row and head, without materializing the scores.

    Self- and cross-attention, forward only. Exact: the error against float64 is that of PyTorch's own backends
    (selfcheck.py holds the rule). Traceable by torch.compile as one op and capturable in CUDA graphs.

    Args:
        q: [B, N_q, H, D], float16, bfloat16 or float32 (IEEE products), D a multiple of 8 from 8 to 256. The first
            three strides are free, the last is 1. B may be 0, N_q is at least 1.
        k: [B, N_k, H, D], same dtype and device; N_k is at least 1.
        v: [B, N_k, H, D], same dtype and device.
        mask: None, or broadcastable to [B, H, N_q, N_k] with any strides (never copied): bool, True where a query
            attends to a key; or q's dtype or float32, added to the scaled scores. A query that attends to no key gets
            zeros, as from PyTorch's SDPA. A masked call never takes the fastest kernels.
        scale: factor of the scores, above zero; D ** -0.5 if None.

    Returns:
        [B, N_q, H, D], contiguous, so that reshaping to [B, N_q, H · D] moves nothing.

    Raises:
        ValueError: an input this op can't take; the text names tensor, value and what is allowed.
    """
    reasons = input_reasons(q, k, v, mask)
    if reasons:
        raise ValueError("; ".join(reasons))
    if scale is None:
        scale = q.shape[3] ** -0.5
    elif not 0 < scale < math.inf:
        raise ValueError(f"scale is {scale}; allowed: a finite number above zero")
    return torch.ops.diffopt_kernels.attention(q, k, v, scale, mask)


def _attention_fake(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, mask: torch.Tensor | None = None
) -> torch.Tensor:
    return q.new_empty(q.shape)


def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, mask: torch.Tensor | None = None
) -> torch.Tensor:
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    batch, n_q, heads, head_dim = q.shape
    name, capability = _gpu(q.device)
    launch = attention_launch(
        LaunchKey(batch, n_q, k.shape[1], heads, head_dim),
        float32=q.dtype == torch.float32,
        aligned=mask is None and is_aligned(q) and is_aligned(k) and is_aligned(v),
        capability=capability,
        device_name=name,
    )
    return launch_attention(q, k, v, out, scale, launch, mask)


@lru_cache(maxsize=64)
def _gpu(device: torch.device) -> tuple[str, tuple[int, int]]:
    """Name and compute capability (of an AMD GPU: 0.0); the interpreter does all that a Hopper GPU does."""
    reasons = device_reasons(device)
    if reasons:
        raise ValueError("; ".join(reasons))
    if device.type != "cuda":
        return "", (9, 0)
    return torch.cuda.get_device_name(device), compute_capability(device)


def is_aligned(x: torch.Tensor) -> bool:
    """Whether tensor descriptors can address x [B, N, H, D]: 16-byte steps everywhere, and no broadcast dimension."""
    broadcast = (stride == 0 for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1)
    return _in_16_byte_steps(x) and not any(broadcast)


def _in_16_byte_steps(x: torch.Tensor) -> bool:
    unit = 16 // x.element_size()
    steps = (stride for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True) if size > 1)
    return x.data_ptr() % 16 == 0 and all(stride % unit == 0 for stride in steps)


def launch_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    scale: float,
    launch: AttentionLaunch,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run one chosen launch into `out` [B, N_q, H, D], contiguous; inputs as `attention` takes them, unchecked.

    For checks and tuning, which need a given launch or a prepared output; everything else calls `attention`. Only
    launches of the pointers kernel take a mask.
    """
    batch, n_q, heads, head_dim = q.shape
    grid = (-(-n_q // launch.block_m) * batch * heads,)
    constants = {
        "D": head_dim,
        "PART_0": launch.parts[0],
        "PART_1": launch.parts[1],
        "BLOCK_M": launch.block_m,
        "BLOCK_N": launch.block_n,
        "WHOLE_KEY_TILES": k.shape[1] % launch.block_n == 0,
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
    }
    if mask is not None:
        if launch.kernel != "pointers":
            raise ValueError(f"a mask was given with {launch.label}; allowed: launches of the pointers kernel")
        constants |= _mask_arguments(mask.expand(batch, heads, n_q, k.shape[1]))
    sizes = (scale * _LOG2_E if mask is None else scale, n_q, k.shape[1], heads)
    if q.device.type == "cuda" and q.device.index != torch.cuda.current_device():
        with torch.cuda.device(q.device):
            _run(launch, grid, q, k, v, out, sizes, constants)
    else:
        _run(launch, grid, q, k, v, out, sizes, constants)
    return out


def _run(launch, grid, q, k, v, out, sizes, constants) -> None:
    from diffopt_kernels import _attention_fwd as device  # here, so that importing the package needs no triton

    if launch.kernel == "descriptors":
        tiles = [
            _descriptor(x, rows, part)
            for x, rows in ((q, launch.block_m), (k, launch.block_n), (v, launch.block_n))
            for part in launch.parts
        ]
        run: Any = device.attention_descriptors_kernel[grid]
        run(*tiles, out, *sizes, **constants)
    else:
        unit = 16 // q.element_size() if all(_in_16_byte_steps(x) for x in (q, k, v)) else 1
        strides = [stride // unit for x in (q, k, v) for stride in x.stride()[:3]]
        run: Any = device.attention_pointers_kernel[grid]
        run(q, k, v, out, *sizes, *strides, UNIT=unit, **constants)


def _mask_arguments(mask: torch.Tensor) -> dict[str, Any]:
    """What the pointers kernel is told of a mask [B, H, N_q, N_k]; a broadcast dimension has stride 0."""
    stride_b, stride_h, stride_m, stride_n = mask.stride()
    return {
        "mask_ptr": mask.view(torch.uint8) if mask.dtype == torch.bool else mask,
        "stride_mb": stride_b,
        "stride_mh": stride_h,
        "stride_mm": stride_m,
        "stride_mn": stride_n,
        "MASK_PER_QUERY": mask.shape[2] > 1 and stride_m != 0,
        "MASK_KEYS_ADJACENT": stride_n == 1,
    }


def _descriptor(x: torch.Tensor, rows: int, columns: int):
    """x [B, N, H, D] as a descriptor of [B, H, N, D] in tiles [1, 1, rows, columns]; None for no columns."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    if columns == 0:
        return None
    batch, n, heads, head_dim = x.shape
    # A dimension of size 1 may carry any stride; the hardware wants a legal one.
    strides = zip(x.shape[:3], x.stride()[:3], strict=True)
    stride_b, stride_n, stride_h = (stride if size > 1 else head_dim for size, stride in strides)
    return TensorDescriptor(x, [batch, heads, n, head_dim], [stride_b, stride_h, stride_n, 1], [1, 1, rows, columns])


_LIBRARY = torch.library.Library("diffopt_kernels", "DEF")
_LIBRARY.define("attention(Tensor q, Tensor k, Tensor v, float scale, Tensor? mask=None) -> Tensor")
_LIBRARY.impl("attention", _attention, "CUDA")
_LIBRARY.impl("attention", _attention, "CPU")
torch.library.register_fake("diffopt_kernels::attention", _attention_fake, lib=_LIBRARY)
