"""The run record: one JSON object per line (JSONL), versioned, validated on read; reports are made from it.

Fields and units are documented on the classes; NaN and infinities are written as strings.
"""

import json
import os
import uuid
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic

from diffopt.errors import DiffoptError
from diffopt.measure.environment import Clocks, Environment
from diffopt.measure.memory import PeakMemory
from diffopt.measure.teacher_forced import Certificate
from diffopt.measure.timing import PairedRatio, Spread

SCHEMA_VERSION = 1


class RecordError(DiffoptError):
    """A file of records that can't be read or written; names the line."""


class _Model(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class ModelIdentity(_Model):
    """What was run.

    Attributes:
        name: as the workload names it.
        hash: SHA-256 of all weight files of a folder; for random weights of their configuration.
        seed: of random weights; None for real ones.
        score_std: smallest and largest standard deviation of attention scores that random weights were scaled to.
        parameters: of the UNet.
    """

    name: str
    hash: str
    seed: int | None = None
    score_std: tuple[float, float] | None = None
    parameters: int


class Workload(_Model):
    """One case of a workload file: everything that must agree for two records to be compared. Sizes in pixels."""

    name: str
    case: str
    model: ModelIdentity
    dtype: str
    width: int
    height: int
    batch: int
    steps: int
    unet_calls: int
    scheduler: str
    guidance: float
    seed: int


class Method(_Model):
    """How it was measured.

    Attributes:
        clock: what the samples are, in words.
        order: of the contenders.
        warmup: unmeasured rounds. repetitions: measured rounds asked for (the samples say how many there are).
        unet_warmup, unet_repetitions: the same for single UNet forwards.
        first_call_s: seconds of each contender's very first pipeline call, compilation included.
        clocks_before, clocks_after: around the timed part.
    """

    clock: str
    order: str = "interleaved A B A B"
    warmup: int
    repetitions: int
    unet_warmup: int
    unet_repetitions: int
    first_call_s: dict[str, float]
    clocks_before: Clocks | None
    clocks_after: Clocks | None


class Contender(_Model):
    """One contender's raw samples in seconds, oldest first, their summaries and the rates made from the medians.

    Attributes:
        loop_s: from the start of the first step to the last latent.
        call_s: the whole pipeline call around it, prompt given as embeddings, latents out.
        unet_s: one UNet forward with the guidance batch, inputs ready.
        loop_its: steps / median loop_s. unet_its: 1 / median unet_s.
        memory: at the peak of one pipeline call.
    """

    loop_s: list[float]
    call_s: list[float]
    unet_s: list[float]
    loop: Spread
    call: Spread
    unet: Spread
    loop_its: float
    unet_its: float
    memory: PeakMemory


class Comparison(_Model):
    """Optimized against stock: speed as stock's time over ours (above 1 is faster), memory as ours over stock's."""

    loop: PairedRatio
    unet: PairedRatio
    peak_memory: float | None


class _Record(_Model):
    schema_version: Literal[1] = SCHEMA_VERSION
    id: str = pydantic.Field(default_factory=lambda: uuid.uuid4().hex)
    environment: Environment


class StepRecord(_Record):
    """One case: stock against optimized denoising steps.

    Attributes:
        attention: what `optimize` was asked for.
        exactness: checked before anything was timed.
        plan: the handle's summary after the run: what each layer ran, how often and why.
        stock, optimized, comparison: None when the exactness check failed or is void: no speed beside a failed check.
        interrupted: the user stopped the run; the samples are the complete rounds until then.
    """

    kind: Literal["step"] = "step"
    workload: Workload
    attention: str
    exactness: Certificate
    plan: dict[str, Any]
    method: Method | None = None
    stock: Contender | None = None
    optimized: Contender | None = None
    comparison: Comparison | None = None
    interrupted: bool = False

    @pydantic.model_validator(mode="after")
    def _no_speed_beside_a_failed_check(self) -> "StepRecord":
        timed = [part is not None for part in (self.method, self.stock, self.optimized, self.comparison)]
        if any(timed) and not (all(timed) and self.exactness.passed):
            raise ValueError("a speed stands beside an exactness check that did not pass")
        return self


class _Kernel(pydantic.BaseModel):
    # The writer is diffopt_kernels.selfcheck: it may add fields before this schema names them.
    model_config = pydantic.ConfigDict(extra="allow", frozen=True, ser_json_inf_nan="strings")


class KernelErrors(_Kernel):
    """Distance to float64 over all elements; a NaN counts as infinite."""

    relative_l2: float
    maximum: float


class SelfcheckCase(_Kernel):
    """One shape in one dtype: our errors, those of PyTorch's math and best fused backend, and the rule's limit.

    Attributes:
        overrun: a guard band around the output was written to.
    """

    case: str
    dtype: str
    ours: KernelErrors
    math: KernelErrors
    fused: KernelErrors | None
    limit: KernelErrors
    overrun: bool

    @property
    def right(self) -> bool:
        """By the numbers, whatever the writer concluded."""
        within = self.ours.relative_l2 <= self.limit.relative_l2 and self.ours.maximum <= self.limit.maximum
        return within and not self.overrun


class SelfcheckLaunch(_Kernel):
    """One launch configuration, checked in a process of its own.

    Attributes:
        label: the configuration.
        faults: one case per dtype with a planted fault (the scale times 1.01), which must be wrong.
        void: why the check proves nothing (a planted fault passed, or none was planted); empty otherwise.
        failure: how its process ended without a result; empty otherwise.
        seed: of the inputs.
    """

    label: str
    right: bool
    void: str = ""
    failure: str = ""
    seed: int | None = None
    cases: list[SelfcheckCase] = []
    faults: list[SelfcheckCase] = []

    @pydantic.model_validator(mode="after")
    def _right_by_the_numbers(self) -> "SelfcheckLaunch":
        checked = bool(self.cases) and all(case.right for case in self.cases)
        fault_found = bool(self.faults) and not any(fault.right for fault in self.faults)
        if self.right and not (checked and fault_found and not self.void and not self.failure):
            raise ValueError(f"{self.label} is called right, and its numbers say it is not")
        return self


class KernelTiming(_Kernel):
    """Microseconds per call of one launch or peer on one shape (inputs hot, captured in one graph)."""

    case: str
    what: str
    microseconds: float


class SelfcheckRecord(_Record):
    """The check of every attention launch that can be selected (`python -m diffopt_kernels.selfcheck --json`)."""

    kind: Literal["attention-selfcheck"] = "attention-selfcheck"
    launches: list[SelfcheckLaunch]
    timings: list[KernelTiming] = []

    @classmethod
    def from_selfcheck(cls, path: str | Path, here: Environment) -> "SelfcheckRecord":
        """Make a record of the self-check's JSON file, written on this machine.

        Raises:
            RecordError: unreadable, not such a file, or made on another device.
        """
        path = Path(path)
        try:
            table = json.loads(path.read_text(encoding="utf-8"))  # not pydantic's reader: it refuses a bare Infinity
            record = cls(environment=here, launches=table["launches"], timings=table.get("timings", []))
        except OSError as error:
            raise RecordError(f"{path}: can't be read: {error.strerror}") from error
        except pydantic.ValidationError as error:
            raise RecordError(f"{path}: not a self-check's result: {_first(error)}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RecordError(f"{path}: not a self-check's result: {error!r}") from error
        device, expected = table.get("device"), here.machine.gpu or "cpu"
        if device != expected:
            raise RecordError(f"{path}: made on {device!r}, this machine's device is {expected!r}")
        return record


Record = Annotated[StepRecord | SelfcheckRecord, pydantic.Field(discriminator="kind")]
_ADAPTER: pydantic.TypeAdapter[StepRecord | SelfcheckRecord] = pydantic.TypeAdapter(Record)


def append_record(path: str | Path, record: StepRecord | SelfcheckRecord) -> None:
    """Append one line, whole or not at all; the folder is made when it is missing.

    Raises:
        RecordError: the file can't be written (its former content is untouched).
    """
    path = Path(path)
    line = record.model_dump_json().encode() + b"\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    except OSError as error:
        raise RecordError(f"{path}: can't be written: {error.strerror}") from error
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            line = b"\n" + line  # a line cut off by someone else stays a damaged line of its own
        try:
            if os.write(descriptor, line) != len(line):
                raise OSError(0, "the disk is full")
            os.fsync(descriptor)
        except OSError as error:
            os.ftruncate(descriptor, size)
            raise RecordError(f"{path}: can't be written: {error.strerror}") from error
    finally:
        os.close(descriptor)


def check_writable(path: str | Path) -> None:
    """Find out before the work that `append_record` will be able to write.

    Raises:
        RecordError: it won't.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        existed = path.exists()
        with path.open("ab"):
            pass
        if not existed:
            path.unlink()
    except OSError as error:
        raise RecordError(f"{path}: can't be written: {error.strerror}") from error


def read_records(path: str | Path) -> list[StepRecord | SelfcheckRecord]:
    """Every record of a file, in order.

    Raises:
        RecordError: unreadable file, or a damaged, cut-off or unknown line, named by its number.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(f"{path}: can't be read: {getattr(error, 'strerror', None) or error}") from error
    return [_parse(line, f"{path}: line {number}") for number, line in enumerate(lines, 1) if line.strip()]


def _parse(line: str, where: str) -> StepRecord | SelfcheckRecord:
    try:
        table = pydantic.TypeAdapter(dict[str, Any]).validate_json(line)
    except pydantic.ValidationError as error:
        raise RecordError(f"{where} is not a record: cut off or damaged ({error.errors()[0]['msg']})") from error
    version = table.get("schema_version")
    if version != SCHEMA_VERSION:
        newer = isinstance(version, int) and version > SCHEMA_VERSION
        advice = "update diffopt to read it" if newer else f"this diffopt reads version {SCHEMA_VERSION}"
        raise RecordError(f"{where} has schema version {version!r}; {advice}")
    try:
        return _ADAPTER.validate_json(line)
    except pydantic.ValidationError as error:
        raise RecordError(f"{where} is not a valid record: {_first(error)}") from error


def _first(error: pydantic.ValidationError) -> str:
    first = error.errors()[0]
    return ": ".join(filter(None, (".".join(str(part) for part in first["loc"]), first["msg"])))
