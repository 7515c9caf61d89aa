"""One row per machine and case: the numbers that tables, CSV, Markdown and the page show side by side."""

import csv
import dataclasses
import io
from collections.abc import Iterable, Mapping, Sequence

from rich import box
from rich.table import Table

from diffopt.bench.record import AnyRecord
from diffopt.bench.report.claims import Claim, claims_of
from diffopt.bench.report.cost import FORMULA
from diffopt.bench.report.data import cost_of, price_of, steps_case_by_case, warm_start_s
from diffopt.bench.step.record import Contender, StepRecord
from diffopt.bench.step.words import peers_words, warm_start_words
from diffopt.gpus import Price

DASH = "—"
_WAITS = 1.1
"""So many times stock's it/s mean, once its UNet calls are captured, that it waited for Python without that."""
MEAN = "gain is the mean paired ratio of loop times with its 95% interval, claimed only if exact and wholly above 1"


@dataclasses.dataclass(frozen=True)
class Row:
    """A machine's latest record of a case; a speed is None where the exactness check did not pass.

    Attributes:
        stock_its, optimized_its: loop iterations per second, before and after.
        captured_its: stock's with its UNet calls captured and channels-last, in the same run; None where not timed.
        gain, gain_low, gain_high: stock's time over ours with its 95% interval (`claims.paired_interval`).
        claimed: whether the gain may be claimed. why: if not, why not.
        stock_memory, optimized_memory: bytes at the peak of a call.
        stock_images_per_s, images_per_s: prompt to pixels; None where whole pictures were not timed.
        stock_cost_per_1000, cost_per_1000: US dollars; None without a price or a rate.
        energy_per_image_j: ours; None where the driver gives none.
        peers: their it/s and ours over the best, in words; empty where none was asked for.
        warm_start_s: from a process's start to its first picture, imports and weights apart; None where not timed.
        warm_start: the same with its stages, or why there is none, in words; empty where nobody looked.
        commit: of the code that ran; empty where it was not known.
        dirty: whether that code had changes beyond the commit.
    """

    machine: str
    case: str
    workload: str
    dtype: str
    stock_its: float | None
    optimized_its: float | None
    captured_its: float | None
    gain: float | None
    gain_low: float | None
    gain_high: float | None
    claimed: bool
    why: str
    stock_memory: int | None
    optimized_memory: int | None
    stock_images_per_s: float | None
    images_per_s: float | None
    stock_cost_per_1000: float | None
    cost_per_1000: float | None
    usd_per_hour: float | None
    price_date: str | None
    price_source: str | None
    energy_per_image_j: float | None
    exact: bool
    exactness: str
    rounds: int
    flags: tuple[str, ...]
    peers: str
    warm_start_s: float | None
    warm_start: str
    time_utc: str
    commit: str
    dirty: bool
    record: str


def rows_of(records: Iterable[AnyRecord], prices: Mapping[str, Price] | None = None) -> list[Row]:
    """A row for the latest record of each machine and case (`data.steps_case_by_case`)."""
    given = prices or {}
    return [_row(record, given.get(record.environment.machine.name)) for record in steps_case_by_case(records)]


def _row(record: StepRecord, given: Price | None) -> Row:
    stock, ours = record.stock, record.optimized
    loop, price = claims_of(record)["loop"], price_of(record, given)
    stock_rate, rate = _images_per_s(stock), _images_per_s(ours)
    return Row(
        machine=record.environment.machine.name,
        case=record.workload.case,
        workload=record.workload.name,
        dtype=record.workload.dtype,
        stock_its=stock.loop_its if stock else None,
        optimized_its=ours.loop_its if ours else None,
        captured_its=next((peer.loop_its for peer in record.peers if peer.name == "cuda-graph"), None),
        gain=loop.interval.ratio if loop.interval else None,
        gain_low=loop.interval.low if loop.interval else None,
        gain_high=loop.interval.high if loop.interval else None,
        claimed=loop.claimed,
        why=loop.why,
        stock_memory=stock.memory.headline if stock else None,
        optimized_memory=ours.memory.headline if ours else None,
        stock_images_per_s=stock_rate,
        images_per_s=rate,
        stock_cost_per_1000=cost_of(record, stock_rate, given),
        cost_per_1000=cost_of(record, rate, given),
        usd_per_hour=price.usd_per_hour if price else None,
        price_date=price.date if price else None,
        price_source=price.source if price else None,
        energy_per_image_j=ours.pictures.energy_per_image_j if ours and ours.pictures else None,
        exact=record.exact,
        exactness=record.verdict(),
        rounds=len(ours.loop_s) if ours else 0,
        flags=record.method.flags if record.method else (),
        peers=peers_words(record),
        warm_start_s=warm_start_s(record),
        warm_start=warm_start_words(record),
        time_utc=record.environment.time_utc,
        commit=record.environment.software.commit or "",
        dirty=bool(record.environment.software.dirty),
        record=record.id,
    )


def _images_per_s(side: Contender | None) -> float | None:
    return side.pictures.images_per_s if side and side.pictures else None


