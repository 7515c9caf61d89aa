"""The record of a self-check: every attention launch that can be selected, and whether it is right."""

from pathlib import Path
from typing import Literal

import pydantic

from diffopt.bench.schema import BaseRecord, RecordError, first_error
from diffopt.config import parse_json
from diffopt.measure.environment import Environment


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
        redrawn: cases that came just beyond their limit and were drawn again; the further draws are among `cases`.
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
    redrawn: list[SelfcheckCase] = []

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


class SelfcheckRecord(BaseRecord):
    """The check of every attention launch that can be selected (`python -m diffopt_kernels.selfcheck --json`)."""

    kind: Literal["attention-selfcheck"] = "attention-selfcheck"
    launches: list[SelfcheckLaunch]
    timings: list[KernelTiming] = pydantic.Field(default_factory=list)

    @classmethod
    def from_selfcheck(cls, path: str | Path, here: Environment) -> "SelfcheckRecord":
        """Make a record of the self-check's JSON file, written on this machine.

        Raises:
            RecordError: unreadable, not such a file, or made on another device.
        """
        path = Path(path)
        try:
            table = parse_json(path.read_text(encoding="utf-8"))  # not pydantic's reader: it refuses a bare Infinity
            record = cls(environment=here, launches=table["launches"], timings=table.get("timings", []))
        except OSError as error:
            raise RecordError(f"{path}: can't be read: {error.strerror}") from error
        except pydantic.ValidationError as error:
            raise RecordError(f"{path}: not a self-check's result: {first_error(error)}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RecordError(f"{path}: not a self-check's result: {error!r}") from error
        device, expected = table.get("device"), here.machine.gpu or "cpu"
        if device != expected:
            raise RecordError(f"{path}: made on {device!r}, this machine's device is {expected!r}")
        return record
