"""One plain PyTorch reference per op: the specification, and what every check compares with."""

import torch

_SCORES_AT_ONCE = 2**26  # elements of one chunk's score matrix: half a gigabyte in float64


def attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """softmax(scale · q kᵀ + mask) v, per batch row and head.

    Vaswani et al., Attention Is All You Need, 2017, section 3.2.1.

    Args:
        q: [B, N_q, H, D], any floating dtype, any strides.
        k: [B, N_k, H, D].
        v: [B, N_k, H, D].
        mask: None, or broadcastable to [B, H, N_q, N_k]: bool, True where a query attends to a key, or floating, added
            to the scaled scores. A query whose scores are all -inf attends to nothing and gets zeros, as from PyTorch's
            SDPA since 2.5 (a plain softmax would give NaN).
        scale: factor of the scores; D ** -0.5 if None.
        dtype: what everything is computed in and returned as.

    Returns:
        [B, N_q, H, D] in `dtype`. Memory beyond that stays bounded: heads and queries are taken in chunks.
    """
    batch, n_q, heads, head_dim = q.shape
    n_k = k.shape[1]
    factor = head_dim**-0.5 if scale is None else scale
    out = torch.empty((batch * heads, n_q, head_dim), dtype=dtype, device=q.device)
    heads_first = [x.transpose(1, 2).reshape(batch * heads, x.shape[1], head_dim) for x in (q, k, v)]
    if mask is not None:
        mask = mask.expand(batch, heads, n_q, n_k)
    rows = min(n_q, max(1, _SCORES_AT_ONCE // n_k))
    heads_at_once = max(1, _SCORES_AT_ONCE // (rows * n_k))
    for i in range(0, batch * heads, heads_at_once):
        q_i, k_i, v_i = (x[i : i + heads_at_once].to(dtype) for x in heads_first)
        for n in range(0, n_q, rows):
            scores = torch.bmm(q_i[:, n : n + rows], k_i.transpose(1, 2)) * factor
            if mask is not None:
                scores += _additive(mask[:, :, n : n + rows], i, len(q_i), dtype)
            weights = scores.softmax(-1)
            if mask is not None:
                weights = weights.masked_fill((scores == -torch.inf).all(-1, keepdim=True), 0)
            out[i : i + heads_at_once, n : n + rows] = torch.bmm(weights, v_i)
    return out.view(batch, heads, n_q, head_dim).transpose(1, 2).contiguous()


def _additive(mask: torch.Tensor, first: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """What `count` heads of `mask` [B, H, rows, N_k] add to their scores, [count, rows, N_k]; heads count through B."""
    heads = mask.shape[1]
    rows = torch.stack([mask[i // heads, i % heads] for i in range(first, first + count)])
    if rows.dtype != torch.bool:
        return rows.to(dtype)
    return torch.zeros_like(rows, dtype=dtype).masked_fill(~rows, -torch.inf)
