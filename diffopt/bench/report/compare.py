"""Two sets of records of one machine, older and newer: what became slower, larger or inexact."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

from rich import box
from rich.table import Table

from diffopt.bench.record import AnyRecord
from diffopt.bench.report.claims import Interval, unpaired_interval
from diffopt.bench.report.data import by_machine, latest_steps
from diffopt.bench.report.merge import MergeError, differences
from diffopt.bench.report.rows import DASH, change
from diffopt.bench.step.record import StepRecord

MEMORY_LIMIT = 1.02
"""Peak memory that grew by more than this factor is a regression: allocators round, and less is noise."""

State = Literal["regression", "faster", "no change", "not comparable"]


@dataclasses.dataclass(frozen=True)
class Change:
    """One machine and case.

    Attributes:
        why: of the state, in words.
        speed: new over old loop it/s of ours (above 1 is faster), with its interval; None without both speeds.
        memory: new over old peak memory of ours.
        software: versions that changed, in words.
    """

    machine: str
    case: str
    state: State
    why: str
    old_its: float | None
    new_its: float | None
    speed: Interval | None
    memory: float | None
    software: str


def compare(old: Sequence[AnyRecord], new: Sequence[AnyRecord]) -> list[Change]:
    """Every case that both sides measured on the same machine.

    Raises:
        MergeError: nothing in common, or a case that isn't the same work.
        MissingExtraError: no scipy, without which no interval.
    """
    before, after = by_machine(old), by_machine(new)
    changes = []
    for machine in (name for name in after if name in before):
        news = latest_steps(after[machine])
        for case, record in latest_steps(before[machine]).items():
            if case in news:
                changes.append(_change(record, news[case]))
    if not changes:
        raise MergeError(f"nothing in common: {_words(before)} against {_words(after)}")
    return changes


def _change(old: StepRecord, new: StepRecord) -> Change:
    found = differences(old, new)
    machine, case = new.environment.machine.name, new.workload.case
    if found:
        raise MergeError(f"{case} on {machine}: not the same work: {'; '.join(found)}")
    speed = memory = None
    if old.optimized and new.optimized and min(len(old.optimized.loop_s), len(new.optimized.loop_s)) > 1:
        speed = unpaired_interval(old.optimized.loop_s, new.optimized.loop_s)
        ours, theirs = new.optimized.memory.headline, old.optimized.memory.headline
        memory = ours / theirs if ours and theirs else None
    state, why = _state(old, new, speed, memory)
    return Change(
        machine,
        case,
        state,
        why,
        old.optimized.loop_its if old.optimized else None,
        new.optimized.loop_its if new.optimized else None,
        speed,
        memory,
        _software(old, new),
    )


def _state(old: StepRecord, new: StepRecord, speed: Interval | None, memory: float | None) -> tuple[State, str]:
    if old.exact and not new.exact:
        return "regression", f"no longer exact: {new.verdict()}"
    if speed is None:
        return "not comparable", "one side has fewer than two timed rounds"
    if speed.high < 1:
        return "regression", "slower: the whole interval lies below 1"
    if memory is not None and memory > MEMORY_LIMIT:
        return "regression", f"peak memory grew by {memory - 1:.1%}"
    if speed.low > 1:
        return "faster", "the whole interval lies above 1"
    return "no change", "the interval includes 1"


def _software(old: StepRecord, new: StepRecord) -> str:
    was, now = old.environment.software, new.environment.software
    names = dict.fromkeys([*was.packages, *now.packages])
    found = [
        f"{name} {was.packages.get(name)} → {now.packages.get(name)}"
        for name in names
        if was.packages.get(name) != now.packages.get(name)
    ]
    if was.source_hash != now.source_hash:
        found.append(f"source {was.source_hash[:8]} → {now.source_hash[:8]}")
    return ", ".join(found)


def on_one_side(old: Sequence[AnyRecord], new: Sequence[AnyRecord]) -> list[str]:
    """Cases that only one side measured, which `compare` says nothing about: `old only: sd15-512 on NVIDIA H100`."""
    before, after = (
        {(name, case) for name, records in by_machine(side).items() for case in latest_steps(records)}
        for side in (old, new)
    )
    return [
        f"{side} only: {case} on {machine}"
        for side, found in (("old", before - after), ("new", after - before))
        for machine, case in sorted(found)
    ]


def _words(machines: Mapping[str, Sequence[AnyRecord]]) -> str:
    """Machines and their cases."""
    parts = [f"{name} ({', '.join(latest_steps(records)) or 'no steps'})" for name, records in machines.items()]
    return "; ".join(parts) or "no records"


def changes_table(changes: Sequence[Change]) -> Table:
    """The changes for a terminal."""
    table = Table(title="ours, old → new", title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("case", "machine", "it/s", "speed (95%)", "memory", "", "why", "changed"):
        table.add_column(heading)
    for found in changes:
        speed, memory = found.speed, found.memory
        table.add_row(
            found.case,
            found.machine,
            change(found.old_its, found.new_its, "{:.2f}"),
            f"× {speed.ratio:.3f} ({speed.low:.3f} to {speed.high:.3f})" if speed else DASH,
            f"× {memory:.3f}" if memory else DASH,
            found.state,
            found.why,
            found.software or DASH,
        )
    return table
