"""The rule for pictures that are decoded in float16 instead of float32.

Errors of rounding are proportional to a dtype's unit roundoff. Plain float16 may overflow, bfloat16 has float32's range
and rounds 8 times as coarsely: a decode in float16 that is right is as far from the exact picture as an eighth of
bfloat16's distance, and as plain float16's where that is finite. It passes at 1.5 times the larger of the two, plus the
step rule's floor, if at least 99.9% of the picture's 8-bit values are within one level of the exact one's, too.
"""

import dataclasses
import math
from collections.abc import Callable

import torch

from diffopt.measure.environment import STRICT
from diffopt.measure.exactness import nonfinite_count, relative_l2
from diffopt.measure.teacher_forced import FACTOR, floor

Decode = Callable[[torch.Tensor], torch.Tensor]
"""Latents [B, 4, h, w] to pictures [B, 3, H, W] in −1 to 1."""

NEAR = 0.999
"""Share of a picture's 8-bit values that have to be within one level."""


@dataclasses.dataclass(frozen=True)
class DecodeCertificate:
    """What the rule found; relative L2 distances to pictures decoded in float32.

    Attributes:
        ours: of the decode under test. fault: the same with the planted fault.
        float16, bfloat16: of stock's decoder in that dtype; infinite where it overflows.
        allowed: the limit for `ours`.
        near: share of 8-bit values within one level. levels: the largest difference, of 255.
        nonfinite: NaN and infinite values in our pictures.
        pictures: that were decoded. fault_name: the planted fault in words.
    """

    ours: float
    fault: float
    float16: float
    bfloat16: float
    allowed: float
    near: float
    levels: int
    nonfinite: int
    pictures: int
    fault_name: str
    __pydantic_config__ = STRICT

    @property
    def void(self) -> bool:
        """The check proves nothing: the planted fault went unnoticed, or there is no limit."""
        return not (math.isfinite(self.fault) and self.fault > self.allowed)

    @property
    def passed(self) -> bool:
        """Both distances are within their limits, all is finite, and the check isn't void."""
        return not self.void and self.nonfinite == 0 and self.ours <= self.allowed and self.near >= NEAR

    def verdict(self) -> str:
        """One line: passed, failed or void, with the numbers that decided."""
        words = f"{self.ours:.2e} of {self.allowed:.2e} allowed"
        if self.void:
            return f"void: the planted fault ({self.fault_name}) was not caught, {self.fault:.2e}; {words}"
        levels = f"{100 * self.near:.3f}% of 8-bit values within one level, the farthest {self.levels} levels off"
        return f"{'passed' if self.passed else 'FAILED'}: {words}; {levels}; planted fault caught at {self.fault:.2e}"


def decode_certificate(
    latents: torch.Tensor,
    *,
    ours: Decode,
    fault: Decode,
    fault_name: str,
    float16: Decode,
    bfloat16: Decode,
    reference: Decode,
) -> DecodeCertificate:
    """Decode latents [B, 4, h, w], as decoders get them, in every way and compare.

    Args:
        ours: the decode under test. fault: the same with a planted fault.
        float16, bfloat16, reference: stock's decode in that dtype; the reference in float32 without TF32.
    """
    exact, picture = reference(latents), ours(latents)
    coarse = relative_l2(bfloat16(latents), exact)
    plain = relative_l2(float16(latents), exact)
    plain = plain if math.isfinite(plain) else math.inf
    finer = torch.finfo(torch.float16).eps / torch.finfo(torch.bfloat16).eps
    limits = [limit for limit in (coarse * finer, plain) if limit < math.inf]
    apart = (_levels(picture) - _levels(exact)).abs()
    return DecodeCertificate(
        ours=relative_l2(picture, exact),
        fault=relative_l2(fault(latents), exact),
        float16=plain,
        bfloat16=coarse,
        allowed=FACTOR * max(limits, default=math.nan) + floor(torch.float16),
        near=(apart <= 1).double().mean().item(),
        levels=int(apart.nan_to_num(nan=255.0).max().item()),
        nonfinite=nonfinite_count(picture),
        pictures=len(latents),
        fault_name=fault_name,
    )


def _levels(picture: torch.Tensor) -> torch.Tensor:
    """A picture in −1 to 1 in levels of 8 bits, as diffusers rounds it."""
    return ((picture.float() / 2 + 0.5).clamp(0, 1) * 255).round()
