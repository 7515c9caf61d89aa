"""The search of `diffopt tune`, driven by a stand-in for the GPU."""

import dataclasses

import pytest
from tuned_tables import KEY

from diffopt.attention.trials import Trial
from diffopt.attention.tuner import (
    BRIEF_ROUNDS,
    FINALISTS,
    Search,
    ShapeToTune,
    TuningFailure,
    runs_on,
    workers_for,
)
from diffopt.attention.tuning import launches_to_try
from diffopt.measure.ceilings import Ceilings
from diffopt_kernels.launch import AttentionLaunch, LaunchKey

SELF = ShapeToTune("self", KEY, "float16")
CROSS = ShapeToTune("cross", LaunchKey(2, 4096, 77, 8, 40), "float16")
WIDE = ShapeToTune("wide", LaunchKey(2, 1024, 1024, 8, 80), "float16")


@dataclasses.dataclass
class FakeGpu:
    """Every launch takes as long as its place among the candidates says; wrong ones are set by label."""

    wrong_briefly: dict[str, str] = dataclasses.field(default_factory=dict)
    wrong_thoroughly: dict[str, str] = dataclasses.field(default_factory=dict)
    wrong_at_shape: dict[str, str] = dataclasses.field(default_factory=dict)
    broken_shapes: frozenset[str] = frozenset()
    others: dict[str, float] = dataclasses.field(default_factory=lambda: {"sdpa": 70.0, "sdpa-cudnn": 60.0})
    checked: list[tuple[AttentionLaunch, tuple[str, ...], bool]] = dataclasses.field(default_factory=list)
    timed: list[tuple[str, int, list[str]]] = dataclasses.field(default_factory=list)

    def check(self, launches, dtypes, *, thorough):
        for launch in reversed(launches):
            self.checked.append((launch, tuple(dtypes), thorough))
            yield launch, (self.wrong_thoroughly if thorough else self.wrong_briefly).get(launch.label, "")

    def time(self, shape, launches, backends, *, rounds):
        labels = [launch.label for launch in launches]
        self.timed.append((shape.case, rounds, [*labels, *backends]))
        if shape.case in self.broken_shapes:
            raise TuningFailure("can't be timed: the GPU is on fire")
        order = [launch.label for launch in launches_to_try(shape.key, shape.dtype)]
        times = {label: 50.0 + order.index(label) for label in labels} | {name: self.others[name] for name in backends}
        return Trial(
            {name: time for name, time in times.items() if name not in self.wrong_at_shape},
            {name: reason for name, reason in self.wrong_at_shape.items() if name in times},
        )

    def ceilings(self):
        return Ceilings(700.0, 4.0)


@dataclasses.dataclass
class Told:
    """What the search told."""

    stages: list[str] = dataclasses.field(default_factory=list)
    out: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def stage(self, text):
        self.stages.append(text)

    def discarded(self, name, reason):
        self.out.append((name, reason))


def search(gpu, *, possible=lambda launch: True, out_of_time=lambda: False):
    return Search(gpu, Told(), ["sdpa", "sdpa-cudnn"], possible, out_of_time)


def labels(shape=SELF):
    return [launch.label for launch in launches_to_try(shape.key, shape.dtype)]


def test_the_fastest_launch_is_kept_beside_the_others_times():
    (row,) = search(FakeGpu()).rows([SELF])
    assert row.case == "self"
    assert row.key == KEY
    assert row.dtype == "float16"
    assert row.launch.label == labels()[0]
    assert list(row.microseconds.items()) == [("diffopt", 50.0), ("sdpa-cudnn", 60.0), ("sdpa", 70.0)]


def test_every_launch_is_checked_before_any_is_timed_and_the_kept_one_on_all_cases():
    gpu = FakeGpu()
    (row,) = search(gpu).rows([SELF])
    brief = {launch.label for launch, dtypes, thorough in gpu.checked if not thorough and dtypes == ("float16",)}
    thorough = {launch.label for launch, dtypes, all_cases in gpu.checked if all_cases and len(dtypes) == 2}
    assert brief == set(labels())
    assert row.launch.label in thorough
    assert len(thorough) == FINALISTS
    assert [(case, rounds > BRIEF_ROUNDS) for case, rounds, _ in gpu.timed] == [("self", False), ("self", True)]
    assert gpu.timed[1][2] == [*labels()[:FINALISTS], "sdpa", "sdpa-cudnn"]


