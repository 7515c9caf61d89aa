"""Which speed-ups may be claimed: exactness passed, and the interval of the paired ratio lies above 1."""

import dataclasses
import math
from collections.abc import Sequence

from diffopt.bench.report.extras import MissingExtraError, require
from diffopt.bench.step.record import StepRecord

CONFIDENCE = 0.95
METHOD = "mean of the logarithms of the paired ratios, Student's t interval, 95%"
_PURPOSE = "the interval of a ratio"


@dataclasses.dataclass(frozen=True)
class Interval:
    """A ratio with its confidence interval: geometric mean over `n` samples."""

    ratio: float
    low: float
    high: float
    n: int


@dataclasses.dataclass(frozen=True)
class Claim:
    """One speed-up, or why there is none.

    Attributes:
        claimed: whether it may be called a gain.
        why: empty for a claim; otherwise what stands against it.
        interval: stock's time over ours, above 1 is faster; None where there is none to be had.
        exact: whether the exactness check passed. exactness: its verdict, with numbers.
    """

    claimed: bool
    why: str
    interval: Interval | None
    exact: bool
    exactness: str


def paired_interval(numerator: Sequence[float], denominator: Sequence[float]) -> Interval:
    """Geometric mean of the paired ratios with its t interval.

    The n-th samples were taken side by side, so drift that both share cancels. A ratio of times is symmetric on the
    logarithmic scale, where the t interval is made (scipy's); it is wider than a bootstrap's with as few samples as
    benchmarks have, and one outlier widens it further.

    Raises:
        MissingExtraError: no scipy.
        ValueError: unequal lengths, fewer than two pairs, or samples that aren't finite and positive.
    """
    stats = require("scipy.stats", _PURPOSE)
    if len(numerator) != len(denominator) or len(numerator) < 2:
        raise ValueError(f"an interval needs two pairs or more: {len(numerator)} and {len(denominator)} samples")
    logs = [_log(top) - _log(bottom) for top, bottom in zip(numerator, denominator, strict=True)]
    if max(logs) == min(logs):  # no spread at all: scipy would answer with NaN
        ratio = math.exp(logs[0])
        return Interval(ratio, ratio, ratio, len(logs))
    bounds = stats.ttest_1samp(logs, 0.0).confidence_interval(CONFIDENCE)
    return Interval(math.exp(math.fsum(logs) / len(logs)), math.exp(bounds.low), math.exp(bounds.high), len(logs))


def unpaired_interval(numerator: Sequence[float], denominator: Sequence[float]) -> Interval:
    """Ratio of the geometric means of two runs with Welch's t interval; `n` is of the smaller one.

    Raises:
        MissingExtraError: no scipy.
        ValueError: fewer than two samples in one, or samples that aren't finite and positive.
    """
    stats = require("scipy.stats", _PURPOSE)
    if min(len(numerator), len(denominator)) < 2:
        raise ValueError(f"an interval needs two samples each: {len(numerator)} and {len(denominator)}")
    top, bottom = [_log(value) for value in numerator], [_log(value) for value in denominator]
    ratio = math.exp(math.fsum(top) / len(top) - math.fsum(bottom) / len(bottom))
    n = min(len(top), len(bottom))
    if max(top) == min(top) and max(bottom) == min(bottom):
        return Interval(ratio, ratio, ratio, n)
    bounds = stats.ttest_ind(top, bottom, equal_var=False).confidence_interval(CONFIDENCE)
    return Interval(ratio, math.exp(bounds.low), math.exp(bounds.high), n)


def claims_of(record: StepRecord) -> dict[str, Claim]:
    """A record's claims: "loop" and "unet", and "pictures" where whole pictures were timed or nothing was."""
    samples: dict[str, tuple[Sequence[float], Sequence[float]]] = {"loop": ((), ()), "unet": ((), ())}
    stock, ours = record.stock, record.optimized
    if stock is not None and ours is not None:
        samples = {"loop": (stock.loop_s, ours.loop_s), "unet": (stock.unet_s, ours.unet_s)}
        if stock.pictures is not None and ours.pictures is not None:
            samples["pictures"] = (stock.pictures.whole_s, ours.pictures.whole_s)
    return {what: _claim(record, *pair) for what, pair in samples.items()}


def _claim(record: StepRecord, stock_s: Sequence[float], ours_s: Sequence[float]) -> Claim:
    exactness = record.verdict()

    def claim(why: str, interval: Interval | None = None) -> Claim:
        return Claim(not why, why, interval, record.exact, exactness)

    if not record.exact:
        return claim(f"the exactness check did not pass: {exactness}")
    if min(len(stock_s), len(ours_s)) < 2:
        return claim("fewer than two interleaved rounds were timed")
    try:
        interval = paired_interval(stock_s, ours_s)
    except MissingExtraError as error:
        return claim(str(error))
    if interval.high < 1:
        return claim("slower: the whole interval lies below 1", interval)
    if interval.low <= 1:
        return claim("the interval includes 1", interval)
    return claim("", interval)


def _log(value: float) -> float:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"a ratio needs finite positive samples, not {value}")
    return math.log(value)
