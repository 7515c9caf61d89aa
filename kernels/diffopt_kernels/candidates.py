"""Launches worth trying: what `diffopt tune` searches for the right and fast ones, beyond those launch.py selects."""

import itertools
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

from diffopt_kernels.launch import MODEL_HEAD_DIMS, AttentionLaunch, Turns, attention_launches
from diffopt_kernels.parts import cut, padded

# (block_m, block_n, num_warps, num_stages). Many keys want deep tiles; 77 keys waste little in tiles of 16 or 32.
_NARROW_TILES = [
    *((128, 64, 4, 3), (64, 128, 4, 3), (64, 128, 4, 2), (64, 64, 4, 3)),
    *((128, 32, 4, 3), (64, 32, 4, 3)),
]
_WIDE_TILES = [
    *((128, 64, 8, 3), (64, 128, 4, 2), (64, 64, 4, 2)),
    *((64, 32, 4, 3), (64, 32, 4, 2)),
]
_NARROW_POINTER_TILES = [(128, 64, 4, 2), (128, 32, 4, 3), (128, 32, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2)]
_WIDE_POINTER_TILES = [(128, 32, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2)]
# (warpgroups, a loading warp, block_n, num_stages, programs, turns[, tail])
_HOPPER_TILES: list[tuple[int, bool, int, int, int, Turns] | tuple[int, bool, int, int, int, Turns, int]] = [
    *((4, True, 64, 4, 1, "softmax"), (4, True, 64, 4, 1, "nothing"), (4, True, 64, 6, 1, "softmax")),
    *((4, True, 64, 4, 1, "softmax", 2), (4, True, 64, 4, 1, "nothing", 2), (4, False, 64, 4, 1, "products", 2)),
    *((4, False, 64, 4, 1, "softmax"), (4, False, 64, 4, 1, "products")),
    *((2, True, 128, 2, 1, "products"), (2, True, 128, 3, 1, "products"), (2, True, 64, 3, 1, "products")),
    *((2, True, 64, 3, 1, "nothing"), (2, False, 64, 4, 2, "nothing"), (2, False, 64, 4, 2, "products")),
    *((2, False, 64, 4, 2, "nothing", 1), (2, True, 64, 4, 1, "nothing", 1), (2, True, 64, 4, 1, "nothing")),
    *((1, True, 128, 2, 2, "nothing"), (1, True, 64, 3, 2, "nothing"), (1, True, 128, 3, 1, "nothing")),
    *((1, True, 128, 2, 1, "nothing"), (1, True, 64, 3, 1, "nothing")),
    *((1, False, 64, 4, 4, "nothing"), (1, False, 64, 3, 4, "nothing"), (1, False, 64, 3, 3, "nothing")),
]
_SHORT_KEYS = (64, 80, 96, 128, 160, 192, 256)
_SHORT_QUERY_TILES = (1, 2, 3, 4)
_SHARED_MEMORY = 226 << 10  # of a multiprocessor, in bytes; what barriers take is left out
_OTHER_REGISTERS = 30  # per thread, beside scores, probabilities and accumulators

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
        for tile in _NARROW_POINTER_TILES if narrow else _WIDE_POINTER_TILES:  # cut, they were wrong on odd strides
            yield AttentionLaunch(head_dim, padded(head_dim), "pointers", *_fitted(padded(head_dim), tile))
        yield from _hopper_candidates(head_dim)
        yield from _short_candidates(head_dim)
        for tile in _FLOAT32_TILES:
            yield AttentionLaunch(head_dim, cut(head_dim), "pointers", *tile, float32=True)


def _hopper_candidates(head_dim: int) -> Iterator[AttentionLaunch]:
    for parts in _gluon_parts(head_dim):
        for groups, loader, block_n, num_stages, programs, turns, *tail in _HOPPER_TILES:
            launch = AttentionLaunch(
                *(head_dim, parts, "hopper", 64 * groups, block_n, 4 * groups + loader, num_stages),
                turns=turns,
                programs=programs,
                tail=tail[0] if tail else 0,
            )
            memory = 2 * sum(parts) * (64 * groups + 2 * num_stages * block_n)
            if memory * programs <= _SHARED_MEMORY and _registers_needed(launch) <= launch.registers[1]:
                yield launch


def _gluon_parts(head_dim: int) -> Iterator[tuple[int, int]]:
    """Padded up to 64, where a cut saves little, and above that cut; 40 both ways: its rows of 80 bytes load slowly."""
    if head_dim <= 64:
        yield padded(head_dim)
    if head_dim > 64 or head_dim == 40:
        yield cut(head_dim)


def _short_candidates(head_dim: int) -> Iterator[AttentionLaunch]:
    for parts, block_n, query_tiles in itertools.product(_gluon_parts(head_dim), _SHORT_KEYS, _SHORT_QUERY_TILES):
        memory = 2 * sum(parts) * (3 * 64 + 2 * block_n)
        needed = (sum(parts) + block_n) // 2 + _OTHER_REGISTERS + 10
        for programs in (4, 3, 2, 1):  # as many as fit
            launch = AttentionLaunch(
                *(head_dim, parts, "short", 64, block_n, 4, 1), query_tiles=query_tiles, programs=programs
            )
            if memory * programs <= _SHARED_MEMORY and needed <= launch.registers[0]:
                yield launch
                break


def _registers_needed(launch: AttentionLaunch) -> int:
    """Per thread of a warpgroup: 64 rows of accumulators, of scores and of probabilities at half the size."""
    return sum(launch.parts) // 2 + launch.block_n // 2 + launch.block_n // 4 + _OTHER_REGISTERS


def _fitted(parts: tuple[int, int], tile: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """An output tile of 256 columns fills the registers of four warps: twice the warps, half the rows."""
    block_m, block_n, num_warps, num_stages = tile
    if parts[0] == 256:
        return min(block_m, 64), min(block_n, 64), 8, 2
    return block_m, block_n, num_warps, num_stages


def labels_named(texts: Sequence[str]) -> list[str]:
    """Labels of launches: those given as they are, and those of the tables given as files (`configs/gpus/*.toml`).

    Raises:
        ValueError: a label is of no launch selected or searched, or a file has no tuned launches that can be read.
    """
    known = {launch.label for launch in (*attention_launches(), *attention_candidates())}
    labels = [label for text in texts for label in (_labels_in(Path(text)) if text.endswith(".toml") else [text])]
    for label in labels:
        if label not in known:
            raise ValueError(f"{label!r} is no launch that is selected or searched; give a label or a table's file")
    return list(dict.fromkeys(labels))


def _labels_in(table: Path) -> list[str]:
    try:
        rows = tomllib.loads(table.read_text())["attention"]["shapes"]
        launches = [row["launch"] | {"parts": tuple(row["launch"]["parts"])} for row in rows if "launch" in row]
        return [AttentionLaunch(**launch).label for launch in launches]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{table} has no tuned launches that can be read: {type(error).__name__}: {error}") from None
