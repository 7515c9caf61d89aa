"""What the kernels can take: functions that return reasons in words, empty when there is none."""

import os
from functools import lru_cache
from importlib.util import find_spec

import torch

from diffopt_kernels.chips import AMD
from diffopt_kernels.parts import HEAD_DIMS

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MINIMUM_CAPABILITY = (8, 0)


def unsupported_reasons(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
) -> list[str]:
    """Why `attention(q, k, v, mask=mask)` can't run on these tensors: one text per reason, or an empty list."""
    return device_reasons(q.device) + input_reasons(q, k, v, mask)


@lru_cache(maxsize=64)
def _device_reasons(device: torch.device) -> tuple[str, ...]:
    if find_spec("triton") is None:
        return ("triton is not installed; the kernels are written in it",)
    if device.type == "cpu" and interpreted():
        return ()
    if device.type != "cuda":
        return (f"q.device is {device}; allowed: a CUDA device (a CPU only with TRITON_INTERPRET=1, for tests)",)
    capability = compute_capability(device)
    if capability != AMD and capability < MINIMUM_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        return (f"{name} has compute capability {capability[0]}.{capability[1]}; allowed: 8.0 or newer",)
    return ()


def compute_capability(device: torch.device | str | None = None) -> tuple[int, int]:
    """Of a CUDA device (the current one if None); `AMD` on an AMD build of PyTorch."""
    return AMD if torch.version.hip is not None else torch.cuda.get_device_capability(device)


def device_reasons(device: torch.device | str) -> list[str]:
    """Why the kernels can't run on `device`: no triton, not CUDA or ROCm, compute capability below 8.0.

    On AMD GPUs the kernels were compiled (cross_compile.py) but never run: the caller's self-check has to decide.
    """
    return list(_device_reasons(torch.device(device)))


def interpreted() -> bool:
    """Whether Triton interprets kernels on the CPU: TRITON_INTERPRET=1 was set before triton was imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def input_reasons(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> list[str]:
    """Why tensors like these can't be attention's inputs on any device: shapes, dtypes, strides, gradients."""
    named = (("q", q), ("k", k), ("v", v))
    reasons = [f"{name} has {x.dim()} dimensions; allowed: [B, N, H, D]" for name, x in named if x.dim() != 4]
    if reasons:
        return reasons
    for name, x in (("k", k), ("v", v)):
        if x.device != q.device:
            reasons.append(f"{name}.device is {x.device}; allowed: {q.device}, as q's")
        if x.dtype != q.dtype:
            reasons.append(f"{name}.dtype is {x.dtype}; allowed: {q.dtype}, as q's")
        for dim, letter in ((0, "B"), (2, "H"), (3, "D")):
            if x.shape[dim] != q.shape[dim]:
                reasons.append(f"{name}.shape[{dim}] is {x.shape[dim]}; allowed: {q.shape[dim]}, {letter} of q")
    if v.shape[1] != k.shape[1]:
        reasons.append(f"v.shape[1] is {v.shape[1]}; allowed: {k.shape[1]}, N_k of k")
    if q.dtype not in DTYPES:
        reasons.append(f"q.dtype is {q.dtype}; allowed: {', '.join(str(dtype) for dtype in DTYPES)}")
    if q.shape[3] not in HEAD_DIMS:
        reasons.append(f"q.shape[3] is {q.shape[3]}; allowed head dims: multiples of 8 from 8 to {HEAD_DIMS[-1]}")
    for name, x in named:
        if x.shape[1] < 1:
            reasons.append(f"{name}.shape[1] is {x.shape[1]}; allowed: at least 1 token")
        if x.stride(3) != 1:
            reasons.append(f"{name}.stride(3) is {x.stride(3)}; allowed: 1")
        if x.requires_grad and torch.is_grad_enabled():
            reasons.append(f"{name}.requires_grad is True; allowed: False, or a call under torch.no_grad()")
    if mask is not None:
        reasons += _mask_reasons(mask, q, k)
    return reasons


def _mask_reasons(mask: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> list[str]:
    reasons = []
    wanted = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    if mask.dim() > 4 or any(n not in (1, m) for n, m in zip(reversed(mask.shape), reversed(wanted), strict=False)):
        allowed = f"what broadcasts to {list(wanted)}, [B, H, N_q, N_k]"
        reasons.append(f"mask.shape is {list(mask.shape)}; allowed: {allowed}")
    if mask.dtype not in (torch.bool, torch.float32, q.dtype):
        reasons.append(f"mask.dtype is {mask.dtype}; allowed: torch.bool, torch.float32 or q's")
    if mask.device != q.device:
        reasons.append(f"mask.device is {mask.device}; allowed: {q.device}, as q's")
    if mask.requires_grad and torch.is_grad_enabled():
        reasons.append("mask.requires_grad is True; allowed: False, or a call under torch.no_grad()")
    return reasons
