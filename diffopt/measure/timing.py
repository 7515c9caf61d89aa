"""Timing that counts device work: events on CUDA, the host's clock on a CPU; contenders interleaved, samples kept."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from diffopt.measure.environment import STRICT

_RESAMPLES = 10_000


@dataclasses.dataclass(frozen=True)
class Spread:
    """Summary of samples; percentiles by linear interpolation. Units are those of the samples."""

    n: int
    median: float
    p5: float
    p90: float
    p95: float
    p99: float
    min: float
    max: float
    __pydantic_config__ = STRICT

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Spread":
        """Summarise at least one finite sample.

        Raises:
            ValueError: no samples, or one that isn't finite.
        """
        values = _finite(samples)
        p5, median, p90, p95, p99 = (float(value) for value in np.percentile(values, (5, 50, 90, 95, 99)))
        return cls(len(values), median, p5, p90, p95, p99, float(values.min()), float(values.max()))


@dataclasses.dataclass(frozen=True)
class PairedRatio:
    """Ratio of the medians of two interleaved series, with a 95% bootstrap interval over the pairs."""

    ratio: float
    low: float
    high: float
    n: int
    __pydantic_config__ = STRICT


@dataclasses.dataclass(frozen=True)
class Samples:
    """Raw samples by contender, in the order they were taken; the n-th of each belong together.

    Attributes:
        interrupted: the user stopped the run; what was complete by then is here.
    """

    by_name: dict[str, list[Any]]
    interrupted: bool = False


def synchronize(device: torch.device | str) -> None:
    """Wait for everything queued on the device; nothing to do on a CPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def device_seconds(run: Callable[[], object], device: torch.device | str) -> float:
    """Seconds one call of `run` takes on the device: events on CUDA's current stream, the host's clock on a CPU.

    The device is idle at the start, so on CUDA host time that the device waits for is included.
    """
    synchronize(device)
    if torch.device(device).type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.cuda.device(device):
        first.record()
        run()
        last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1000


def interleaved(
    runs: Mapping[str, Callable[[], Any]],
    *,
    repetitions: int,
    warmup: int,
    measure: Callable[[Callable[[], Any]], Any],
    on_sample: Callable[[str, int], None] | None = None,
) -> Samples:
    """Measure several contenders in turn, A B A B ..., after `warmup` unmeasured rounds of the same kind.

    Args:
        runs: contender name to what it does.
        measure: turns one run into a sample, e.g. `lambda run: device_seconds(run, device)`.
        on_sample: called with the name and the number of each finished repetition, warm-ups as negative numbers.

    Ctrl-C after the first complete round ends the measurement and keeps the complete rounds; before it, it is raised.
    """
    by_name: dict[str, list[Any]] = {name: [] for name in runs}
    rounds = 0
    try:
        for repetition in range(-warmup, repetitions):
            sampled = {}
            for name, run in runs.items():
                sampled[name] = measure(run)
                if on_sample is not None:
                    on_sample(name, repetition)
            if repetition >= 0:
                for name, sample in sampled.items():
                    by_name[name].append(sample)
                rounds += 1
    except KeyboardInterrupt:
        if rounds == 0:
            raise
        return Samples({name: samples[:rounds] for name, samples in by_name.items()}, interrupted=True)
    return Samples(by_name)


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float], *, seed: int = 0) -> PairedRatio:
    """Median of one series over the median of the other, the n-th samples of which were taken side by side.

    The interval resamples the pairs, so drift that both share cancels (percentile bootstrap, Efron 1979).

    Raises:
        ValueError: series of unequal length, none, or samples that aren't finite and positive.
    """
    top, bottom = _finite(numerator), _finite(denominator)
    if len(top) != len(bottom):
        raise ValueError(f"paired series of unequal length: {len(top)} and {len(bottom)}")
    if min(top.min(), bottom.min()) <= 0:
        raise ValueError("a ratio needs positive samples")
    picks = np.random.default_rng(seed).integers(len(top), size=(_RESAMPLES, len(top)))
    ratios = np.median(top[picks], axis=1) / np.median(bottom[picks], axis=1)
    low, high = (float(value) for value in np.percentile(ratios, (2.5, 97.5)))
    return PairedRatio(float(np.median(top) / np.median(bottom)), low, high, len(top))


def _finite(samples: Sequence[float]) -> np.ndarray:
    values = np.asarray(samples, dtype=np.float64)
    if values.size == 0 or not all(map(math.isfinite, values)):
        raise ValueError(f"samples must be finite and at least one: {list(samples)}")
    return values
