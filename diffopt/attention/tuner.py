"""The search of `diffopt tune`: for each shape the fastest right launch, and the times of all other exact backends.

Shapes of one head dim and dtype share their candidates, so they are taken together: all launches are checked briefly,
the right ones timed briefly at every shape, the fastest few checked on all cases, and the right ones of those timed
for longer beside the other backends. Each shape's row is kept as soon as it is there.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch

from diffopt.attention import trials
from diffopt.attention.backends import BACKENDS
from diffopt.attention.isolation import Failure, run_many, run_one
from diffopt.attention.trials import Trial
from diffopt.attention.tuning import launches_to_try
from diffopt.errors import DiffoptError
from diffopt.gpus import OWN, TunedShape
from diffopt.measure.ceilings import Ceilings
from diffopt_kernels.launch import AttentionLaunch, LaunchKey

SIXTEEN_BIT = ("float16", "bfloat16")
FINALISTS = 3
BRIEF_ROUNDS = 3
_SHOWN = 5  # launches whose brief times are told
LONG_ROUNDS = 25
_CHECK_SECONDS = 90  # compiling included, on busy cores; a launch whose warps wait for each other for ever costs that
_TIMING_SECONDS = 120  # of silence
_MEMORY_PER_WORKER = 2 * 2**30  # a CUDA context, the libraries' workspaces and the inputs of a case


@dataclasses.dataclass(frozen=True)
class ShapeToTune:
    """A shape of a workload: its name there, its sizes, and "float16", "bfloat16" or "float32"."""

    case: str
    key: LaunchKey
    dtype: str


class Trials(Protocol):
    """What the search asks of a GPU."""

    def check(
        self, launches: Sequence[AttentionLaunch], dtypes: Sequence[str], *, thorough: bool
    ) -> Iterable[tuple[AttentionLaunch, str]]:
        """Each launch, in whatever order they end, with why it is wrong; "" if it is right."""
        ...

    def time(
        self, shape: ShapeToTune, launches: Sequence[AttentionLaunch], backends: Sequence[str], *, rounds: int
    ) -> Trial:
        """Times of launches (by label) and backends (by name) at one shape, and what was wrong there."""
        ...

    def ceilings(self) -> Ceilings:
        """The GPU's measured ceilings."""
        ...


class Report(Protocol):
    """Who is told how the search goes."""

    def stage(self, text: str) -> None:
        """What is done next."""
        ...

    def discarded(self, name: str, reason: str) -> None:
        """A launch or backend that is out, and why."""
        ...


class TuningFailure(DiffoptError):
    """A shape that couldn't be timed at all."""