@pytest.mark.parametrize("where", ["wrong_briefly", "wrong_thoroughly", "wrong_at_shape"])
def test_a_wrong_launch_is_named_and_never_kept(where):
    first, second = labels()[:2]
    gpu = FakeGpu(**{where: {first: "relative error 1.2"}})
    seeking = search(gpu)
    (row,) = seeking.rows([SELF])
    assert row.launch.label == second
    assert {name for name, _ in seeking.report.out} == {first}
    assert all("relative error 1.2" in reason for _, reason in seeking.report.out)
    finals = gpu.timed[-1][2]
    assert first not in finals
    assert len(finals) == FINALISTS + 2  # slower ones moved up
    if where == "wrong_briefly":
        assert all(first not in names for _, _, names in gpu.timed)


def test_where_no_launch_is_right_the_others_are_still_ranked():
    seeking = search(FakeGpu(wrong_briefly=dict.fromkeys(labels(), "wrong")))
    (row,) = seeking.rows([SELF])
    assert row.launch is None
    assert row.microseconds == {"sdpa-cudnn": 60.0, "sdpa": 70.0}
    assert {name for name, _ in seeking.report.out} == set(labels())


def test_a_backend_that_is_not_exact_is_left_out_and_named():
    seeking = search(FakeGpu(wrong_at_shape={"sdpa-cudnn": "largest error 0.3"}))
    (row,) = seeking.rows([SELF])
    assert set(row.microseconds) == {"diffopt", "sdpa"}
    assert seeking.report.out == [("sdpa-cudnn", "largest error 0.3 (self)")]


def test_shapes_of_one_head_dim_share_their_checks():
    gpu = FakeGpu()
    rows = list(search(gpu).rows([SELF, WIDE, CROSS]))
    assert [row.case for row in rows] == ["self", "cross", "wide"]
    brief = [launch for launch, _, thorough in gpu.checked if not thorough]
    thorough = [launch for launch, _, all_cases in gpu.checked if all_cases]
    assert len(brief) == len(set(brief))
    assert len(thorough) == len(set(thorough))


def test_a_shape_that_cannot_be_timed_is_named_and_the_rest_goes_on():
    seeking = search(FakeGpu(broken_shapes=frozenset({"self"})))
    assert [row.case for row in seeking.rows([SELF, CROSS])] == ["cross"]
    assert ("self", "can't be timed: the GPU is on fire") in seeking.report.out


def test_what_cannot_run_on_this_gpu_is_not_tried():
    gpu = FakeGpu()
    (row,) = search(gpu, possible=runs_on((8, 6))).rows([SELF])
    assert row.launch.kernel == "pointers"
    assert {launch.kernel for launch, _, _ in gpu.checked} == {"pointers"}
    assert {launch.kernel for launch in launches_to_try(KEY, "float16") if runs_on((9, 0))(launch)} > {"pointers"}


def test_rows_come_as_they_are_done():
    """An interruption during the second shape's timing finds the first one kept."""
    gpu = FakeGpu()
    rows = search(gpu).rows([SELF, CROSS])
    assert next(rows).case == "self"
    assert [case for case, rounds, _ in gpu.timed if rounds > BRIEF_ROUNDS] == ["self"]


def test_when_time_is_up_no_further_step_begins():
    gpu = FakeGpu()
    rows = search(gpu, out_of_time=lambda: len(gpu.timed) == 3).rows([SELF, CROSS, WIDE])
    assert [row.case for row in rows] == ["self"]  # two brief timings, one long one
    assert not list(search(FakeGpu(), out_of_time=lambda: True).rows([SELF]))


@pytest.mark.parametrize(("cores", "gib", "workers"), [(16, 140, 16), (16, 8, 4), (2, 140, 2), (16, 1, 1)])
def test_checks_at_once_fit_cores_and_memory(cores, gib, workers):
    assert workers_for(cores, gib * 2**30) == workers
