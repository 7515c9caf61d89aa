"""Tables that stand below the results: peers side by side, where a UNet call's time goes, warm starts by stage."""

import dataclasses
from collections.abc import Iterable, Sequence

from diffopt.bench.record import AnyRecord
from diffopt.bench.report.data import steps_case_by_case
from diffopt.bench.report.rows import DASH
from diffopt.bench.step.peer_record import StepPeer
from diffopt.bench.step.record import StepRecord
from diffopt.bench.step.warm_start_record import NOT_COUNTED, STAGES
from diffopt.bench.step.words import floor_us, over_best, state_words
from diffopt.bench.workloads import STEP_PEERS
from diffopt.measure.profile import KINDS

NOT_RUN = "not run"


@dataclasses.dataclass(frozen=True)
class Grid:
    """A table in words.

    Attributes:
        name: for links. title: of the table. about: what its cells are.
        headings: of the columns; the first two, case and machine, are text, the others numbers.
        rows: as many cells each. notes: what stands below.
    """

    name: str
    title: str
    about: str
    headings: tuple[str, ...]
    rows: list[tuple[str, ...]]
    notes: list[str] = dataclasses.field(default_factory=list)

    def markdown(self) -> list[str]:
        """Lines of Markdown, the title as a heading."""
        rule = ("---", "---", *["---:"] * (len(self.headings) - 2))
        lines = [f"| {' | '.join(row)} |" for row in (self.headings, rule, *self.rows)]
        notes = [*(f"- {note}" for note in self.notes), ""] if self.notes else []
        return [f"## {self.title}", "", *lines, "", self.about, "", *notes]


def grids_of(records: Iterable[AnyRecord]) -> list[Grid]:
    """Those that these records hold something for."""
    steps = steps_case_by_case(records)
    return [grid for grid in (_peers(steps), _profiles(steps), _warm_starts(steps)) if grid.rows]


def _peers(steps: Sequence[StepRecord]) -> Grid:
    steps = [record for record in steps if any(peer.state != "absent" for peer in record.peers)]
    run = {peer.name for record in steps for peer in record.peers}
    names = [name for name in STEP_PEERS if name in run]
    never = [name for name in STEP_PEERS if name not in run and any(name in r.peers_left_out for r in steps)]
    rows, notes = [], [f"left out everywhere: {', '.join(never)}"] if never else []
    for record in steps:
        found = {peer.name: peer for peer in record.peers}
        stock, ours, ratio = record.stock, record.optimized, over_best(record).ratio
        rows.append(
            (
                *_place(record),
                f"{stock.loop_its:.2f}" if stock else DASH,
                *(_peer_cell(found.get(name), left_out=name in record.peers_left_out) for name in names),
                f"{ours.loop_its:.2f}" if ours else DASH,
                f"× {ratio.ratio:.3f} ({ratio.low:.3f} to {ratio.high:.3f})" if ratio else DASH,
            )
        )
        where = " on ".join(_place(record))
        notes += [f"{where}: {peer.name} {state_words(peer)}" for peer in found.values() if peer.why]
    about = (
        "it/s of the loop, in turn in one run, in brackets the seconds of the first call, compilation included; those "
        "that have a speed passed the check that diffopt must pass. Over the best: the fastest peer's time over "
        "diffopt's, with its 95% interval; a dash where one of them failed, which might have been the fastest. A dash "
        "under a peer: the case did not have it then."
    )
    return Grid("peers", "Peers", about, ("case", "machine", "stock", *names, "diffopt", "over the best"), rows, notes)


def _peer_cell(peer: StepPeer | None, *, left_out: bool) -> str:
    if peer is None:
        return NOT_RUN if left_out else DASH
    if peer.loop_its is None:
        return peer.state
    return f"{peer.loop_its:.2f} ({peer.first_call_s:.1f})" if peer.first_call_s is not None else f"{peer.loop_its:.2f}"


def _profiles(steps: Sequence[StepRecord]) -> Grid:
    rows, notes = [], []
    for record in steps:
        if record.profile is None:
            continue
        found, floor = record.profile, floor_us(record)
        if found.why:
            notes.append(f"{' on '.join(_place(record))}: {found.words(floor)}")
        numbers = [*map(found.microseconds.get, KINDS), found.total_us or None, found.launches, floor]
        rows.append((*_place(record), *(DASH if number is None else f"{number:.0f}" for number in numbers)))
    about = (
        "Microseconds of GPU time of diffopt's UNet call alone with the guidance batch, by kind of work; what the "
        "steps of a run share is computed in it, too. The floor is what a stock call's operations take at the "
        "datasheet's peak."
    )
    headings = ("case", "machine", *KINDS, "all", "launches", "floor")
    return Grid("profiles", "Where the time of a UNet call goes", about, headings, rows, notes)


def _warm_starts(steps: Sequence[StepRecord]) -> Grid:
    counted = [stage for stage in STAGES if stage not in NOT_COUNTED]
    rows, notes = [], []
    for record in steps:
        found = record.warm_start
        if found is None:
            continue
        if found.warm_start_s is None:
            notes.append(f"{' on '.join(_place(record))}: no warm start: {found.why}")
        stages = ("warm_start_s", *counted, "second_picture_s", *NOT_COUNTED)
        times = [getattr(found, stage) for stage in stages]
        rows.append((*_place(record), *(DASH if time is None else f"{time:.1f}" for time in times)))
    names = [stage.removesuffix("_s") for stage in (*counted, "second_picture_s", *NOT_COUNTED)]
    about = (
        "Seconds from a process's start to its first picture, with an earlier process's caches. Imports and reading "
        "the weights are not counted; the second picture is what one takes without the start."
    )
    headings = ("case", "machine", "warm start", *(name.replace("_", " ") for name in names))
    return Grid("warm-starts", "Warm starts", about, headings, rows, notes)


def _place(record: StepRecord) -> tuple[str, str]:
    return record.workload.case, record.environment.machine.name
