"""The record of one run of the measures: its schema, how it is written and read, and how it is told in a table."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pydantic

from diffopt.bench.schema import Model, RecordError, first_error
from diffopt.measure.environment import environment

DEFAULT_RECORD = Path(__file__).parent.parent / "reports" / "bundled-model.json"


class Answer(Model):
    """One picture and its verdict; `found` says what it was taken for (a hue in degrees, classes)."""

    prompt: str
    seed: int
    right: bool
    found: str = ""


class Measure(Model):
    """One measure: a value, the goal it is held against, and whether it holds.

    A measure is void, and its goal does not hold, where the model may have been trained on what it must not have seen.
    """

    name: Literal["concepts", "colours", "pairs", "autoencoder", "steps"]
    what: str
    value: float
    unit: Literal["share", "dB"]
    goal: float
    at_least: bool
    count: int
    seed: int | None = None
    void: str | None = None
    parts: dict[str, float] = pydantic.Field(default_factory=dict)
    answers: tuple[Answer, ...] = ()
    seconds: float

    @property
    def holds(self) -> bool:
        """Whether the value reaches the goal, and counts."""
        reached = self.value >= self.goal if self.at_least else self.value <= self.goal
        return reached and self.void is None


class Judged(Model):
    """The classifier that judged the held-out pairs, with its own accuracy on pictures kept from it."""

    weights_sha256: str
    classes: int
    kept_back: int
    top1: float
    top5: float


class Where(Model):
    """The machine and the software: what shifts a figure by rounding, and how long it took."""

    machine: str
    threads: int
    python: str
    packages: dict[str, str | None]
    commit: str | None
    time_utc: str


def where(device: str) -> Where:
    """This machine and what runs on it."""
    found = environment(device)
    packages = {name: found.software.packages.get(name) for name in ("torch", "diffusers", "transformers", "numpy")}
    return Where(
        machine=found.machine.name,
        threads=found.machine.threads,
        python=found.software.python,
        packages=packages,
        commit=found.software.commit,
        time_utc=found.time_utc,
    )


class BundledModelRecord(Model):
    """All measures of one model. Hashes: of its weights, of the rendered artwork, of the lists of held-out pairs.

    It has a version of its own, apart from that of speed records: a record of a model stays valid as history.
    """

    schema_version: Literal[1] = 1
    kind: Literal["bundled-model"] = "bundled-model"
    environment: Where
    model: str
    model_sha256: str
    steps: int
    guidance: float
    scheduler: str
    data_sha256: str
    pairs_sha256: str
    judge: Judged
    measures: tuple[Measure, ...]

    def with_measures(self, measures: Sequence[Measure]) -> "BundledModelRecord":
        """The same record with these measures added, or in place of those of the same name."""
        names = {measure.name for measure in measures}
        kept = tuple(measure for measure in self.measures if measure.name not in names)
        return self.model_copy(update={"measures": (*kept, *measures)})

    def same_subject(self, other: "BundledModelRecord") -> bool:
        """Whether both are of the same weights, data, held-out lists, judge and settings."""
        ignored = {"environment", "measures", "model"}
        return self.model_dump(exclude=ignored) == other.model_dump(exclude=ignored)


def write_record(record: BundledModelRecord, file: Path) -> None:
    """Write the record as JSON, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_suffix(".new")
    new.write_text(record.model_dump_json(indent=1) + "\n", encoding="utf-8")
    new.replace(file)


def read_record(file: Path) -> BundledModelRecord:
    """Read a record; raises RecordError with one line that names the file and the first thing that is wrong."""
    try:
        return BundledModelRecord.model_validate_json(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecordError(f"{file} does not exist: python -m training.measure writes it") from None
    except pydantic.ValidationError as error:
        raise RecordError(f"{file}: {first_error(error)}") from None


def told(value: float, unit: str) -> str:
    """A value with its unit: `83.5%`, `31.2 dB`."""
    return f"{value:.1%}" if unit == "share" else f"{value:.1f} {unit}"


def table(measures: Sequence[Measure]) -> str:
    """The measures as a Markdown table: value, goal, verdict."""
    lines = ["| measure | value | goal | holds |", "|---|---|---|---|"]
    for measure in measures:
        goal = f"{'at least' if measure.at_least else 'at most'} {told(measure.goal, measure.unit)}"
        parts = ", ".join(f"{name} {told(value, measure.unit)}" for name, value in measure.parts.items())
        value = told(measure.value, measure.unit) + (f" ({parts})" if parts else "")
        verdict = f"void: {measure.void}" if measure.void else ("yes" if measure.holds else "no")
        lines.append(f"| {measure.what} | {value} | {goal} | {verdict} |")
    return "\n".join(lines)
