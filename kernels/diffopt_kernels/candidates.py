"""Launches worth trying: what the self-check can search for the right and fast ones that launch.py's tables hold."""

from collections.abc import Iterator, Sequence

from diffopt_kernels.launch import MODEL_HEAD_DIMS, AttentionLaunch
from diffopt_kernels.parts import cut, padded

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


def attention_candidates(head_dims: Sequence[int] = MODEL_HEAD_DIMS) -> list[AttentionLaunch]:
    """All launches to try at these head dims, each once; the order is stable, so that an index names one."""
    return list(dict.fromkeys(_candidates(head_dims)))


def _candidates(head_dims: Sequence[int]) -> Iterator[AttentionLaunch]:
    for head_dim in head_dims:
        narrow = head_dim <= 64
        for parts in dict.fromkeys((padded(head_dim), cut(head_dim))):
            for tile in _NARROW_TILES if narrow else _WIDE_TILES:
                yield AttentionLaunch(head_dim, parts, "descriptors", *_fitted(parts, tile))
            for tile in _NARROW_POINTER_TILES if narrow else _WIDE_POINTER_TILES:
                yield AttentionLaunch(head_dim, parts, "pointers", *_fitted(parts, tile))
        for tile in _FLOAT32_TILES:
            yield AttentionLaunch(head_dim, cut(head_dim), "pointers", *tile, float32=True)


def _fitted(parts: tuple[int, int], tile: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """An output tile of 256 columns fills the registers of four warps: twice the warps, half the rows."""
    block_m, block_n, num_warps, num_stages = tile
    if parts[0] == 256:
        return min(block_m, 64), min(block_n, 64), 8, 2
    return block_m, block_n, num_warps, num_stages
