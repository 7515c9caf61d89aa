"""What a report says of attention: each shape against its best exact peer, and the mean over the headline shapes."""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Any, Literal

from diffopt.bench.attention.peers import OURS, OURS_BF16
from diffopt.bench.attention.record import AttentionFigure, AttentionRecord
from diffopt.measure.timing import PairedRatio, Spread, paired_ratio
from diffopt_kernels.cost import attention_bytes, attention_flops

Heat = Literal["hot_us", "cold_us"]

NOT_MEASURED: dict[str, Any] = {
    "geomean_ratio": None,
    "geomean_ratio_cold": None,
    "worst_ratio": None,
    "worst_ratio_interval": None,
    "worst_shape": None,
    "void_ratio": "never measured: diffopt bench attention",
    "bf16_worst_ratio": None,
    "memory_beyond_output": None,
    "peers": {},
    "ceilings": None,
    "headline": [],
    "shapes": {},
    "run": None,
}
"""The keys of `attention_entry`, where no attention workload was measured."""


@dataclasses.dataclass(frozen=True)
class Compared:
    """One shape against the peer that is hardest to beat: our time over its time, both in the same dtype.

    Attributes:
        ratio: below 1 we are faster; None if the comparison is void.
        void: why.
        excluded: peers whose result was wrong, which are no exact peers.
    """

    peer: str
    ratio: PairedRatio | None
    void: str
    excluded: tuple[str, ...]


def compared(record: AttentionRecord, heat: Heat = "hot_us") -> Compared:
    """The shape's ratio. A required contender without a time voids it, unless it is a peer whose result was wrong."""
    ours = {figure.dtype: figure for figure in record.figures if figure.name in (OURS, OURS_BF16)}
    peers = [figure for figure in record.figures if figure.name not in (OURS, OURS_BF16)]
    wrong = tuple(figure.name for figure in peers if figure.state == "wrong")
    missing = [f for f in record.figures if f.required and f.state != "timed" and f.name not in wrong]
    timed = [figure for figure in peers if figure.state == "timed" and figure.dtype in ours]
    if missing or not timed:
        words = "; ".join(f"{figure.name}: {figure.state}" for figure in missing) or "no peer was timed"
        return Compared("", None, words, wrong)

    def quotient(peer: AttentionFigure) -> float:
        return statistics.median(getattr(ours[peer.dtype], heat)) / statistics.median(getattr(peer, heat))

    best = max(timed, key=quotient)
    return Compared(best.name, paired_ratio(getattr(ours[best.dtype], heat), getattr(best, heat)), "", wrong)


def attention_entry(records: Sequence[AttentionRecord]) -> dict[str, Any]:
    """One machine's attention as JSON-able data: `NOT_MEASURED` names the keys.

    Ratios are our time over the best exact peer's (below 1 is faster). The mean and the worst are over the headline
    shapes of one run, the latest that has all of them; if one of them is void, so are they. Of any other shape the
    latest record counts.
    """
    latest = _latest_run(records)
    headline = latest[0].headline
    chosen = {record.shape.name: record for record in sorted(records, key=_time)}
    chosen |= {record.shape.name: record for record in latest if record.shape.name in headline}
    shapes = {name: shape_entry(record) for name, record in chosen.items()}
    measured = {record.shape.name: shapes[record.shape.name] for record in latest if record.shape.name in headline}
    return {
        **NOT_MEASURED,
        **_headline(headline, measured),
        "bf16_worst_ratio": max((s["bf16_ratio"] for s in shapes.values() if s["bf16_ratio"]), default=None),
        "memory_beyond_output": max(
            (s["memory_beyond_output"] for s in shapes.values() if s["memory_beyond_output"] is not None), default=None
        ),
        "peers": _peers(latest),
        "ceilings": dataclasses.asdict(latest[0].ceilings) if latest[0].ceilings else None,
        "headline": list(headline),
        "shapes": shapes,
        "run": latest[0].run,
    }


