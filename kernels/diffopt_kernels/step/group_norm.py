"""GroupNorm with SiLU and what is added before it, for channels-last images; device side: _group_norm.py."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from diffopt_kernels.launcher import Pointer, PreparedLaunch, Recent
from diffopt_kernels.step.support import common_reasons, image_reasons
from diffopt_kernels.support import device_reasons

_PREPARED = Recent(512)
MOST_PER_GROUP = 256  # channels: a program holds whole groups

# Chosen on an H100 (2026-11-26) at 13 shapes of SD1.5, SD2.1 and SDXL, batch 2 (reports/step-checks-h100.txt).
_WHOLE_PIXELS = 1024  # up to which one kernel that reads a group more than once costs less than two
_WHOLE = 65536  # elements of a group, padded, likewise
_MULTIPROCESSORS = 132  # an H100's
_CHUNKS = 32  # every program that normalizes merges the moments of so many at most
_FEWEST = 96  # programs, rather than which they get fewer groups each
_GROUPS = 16  # for so many, or for 32, there is room: programs of fewer, of more channels each, are compiled alike
_VALUES = 8  # a thread's share of a tile: 16 bytes of 16-bit elements, one load
_LOADS = 8  # tiles at once: 64 values in a thread's registers


def group_norm(
    x: torch.Tensor,
    groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    *,
    silu: bool = False,
    shift: torch.Tensor | None = None,
    channel_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """GroupNorm of x + shift + channel_bias, then SiLU if asked for; statistics in float32.

    Wu and He, Group Normalization, 2018. Traceable as one op, capturable in CUDA graphs.

    Args:
        x: [B, C, H, W] in channels-last memory, float16, bfloat16 or float32.
        groups: a divisor of C.
        weight: [C], dtype and device of x, as all that follow.
        bias: [C].
        eps: added to the variance.
        silu: whether x · sigmoid(x) follows.
        shift: [B, C], added to every pixel before (a time embedding), or None.
        channel_bias: [C], likewise (a convolution's bias), or None.

    Returns:
        [B, C, H, W] in channels-last memory, dtype of x.

    Raises:
        ValueError: an input this op can't take; the text names tensor, value and what is allowed.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        _refuse(x, groups, weight, bias, shift, channel_bias)
    return _OP(x, groups, weight, bias, eps, silu, shift, channel_bias)


def group_norm_joined(
    x: torch.Tensor,
    second: torch.Tensor,
    groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    *,
    silu: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`group_norm` of two tensors' channels, and the two concatenated: stored on the way, read once less.

    Args:
        x: in channels-last memory, the first of C channels.
        second: in channels-last memory, the others, dtype and device of x.
        groups, weight, bias, eps, silu: as of `group_norm`.

    Returns:
        Norm and concatenation, [B, C, H, W] in channels-last memory.

    Raises:
        ValueError: as `group_norm`.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        _refuse(x, groups, weight, bias, second=second)
    return _JOINED_OP(x, second, groups, weight, bias, eps, silu)


def group_norm_reasons(
    x: torch.Tensor,
    groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    shift: torch.Tensor | None = None,
    channel_bias: torch.Tensor | None = None,
    second: torch.Tensor | None = None,
) -> list[str]:
    """Why `group_norm` (with `second`: `group_norm_joined`) can't take these inputs on any device, in words."""
    reasons = image_reasons(x) + (image_reasons(second, "second") if second is not None else [])
    if reasons:
        return reasons
    batch, channels = _shape(x, second)[:2]
    if second is not None and (second.shape[0], *second.shape[2:]) != (batch, *x.shape[2:]):
        reasons.append(f"second.shape is {list(second.shape)}; allowed: {list(x.shape)} but for the channels")
    if groups < 1 or channels % groups:
        reasons.append(f"groups is {groups}; allowed: divisors of {channels}, C")
    elif channels // groups > MOST_PER_GROUP:
        reasons.append(f"groups is {groups}; allowed: so many that a group has at most {MOST_PER_GROUP} channels")
    return reasons + common_reasons(
        x,
        ("weight", weight, (channels,)),
        ("bias", bias, (channels,)),
        ("shift", shift, (batch, channels)),
        ("channel_bias", channel_bias, (channels,)),
        ("second", second, None),
    )


def _shape(x: torch.Tensor, second: torch.Tensor | None) -> tuple[int, int, int, int]:
    """Of x and second concatenated, [B, C, H, W]."""
    batch, channels, height, width = x.shape
    return batch, channels + (0 if second is None else second.shape[1]), height, width


def _refuse(x, groups, weight, bias, shift=None, channel_bias=None, second=None) -> None:
    reasons = group_norm_reasons(x, groups, weight, bias, shift, channel_bias, second)
    if reasons:
        raise ValueError("; ".join(reasons))


@dataclass(frozen=True)
class GroupNormLaunch:
    """How one shape is cut into programs.

    Attributes:
        groups: of one program.
        columns: its channels, padded to a power of two.
        pixels: of one tile, a power of two.
        loads: tiles that are loaded at once.
        stores: tiles that are normalized at once.
        chunk: pixels that one program takes the moments of; if `whole`, those it normalizes.
        chunks: so many of them.
        num_warps: of one program.
        whole: whether there is one kernel, each program of which takes the moments of all pixels; else there are two.
    """

    groups: int
    columns: int
    pixels: int
    loads: int
    stores: int
    chunk: int
    chunks: int
    num_warps: int
    whole: bool

    @property
    def rows(self) -> int:
        """Pixels that are loaded at once."""
        return self.pixels * self.loads


@lru_cache(maxsize=512)
def group_norm_launch(batch: int, pixels: int, channels: int, groups: int) -> GroupNormLaunch:
    """The launch for [batch, pixels, channels] in `groups` groups: by the figures above.

    What kernels are compiled for takes few values for all numbers of pixels and batches.
    """
    per_group = channels // groups
    if pixels <= _WHOLE_PIXELS and _power_of_two(pixels) * _power_of_two(per_group) <= _WHOLE:
        return _whole_launch(batch, pixels, per_group, groups)
    return _chunked_launch(batch, pixels, per_group, groups)


def _whole_launch(batch: int, pixels: int, per_group: int, groups: int) -> GroupNormLaunch:
    """One group in each program; parts of its pixels so that every multiprocessor has one to normalize."""
    columns = _power_of_two(per_group)
    # Of all pixels' three kinds, 8x8, 16x16 and 32x32 are loaded at once, and half of them stored, if registers allow.
    rows = 64 if pixels <= 128 else 256 if pixels <= 768 else 1024
    num_warps = 4 if rows == 64 else 8
    tile = _tile(columns, num_warps, rows)
    loads, stores = min(_LOADS, rows // tile), max(1, min(_LOADS, rows // (2 * tile)))
    parts = max(1, min(_MULTIPROCESSORS // (groups * batch), pixels // 16))
    chunk = -(-pixels // parts)
    return GroupNormLaunch(1, columns, tile, loads, stores, chunk, -(-pixels // chunk), num_warps, whole=True)


def _chunked_launch(batch: int, pixels: int, per_group: int, groups: int) -> GroupNormLaunch:
    """Groups of about 128 channels in each program of four warps, one or two of which fall to a multiprocessor."""
    together = min(groups, max(1, 128 // per_group))
    while together > 1 and together * per_group > 32 and -(-groups // together) * batch * _CHUNKS < _FEWEST:
        together = -(-together // 2)
    columns = _power_of_two(together * per_group)
    tile = _tile(columns, 4)
    rounds = -(-pixels // (tile * _LOADS))
    blocks = -(-groups // together) * batch
    each = 1
    while each < rounds and (
        -(-rounds // each) > _CHUNKS or blocks * -(-rounds // (2 * each)) >= 1.5 * _MULTIPROCESSORS
    ):
        each *= 2
    chunk = tile * _LOADS * each
    return GroupNormLaunch(together, columns, tile, _LOADS, _LOADS, chunk, -(-pixels // chunk), 4, whole=False)


def _tile(columns: int, num_warps: int, most: int = 1024) -> int:
    """Pixels of a tile of which each thread has one vector."""
    return min(most, max(1, 32 * num_warps * _VALUES // columns))


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def _fake(x, groups, weight, bias, eps, silu=False, shift=None, channel_bias=None):
    with torch.no_grad():
        _refuse(x, groups, weight, bias, shift, channel_bias)
    return _empty(x, None)


def _fake_joined(x, second, groups, weight, bias, eps, silu=False):
    with torch.no_grad():
        _refuse(x, groups, weight, bias, second=second)
    return _empty(x, second), _empty(x, second)


def _empty(x: torch.Tensor, second: torch.Tensor | None) -> torch.Tensor:
    if second is None:
        return torch.empty_like(x, memory_format=torch.channels_last)
    return torch.empty(_shape(x, second), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _run(x, groups, weight, bias, eps, silu=False, shift=None, channel_bias=None, second=None, joined=None):
    key = (
        *(groups, eps, silu, x.shape, x.stride(), x.dtype, x.device),
        *(weight.shape, weight.stride(), weight.dtype, bias.shape, bias.stride(), bias.dtype),
        None if shift is None else (shift.shape, shift.stride(), shift.dtype, shift.device),
        None if channel_bias is None else (channel_bias.shape, channel_bias.stride(), channel_bias.dtype),
        None if second is None else (second.shape, second.stride(), second.dtype, second.device),
    )
    prepared = _PREPARED.get(key)
    if prepared is None:
        with torch.no_grad():
            _refuse(x, groups, weight, bias, shift, channel_bias, second)
        extras = {"shift_ptr": shift, "channel_bias_ptr": channel_bias, "second_ptr": second, "joined_ptr": joined}
        prepared = _prepared(x, groups, eps, silu, extras)
        _PREPARED.put(key, prepared)
    out = _empty(x, second)
    prepared(x, out, weight, bias, *(extra for extra in (shift, channel_bias, second, joined) if extra is not None))
    return out


def _run_joined(x, second, groups, weight, bias, eps, silu=False):
    joined = _empty(x, second)
    return _run(x, groups, weight, bias, eps, silu, second=second, joined=joined), joined


def _prepared(x, groups: int, eps: float, silu: bool, extras: dict[str, Any]) -> Callable[..., None]:
    """The launches for inputs like these, called with x, out, weight, bias, and those extras that are not None."""
    reasons = device_reasons(x.device)
    if reasons:
        raise ValueError("; ".join(reasons))
    shape = batch, channels, height, width = _shape(x, extras["second_ptr"])
    pixels = height * width
    if 0 in shape:
        return lambda *_: None
    from diffopt_kernels.step import _group_norm as device  # here, so that importing the package needs no triton

    launch = group_norm_launch(batch, pixels, channels, groups)
    given = [name for name, extra in extras.items() if extra is not None]
    pointers = {name: Pointer(4 + given.index(name)) if name in given else None for name in extras}
    applied = {"out_ptr": Pointer(1), "joined_ptr": pointers.pop("joined_ptr")}
    applied |= {"weight_ptr": Pointer(2), "bias_ptr": Pointer(3)}
    applied |= {"eps": eps, "STORES": launch.stores, "SILU": silu}
    shift = extras["shift_ptr"]
    shared = {"x_ptr": Pointer(0), **pointers, "stride_shift": 0 if shift is None else shift.stride(0)}
    shared |= {"P": pixels, "C": channels, "C_X": x.shape[1], **_shared_arguments(launch, channels // groups)}
    taken = {"LOADS": launch.loads}
    blocks = -(-groups // launch.groups)
    if launch.whole:
        return PreparedLaunch(
            device.group_norm_whole_kernel,
            (blocks, launch.chunks, batch),
            {**shared, **taken, **applied},
            device=x.device,
        )
    shared |= {"moments_ptr": Pointer(4 + len(given)), "G": groups, **_group_arguments(launch, channels // groups)}
    moments_launch = PreparedLaunch(
        device.group_norm_moments_kernel,
        (blocks, launch.chunks, batch),
        {**shared, **taken},
        device=x.device,
    )
    apply_launch = PreparedLaunch(
        device.group_norm_apply_kernel,
        (blocks, -(-pixels // (launch.pixels * launch.stores)), batch),
        {**shared, **applied, "CHUNKS": launch.chunks, "CHUNKS_PAD": _CHUNKS},
        device=x.device,
    )
    size = (batch, 2, groups, launch.chunks)

    def both(*tensors: torch.Tensor) -> None:
        moments = torch.empty(size, dtype=torch.float32, device=tensors[0].device)
        moments_launch(*tensors, moments)
        apply_launch(*tensors, moments)

    return both


def _shared_arguments(launch: GroupNormLaunch, per_group: int) -> dict[str, Any]:
    """What a launch gives all kernels."""
    return {
        "CHUNK": launch.chunk,
        "CPG": per_group,
        "COLS": launch.columns,
        "PIXELS": launch.pixels,
        "num_warps": launch.num_warps,
    }


def _group_arguments(launch: GroupNormLaunch, per_group: int) -> dict[str, Any]:
    """What the two kernels of a chunked launch get about groups.

    That programs begin at multiples of a load is all that is compiled in: models' 120 channels of 10 to 60 in each
    group, and 80 of one group, share a kernel.
    """
    unit = math.gcd(launch.groups * per_group, _VALUES)
    return {
        "GROUPS": launch.groups,
        "GROUPS_PAD": max(_GROUPS, _power_of_two(launch.groups)),
        "UNITS": launch.groups * per_group // unit,
        "UNIT": unit,
    }


_LIBRARY = torch.library.Library("diffopt_kernels", "FRAGMENT")
_LIBRARY.define(
    "group_norm(Tensor x, int groups, Tensor weight, Tensor bias, float eps, bool silu=False, "
    "Tensor? shift=None, Tensor? channel_bias=None) -> Tensor"
)
_LIBRARY.define(
    "group_norm_joined(Tensor x, Tensor second, int groups, Tensor weight, Tensor bias, float eps, "
    "bool silu=False) -> (Tensor, Tensor)"
)
for key in ("CUDA", "CPU"):
    _LIBRARY.impl("group_norm", _run, key)
    _LIBRARY.impl("group_norm_joined", _run_joined, key)
torch.library.register_fake("diffopt_kernels::group_norm", _fake, lib=_LIBRARY)
torch.library.register_fake("diffopt_kernels::group_norm_joined", _fake_joined, lib=_LIBRARY)
_OP = torch.ops.diffopt_kernels.group_norm.default
_JOINED_OP = torch.ops.diffopt_kernels.group_norm_joined.default