@dataclasses.dataclass
class Search:
    """One run of the search.

    Attributes:
        trials: the GPU, or a stand-in.
        report: who is told.
        backends: the others' names, timed beside diffopt's kernels.
        possible: whether a launch can run on this kind of GPU at all.
        out_of_time: asked before each step; true ends the search early.
    """

    trials: Trials
    report: Report
    backends: Sequence[str]
    possible: Callable[[AttentionLaunch], bool]
    out_of_time: Callable[[], bool] = lambda: False
    _thorough: dict[AttentionLaunch, str] = dataclasses.field(default_factory=dict)

    def rows(self, shapes: Iterable[ShapeToTune]) -> Iterator[TunedShape]:
        """A row for each shape, as soon as it is measured; fewer where time ran out or a shape can't be timed."""

        def group(shape: ShapeToTune) -> tuple[int, str]:
            return shape.key.head_dim, shape.dtype

        for _, together in itertools.groupby(sorted(shapes, key=group), key=group):
            yield from self._group(list(together))

    def _group(self, shapes: Sequence[ShapeToTune]) -> Iterator[TunedShape]:
        if self.out_of_time():
            return
        candidates = {shape: self._candidates(shape) for shape in shapes}
        right = self._right_briefly(list(dict.fromkeys(itertools.chain(*candidates.values()))), shapes[0])
        ranked: dict[ShapeToTune, list[AttentionLaunch]] = {}
        for shape in shapes:
            if self.out_of_time():
                return
            ranked[shape] = self._ranked(shape, [launch for launch in candidates[shape] if launch in right])
        self._check_thoroughly([launch for launches in ranked.values() for launch in launches[:FINALISTS]])
        for shape in shapes:
            if self.out_of_time():
                return
            row = self._row(shape, self._finalists(ranked[shape]))
            if row is not None:
                yield row

    def _candidates(self, shape: ShapeToTune) -> list[AttentionLaunch]:
        return [launch for launch in launches_to_try(shape.key, shape.dtype) if self.possible(launch)]

    def _right_briefly(self, launches: Sequence[AttentionLaunch], shape: ShapeToTune) -> set[AttentionLaunch]:
        self.report.stage(f"d{shape.key.head_dim} {shape.dtype}: checking {len(launches)} launches")
        right = set()
        for launch, reason in self.trials.check(launches, [shape.dtype], thorough=False):
            if reason:
                self.report.discarded(launch.label, reason)
            else:
                right.add(launch)
        return right

    def _ranked(self, shape: ShapeToTune, launches: Sequence[AttentionLaunch]) -> list[AttentionLaunch]:
        """The right launches at a shape, fastest first by a brief timing."""
        if not launches:
            return []
        self.report.stage(f"{shape.case}: timing {len(launches)} launches")
        microseconds = self._time(shape, launches, [], rounds=BRIEF_ROUNDS)
        timed = [launch for launch in launches if launch.label in microseconds]
        ranked = sorted(timed, key=lambda launch: microseconds[launch.label])
        fastest = ", ".join(f"{launch.label} {microseconds[launch.label]:.1f}" for launch in ranked[:_SHOWN])
        self.report.stage(f"{shape.case}: in brief {fastest or 'none'} µs")
        return ranked

    def _check_thoroughly(self, launches: Iterable[AttentionLaunch]) -> None:
        """All cases, and both 16-bit dtypes: the kernels take one table for the two."""
        new = [launch for launch in dict.fromkeys(launches) if launch not in self._thorough]
        if not new:
            return
        self.report.stage(f"checking the fastest {len(new)} on all cases")
        dtypes = ["float32"] if new[0].float32 else SIXTEEN_BIT
        for launch, reason in self.trials.check(new, dtypes, thorough=True):
            self._thorough[launch] = reason
            if reason:
                self.report.discarded(launch.label, reason)

    def _finalists(self, ranked: Sequence[AttentionLaunch]) -> list[AttentionLaunch]:
        """The fastest `FINALISTS` launches that are right on all cases; slower ones move up for wrong ones."""
        finalists: list[AttentionLaunch] = []
        for launch in ranked:
            self._check_thoroughly([launch])
            if not self._thorough[launch]:
                finalists.append(launch)
            if len(finalists) == FINALISTS:
                break
        return finalists

    def _row(self, shape: ShapeToTune, finalists: Sequence[AttentionLaunch]) -> TunedShape | None:
        self.report.stage(f"{shape.case}: timing the fastest {len(finalists)} beside {', '.join(self.backends)}")
        microseconds = self._time(shape, finalists, self.backends, rounds=LONG_ROUNDS)
        timed = [launch for launch in finalists if launch.label in microseconds]
        best = min(timed, key=lambda launch: microseconds[launch.label], default=None)
        times = {name: microseconds[name] for name in self.backends if name in microseconds}
        if best is not None:
            times[OWN] = microseconds[best.label]
        if not times:
            return None
        return TunedShape(
            case=shape.case,
            batch=shape.key.batch,
            query_tokens=shape.key.n_q,
            key_tokens=shape.key.n_k,
            heads=shape.key.heads,
            head_dim=shape.key.head_dim,
            dtype=shape.dtype,  # pyright: ignore[reportArgumentType]  (checked where the workload is read)
            microseconds=dict(sorted(times.items(), key=lambda item: item[1])),
            launch=best,
        )

    def _time(
        self, shape: ShapeToTune, launches: Sequence[AttentionLaunch], backends: Sequence[str], *, rounds: int
    ) -> Mapping[str, float]:
        try:
            trial = self.trials.time(shape, launches, backends, rounds=rounds)
        except TuningFailure as error:
            self.report.discarded(shape.case, str(error))
            return {}
        for name, reason in trial.wrong.items():
            self.report.discarded(name, f"{reason} ({shape.case})")
        return trial.microseconds


