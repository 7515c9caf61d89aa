"""Inputs that attention is checked and timed on: model shapes by name, and the awkward ones with the reason why."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch

from diffopt_kernels.launch import AttentionLaunch

Layout = Literal["contiguous", "fused", "heads first", "surrounded", "unaligned", "broadcast"]
Content = Literal[
    "normal",
    "spread 3",
    "spread 5",
    "spread 6",
    "spread 7",
    "spread 30",
    "rising",
    "falling",
    "one key",
    "equal keys",
    "zero queries",
    "far below zero",
    "low rest",
]
Mask = Literal["none", "keys", "late keys", "pairs", "bias", "wide bias"]


@dataclass(frozen=True)
class AttentionCase:
    """One input: its shape, what is in it, how it lies in memory, its mask. `why` says what it is there to catch.

    With `repeats` the launch runs that often; every run must give the same bits.
    """

    why: str
    batch: int
    n_q: int
    n_k: int
    heads: int
    content: Content = "normal"
    layout: Layout = "contiguous"
    mask: Mask = "none"
    repeats: int = 1

    @property
    def name(self) -> str:
        mask = "" if self.mask == "none" else f", mask {self.mask}"
        return f"{self.why}: {self.batch},{self.n_q},{self.n_k},{self.heads} {self.content}, {self.layout}{mask}"


# Self-attention and cross-attention layers as the UNets call them (guidance batch of 2), by head dim.
MODEL_CASES: dict[int, tuple[AttentionCase, ...]] = {
    40: (
        AttentionCase("sd15-512 self 64x64", 2, 4096, 4096, 8),
        AttentionCase("sd15-512 cross 64x64", 2, 4096, 77, 8),
    ),
    64: (
        AttentionCase("sdxl self 64x64", 2, 4096, 4096, 10),
        AttentionCase("sdxl self 32x32", 2, 1024, 1024, 20),
        AttentionCase("sdxl cross 64x64", 2, 4096, 77, 10),
        AttentionCase("sdxl cross 32x32", 2, 1024, 77, 20),
    ),
    80: (
        AttentionCase("sd15-512 self 32x32", 2, 1024, 1024, 8),
        AttentionCase("sd15-1024 self 64x64", 2, 4096, 4096, 8),
        AttentionCase("sd15-512 cross 32x32", 2, 1024, 77, 8),
    ),
    128: (
        AttentionCase("d128 self 64x64", 1, 4096, 4096, 8),
        AttentionCase("d128 cross 64x64", 1, 4096, 77, 8),
    ),
    160: (
        AttentionCase("sd15-512 self 16x16", 2, 256, 256, 8),
        AttentionCase("sd15-1024 self 32x32", 2, 1024, 1024, 8),
        AttentionCase("sd15-512 self 8x8", 2, 64, 64, 8),
        AttentionCase("sd15-512 cross 16x16", 2, 256, 77, 8),
    ),
}

# Scores with a standard deviation of 3 over two or more key tiles: here a wrong scale shows in every dtype.
FAULT_CASE = AttentionCase("planted fault", 1, 256, 256, 2, "spread 3")


def awkward_cases(launch: AttentionLaunch) -> Iterator[AttentionCase]:
    """What one launch is checked on; `_awkward_cases` with no more keys than it takes."""
    for case in _awkward_cases(launch):
        yield _with_keys_for(launch, case)
    if launch.kernel == "short":
        n_q = (2 * launch.query_tiles + 1) * launch.block_m + 5
        yield AttentionCase("many query tiles", 2, n_q, launch.block_n - 1, 3, "spread 3", "surrounded")
    if launch.kernel == "hopper":  # the first tile's maximum is far from the largest: the program starts over
        n_k = 9 * launch.block_n
        for layout in ("contiguous", "surrounded"):
            n_k += 3
            yield AttentionCase("starting over", 2, launch.block_m + 7, n_k, 2, "rising", layout)
            yield AttentionCase("starting over at its own place", 1, n_k, n_k, 2, "one key", layout)
        # Some programs start over for a row or two, among many that do not: where two shared a multiprocessor, one in a
        # hundred once went on without (reports/notes/attention.md).
        for content in ("spread 5", "spread 6", "spread 7"):
            yield AttentionCase("some programs start over", 2, 1024, 1024, 20, content, repeats=300)


def fault_case(launch: AttentionLaunch) -> AttentionCase:
    """The case in which a planted fault has to show; none smaller does in every dtype."""
    return _with_keys_for(launch, FAULT_CASE)


def _with_keys_for(launch: AttentionLaunch, case: AttentionCase) -> AttentionCase:
    return case if launch.takes(case.n_k) else replace(case, n_k=launch.block_n)


def _awkward_cases(launch: AttentionLaunch) -> Iterator[AttentionCase]:
    """Lengths around the edges of this launch's tiles, every content and every layout, all small.

    Each but the exact ones has 64 query rows or more: over a handful, whose rounding is larger is a matter of luck.
    """
    m, n = launch.block_m, launch.block_n
    yield AttentionCase("single query and key", 1, 1, 1, 1)
    yield AttentionCase("single key", 2, 63, 1, 3)
    yield AttentionCase("single query", 16, 1, 77, 4)
    yield AttentionCase("prompt length", 2, 111, 77, 3, layout="surrounded")
    yield AttentionCase("exact tiles", 1, m, n, 2)
    yield AttentionCase("two exact tiles", 2, 2 * m, 2 * n, 1, "spread 3")
    yield AttentionCase("one more than a tile", 1, m + 1, n + 1, 2, layout="surrounded")
    yield AttentionCase("one less than two tiles", 1, 2 * m - 1, 2 * n - 1, 2, layout="surrounded")
    yield AttentionCase("deeper than the pipeline", 1, 77, 5 * n + 3, 2, "spread 3", "surrounded")
    yield AttentionCase("many programs", 3, 256, 256, 5, "spread 3", "fused")
    for content in ("spread 30", "rising", "falling", "one key", "equal keys", "zero queries", "far below zero"):
        yield AttentionCase("adversarial", 1, 111, 4 * n, 2, content)
        yield AttentionCase("adversarial with a tail", 1, 63, 111, 2, content, "surrounded")
    # Each other key weighs 2 ** -11 of the largest, all together four times as much: digits lost down there show here.
    yield AttentionCase("most of the weight far below the maximum", 1, 65, 8192, 2, "low rest")
    for layout in ("fused", "heads first", "broadcast"):
        yield AttentionCase("views", 2, 65, 65, 3, "spread 3", layout)
    if launch.kernel == "pointers":
        yield AttentionCase("odd strides", 2, 77, 63, 3, "spread 3", "unaligned")
        yield AttentionCase("odd strides, exact tiles", 1, m, 2 * n, 2, "spread 3", "unaligned")
        yield from _masked_cases(m, n)


def _masked_cases(m: int, n: int) -> Iterator[AttentionCase]:
    """Every kind of mask, over whole key tiles and not, along all strides the kernel tells apart."""
    yield AttentionCase("key padding", 2, 65, 2 * n + 3, 3, "spread 3", mask="keys")
    yield AttentionCase("key padding, exact tiles", 1, 2 * m, 4 * n, 2, "rising", mask="keys")
    yield AttentionCase("first tiles hold no key", 2, 65, 5 * n + 1, 2, "spread 3", "surrounded", "late keys")
    yield AttentionCase("queries without keys", 2, m + 1, 3 * n - 1, 2, "spread 3", "surrounded", "pairs")
    yield AttentionCase("queries without keys, exact tiles", 1, 2 * m, 2 * n, 2, "spread 3", mask="pairs")
    yield AttentionCase("bias", 2, 77, 3 * n + 1, 3, "spread 3", "fused", "bias")
    yield AttentionCase("bias, exact tiles", 1, m, 2 * n, 2, "far below zero", mask="bias")
    yield AttentionCase(
        "bias of lowest numbers, keys before queries", 1, 111, 2 * n + 1, 3, "spread 3", mask="wide bias"
    )


def tiny_cases(launch: AttentionLaunch) -> Iterator[AttentionCase]:
    """At most two tiles per axis: for the interpreter and for compute-sanitizer."""
    for case in _tiny_cases(launch):
        yield _with_keys_for(launch, case)


def _tiny_cases(launch: AttentionLaunch) -> Iterator[AttentionCase]:
    m, n = launch.block_m, launch.block_n
    yield AttentionCase("single query and key", 1, 1, 1, 1)
    yield AttentionCase("one more than a tile", 1, m + 1, n + 1, 2, "spread 3", "surrounded")
    yield AttentionCase("exact tiles", 1, m, 2 * n, 2, "far below zero")
    yield AttentionCase("views", 4, 9, 2 * n - 1, 2, "rising", "fused")
    if launch.kernel == "pointers":
        yield AttentionCase("odd strides", 4, 5, n + 3, 4, layout="unaligned")
        yield AttentionCase("first tile holds no key", 2, 33, 2 * n, 2, "spread 3", mask="late keys")
        yield AttentionCase("queries without keys", 1, m + 1, n + 1, 2, "spread 3", "surrounded", "pairs")
        yield AttentionCase("bias of lowest numbers, keys before queries", 1, m + 1, n + 1, 2, mask="wide bias")


def make_inputs(
    case: AttentionCase, head_dim: int, dtype: torch.dtype, device: torch.device | str, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q [B, N_q, H, D], k and v [B, N_k, H, D], fresh random values, laid out as the case says."""
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(n: int) -> torch.Tensor:
        return torch.randn((case.batch, n, case.heads, head_dim), generator=generator, device=device)

    q, k, v = _filled(case, normal(case.n_q), normal(case.n_k), normal(case.n_k))
    return tuple(_laid_out(case, x.to(dtype)) for x in (q, k, v))  # pyright: ignore[reportReturnType]


