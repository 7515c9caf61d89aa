"""Launches worth trying: what the self-check can search for the right and fast ones that launch.py's tables hold."""

from collections.abc import Iterator

from diffopt_kernels.launch import HEAD_DIMS, AttentionLaunch

# Padded to one power of two, or cut into two. 64 and 128 are powers of two already.
_PARTS = {
    40: ((64, 0), (32, 16)),
    64: ((64, 0),),
    80: ((128, 0), (64, 16)),
    128: ((128, 0),),
    160: ((256, 0), (128, 32)),
}

# (block_m, block_n, num_warps, num_stages). Many keys want deep tiles; 77 keys waste little in tiles of 16 or 32.
_NARROW_TILES = [
    *((128, 64, 4, 3), (128, 64, 4, 2), (128, 64, 8, 3), (128, 128, 8, 2)),
    *((64, 128, 4, 3), (64, 128, 4, 2), (64, 64, 4, 3), (64, 64, 4, 2)),
    *((128, 32, 4, 3), (128, 32, 8, 3), (128, 16, 4, 3), (64, 32, 4, 3), (64, 16, 4, 3)),
]
_WIDE_TILES = [
    *((128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2)),
    *((64, 128, 4, 2), (64, 64, 4, 3), (64, 64, 4, 2)),
    *((128, 32, 8, 2), (64, 32, 4, 3), (64, 32, 4, 2), (64, 16, 4, 3)),
    *((32, 64, 4, 2), (32, 64, 2, 2)),
]
_NARROW_POINTER_TILES = [(128, 64, 4, 2), (128, 32, 4, 3), (128, 32, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2)]
_WIDE_POINTER_TILES = [(128, 32, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2)]
_FLOAT32_TILES = [(32, 32, 4, 1), (16, 32, 4, 1), (32, 16, 4, 1)]


def attention_candidates() -> list[AttentionLaunch]:
    """All launches to try, each once; the order is stable, so that an index names one."""
    return list(dict.fromkeys(_candidates()))


def _candidates() -> Iterator[AttentionLaunch]:
    for head_dim in HEAD_DIMS:
        narrow = head_dim <= 64
        for parts in _PARTS[head_dim]:
            for tile in _NARROW_TILES if narrow else _WIDE_TILES:
                yield AttentionLaunch(head_dim, parts, "descriptors", *_fitted(parts, tile))
            for tile in _NARROW_POINTER_TILES if narrow else _WIDE_POINTER_TILES:
                yield AttentionLaunch(head_dim, parts, "pointers", *_fitted(parts, tile))
        for tile in _FLOAT32_TILES:
            yield AttentionLaunch(head_dim, _PARTS[head_dim][-1], "pointers", *tile, float32=True)


def _fitted(parts: tuple[int, int], tile: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """An output tile of 256 columns fills the registers of four warps: twice the warps, half the rows."""
    block_m, block_n, num_warps, num_stages = tile
    if parts[0] == 256:
        return min(block_m, 64), min(block_n, 64), 8, 2
    return block_m, block_n, num_warps, num_stages
