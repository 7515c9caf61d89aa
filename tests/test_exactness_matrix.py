"""The step rule on what people choose: every scheduler, guidance off and on, pipelines, sizes.

On stock's own latents the bundled model's steps are as near to the exact ones as stock's, and a planted fault is found.
On a GPU that is all of ours in float16: kernels, fused blocks, time embeddings of a whole schedule at once, graphs. On
a CPU, in float32, it is attention and calls that `Tape` captures, whose bits are stock's. (Blocks fused there for tests
are PyTorch's in another memory layout, up to twice as far from float64 as the rule's two backends, whose convolutions
are the same; test_unet_times has them bit for bit against uncaptured ones, for every scheduler.)
"""

import functools
from typing import Any

import pytest
import torch
from pipeline_kinds import KINDS, latents
from pipelines import ROUNDING, distance, make_pipeline
from recorders import Recorder, Tape, norms_without_kernels
from scheduler_params import ALL, scheduler_of
from tiny_model import one_thread  # noqa: F401

import diffopt
from diffopt.attention.backends import AUTO
from diffopt.bench.step import check
from diffopt.bench.step.contenders import twin
from diffopt.handle import Handle
from diffopt.measure.teacher_forced import Certificate, UNetCall, record_unet_calls
from diffopt.unet import fused, graphs, provenance, schedules, times

ON_CPU = not torch.cuda.is_available()
GRAPHS = ["stand-in", pytest.param("graphs", marks=pytest.mark.gpu)]
GUIDANCE = pytest.mark.parametrize("guidance", [1.0, 3.0], ids=["guidance off", "guidance on"])
APART = 1e-4 if ON_CPU else ROUNDING["bundled"]
"""How far final latents may be apart: whole runs amplify rounding, so this only says that the same was drawn."""


@pytest.fixture(params=GRAPHS)
def captured(request, monkeypatch):
    """Calls are captured: by a stand-in, and on a GPU as true graphs."""
    if ON_CPU:
        monkeypatch.setattr(schedules, "device_reasons", lambda device: [])
    if request.param == "stand-in":  # a tape has PyTorch's operations alone, and a GPU runs more
        monkeypatch.setattr("diffopt.handle.CudaCapturer", Tape if ON_CPU else Recorder)


def pipeline(kind: str, scheduler: str) -> tuple[Any, dict[str, Any]]:
    """The bundled model in a pipeline of a kind with a scheduler, and what it is called with."""
    pipe = KINDS[kind].make(make_pipeline("bundled"))
    pipe.scheduler = scheduler_of(scheduler, pipe.scheduler)
    return pipe, KINDS[kind].options()


def optimized(stock: Any) -> tuple[Any, Handle]:
    """A pipeline of equal weights, optimized."""
    pipe = twin(stock)
    pipe.set_progress_bar_config(disable=True)
    return pipe, diffopt.optimize(pipe)


def certificate(stock: Any, ours: Any, calls: list[UNetCall], outputs: Any) -> Certificate:
    steps = range(len(calls))
    return check.check_steps(stock, ours, calls, outputs, attention=AUTO, steps=steps, on_step=lambda done: None)


def computed_apart(handle: Handle) -> dict[str, int]:
    """How often what steps share was computed so far."""
    step = handle.summary()["step"]
    return {name: step[name] for name in ("prologues", "tables", "sums")}


def assert_exact(kind: str, scheduler: str, **options: Any) -> None:
    stock, usual = pipeline(kind, scheduler)
    run = functools.partial(latents, **{**usual, **options})
    drawn = []
    calls, outputs = record_unet_calls(stock.unet, lambda: drawn.append(run(stock)))
    ours, handle = optimized(stock)
    assert schedules.is_on(ours.scheduler) == (type(stock.scheduler) in schedules._METHODS)
    assert distance(run(ours), drawn[0]) < APART
    assert ours.scheduler.timesteps.tolist() == stock.scheduler.timesteps.tolist()

    in_loop = computed_apart(handle)
    found = certificate(stock, ours, calls, outputs)
    assert found.passed, found.verdict()  # void, where the planted fault goes unnoticed
    assert found.bitwise_stock == ON_CPU, "on a GPU our kernels must have run"
    assert {call.rows for call in calls} == {1 if options["guidance_scale"] <= 1 else 2}
    step = handle.summary()["step"]
    assert (step["captures"], step["uncaptured"]) == (1, [])
    assert computed_apart(handle) == {name: 2 * count for name, count in in_loop.items()}, "the replay is as the loop"
    assert ON_CPU or step["tables"] > 0, "time embeddings were made in the steps"


