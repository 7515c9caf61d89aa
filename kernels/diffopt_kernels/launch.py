"""How a kernel is launched: plain data, chosen by pure functions of shapes and hardware figures."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, Protocol, TypeVar

from diffopt_kernels.parts import HEAD_DIMS, cut, padded
from diffopt_kernels.registers import registers

Kernel = Literal["pointers", "descriptors", "hopper", "short"]
Turns = Literal["nothing", "products", "softmax"]
KeyClass = Literal["long", "short"]


@dataclass(frozen=True)
class AttentionLaunch:
    """One way to run attention at one head dim.

    Attributes:
        head_dim: D, in elements.
        parts: powers of two the head dim is cut into; (64, 0) pads 40 to 64, (32, 16) reads 40 as 32 + 8 of 16.
        kernel: "pointers" runs everywhere; "descriptors" needs Hopper or newer and 16-byte alignment; "hopper" and
            "short" are Gluon, for Hopper alone, with the same alignment; "short" takes at most `block_n` keys.
        block_m: queries of one program, of "short" those of one of its tiles.
        block_n: keys of one tile; of "short" all keys, as one power of two or the sum of two.
        num_warps: warps of one program; "hopper" has one for each 16 queries, and one more where a warp only loads.
        num_stages: depth of the pipeline over key tiles.
        float32: for float32 tensors (IEEE products, no tensor cores) instead of float16 and bfloat16.
        turns: of "hopper": what its warpgroups do one after another, so that others do something else meanwhile.
        programs: of "hopper" and "short": programs that share the registers of one multiprocessor.
        query_tiles: of "short": tiles of queries that one program takes one after another.
        tail: of "hopper": warpgroups that work in the programs of the last wave, 0 for all of them.
    """

    head_dim: int
    parts: tuple[int, int]
    kernel: Kernel
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    float32: bool = False
    turns: Turns = "nothing"
    programs: int = 1
    query_tiles: int = 1
    tail: int = 0

    @property
    def label(self) -> str:
        """A short name, unique among launches: "d40 32+16 descriptors 128x64 w4 s3"."""
        parts = "+".join(str(part) for part in self.parts if part)
        text = (
            f"d{self.head_dim} {parts} {self.kernel} {self.block_m}x{self.block_n} w{self.num_warps} s{self.num_stages}"
        )
        text += f" p{self.programs}" if self.programs > 1 else ""
        text += f" q{self.query_tiles}" if self.query_tiles > 1 else ""
        text += f" t{self.tail}" if self.tail else ""
        return text + (f" {self.turns} in turns" if self.turns != "nothing" else "") + (" fp32" if self.float32 else "")

    @property
    def key_blocks(self) -> tuple[int, int]:
        """The two tiles of "short", powers of two: 80 keys are 64 + 16."""
        first = 1 << (self.block_n.bit_length() - 1)
        return first, self.block_n - first

    @property
    def has_loader(self) -> bool:
        """Whether one warp of "hopper" does nothing but load."""
        return self.num_warps > self.block_m // 16

    @property
    def registers(self) -> tuple[int, int]:
        """Of "hopper" and "short", per thread: at launch, and of a warpgroup once a loader has given up its own."""
        return registers(32 * self.num_warps // 128 * 128, self.programs, loader=self.has_loader)

    def takes(self, n_k: int) -> bool:
        """Whether it can work on this many keys."""
        return self.kernel != "short" or n_k <= self.block_n

    @property
    def family(self) -> tuple:
        """Equal for launches that differ only in how many columns of their parts are used: one check covers them.

        16-bit pointer loads without a column mask compile to other code than with one, so there full and partly used
        parts are two families.
        """
        masked = self.head_dim < sum(self.parts) and self.kernel == "pointers" and not self.float32
        return replace(self, head_dim=0), masked


# For aligned tensors on Hopper GPUs without tuned launches. The long rows of 40, 64, 80 and 160 were each the fastest
# of the plain kernels at one shape or more on an H200, before there were Gluon ones; the others are predictions; for
# few keys pointer loads were the fastest at 40, 64 and 80. A head dim without a row takes that of the columns `cut`
# covers it with.
_DESCRIPTORS: dict[tuple[int, KeyClass], AttentionLaunch] = {
    (40, "long"): AttentionLaunch(40, (64, 0), "descriptors", 128, 64, 4, 3),
    (64, "long"): AttentionLaunch(64, (64, 0), "descriptors", 64, 128, 4, 3),
    (80, "long"): AttentionLaunch(80, (64, 16), "descriptors", 64, 128, 4, 2),
    (128, "long"): AttentionLaunch(128, (128, 0), "descriptors", 128, 64, 8, 3),
    (128, "short"): AttentionLaunch(128, (128, 0), "descriptors", 64, 32, 4, 3),
    (160, "long"): AttentionLaunch(160, (128, 32), "descriptors", 64, 64, 4, 2),
    (160, "short"): AttentionLaunch(160, (128, 32), "descriptors", 64, 32, 4, 2),
}
MODEL_HEAD_DIMS = tuple(dict.fromkeys(head_dim for head_dim, _ in _DESCRIPTORS))  # of Stable Diffusion's UNets, and 128

# (block_m, block_n, num_warps, num_stages) for head dims of no known model, by columns covered.
_DESCRIPTOR_TILES: dict[int, tuple[int, int, int, int]] = {
    16: (128, 64, 4, 3),
    32: (128, 64, 4, 3),
    48: (128, 64, 4, 3),
    96: (64, 64, 4, 2),
    192: (64, 64, 4, 2),
    256: (64, 64, 8, 2),
}

# One power of two covers all columns: cut head dims with 16-bit pointer loads were measured wrong on odd strides.
_POINTER_TILES: dict[int, tuple[int, int, int, int]] = {
    16: (128, 32, 4, 3),
    32: (128, 32, 4, 3),
    64: (128, 32, 4, 3),
    128: (64, 32, 4, 2),
    256: (64, 32, 8, 2),
}


def _on_hopper(head_dim: int, keys: KeyClass) -> AttentionLaunch:
    if (head_dim, keys) in _DESCRIPTORS:
        return _DESCRIPTORS[head_dim, keys]
    parts = cut(head_dim)
    if sum(parts) in _DESCRIPTOR_TILES:
        return AttentionLaunch(head_dim, parts, "descriptors", *_DESCRIPTOR_TILES[sum(parts)])
    if (sum(parts), keys) in _DESCRIPTORS:
        return replace(_DESCRIPTORS[sum(parts), keys], head_dim=head_dim)
    return _pointers(head_dim)


def _pointers(head_dim: int) -> AttentionLaunch:
    parts = padded(head_dim)
    return AttentionLaunch(head_dim, parts, "pointers", *_POINTER_TILES[parts[0]])


def _float32(head_dim: int) -> AttentionLaunch:
    parts = cut(head_dim)
    return AttentionLaunch(head_dim, parts, "pointers", 32, 32 if sum(parts) <= 96 else 16, 4, 1, float32=True)


_DESCRIPTORS_ON = 9  # major compute capability: Hopper, where these launches were checked; newer chips have them too
SHORT_KEYS = 256  # up to here one query tile sees so few key tiles that filling the pipeline decides


@dataclass(frozen=True)
class LaunchKey:
    """The shape of one call: q [batch, n_q, heads, head_dim], k and v [batch, n_k, heads, head_dim]."""

    batch: int
    n_q: int
    n_k: int
    heads: int
    head_dim: int

    @property
    def keys(self) -> KeyClass:
        """Whether a query tile sees so few keys that filling the pipeline decides."""
        return "short" if self.n_k <= SHORT_KEYS else "long"


_TUNED: dict[str, dict[LaunchKey, AttentionLaunch]] = {}


class _Clearable(Protocol):
    def clear(self) -> None: ...


_Cache = TypeVar("_Cache", bound=_Clearable)
_FORGOTTEN: list[_Clearable] = []


def forgotten_with_launches(cache: _Cache) -> _Cache:
    """Have a cache of things made from launches cleared when `use_tuned_launches` changes them; returns it."""
    _FORGOTTEN.append(cache)
    return cache


def use_tuned_launches(device_name: str, table: Mapping[LaunchKey, AttentionLaunch]) -> None:
    """Prefer these launches for 16-bit tensors on GPUs of this name (as the driver calls them); replaces older ones."""
    _TUNED[device_name] = dict(table)
    attention_launch.cache_clear()
    for cache in _FORGOTTEN:
        cache.clear()


@lru_cache(maxsize=4096)
def attention_launch(
    key: LaunchKey, *, float32: bool, aligned: bool, capability: tuple[int, int], device_name: str = ""
) -> AttentionLaunch:
    """The launch for one call: tuned for this shape, or for the nearest one, or the heuristic for the capability.

    Args:
        key: the shape; its head dim is one of `HEAD_DIMS`, all sizes at least 1.
        float32: whether the tensors are float32.
        aligned: whether every base address and stride is a multiple of 16 bytes and no stride is zero.
        capability: compute capability of the GPU.
        device_name: of the GPU, for launches tuned on it.
    """
    if float32:
        return _float32(key.head_dim)
    tuned = _nearest_tuned(key, _TUNED.get(device_name, {})) if aligned else None
    if tuned is not None:
        return tuned
    if not aligned or capability[0] != _DESCRIPTORS_ON:
        return _pointers(key.head_dim)
    return _on_hopper(key.head_dim, key.keys)


def _nearest_tuned(key: LaunchKey, table: Mapping[LaunchKey, AttentionLaunch]) -> AttentionLaunch | None:
    """The launch of the tuned shape with this head dim and key class whose sizes differ by the smallest factors."""
    if key in table and table[key].takes(key.n_k):
        return table[key]
    near = [
        other
        for other, launch in table.items()
        if (other.head_dim, other.keys) == (key.head_dim, key.keys) and launch.takes(key.n_k)
    ]
    return table[min(near, key=lambda other: distance(key, other))] if near else None


def distance(a: LaunchKey, b: LaunchKey) -> float:
    """How far two shapes are apart: the factors between their sizes, in powers of two, added up."""
    pairs = ((a.n_q, b.n_q), (a.n_k, b.n_k), (a.batch * a.heads, b.batch * b.heads))
    return sum(abs(math.log2(x / y)) for x, y in pairs)


def attention_launches(capability: tuple[int, int] = (9, 0)) -> list[AttentionLaunch]:
    """What `attention_launch` can return on a GPU of this compute capability, each `family` once.

    Head dims of known models come first and so stand for their family, then the narrowest one.
    """

    def all_launches() -> Iterator[AttentionLaunch]:
        for head_dim in (*MODEL_HEAD_DIMS, *HEAD_DIMS):
            if capability[0] == _DESCRIPTORS_ON:
                yield from (_on_hopper(head_dim, keys) for keys in ("long", "short"))
            yield _pointers(head_dim)
            yield _float32(head_dim)

    families: dict[tuple, AttentionLaunch] = {}
    for launch in all_launches():
        families.setdefault(launch.family, launch)
    return list(families.values())