def make_mask(case: AttentionCase, dtype: torch.dtype, device: torch.device | str, seed: int) -> torch.Tensor | None:
    """The case's mask, broadcastable to [B, H, N_q, N_k]; `dtype` is that of the queries.

    "keys" and "late keys": bool [B, 1, 1, N_k], as prompts are padded. "pairs": bool [B, H, N_q, N_k]; each head's
    first query attends to nothing. "bias": `dtype` [H, N_q, N_k], a quarter of it -inf. "wide bias": float32
    [1, 1, N_q, N_k], keys before queries in memory, a quarter of it float32's lowest number, the first query's all.
    """
    if case.mask == "none":
        return None
    generator = torch.Generator(device=device).manual_seed(seed + 1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    if case.mask == "keys":
        mask = normal(case.batch, 1, 1, case.n_k) > -0.5
        mask[..., case.n_k // 2] = True
        return mask
    if case.mask == "late keys":
        late = torch.arange(case.n_k, device=device) >= case.n_k * 3 // 4
        return late.expand(case.batch, 1, 1, case.n_k)
    if case.mask == "pairs":
        mask = normal(case.batch, case.heads, case.n_q, case.n_k) > 0
        mask[:, :, 0] = False
        return mask
    if case.mask == "bias":
        bias = normal(case.heads, case.n_q, case.n_k)
        return torch.where(bias < -0.7, -torch.inf, bias * 2).to(dtype)
    bias = normal(1, 1, case.n_k, case.n_q)
    bias = torch.where(bias < -0.7, torch.finfo(torch.float32).min, bias * 2)
    bias[..., 0] = torch.finfo(torch.float32).min
    return bias.transpose(2, 3)


def _filled(
    case: AttentionCase, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Standard normal tensors turned into what `content` asks for; scores count after scaling by D ** -0.5."""
    if case.content.startswith("spread"):
        return q * float(case.content.split()[1]), k, v
    if case.content == "zero queries":
        return q * 0, k, v
    if case.content == "equal keys":
        return q, k[:, :1].expand_as(k), v
    if case.content == "normal":
        return q, k, v
    # The rest give each key a score of its own for all queries: along one direction that queries and keys share.
    n_k, head_dim = k.shape[1], k.shape[3]
    ramp = torch.linspace(-20, 20, n_k, device=k.device)
    wanted = {
        "rising": ramp,  # the maximum moves in every tile
        "falling": ramp.flip(0),  # the first tile decides, the rest must not disturb it
        "one key": torch.where(torch.arange(n_k, device=k.device) == n_k // 2, 60.0, 0.0),
        "low rest": torch.where(torch.arange(n_k, device=k.device) == 5, 7.5, 0.0),
        "far below zero": torch.full((n_k,), -200.0, device=k.device),  # a missing key would score 0 and win
    }[case.content]
    direction = torch.ones(head_dim, device=k.device)
    q = 0.1 * q + direction * 4
    k = 0.3 * k + direction * (wanted / (4 * head_dim**0.5))[None, :, None, None]
    return q, k, v


def _laid_out(case: AttentionCase, x: torch.Tensor) -> torch.Tensor:
    batch, n, heads, head_dim = x.shape
    if case.layout == "fused":  # the middle third of a fused projection
        return torch.stack([x.flip(1), x, -x], dim=2)[:, :, 1]
    if case.layout == "heads first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if case.layout == "broadcast":
        return x[:1].expand_as(x)
    if case.layout in ("surrounded", "unaligned"):  # NaN after each row of tokens and after each head's columns
        odd = int(case.layout == "unaligned")
        columns = head_dim + (odd or 16)
        buffer = torch.full((batch * (n + 3) * heads * columns + odd,), torch.nan, dtype=x.dtype, device=x.device)
        view = buffer[odd:].view(batch, n + 3, heads, columns)[:, :n, :, :head_dim]
        return view.copy_(x)
    return x.contiguous()


def poisoned_output(
    shape: torch.Size, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """An output full of NaN between two guard bands of a known value: (output, band before, band after)."""
    band, n = 4096, shape.numel()
    buffer = torch.full((n + 2 * band,), GUARD, dtype=dtype, device=device)
    out = buffer[band : band + n]
    out.fill_(torch.nan)
    return out.view(shape), buffer[:band], buffer[band + n :]


GUARD = -1.75  # exact in every dtype
