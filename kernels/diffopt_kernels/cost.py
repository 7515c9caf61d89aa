"""Floating-point operations and bytes of the ops, from shapes alone."""


def attention_flops(batch: int, n_q: int, n_k: int, heads: int, head_dim: int) -> int:
    """Floating-point operations of the two products, a multiply and an add each; the softmax is not counted.

    The convention of the attention papers (4 · B · H · N_q · N_k · D), without any padding a kernel may do.
    """
    return 4 * batch * heads * n_q * n_k * head_dim


def attention_bytes(batch: int, n_q: int, n_k: int, heads: int, head_dim: int, itemsize: int) -> int:
    """Bytes that have to move at least: queries, keys and values read once, the output written once."""
    return batch * heads * head_dim * itemsize * (2 * n_q + 2 * n_k)
