"""What the search of `diffopt tune` runs per launch and shape: wrong ones are found, and blamed when they die."""

import dataclasses

import pytest
import torch
from test_tuner import SELF

from diffopt.attention import trials, tuner
from diffopt.attention.backends import BACKENDS
from diffopt.attention.isolation import Failure
from diffopt.attention.trials import Trial
from diffopt.attention.tuner import GpuTrials, TuningFailure
from diffopt.attention.tuning import launches_to_try
from diffopt_kernels.launch import LaunchKey

KEY = LaunchKey(1, 40, 33, 2, 40)
RIGHT = next(launch for launch in launches_to_try(KEY, "float16") if launch.kernel == "pointers")
WRONG = dataclasses.replace(RIGHT, parts=(32, 0))  # leaves 8 of 40 columns out


def silent(_message):
    pass


@pytest.mark.parametrize(("launch", "words"), [(RIGHT, ""), (WRONG, "relative error inf, allowed ")])
def test_a_launch_is_checked(kernel_device, launch, words):
    reason = trials.check(silent, launch, "float16", False, str(kernel_device))
    assert reason.startswith(words)
    assert bool(reason) == bool(words)


def test_launches_and_backends_are_compared_and_timed_at_a_shape(kernel_device, monkeypatch):
    sent = []
    faulty = dataclasses.replace(BACKENDS["sdpa-math"], run=lambda q, k, v, mask, scale: torch.zeros_like(q))
    monkeypatch.setitem(BACKENDS, "sdpa-math", faulty)
    refusing = dataclasses.replace(BACKENDS["sdpa-flash"], call_reasons=lambda *_: ["not this head dim"])
    monkeypatch.setitem(BACKENDS, "sdpa-flash", refusing)
    others = ["sdpa", "sdpa-math", "sdpa-flash"]
    trial = trials.time_shape(sent.append, KEY, "float16", [RIGHT, WRONG], others, 2, str(kernel_device))
    assert set(trial.microseconds) == {"sdpa", RIGHT.label}
    assert all(microseconds > 0 for microseconds in trial.microseconds.values())
    assert set(trial.wrong) == {"sdpa-math", "sdpa-flash", WRONG.label}
    assert trial.wrong["sdpa-flash"] == "can't serve this shape: not this head dim"
    assert trial.wrong["sdpa-math"].startswith("relative error 1.0e+00, allowed ")
    assert sent == ["sdpa", "sdpa-math", "sdpa-flash", RIGHT.label, WRONG.label, ""]


def test_a_launch_is_right_only_if_it_is_in_every_dtype(monkeypatch):
    outcomes = {"float16": "", "bfloat16": Failure("its process ended with -6")}

    def run_many(task, arguments, *, workers, silence):
        assert (task, workers) == (trials.check, 5)
        for those in reversed(list(arguments)):
            yield those, outcomes[those[1]]

    monkeypatch.setattr(tuner, "run_many", run_many)
    gpu = GpuTrials("cuda:0", 5)
    assert list(gpu.check([RIGHT], ["float16"], thorough=False)) == [(RIGHT, "")]
    assert dict(gpu.check([RIGHT, WRONG], ["float16", "bfloat16"], thorough=True)) == dict.fromkeys(
        (RIGHT, WRONG), "its process ended with -6"
    )


@pytest.fixture
def processes(monkeypatch):
    """Timing processes, each of which sends some names and then ends in a way of its own."""
    scripts, asked = [], []

    def run_one(task, key, dtype, launches, backends, rounds, device, *, silence, on_message):
        assert task is trials.time_shape
        asked.append([*backends, *(launch.label for launch in launches)])
        messages, outcome = scripts.pop(0)
        for message in messages:
            on_message(message)
        return outcome

    monkeypatch.setattr(tuner, "run_one", run_one)
    return scripts, asked


def test_what_ends_the_timing_is_wrong_and_the_rest_is_timed_again(processes):
    scripts, asked = processes
    scripts += [
        (["sdpa", WRONG.label], Failure("its process ended with -6")),
        (["sdpa", RIGHT.label, ""], Trial({"sdpa": 2.0}, {RIGHT.label: "relative error 1"})),
    ]
    trial = GpuTrials("cuda:0", 1).time(SELF, [RIGHT, WRONG], ["sdpa"], rounds=3)
    assert trial.microseconds == {"sdpa": 2.0}
    assert trial.wrong == {WRONG.label: "its process ended with -6", RIGHT.label: "relative error 1"}
    assert asked == [["sdpa", RIGHT.label, WRONG.label], ["sdpa", RIGHT.label]]


@pytest.mark.parametrize("messages", [[], ["sdpa", ""]], ids=["before the first", "while all are timed"])
def test_where_nobody_is_to_blame_the_shape_is_given_up(processes, messages):
    processes[0].append((messages, Failure("no result within 120 s")))
    with pytest.raises(TuningFailure, match="can't be timed: no result within 120 s"):
        GpuTrials("cuda:0", 1).time(SELF, [RIGHT], ["sdpa"], rounds=3)


@pytest.mark.slow
def test_trials_in_processes_of_their_own(kernel_device):
    gpu = GpuTrials(str(kernel_device), 2)
    verdicts = dict(gpu.check([RIGHT, WRONG], ["float16"], thorough=False))
    assert verdicts[RIGHT] == ""
    assert verdicts[WRONG].startswith("relative error inf")
    shape = dataclasses.replace(SELF, key=KEY)
    trial = gpu.time(shape, [RIGHT, WRONG], ["sdpa"], rounds=2)
    assert set(trial.microseconds) == {"sdpa", RIGHT.label}
    assert set(trial.wrong) == {WRONG.label}
