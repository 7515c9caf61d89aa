"""Cost of scaling: how the time per picture grows with pixels, batch and steps, from records that hold it."""

import dataclasses
import statistics
from collections.abc import Iterable
from typing import Literal

from diffopt.bench.record import AnyRecord
from diffopt.bench.report.data import by_machine, latest_steps
from diffopt.bench.step.record import Contender, StepRecord

Axis = Literal["pixels", "batch", "steps"]
AXES: tuple[Axis, ...] = ("pixels", "batch", "steps")


@dataclasses.dataclass(frozen=True)
class Series:
    """Seconds per picture of one machine and model along one axis, everything else equal.

    Attributes:
        what: "whole pictures", or "denoising loops" where a record has no whole pictures.
        points: value on the axis, stock's and our median seconds per picture; sorted, at least two values.
    """

    machine: str
    model: str
    axis: Axis
    fixed: str
    what: str
    points: tuple[tuple[int, float, float], ...]


def scaling(records: Iterable[AnyRecord]) -> list[Series]:
    """Every series of two points or more; a record whose exactness check did not pass has no point."""
    found = []
    for machine, group in by_machine(records).items():
        timed = [record for record in latest_steps(group).values() if record.stock and record.optimized]
        for axis in AXES:
            families: dict[tuple[object, ...], list[StepRecord]] = {}
            for record in timed:
                families.setdefault(_family(record, axis), []).append(record)
            found += [_series(machine, axis, family) for family in families.values() if _values(family, axis) > 1]
    return found


def _family(record: StepRecord, axis: Axis) -> tuple[object, ...]:
    """What must be equal for two records to differ along the axis only."""
    work = record.workload
    others = {"pixels": work.width * work.height, "batch": work.batch, "steps": work.steps}
    del others[axis]
    return (work.model.name, work.model.hash, work.dtype, work.scheduler, work.guidance, work.decode, *others.items())


def _values(family: list[StepRecord], axis: Axis) -> int:
    return len({_value(record, axis) for record in family})


def _value(record: StepRecord, axis: Axis) -> int:
    work = record.workload
    return {"pixels": work.width * work.height, "batch": work.batch, "steps": work.steps}[axis]


def _series(machine: str, axis: Axis, family: list[StepRecord]) -> Series:
    work = family[0].workload
    whole = all(side and side.pictures for record in family for side in (record.stock, record.optimized))
    fixed = {"pixels": f"{work.width}×{work.height}", "batch": f"batch {work.batch}", "steps": f"{work.steps} steps"}
    del fixed[axis]
    if work.decode != "stock":
        fixed["decode"] = f"decoded in {work.decode}"
    points = {
        _value(record, axis): (_per_picture(record, record.stock, whole), _per_picture(record, record.optimized, whole))
        for record in family
    }
    return Series(
        machine,
        work.model.name,
        axis,
        ", ".join(fixed.values()),
        "whole pictures" if whole else "denoising loops",
        tuple((value, *points[value]) for value in sorted(points)),
    )


def _per_picture(record: StepRecord, side: Contender | None, whole: bool) -> float:
    assert side is not None
    samples = side.pictures.whole_s if whole and side.pictures else side.loop_s
    return statistics.median(samples) / record.workload.batch
