"""Claims: a gain needs exactness and an interval above 1; otherwise the reason is told."""

import dataclasses
import math
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sample_records import a_certificate, a_peer, a_step_record, some_pictures

from diffopt.bench.report.claims import Interval, claims_of, paired_interval, unpaired_interval
from diffopt.bench.report.cost import cost_per_1000, given_price, given_prices, known_price
from diffopt.bench.report.extras import MissingExtraError
from diffopt.bench.report.rows import claim_words, disturbed_notes, gain_words, host_notes, row_notes, rows_of
from diffopt.errors import InputError

seconds = st.floats(0.01, 100)


@pytest.fixture
def _scipy():
    pytest.importorskip("scipy", reason='needs scipy: pip install "diffopt[report]"')


@pytest.mark.usefixtures("_scipy")
def test_a_clear_gain_is_claimed():
    claim = claims_of(a_step_record())["loop"]
    assert claim.claimed
    assert claim.why == ""
    assert claim.exact
    assert claim.interval is not None
    # by hand: logs of 2, 21/11 and 19/9 and Student's t for two degrees of freedom
    logs = [math.log(ratio) for ratio in (2, 21 / 11, 19 / 9)]
    mean = sum(logs) / 3
    half = 4.302653 * math.sqrt(sum((log - mean) ** 2 for log in logs) / 2 / 3)
    assert claim.interval.ratio == pytest.approx(math.exp(mean))
    assert (claim.interval.low, claim.interval.high) == pytest.approx((math.exp(mean - half), math.exp(mean + half)))
    (row,) = rows_of([a_step_record()])
    assert gain_words(row).startswith("× 2.005 (")


@pytest.mark.usefixtures("_scipy")
@pytest.mark.parametrize(
    ("loops", "why", "words"),
    [
        (([1.0, 1.3, 0.9], [1.0, 1.0, 1.0]), "the interval includes 1", "no claim ("),
        (([1.0, 0.7, 1.0], [1.0, 1.0, 1.0]), "the interval includes 1", "no claim ("),
        (([1.0, 1.01, 0.99], [2.0, 2.0, 2.0]), "slower: the whole interval lies below 1", "slower × 0.500 ("),
        (([1.0, 1.0], [1.0, 1.0]), "the interval includes 1", "no claim (1.000 to 1.000)"),
        (([1.0], [0.5]), "fewer than two interleaved rounds were timed", "no claim"),
    ],
)
def test_what_is_not_clear_is_no_claim(loops, why, words):
    record = a_step_record(loops=loops)
    claim = claims_of(record)["loop"]
    assert not claim.claimed
    assert claim.why == why
    (row,) = rows_of([record])
    assert gain_words(row).startswith(words)
    assert any("no claim on NVIDIA Test for sd15-512" in note and why in note for note in row_notes([row]))


@pytest.mark.usefixtures("_scipy")
def test_where_stock_waits_for_the_host_its_captured_loop_is_named():
    """Stock takes 2 s for 30 steps, its captured loop 1.5."""
    (row,) = rows_of([a_step_record(peers=[a_peer("compile-reduce-overhead"), a_peer("cuda-graph")])])
    assert (row.stock_its, row.captured_its) == (15, 20)
    words = "captured as graphs and channels-last its loop makes, in it/s: 20.00 (sd15-512)"
    assert host_notes([row]) == [f"stock waits for the host on NVIDIA Test; {words}"]
    assert host_notes([row])[0] in row_notes([row])
    assert host_notes([dataclasses.replace(row, stock_its=19.0)]) == []  # a difference that no host need explain


@pytest.mark.usefixtures("_scipy")
@pytest.mark.parametrize(
    "peers", [[], [a_peer("compile-reduce-overhead")], [a_peer("cuda-graph", state="failed", why="no")]]
)
def test_without_stocks_captured_loop_nothing_is_said_of_the_host(peers):
    (row,) = rows_of([a_step_record(peers=peers)])
    assert row.captured_its is None
    assert host_notes([row]) == []


