"""Which head dims the kernels take, and the powers of two that cover each: Triton's blocks have no other sizes."""

HEAD_DIMS = range(8, 257, 8)

_NARROWEST = 16  # the shallowest product of the matrix units, and of tl.dot


def padded(head_dim: int) -> tuple[int, int]:
    """`head_dim` columns as one power of two: 40 gives (64, 0)."""
    return max(_NARROWEST, 1 << (head_dim - 1).bit_length()), 0


def cut(head_dim: int) -> tuple[int, int]:
    """`head_dim` columns as one power of two or as two: 40 gives (32, 16), 64 (64, 0), 80 (64, 16), 136 (128, 32).

    The second is at least a quarter of the first, so that 32 head dims need no more than ten pairs.
    """
    whole, _ = padded(head_dim)
    first = whole // 2
    if first < 2 * _NARROWEST:
        return whole, 0
    rest, _ = padded(head_dim - first)
    second = max(rest, first // 4)
    return (first, second) if first + second < whole else (whole, 0)
