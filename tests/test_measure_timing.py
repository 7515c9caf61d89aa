"""Summaries, paired ratios and the interleaving of contenders."""

import math

import pytest

from diffopt.measure.timing import Spread, device_seconds, interleaved, paired_ratio


def test_spread_of_a_known_series():
    spread = Spread.of([float(value) for value in range(100, -1, -1)])
    assert spread == Spread(n=101, median=50, p5=5, p90=90, p95=95, p99=99, min=0, max=100)


@pytest.mark.parametrize("samples", [[], [1.0, math.nan], [math.inf]])
def test_spread_refuses_what_has_no_summary(samples):
    with pytest.raises(ValueError, match="finite"):
        Spread.of(samples)


def test_paired_ratio_finds_the_ratio_and_narrows_with_agreement():
    steady = [1.0, 1.01, 0.99, 1.0, 1.02, 0.98, 1.0]
    ratio = paired_ratio([2 * value for value in steady], steady)
    assert (ratio.ratio, ratio.n) == (2.0, 7)
    assert ratio.low <= 2.0 <= ratio.high
    assert ratio.high - ratio.low < 0.1


def test_paired_ratio_of_equal_contenders_includes_one():
    a = [1.0, 1.2, 0.9, 1.1, 1.05, 0.95, 1.3, 0.85]
    b = [1.1, 0.95, 1.0, 1.2, 0.9, 1.05, 1.25, 0.88]
    ratio = paired_ratio(a, b)
    assert ratio.low < 1 < ratio.high


def test_paired_ratio_cancels_drift_that_both_share():
    drift = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]  # a machine that gets slower and slower
    ratio = paired_ratio([1.5 * value for value in drift], drift)
    assert ratio.low == pytest.approx(1.5)
    assert ratio.high == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("top", "bottom"), [([1.0], [1.0, 2.0]), ([], []), ([0.0], [1.0]), ([1.0], [-1.0]), ([math.nan], [1.0])]
)
def test_paired_ratio_refuses_what_is_no_pair(top, bottom):
    with pytest.raises(ValueError, match=r"unequal|positive|finite"):
        paired_ratio(top, bottom)


def test_interleaved_takes_turns_after_the_warmup():
    order = []
    runs = {name: (lambda name=name: order.append(name) or len(order)) for name in "AB"}
    samples = interleaved(runs, repetitions=2, warmup=1, measure=lambda run: run())
    assert order == ["A", "B"] * 3
    assert samples.by_name == {"A": [3, 5], "B": [4, 6]}
    assert not samples.interrupted


def test_an_interrupt_keeps_complete_rounds_only():
    def run():
        run.calls += 1
        if run.calls == 6:  # in the middle of the third round
            raise KeyboardInterrupt
        return run.calls

    run.calls = 0
    samples = interleaved({"A": run, "B": run}, repetitions=9, warmup=0, measure=lambda run: run())
    assert samples.by_name == {"A": [1, 3], "B": [2, 4]}
    assert samples.interrupted


def test_an_interrupt_before_the_first_round_goes_on():
    def run():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interleaved({"A": run}, repetitions=3, warmup=1, measure=lambda run: run())


def test_device_seconds_counts_what_ran():
    import time

    assert device_seconds(lambda: time.sleep(0.02), "cpu") >= 0.02


@pytest.mark.gpu
def test_device_seconds_waits_for_the_device():
    import torch

    x = torch.randn(8192, 8192, device="cuda")
    (x @ x).sum().item()
    one, many = (device_seconds(lambda n=n: [x @ x for _ in range(n)], "cuda") for n in (1, 10))
    assert many > 5 * one  # queued work would look free
