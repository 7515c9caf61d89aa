"""Attention for [B, N, H, D] tensors; device side: _attention_fwd.py."""

import math
from collections.abc import Callable
from functools import lru_cache

import torch

from diffopt_kernels.attention_prepared import is_aligned, prepared_attention
from diffopt_kernels.launch import AttentionLaunch, LaunchKey, attention_launch, forgotten_with_launches
from diffopt_kernels.launcher import Recent
from diffopt_kernels.support import compute_capability, device_reasons, input_reasons

_PREPARED = forgotten_with_launches(Recent(1024))
"""Launches by all that decides them: a UNet calls the same few dozen shapes again and again."""


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
    if _escapes_the_op(q, k, v, mask):
        _refuse(q, k, v, mask, scale)
    return _OP(q, k, v, scale, mask)


def _escapes_the_op(q, k, v, mask) -> bool:
    """Whether to check here, although the op checks too: by layout, remembered, which costs nothing when seen before.

    The op can't tell whether a gradient is wanted (functorch unwraps it), and while tracing its error would arrive
    wrapped in the compiler's own.
    """
    if torch.compiler.is_compiling() or not (type(q) is type(k) is type(v) is torch.Tensor):
        return True
    if not torch.is_grad_enabled():
        return False
    return q.requires_grad or k.requires_grad or v.requires_grad or (mask is not None and mask.requires_grad)


def _refuse(q, k, v, mask, scale: float | None) -> None:
    """Raise the ValueError that says what is wrong with the inputs, if anything is."""
    reasons = input_reasons(q, k, v, mask)
    if scale is not None and not 0 < scale < math.inf:
        reasons.append(f"scale is {scale}; allowed: a finite number above zero")
    if reasons:
        raise ValueError("; ".join(reasons))


def _attention_fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    with torch.no_grad():  # gradients are `attention`'s business
        _refuse(q, k, v, mask, scale)
    return q.new_empty(q.shape)


def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    key = _key(q, k, v, mask, scale, None)
    prepared = _PREPARED.get(key)
    if prepared is None:
        prepared = _prepare(q, k, v, mask, scale)
        _PREPARED.put(key, prepared)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    _start(prepared, q, k, v, out, mask)
    return out


def _key(q, k, v, mask, scale: float | None, launch: AttentionLaunch | None) -> tuple:
    """All that a prepared launch depends on. Calls with the same key differ in addresses and values only."""
    return (
        *(launch, scale, (q.data_ptr() | k.data_ptr() | v.data_ptr()) % 16 == 0),
        *(q.shape, q.stride(), q.dtype, q.device),
        *(k.shape, k.stride(), k.dtype, k.device),
        *(v.shape, v.stride(), v.dtype, v.device),
        None if mask is None else (mask.shape, mask.stride(), mask.dtype, mask.device),
    )


def _prepare(q, k, v, mask, scale: float | None) -> Callable[..., None]:
    """The launch for inputs like these, called with (q, k, v, out) and the mask if there is one."""
    with torch.no_grad():  # as in the fake
        _refuse(q, k, v, mask, scale)
    batch, n_q, heads, head_dim = q.shape
    if q.numel() == 0:
        return _nothing
    name, capability = _gpu(q.device)
    launch = attention_launch(
        LaunchKey(batch, n_q, k.shape[1], heads, head_dim),
        float32=q.dtype == torch.float32,
        aligned=mask is None and is_aligned(q) and is_aligned(k) and is_aligned(v),
        capability=capability,
        device_name=name,
    )
    return prepared_attention(q, k, v, head_dim**-0.5 if scale is None else scale, launch, _expanded(mask, q, k))


def _nothing(*_: torch.Tensor) -> None:
    """The launch for an empty output."""


@lru_cache(maxsize=64)
def _gpu(device: torch.device) -> tuple[str, tuple[int, int]]:
    """Name and compute capability (of an AMD GPU: 0.0); the interpreter does all that a Hopper GPU does."""
    reasons = device_reasons(device)
    if reasons:
        raise ValueError("; ".join(reasons))
    if device.type != "cuda":
        return "", (9, 0)
    return torch.cuda.get_device_name(device), compute_capability(device)


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
    key = _key(q, k, v, mask, scale, launch)
    prepared = _PREPARED.get(key)
    if prepared is None:
        prepared = prepared_attention(q, k, v, scale, launch, _expanded(mask, q, k))
        _PREPARED.put(key, prepared)
    _start(prepared, q, k, v, out, mask)
    return out


def _start(prepared, q, k, v, out, mask) -> None:
    if mask is None:
        prepared(q, k, v, out)
    else:
        prepared(q, k, v, out, mask.view(torch.uint8) if mask.dtype == torch.bool else mask)


def _expanded(mask: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor | None:
    """The mask as [B, H, N_q, N_k], broadcast dimensions with stride 0."""
    batch, n_q, heads, _ = q.shape
    return None if mask is None else mask.expand(batch, heads, n_q, k.shape[1])


_LIBRARY = torch.library.Library("diffopt_kernels", "DEF")
_LIBRARY.define("attention(Tensor q, Tensor k, Tensor v, float? scale=None, Tensor? mask=None) -> Tensor")
_LIBRARY.impl("attention", _attention, "CUDA")
_LIBRARY.impl("attention", _attention, "CPU")
torch.library.register_fake("diffopt_kernels::attention", _attention_fake, lib=_LIBRARY)
_OP = torch.ops.diffopt_kernels.attention.default
"""Called for every input, in eager mode too: passing the dispatcher by safely would cost as much as it does."""