@dataclasses.dataclass(frozen=True)
class GpuTrials:
    """Trials on a GPU, each in a process of its own: checks `workers` at once, timings alone."""

    device: str
    workers: int

    def check(
        self, launches: Sequence[AttentionLaunch], dtypes: Sequence[str], *, thorough: bool
    ) -> Iterator[tuple[AttentionLaunch, str]]:
        """As `Trials.check`."""
        arguments = [(launch, dtype, thorough, self.device) for launch in launches for dtype in dtypes]
        reasons: dict[AttentionLaunch, list[str]] = {launch: [] for launch in launches}
        for (launch, *_), outcome in run_many(trials.check, arguments, workers=self.workers, silence=_CHECK_SECONDS):
            reasons[launch].append(outcome.words if isinstance(outcome, Failure) else outcome)
            if len(reasons[launch]) == len(dtypes):
                yield launch, "; ".join(dict.fromkeys(filter(None, reasons[launch])))

    def time(
        self, shape: ShapeToTune, launches: Sequence[AttentionLaunch], backends: Sequence[str], *, rounds: int
    ) -> Trial:
        """As `Trials.time`. What ends the process is wrong, and the rest is timed again without it.

        Raises:
            TuningFailure: the process ended while no contender was to blame.
        """
        wrong: dict[str, str] = {}
        while True:
            tried = [""]
            outcome: Any = run_one(
                trials.time_shape,
                shape.key,
                shape.dtype,
                [launch for launch in launches if launch.label not in wrong],
                [name for name in backends if name not in wrong],
                rounds,
                self.device,
                silence=_TIMING_SECONDS,
                on_message=tried.append,
            )
            if not isinstance(outcome, Failure):
                return Trial(outcome.microseconds, {**wrong, **outcome.wrong})
            if not tried[-1]:
                raise TuningFailure(f"can't be timed: {outcome.words}")
            wrong[tried[-1]] = outcome.words

    def ceilings(self) -> Ceilings:
        """The GPU's measured ceilings.

        Raises:
            TuningFailure: they couldn't be measured.
        """
        outcome = run_one(trials.ceilings, self.device, silence=_TIMING_SECONDS)
        if isinstance(outcome, Failure):
            raise TuningFailure(f"the GPU's ceilings can't be measured: {outcome.words}")
        return outcome


def other_backends(device: torch.device) -> list[str]:
    """Exact backends beside diffopt's that can serve on a device. SDPA math holds all scores: it is never close."""
    others = [backend for name, backend in BACKENDS.items() if name not in (OWN, "sdpa-math")]
    return [backend.name for backend in others if not backend.device_reasons(device)]


def workers_for(cores: int, free_memory: int) -> int:
    """How many checks to run at once: as many as there are cores and as fit into the GPU's free memory, in bytes."""
    return max(1, min(cores, free_memory // _MEMORY_PER_WORKER))


def runs_on(capability: tuple[int, int]) -> Callable[[AttentionLaunch], bool]:
    """Whether a launch can run on a GPU of this compute capability."""
    kernels = {"pointers"} | ({"descriptors"} if capability >= (9, 0) else set())
    return lambda launch: launch.kernel in kernels or capability[0] == 9