def shape_entry(record: AttentionRecord) -> dict[str, Any]:
    """One shape: our time, rate, share of the ceiling and memory, the ratio with its interval, and every contender."""
    hot, cold = compared(record), compared(record, "cold_us")
    figures = {figure.name: figure for figure in record.figures}
    us = _median(figures.get(OURS))
    bf16_us = _median(figures.get(OURS_BF16))
    flops = attention_flops(*record.shape.sizes)
    return {
        "sizes": list(record.shape.sizes),
        "microseconds": us,
        "ratio": hot.ratio.ratio if hot.ratio else None,
        "ratio_interval": [hot.ratio.low, hot.ratio.high] if hot.ratio else None,
        "best_peer": hot.peer or None,
        "ratio_cold": cold.ratio.ratio if cold.ratio else None,
        "best_peer_cold": cold.peer or None,
        "void": hot.void,
        "excluded": list(hot.excluded),
        "tflops": flops / us / 1e6 if us else None,
        "share_of_ceiling": _share(record, us),
        "bf16_ratio": bf16_us / us if us and bf16_us else None,
        "memory_beyond_output": _beyond_output(record, figures.get(OURS)),
        "contenders": {name: _contender(figure, flops) for name, figure in figures.items()},
        "time_utc": record.environment.time_utc,
        "commit": record.environment.software.commit,
        "record": record.id,
    }


def _contender(figure: AttentionFigure, flops: int) -> dict[str, Any]:
    hot = Spread.of(figure.hot_us) if figure.hot_us else None
    cold = Spread.of(figure.cold_us) if figure.cold_us else None
    return {
        "state": figure.state,
        "why": figure.why,
        "dtype": figure.dtype,
        "microseconds": hot.median if hot else None,
        "range": [hot.min, hot.max] if hot else None,
        "cold_microseconds": cold.median if cold else None,
        "cold_range": [cold.min, cold.max] if cold else None,
        "tflops": flops / hot.median / 1e6 if hot else None,
    }


def _headline(headline: Sequence[str], shapes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    missing = [name for name in headline if name not in shapes]
    voids = [f"{name} ({shape['void']})" for name, shape in shapes.items() if shape["void"]]
    if missing or voids or not headline:
        words = [f"not measured in one run: {', '.join(missing)}"] if missing else []
        return {"void_ratio": "; ".join([*words, *voids]) or "no shape is marked as the headline"}
    worst = max(shapes, key=lambda name: shapes[name]["ratio"])
    return {
        "void_ratio": "",
        "geomean_ratio": statistics.geometric_mean(shape["ratio"] for shape in shapes.values()),
        "geomean_ratio_cold": statistics.geometric_mean(shape["ratio_cold"] for shape in shapes.values()),
        "worst_ratio": shapes[worst]["ratio"],
        "worst_ratio_interval": shapes[worst]["ratio_interval"],
        "worst_shape": worst,
    }


def _peers(run: Sequence[AttentionRecord]) -> dict[str, Any]:
    """Every peer of a run: is it required, its version, on how many shapes it was what; why absent, how to get it."""
    peers: dict[str, Any] = {}
    for figure in (figure for record in run for figure in record.figures if figure.name not in (OURS, OURS_BF16)):
        peer = peers.setdefault(
            figure.name,
            {
                "required": figure.required,
                "dtype": figure.dtype,
                "version": figure.version,
                "absent": None,
                "install": None,
                "shapes": {},
            },
        )
        if figure.state == "absent":
            peer |= {"absent": figure.why, "install": figure.install}
        peer["shapes"][figure.state] = peer["shapes"].get(figure.state, 0) + 1
    return peers


def _latest_run(records: Sequence[AttentionRecord]) -> list[AttentionRecord]:
    """The latest run with all its headline shapes, or the latest one if there is none."""
    runs: dict[str, list[AttentionRecord]] = {}
    for record in sorted(records, key=_time):
        runs.setdefault(record.run, []).append(record)
    whole = [run for run in runs.values() if set(run[0].headline) <= {record.shape.name for record in run}]
    return max(whole or runs.values(), key=lambda run: _time(run[-1]))


def _time(record: AttentionRecord) -> str:
    return record.environment.time_utc


def _median(figure: AttentionFigure | None) -> float | None:
    return statistics.median(figure.hot_us) if figure and figure.hot_us else None


def _share(record: AttentionRecord, us: float | None) -> float | None:
    """Of the speed at which a plain product or a plain copy, whichever takes longer, would do this shape's work."""
    if record.ceilings is None or us is None:
        return None
    product_us = attention_flops(*record.shape.sizes) / record.ceilings.fp16_tflops / 1e6
    copy_us = attention_bytes(*record.shape.sizes, itemsize=2) / record.ceilings.copy_tb_s / 1e6
    return max(product_us, copy_us) / us


def _beyond_output(record: AttentionRecord, figure: AttentionFigure | None) -> int | None:
    """Bytes at the peak of one call beyond inputs and output."""
    if figure is None or figure.peak_memory is None:
        return None
    shape = record.shape
    return figure.peak_memory - 2 * math.prod((shape.batch, shape.n_q, shape.heads, shape.head_dim))
