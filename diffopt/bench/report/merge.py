"""Records of several machines side by side, like beside like: what differs in the work is refused."""

from collections.abc import Mapping, Sequence
from typing import Any

from diffopt.bench.record import AnyRecord
from diffopt.bench.report.data import by_machine, latest_steps
from diffopt.bench.report.rows import Row, rows_of
from diffopt.bench.step.record import StepRecord
from diffopt.errors import DiffoptError
from diffopt.gpus import Price


class MergeError(DiffoptError):
    """Records that can't stand in one table; names the fields that differ."""


def merged_rows(files: Mapping[str, Sequence[AnyRecord]], prices: Mapping[str, Price] | None = None) -> list[Row]:
    """One row per case and machine, in the order of `rows.rows_of`.

    A case that several machines measured must be the same work on all of them: every field of `Workload` agrees, but
    for the name of the file that the case stands in, and for the dtype between CPUs and GPUs (half precision is
    emulated on a CPU), which the row states.

    Args:
        files: what is merged: the name of each file and its records.

    Raises:
        MergeError: no denoising steps in a file, a case that isn't the same work everywhere, or a file that shares no
            case with the others.
    """
    steps = {name: [record for record in records if isinstance(record, StepRecord)] for name, records in files.items()}
    for name, records in steps.items():
        if not records:
            raise MergeError(f"{name}: no records of denoising steps; `diffopt bench quick` makes some")
    _check_same_work([record for records in steps.values() for record in records])
    _check_shared_cases({name: [record.workload.case for record in records] for name, records in steps.items()})
    return rows_of([record for records in steps.values() for record in records], prices)


def differences(one: StepRecord, other: StepRecord) -> list[str]:
    """Fields of the work that differ, each with both values; the dtype only between machines of one kind.

    `quick` and `full` have cases in common: which of them a case was run from is no part of the work.
    """
    ours, theirs = (_flat(record.workload.model_dump(exclude={"name"})) for record in (one, other))
    if (one.environment.machine.gpu is None) != (other.environment.machine.gpu is None):
        theirs["dtype"] = ours["dtype"]
    return [f"{key}: {ours[key]!r} and {theirs[key]!r}" for key in ours if ours[key] != theirs[key]]


def _check_same_work(records: Sequence[StepRecord]) -> None:
    first: dict[str, StepRecord] = {}
    for group in by_machine(records).values():
        for case, record in latest_steps(group).items():
            reference = first.setdefault(case, record)
            found = differences(reference, record)
            if found:
                names = f"{reference.environment.machine.name} and {record.environment.machine.name}"
                raise MergeError(f"{case}: not the same work on {names}: {'; '.join(found)}")


def _check_shared_cases(cases: Mapping[str, Sequence[str]]) -> None:
    if len(cases) < 2:
        return
    for name, mine in cases.items():
        others = sorted({case for other, theirs in cases.items() if other != name for case in theirs})
        if not set(mine) & set(others):
            alone = ", ".join(dict.fromkeys(mine))
            raise MergeError(f"{name}: unlike workloads: its cases are {alone}; the others have {', '.join(others)}")


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables with dotted keys, without what only describes random weights (their hash and seed decide)."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        elif key != "score_std":  # measured: its last digits are the device's own
            flat[f"{prefix}{key}"] = value
    return flat
