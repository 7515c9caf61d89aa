"""The rule of attention_check.py as one assertion, for every test of attention."""

import torch

from diffopt_kernels import attention_reference
from diffopt_kernels.attention_check import allowed_errors, errors_against, sdpa_errors


def assert_exact(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> None:
    """`out` [B, N_q, H, D] is as close to float64 as PyTorch's own attention allows."""
    expected = attention_reference(q, k, v, mask=mask, scale=scale)
    peers = [e for e in sdpa_errors(q, k, v, expected, mask=mask, scale=scale) if e]
    ours, limit = errors_against(out, expected), allowed_errors(peers, expected, q.dtype)
    assert ours.within(limit), f"{ours} is not within {limit}"