@pytest.mark.usefixtures("_scipy")
def test_what_disturbed_stands_once_for_each_machine():
    (row,) = rows_of([a_step_record(loops=([1.0, 1.0], [0.5, 0.5]))])
    capped = [dataclasses.replace(row, flags=(f"clocks throttled (power cap) at {n} of 38 looks",)) for n in (7, 12)]
    other = dataclasses.replace(capped[0], machine="NVIDIA Other", flags=(*capped[0].flags, "others at 1 of 3 looks"))
    assert disturbed_notes([row]) == []
    assert disturbed_notes([*capped, row, other]) == [
        "disturbed on NVIDIA Test, clocks throttled (power cap): sd15-512 (7 of 38 looks), sd15-512 (12 of 38 looks)",
        "disturbed on NVIDIA Other, clocks throttled (power cap): sd15-512 (7 of 38 looks)",
        "disturbed on NVIDIA Other, others: sd15-512 (1 of 3 looks)",
    ]


@pytest.mark.parametrize("certificate", [a_certificate(ours=0.5), a_certificate(fault=1e-3)], ids=["failed", "void"])
def test_without_exactness_there_is_no_claim(certificate):
    for claim in claims_of(a_step_record(certificate=certificate)).values():
        assert not claim.claimed
        assert not claim.exact
        assert claim.interval is None
        assert claim.why == f"the exactness check did not pass: {certificate.verdict()}"
        assert claim_words(claim).startswith("no claim: the exactness check did not pass")


def test_without_scipy_one_line_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    claim = claims_of(a_step_record())["loop"]
    assert not claim.claimed
    assert claim.why == 'the interval of a ratio needs scipy, which is not installed: pip install "diffopt[report]"'
    with pytest.raises(MissingExtraError, match="needs scipy"):
        unpaired_interval([1.0, 2.0], [1.0, 2.0])


@pytest.mark.usefixtures("_scipy")
def test_pictures_have_a_claim_of_their_own():
    pictures = some_pictures([3.0, 3.1, 2.9]), some_pictures([2.9, 3.2, 3.0], unet_s=[0.5, 0.6, 0.5])
    claims = claims_of(a_step_record(pictures=pictures))
    assert claims["loop"].claimed
    assert not claims["pictures"].claimed
    assert claims["pictures"].interval == paired_interval([3.0, 3.1, 2.9], [2.9, 3.2, 3.0])
    assert set(claims_of(a_step_record())) == {"loop", "unet"}


@pytest.mark.usefixtures("_scipy")
def test_the_gain_of_a_row_is_the_loops():
    record = a_step_record()
    assert record.optimized is not None
    slow = record.optimized.model_copy(update={"unet_s": [0.1, 0.1, 0.1]})
    record = record.model_copy(update={"optimized": slow})
    claims, (row,) = claims_of(record), rows_of([record])
    assert claims["loop"].claimed
    assert not claims["unet"].claimed
    assert claims["loop"].interval == Interval(row.gain, row.gain_low, row.gain_high, 3)
    assert claim_words(claims["loop"]) == gain_words(row)
    assert claim_words(claims["unet"]).startswith("no claim: slower: the whole interval lies below 1; × 0.500 (")


@pytest.mark.usefixtures("_scipy")
@given(pairs=st.lists(st.tuples(seconds, seconds), min_size=2, max_size=8), factor=st.floats(0.1, 10))
def test_the_interval_holds_its_ratio_turns_around_and_scales(pairs, factor):
    top, bottom = zip(*pairs, strict=True)
    found, turned = paired_interval(top, bottom), paired_interval(bottom, top)
    assert found.low <= found.ratio * (1 + 1e-9)
    assert found.ratio <= found.high * (1 + 1e-9)
    assert turned.ratio == pytest.approx(1 / found.ratio)
    if math.isfinite(found.high) and found.low > 0:
        assert (turned.low, turned.high) == pytest.approx((1 / found.high, 1 / found.low), rel=1e-6)
    scaled = paired_interval([factor * value for value in top], bottom)
    assert scaled.ratio == pytest.approx(factor * found.ratio)