def recorded(guidance: float) -> tuple[Any, Any, Any, Any]:
    """Stock, the calls and outputs of its UNet, and what made them."""
    stock, options = pipeline("text to image", "euler")
    run = functools.partial(latents, **options, guidance_scale=guidance)
    return stock, *record_unet_calls(stock.unet, lambda: run(stock)), run


@GUIDANCE
@pytest.mark.parametrize("scheduler", ALL)
def test_every_scheduler(captured, scheduler, guidance):
    assert_exact("text to image", scheduler, guidance_scale=guidance)


@GUIDANCE
@pytest.mark.parametrize("kind", ["image to image", "inpainting", "inpainting with 9 channels"])
def test_other_pipelines(captured, kind, guidance):
    assert_exact(kind, "euler", guidance_scale=guidance, steps=4)


@GUIDANCE
def test_a_size_that_is_not_square_and_halves_to_odd_ones(captured, guidance):
    assert_exact("text to image", "dpmpp-2m", guidance_scale=guidance, width=72, height=104)


@GUIDANCE
def test_a_wrong_scale_of_scores_fails(captured, guidance):
    stock, calls, outputs, _ = recorded(guidance)
    wrong = twin(stock)
    diffopt.optimize(wrong, attention=check._faulty(AUTO, wrong.device))
    found = certificate(stock, wrong, calls, outputs)
    assert not found.void
    assert not any(step.ok for step in found.steps)


def with_time_table(monkeypatch, stock: Any, run: Any) -> tuple[Any, Handle, times.TimeTable]:
    """A pipeline as optimized on a GPU, as far as time embeddings go, that has run, its handle and its table."""
    ours, handle = optimized(stock)
    if ON_CPU:
        norms_without_kernels(monkeypatch)
        fused.put_on(ours.unet, frozenset((fused.NORMS, fused.SHARED)))
    run(ours)
    (bucket,) = getattr(ours.unet, graphs.ATTRIBUTE).buckets
    assert bucket.table is not None
    return ours, handle, bucket.table


def as_from_a_gpu(monkeypatch, calls: list[UNetCall]) -> None:
    """From now on no timestep of calls can be seen without a copy on the CPU."""
    if ON_CPU:
        on_gpu = {id(call.arguments[1]) for call in calls}
        stock = times.number_of
        monkeypatch.setattr(torch.Tensor, "cpu", torch.Tensor.clone)
        for module in (provenance, times):
            monkeypatch.setattr(module, "number_of", lambda t: None if id(t) in on_gpu else stock(t))


@GUIDANCE
def test_time_embeddings_of_another_step_fail(captured, monkeypatch, guidance):
    stock, calls, outputs, run = recorded(guidance)
    late, _, table = with_time_table(monkeypatch, stock, run)
    monkeypatch.setattr(table, "bring", lambda *_: False)
    found = certificate(stock, late, calls, outputs)
    assert not found.void
    assert [step.ok for step in found.steps][:2] == [False, False], "it has those of the third"


@GUIDANCE
def test_wrong_rows_of_a_time_table_fail(captured, monkeypatch, guidance):
    """The replay reads rows that were made with an earlier step's, as the loop does."""
    stock, calls, outputs, run = recorded(guidance)
    ours, handle, table = with_time_table(monkeypatch, stock, run)
    as_from_a_gpu(monkeypatch, calls)
    right = certificate(stock, ours, calls, outputs)
    assert computed_apart(handle)["tables"] == 2, "one for the loop, one for the replay"

    load = table._load
    monkeypatch.setattr(table, "_load", lambda *call: dict.fromkeys(load(*call), 0))
    wrong = certificate(stock, ours, calls, outputs)
    assert not wrong.void
    assert [step.ok for step in wrong.steps][1:] == [False, False], "they have the first one's"
    assert wrong.steps[0].ours == pytest.approx(right.steps[0].ours, rel=0.01)
    assert all(step.ours < 2 * step.allowed for step in right.steps)


def test_timesteps_are_on_the_gpu_in_the_replay_if_they_are_in_the_loop(captured, monkeypatch):
    stock, calls, outputs, run = recorded(3.0)
    ours, handle, _ = with_time_table(monkeypatch, stock, run)
    as_from_a_gpu(monkeypatch, calls)
    schedules.take_off(ours.scheduler)
    certificate(stock, ours, calls, outputs)
    assert computed_apart(handle)["tables"] == 1 + len(calls)
