"""What free-running pictures of several prompts differ by, one by one and as distributions."""

import math
import statistics
from typing import NamedTuple

import pydantic

from diffopt.bench.schema import Model


class Distribution(NamedTuple):
    """Over prompts: the median, the value that all but the worst 5% reach, and the worst."""

    median: float
    p5: float
    worst: float


class PictureDifferences(Model):
    """Two pipelines' pictures of the same prompts and seeds, compared one by one at 8 bits per channel.

    Attributes:
        left, right: what made them, in words.
        psnr_db: peak signal-to-noise ratio in decibels; infinite where two pictures are the same.
        ssim: structural similarity, 1 for the same; None where scikit-image was missing.
        max_difference: the largest over pixels and channels, of 255.
    """

    left: str
    right: str
    psnr_db: list[float]
    ssim: list[float] | None
    max_difference: list[int]

    @pydantic.model_validator(mode="after")
    def _samples_belong_together(self) -> "PictureDifferences":
        lengths = {len(self.psnr_db), len(self.max_difference), *([len(self.ssim)] if self.ssim is not None else [])}
        if len(lengths) > 1 or 0 in lengths:
            raise ValueError("differences of pictures have unequal numbers of samples, or none")
        return self

    @property
    def identical(self) -> int:
        """How many pairs are the same picture, bit for bit."""
        return sum(difference == 0 for difference in self.max_difference)

    def distributions(self) -> dict[str, Distribution | None]:
        """`psnr_db`, `ssim` (None: not measured) and `max_difference`."""
        return {
            "psnr_db": _lowest_are_worst(self.psnr_db),
            "ssim": None if self.ssim is None else _lowest_are_worst(self.ssim),
            "max_difference": Distribution(*(-value for value in _lowest_are_worst([-x for x in self.max_difference]))),
        }


class FreeRunning(Model):
    """Whole pictures over several prompts, each with a seed of its own.

    Attributes:
        prompts: how many. steps: of each picture.
        ours: stock as it came against the optimized pipeline.
        stock: stock as it came against stock on another of PyTorch's backends; None where every backend gives the
            same bits.
        nonfinite_ours, nonfinite_stock: NaN and infinite values in the decoded pictures, all prompts together.
    """

    prompts: int
    steps: int
    ours: PictureDifferences
    stock: PictureDifferences | None
    nonfinite_ours: int
    nonfinite_stock: int

    @property
    def finite(self) -> bool:
        """No value broke down that doesn't break down in stock."""
        return self.nonfinite_ours <= self.nonfinite_stock


def _lowest_are_worst(values: list[float]) -> Distribution:
    """Values that were measured, never means of two of them: PSNR can be infinite."""
    ordered = sorted(values)
    return Distribution(statistics.median_low(ordered), ordered[math.floor(0.05 * (len(ordered) - 1))], ordered[0])
