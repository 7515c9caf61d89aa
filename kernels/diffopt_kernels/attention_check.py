"""Is a launch right? Its error against float64 beside that of PyTorch's own attention, by one rule.

The rule: relative L2 error and maximum error at most twice the larger of SDPA math's and the best fused backend's in
the same dtype, plus one unit in the last place. NaN never passes, an output band that changed never passes, and a
planted fault (the scale times 1.01) must fail, else the check proves nothing. The largest error of a few thousand
elements is a draw: one just beyond its limit is drawn again, and every further draw must be within.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol, TypeVar

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from diffopt_kernels.attention import is_aligned, launch_attention
from diffopt_kernels.attention_cases import GUARD, AttentionCase, fault_case, make_inputs, make_mask, poisoned_output
from diffopt_kernels.launch import AttentionLaunch
from diffopt_kernels.reference import attention_reference

PLANTED_FAULT = 1.01
NEAR = 1.25  # times the limit; of all launches soaked on an H100, three float32 draws came beyond it, by 1.05 to 1.14
REDRAWS = 4
_FUSED = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)


@dataclass(frozen=True)
class Errors:
    """Distance to float64: relative L2 (dimensionless) and the largest absolute difference. NaN counts as infinite."""

    relative_l2: float
    maximum: float

    def within(self, limit: "Errors") -> bool:
        return self.relative_l2 <= limit.relative_l2 and self.maximum <= limit.maximum

    def near(self, limit: "Errors") -> bool:
        """The largest error, and it alone, is beyond its limit, by so little that it may be the draw."""
        return self.relative_l2 <= limit.relative_l2 and limit.maximum < self.maximum <= limit.maximum * NEAR


@dataclass(frozen=True)
class CaseResult:
    """One case in one dtype: our errors, PyTorch's, what the rule allows, and whether the guard bands are intact."""

    case: str
    dtype: str
    ours: Errors
    math: Errors
    fused: Errors | None
    limit: Errors
    overrun: bool

    @property
    def right(self) -> bool:
        return self.ours.within(self.limit) and not self.overrun

    @property
    def near(self) -> bool:
        return self.ours.near(self.limit) and not self.overrun


@dataclass(frozen=True)
class LaunchResult:
    """All cases of one launch, and the planted fault in each dtype. Only a launch that is `right` may ship.

    `void` says why the check proves nothing: the fault was not noticed, or not looked for. `redrawn` are the cases that
    came just beyond their limit; in their place `cases` has the further draws.
    """

    label: str
    cases: tuple[CaseResult, ...]
    faults: tuple[CaseResult, ...]
    redrawn: tuple[CaseResult, ...] = ()

    @property
    def void(self) -> str:
        passed = [fault.dtype for fault in self.faults if fault.right]
        if passed:
            return f"a scale wrong by 1% passes in {', '.join(passed)}"
        return "" if self.faults else "no fault was planted"

    @property
    def right(self) -> bool:
        return not self.void and bool(self.cases) and all(case.right for case in self.cases)

    @property
    def worst(self) -> CaseResult:
        """The case that comes closest to its limit, or goes farthest beyond it."""
        return max(self.cases, key=lambda c: (c.overrun, c.ours.relative_l2 / c.limit.relative_l2))

    def as_record(self) -> dict:
        return {**asdict(self), "void": self.void, "right": self.right}


def errors_against(out: torch.Tensor, expected: torch.Tensor) -> Errors:
    """Errors of `out` against the float64 `expected`, over all elements."""
    difference = out.double() - expected
    l2, maximum = (difference.norm() / expected.norm()).item(), difference.abs().max().item()
    return Errors(*(x if math.isfinite(x) else math.inf for x in (l2, maximum)))


def allowed_errors(peers: Iterable[Errors], expected: torch.Tensor, dtype: torch.dtype) -> Errors:
    """Twice the largest peer error plus one unit in the last place of `dtype`.

    For the maximum that is the spacing of numbers at the largest output; for the L2 norm the same rounding, evenly
    distributed over all elements (1 / sqrt(12) of the spacing).
    """
    peers = list(peers)
    unit = torch.finfo(dtype).eps
    return Errors(
        2 * max(p.relative_l2 for p in peers) + unit / math.sqrt(12),
        2 * max(p.maximum for p in peers) + unit * expected.abs().max().item(),
    )


class Result(Protocol):
    """What one draw of a case gives: whether it is `near`, which is not right, but may be the draw."""

    @property
    def near(self) -> bool: ...