def rows_csv(rows: Sequence[Row]) -> str:
    """The rows as CSV with a header line, numbers in full; an empty cell is a value that isn't there."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in dataclasses.fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(dataclasses.asdict(row) for row in rows)
    return text.getvalue()


HEADINGS = ("case", "machine", "dtype", "it/s", "gain (95%)", "memory", "images/s", "$ per 1000", "exact")
"""Of `cells`, in order. Those with a before and an after are stock → diffopt."""


def cells(row: Row) -> tuple[str, ...]:
    """A row in words, for `HEADINGS`."""
    return (
        row.case,
        row.machine,
        row.dtype,
        change(row.stock_its, row.optimized_its, "{:.2f}"),
        gain_words(row),
        change(_gib(row.stock_memory), _gib(row.optimized_memory), "{:.2f}", " GiB"),
        change(row.stock_images_per_s, row.images_per_s, "{:#.3g}"),
        change(row.stock_cost_per_1000, row.cost_per_1000, "{:.2f}"),
        row.exactness.partition(":")[0],
    )


def rows_table(rows: Sequence[Row], machine: str = "") -> Table:
    """The rows for a terminal; those of one machine under its name."""
    table = Table(title=machine or None, title_justify="left", box=box.SIMPLE_HEAD)
    shown = [number for number, heading in enumerate(HEADINGS) if not (machine and heading == "machine")]
    for number in shown:
        table.add_column(HEADINGS[number], justify="right" if 3 <= number < 8 else "left", no_wrap=number > 2)
    for row in rows:
        table.add_row(*(cells(row)[number] for number in shown))
    return table


def rows_markdown(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [f"| {' | '.join(HEADINGS)} |", "|---|---|---|---:|---:|---:|---:|---:|---|"]
    lines += [f"| {' | '.join(cells(row))} |" for row in rows]
    return "\n".join(lines)


def row_notes(rows: Sequence[Row], *, beside: bool = True) -> list[str]:
    """What stands below the rows: no claim and why, peers, warm starts, disturbances, code, the formula, prices.

    Args:
        beside: whether peers and warm starts are said here; tables of their own say more (`grids`).
    """
    notes = claim_notes(rows)
    if beside:
        notes += [f"{row.case} on {row.machine}: {row.peers}" for row in rows if row.peers]
        notes += [f"{row.case} on {row.machine}: {row.warm_start}" for row in rows if row.warm_start]
    notes += host_notes(rows) + disturbed_notes(rows) + code_notes(rows)
    if any(row.cost_per_1000 is not None for row in rows):
        notes.append(FORMULA)
    priced = [row for row in rows if row.cost_per_1000 is not None]
    prices = dict.fromkeys((row.machine, row.usd_per_hour, row.price_date, row.price_source) for row in priced)
    return notes + [f"{machine}: ${usd:g} per hour, {date}, {source}" for machine, usd, date, source in prices]


def claim_notes(rows: Sequence[Row]) -> list[str]:
    """What a gain is, and which rows claim none for what reason."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if not row.claimed:
            reasons.setdefault((row.machine, row.why), []).append(row.case)
    notes = [f"no claim on {machine} for {', '.join(cases)}: {why}" for (machine, why), cases in reasons.items()]
    return [MEAN, *notes] if rows else []


def host_notes(rows: Sequence[Row]) -> list[str]:
    """Where stock waits for Python, so that gains depend on the host: what it makes with its UNet calls captured."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row.captured_its and row.stock_its and row.captured_its > _WAITS * row.stock_its:
            found.setdefault(row.machine, []).append(f"{row.captured_its:.2f} ({row.case})")
    return [
        f"stock waits for the host on {machine}; captured as graphs and channels-last its loop makes, in it/s: "
        + ", ".join(cases)
        for machine, cases in found.items()
    ]


def disturbed_notes(rows: Sequence[Row]) -> list[str]:
    """Which rows were measured while something was wrong with a machine, and at how many looks at it (`Watch`)."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for flag in row.flags:
            words, _, looks = flag.partition(" at ")
            found.setdefault((row.machine, words), []).append(f"{row.case} ({looks})")
    return [f"disturbed on {machine}, {words}: {', '.join(cases)}" for (machine, words), cases in found.items()]


def code_notes(rows: Sequence[Row]) -> list[str]:
    """Which rows were measured with which code, newest first; nothing where it was the same in all."""
    commits: dict[str, dict[str, list[str]]] = {}
    for row in sorted(rows, key=lambda row: row.time_utc, reverse=True):
        code = (row.commit[:7] or "not known") + (" with changes" if row.dirty else "")
        commits.setdefault(code, {}).setdefault(row.machine, []).append(row.case)
    if len(commits) < 2:
        return []
    places = {
        commit: " and ".join(f"{', '.join(sorted(cases))} on {machine}" for machine, cases in machines.items())
        for commit, machines in commits.items()
    }
    return [f"different code, newest first, by commit: {'; '.join(f'{c}: {where}' for c, where in places.items())}"]


def gain_words(row: Row) -> str:
    """`× 1.700 (1.650 to 1.752)` for a claim, `no claim (...)` where there is none, a dash without samples."""
    if row.gain is None or row.gain_low is None or row.gain_high is None:
        return "no claim" if row.optimized_its is not None else DASH
    interval = f"({row.gain_low:.3f} to {row.gain_high:.3f})"
    if row.claimed:
        return f"× {row.gain:.3f} {interval}"
    return f"slower × {row.gain:.3f} {interval}" if row.gain_high < 1 else f"no claim {interval}"


def claim_words(claim: Claim) -> str:
    """A claim in one line."""
    if claim.interval is None:
        return f"no claim: {claim.why}"
    words = f"× {claim.interval.ratio:.3f} ({claim.interval.low:.3f} to {claim.interval.high:.3f})"
    return words if claim.claimed else f"no claim: {claim.why}; {words}"


def change(before: float | None, after: float | None, form: str, unit: str = "") -> str:
    """`before → after`, or a dash when one of them isn't there."""
    return DASH if before is None or after is None else f"{form.format(before)} → {form.format(after)}{unit}"


def _gib(size: int | None) -> float | None:
    return None if size is None else size / 2**30
