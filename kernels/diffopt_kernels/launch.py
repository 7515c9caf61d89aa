"""How a kernel is launched: plain data, chosen by pure functions of shapes and hardware figures."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

HEAD_DIMS = (40, 64, 80, 128, 160)

Loads = Literal["pointers", "descriptors"]
KeyClass = Literal["long", "short"]


@dataclass(frozen=True)
class AttentionLaunch:
    """One way to run attention at one head dim.

    Attributes:
        head_dim: D, in elements.
        parts: powers of two the head dim is cut into; (64, 0) pads 40 to 64, (32, 16) reads 40 as 32 + 8 of 16.
        loads: "pointers" runs everywhere; "descriptors" needs Hopper or newer and 16-byte alignment.
        block_m: queries of one program.
        block_n: keys of one tile.
        num_warps: warps of one program.
        num_stages: depth of the software pipeline over key tiles.
        float32: for float32 tensors (IEEE products, no tensor cores) instead of float16 and bfloat16.
    """

    head_dim: int
    parts: tuple[int, int]
    loads: Loads
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    float32: bool = False

    @property
    def label(self) -> str:
        """A short name, unique among launches: "d40 32+16 descriptors 128x64 w4 s3"."""
        parts = "+".join(str(part) for part in self.parts if part)
        tile = f"{self.block_m}x{self.block_n} w{self.num_warps} s{self.num_stages}"
        return f"d{self.head_dim} {parts} {self.loads} {tile}{' fp32' if self.float32 else ''}"

    @property
    def as_code(self) -> str:
        """The constructor call, as the tables below hold it."""
        tile = f"{self.block_m}, {self.block_n}, {self.num_warps}, {self.num_stages}"
        tail = ", float32=True" if self.float32 else ""
        return f'AttentionLaunch({self.head_dim}, {self.parts}, "{self.loads}", {tile}{tail})'


# PREDICTIONS until the GPU has spoken.
_DESCRIPTORS: dict[tuple[int, KeyClass], AttentionLaunch] = {
    (40, "long"): AttentionLaunch(40, (64, 0), "descriptors", 128, 64, 4, 3),
    (40, "short"): AttentionLaunch(40, (64, 0), "descriptors", 128, 32, 4, 3),
    (64, "long"): AttentionLaunch(64, (64, 0), "descriptors", 64, 128, 4, 3),
    (64, "short"): AttentionLaunch(64, (64, 0), "descriptors", 128, 32, 4, 3),
    (80, "long"): AttentionLaunch(80, (64, 16), "descriptors", 64, 128, 4, 2),
    (80, "short"): AttentionLaunch(80, (64, 16), "descriptors", 64, 32, 4, 3),
    (128, "long"): AttentionLaunch(128, (128, 0), "descriptors", 128, 64, 8, 3),
    (128, "short"): AttentionLaunch(128, (128, 0), "descriptors", 64, 32, 4, 3),
    (160, "long"): AttentionLaunch(160, (128, 32), "descriptors", 64, 64, 4, 2),
    (160, "short"): AttentionLaunch(160, (128, 32), "descriptors", 64, 32, 4, 2),
}

_POINTERS: dict[int, AttentionLaunch] = {
    40: AttentionLaunch(40, (64, 0), "pointers", 128, 32, 4, 3),
    64: AttentionLaunch(64, (64, 0), "pointers", 128, 32, 4, 3),
    80: AttentionLaunch(80, (128, 0), "pointers", 64, 32, 4, 2),
    128: AttentionLaunch(128, (128, 0), "pointers", 64, 32, 4, 2),
    160: AttentionLaunch(160, (256, 0), "pointers", 64, 32, 8, 2),
}

_FLOAT32: dict[int, AttentionLaunch] = {
    40: AttentionLaunch(40, (32, 16), "pointers", 32, 32, 4, 1, float32=True),
    64: AttentionLaunch(64, (64, 0), "pointers", 32, 32, 4, 1, float32=True),
    80: AttentionLaunch(80, (64, 16), "pointers", 32, 32, 4, 1, float32=True),
    128: AttentionLaunch(128, (128, 0), "pointers", 32, 16, 4, 1, float32=True),
    160: AttentionLaunch(160, (128, 32), "pointers", 32, 16, 4, 1, float32=True),
}

_DESCRIPTORS_ON = 9  # major compute capability: Hopper, where these launches were checked; newer chips have them too
SHORT_KEYS = 256  # up to here one query tile sees so few key tiles that filling the pipeline decides


def attention_launch(
    head_dim: int, n_k: int, *, float32: bool, aligned: bool, capability: tuple[int, int]
) -> AttentionLaunch:
    """The launch for one call.

    Args:
        head_dim: one of `HEAD_DIMS`.
        n_k: number of keys, at least 1.
        float32: whether the tensors are float32.
        aligned: whether every base address and stride is a multiple of 16 bytes and no stride is zero.
        capability: compute capability of the GPU.
    """
    if float32:
        return _FLOAT32[head_dim]
    if not aligned or capability[0] != _DESCRIPTORS_ON:
        return _POINTERS[head_dim]
    return _DESCRIPTORS[head_dim, "short" if n_k <= SHORT_KEYS else "long"]


def attention_launches(capability: tuple[int, int] = (9, 0)) -> list[AttentionLaunch]:
    """Every launch that `attention_launch` can return on a GPU of this compute capability, each once."""

    def tables() -> Iterator[AttentionLaunch]:
        if capability[0] == _DESCRIPTORS_ON:
            yield from _DESCRIPTORS.values()
        yield from _POINTERS.values()
        yield from _FLOAT32.values()

    return list(dict.fromkeys(tables()))