R = TypeVar("R", bound=Result)


def drawn(check: Callable[[int], Sequence[R]], seed: int, stride: int) -> tuple[list[R], list[R]]:
    """One case's results, further draws in place of those that came near, and apart those that were drawn again.

    Args:
        check: the case's results for one seed.
        seed: of the first draw.
        stride: between the seeds of further draws: the number of cases, each of which has a seed of its own.
    """
    first = list(check(seed))
    near = [result for result in first if result.near]
    further = [seed + (number + 1) * stride for number in range(REDRAWS if near else 0)]
    kept = [result for result in first if not result.near]
    return kept + [result for other in further for result in check(other)], near


def sdpa_errors(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    expected: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> tuple[Errors, Errors | None]:
    """Errors of SDPA math and of the fused SDPA backend with the smallest one (None if none serves)."""
    # Copies, also of what is contiguous: an address off a multiple of 16 bytes crashes the memory-efficient kernel.
    q, k, v = (x.transpose(1, 2).clone(memory_format=torch.contiguous_format) for x in (q, k, v))
    if mask is not None:
        mask = mask.expand(*q.shape[:3], k.shape[2]).clone(memory_format=torch.contiguous_format)

    def errors(backend: SDPBackend) -> Errors:
        with sdpa_kernel(backend):
            out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        return errors_against(out.transpose(1, 2), expected)

    fused = []
    for backend in _FUSED if mask is None or mask.dtype in (torch.bool, q.dtype) else ():
        try:
            fused.append(errors(backend))
        except RuntimeError as error:
            if "No available kernel" not in str(error) and "No viable backend" not in str(error):
                raise
    return errors(SDPBackend.MATH), min(fused, key=lambda e: e.relative_l2, default=None)


def check_case(
    launch: AttentionLaunch,
    case: AttentionCase,
    dtype: torch.dtype,
    device: torch.device,
    *,
    seed: int = 0,
    fault: float = 1.0,
) -> CaseResult:
    """Run one launch on one case; `fault` multiplies the scale, to prove that the rule notices."""
    q, k, v = make_inputs(case, launch.head_dim, dtype, device, seed)
    if launch.kernel != "pointers" and not all(is_aligned(x) for x in (q, k, v)):
        q, k, v = (x.contiguous() for x in (q, k, v))
    mask = make_mask(case, dtype, device, seed)
    expected = attention_reference(q, k, v, mask=mask)
    math_errors, fused_errors = sdpa_errors(q, k, v, expected, mask=mask)
    limit = allowed_errors([e for e in (math_errors, fused_errors) if e], expected, dtype)
    out, before, after = poisoned_output(q.shape, dtype, device)
    launch_attention(q, k, v, out, launch.head_dim**-0.5 * fault, launch, mask)
    differ = torch.zeros((), dtype=torch.bool, device=device)
    for _ in range(case.repeats - 1):
        again = torch.full_like(out, torch.nan)  # memory that was freed just now holds the last run's output
        differ |= (launch_attention(q, k, v, again, launch.head_dim**-0.5 * fault, launch, mask) != out).any()
    return CaseResult(
        case=case.name,
        dtype=str(dtype).removeprefix("torch."),
        ours=Errors(math.inf, math.inf) if differ else errors_against(out, expected),
        math=math_errors,
        fused=fused_errors,
        limit=limit,
        overrun=bool((before != GUARD).any() or (after != GUARD).any()),
    )


def check_launch(
    launch: AttentionLaunch,
    cases: Iterable[AttentionCase],
    dtypes: Iterable[torch.dtype],
    device: torch.device,
    *,
    seed: int = 0,
) -> LaunchResult:
    """Every case in every dtype, then the planted fault, which has to fail."""
    cases, dtypes = list(cases), list(dtypes)
    results, redrawn = [], []
    for dtype in dtypes:
        for i, case in enumerate(cases):

            def check(seed: int, case=case, dtype=dtype) -> list[CaseResult]:
                return [check_case(launch, case, dtype, device, seed=seed)]

            kept, again = drawn(check, seed + i, len(cases))
            results += kept
            redrawn += again
    faults = [check_case(launch, fault_case(launch), dtype, device, seed=seed, fault=PLANTED_FAULT) for dtype in dtypes]
    return LaunchResult(launch.label, tuple(results), tuple(faults), tuple(redrawn))