@pytest.mark.usefixtures("_scipy")
def test_drift_that_both_share_does_not_widen_a_paired_interval():
    drift = [1.0, 1.5, 2.2, 3.0]
    ours, stock = [0.50, 0.751, 1.099, 1.501], drift
    paired, unpaired = paired_interval(stock, ours), unpaired_interval(stock, ours)
    assert paired.low > 1.9
    assert unpaired.low < 1


@pytest.mark.usefixtures("_scipy")
def test_two_runs_may_differ_in_their_number_and_spread():
    """By hand: Welch's t interval of logs, its degrees of freedom by Welch and Satterthwaite."""
    ours, others = [math.exp(x) for x in (0.1, 0.3, 0.2)], [math.exp(x) for x in (0.0, 0.8, -0.8, 0.4, -0.4)]
    found = unpaired_interval(ours, others)
    parts = 0.01 / 3, 0.4 / 5  # variance over number
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / 2 + parts[1] ** 2 / 4)
    half = scipy_t(freedom) * math.sqrt(sum(parts))
    assert (found.ratio, found.n) == (pytest.approx(math.exp(0.2)), 3)
    assert (found.low, found.high) == pytest.approx((math.exp(0.2 - half), math.exp(0.2 + half)))


@pytest.mark.usefixtures("_scipy")
def test_a_run_without_spread_leaves_that_of_the_other():
    even, spread = [1.0, 1.0, 1.0], [1.0, 1.1, 0.9]
    for samples in ((even, spread), (spread, even)):
        found = unpaired_interval(*samples)
        assert found.low < 0.95 < 1.05 < found.high
    assert unpaired_interval(even, even[:2]) == Interval(1.0, 1.0, 1.0, 2)


def scipy_t(freedom: float) -> float:
    """Student's t that 95% lie within."""
    return pytest.importorskip("scipy.stats").t.ppf(0.975, freedom)


@pytest.mark.parametrize(
    "samples",
    [([1.0], [1.0]), ([1.0, 2.0], [1.0]), ([1.0, 0.0], [1.0, 1.0]), ([1.0, math.inf], [1.0, 1.0])],
)
@pytest.mark.usefixtures("_scipy")
def test_samples_that_make_no_ratio_are_refused(samples):
    for interval in (paired_interval, unpaired_interval):
        with pytest.raises(ValueError, match="needs"):
            interval(*samples)


@given(usd=st.floats(0.01, 1000), rate=st.floats(0.001, 1000))
def test_the_cost_formula(usd, rate):
    cost = cost_per_1000(usd, rate)
    assert cost == pytest.approx(1000 / rate / 3600 * usd)  # the hours that 1000 images take, times the price
    assert cost_per_1000(2 * usd, 2 * rate) == pytest.approx(cost)


def test_a_price_of_3_60_at_one_image_a_second_is_one_dollar():
    assert cost_per_1000(3.60, 1.0) == pytest.approx(1.0)


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "free", ""])
def test_a_price_that_is_none_is_refused(text):
    with pytest.raises(InputError, match=r"--price: .* above 0"):
        given_price(text)


def test_prices_are_given_per_machine():
    prices = given_prices(["A=2", "B=3.5", "A=4"], ["A", "B"])
    assert {name: price.usd_per_hour for name, price in prices.items()} == {"A": 4.0, "B": 3.5}
    assert given_prices(["2"], ["A"])["A"].usd_per_hour == 2
    for text in ("2", "C=2"):
        with pytest.raises(InputError, match="name the machine, MACHINE=USD, one of: A, B"):
            given_prices([text], ["A", "B"])


def test_shipped_prices_are_dated_and_sourced():
    for name in ("NVIDIA H100 80GB HBM3", "NVIDIA H200"):
        price = known_price(name)
        assert price is not None
        assert all(dataclasses.astuple(price))
    assert known_price(None) is None
    assert known_price("NVIDIA T1000") is None
