"""Rehearsals: each kernel is compiled once and beside others, nothing of missing ones is launched, nothing is kept."""

import functools
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.upsampling import Upsample2D
from recorders import Tape, norms_without_kernels
from tiny_model import one_thread, tiny_pipeline  # noqa: F401
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from twins import Twins
from upsampling import upsampled_convolution

import diffopt
from diffopt.unet import forwards, fused, schedules, summed
from diffopt_kernels.rehearsal import rehearsed
from diffopt_kernels.step import reference

# --- Triton's real way on a driver that takes notes -----------------------------------------------------------------


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """By case what was compiled and launched; see stub_rehearsal.py. "again" is of a later process."""
    pytest.importorskip("triton")
    import stub_cuda

    folder = tmp_path_factory.mktemp("stub")
    return stub_cuda.output_of("stub_rehearsal.py", folder) | stub_cuda.output_of("stub_rehearsal.py", folder, "again")


def test_missing_kernels_are_compiled_once_in_threads_and_launched_then(notes: dict[str, dict[str, Any]]) -> None:
    """A compilation more would mean that a launch's key in Triton's cache is not the rehearsal's."""
    found = notes["first"]
    assert found["returned"] == "done"
    assert found["passes"] == [0, found["kernels"]]
    assert found["compiled"] == found["beside"] == found["kernels"] == 6
    assert found["devices"] == [0]
    assert found["direct"]


def test_what_is_compiled_is_not_rehearsed(notes: dict[str, dict[str, Any]]) -> None:
    assert (notes["second"]["passes"], notes["second"]["compiled"]) == ([6], 0)


def test_what_the_disk_has_is_not_rehearsed(notes: dict[str, dict[str, Any]]) -> None:
    found = notes["again"]
    assert (found["passes"], found["compiled"], found["read"]) == ([6], 0, 6)


def test_launches_of_one_kernel_compile_it_once(notes: dict[str, dict[str, Any]]) -> None:
    assert (notes["alike"]["passes"], notes["alike"]["compiled"]) == ([0, 3], 1)


def test_what_cannot_be_compiled_is_said_where_it_is_launched(notes: dict[str, dict[str, Any]]) -> None:
    found = notes["fault"]
    assert found["said"] == found["alone"] == "CompileTimeAssertionFailure: broken on purpose"
    assert (found["compiled"], notes["after the fault"]["compiled"]) == (1, 0), "the kernel beside it is compiled"


def test_an_interrupt_leaves_kernels_that_can_be_launched(notes: dict[str, dict[str, Any]]) -> None:
    found = notes["after an interrupt"]
    assert found["said"].startswith("KeyboardInterrupt")
    assert found["passes"] == [1]


def test_another_thread_really_launches(notes: dict[str, dict[str, Any]]) -> None:
    found = notes["another thread"]
    assert found["passes"] == [1, 1], "in both runs of the work"
    assert (found["compiled"], found["beside"]) == (2, 1)


def test_each_gpu_gets_a_kernel_of_its_own(notes: dict[str, dict[str, Any]]) -> None:
    """One that was loaded on another GPU can't be launched; Triton 3.7 would hand it to all GPUs of one kind."""
    found = notes["two GPUs"]
    assert not found["shared"]
    assert found["passes"] == [1, 2], "only one GPU's is rehearsed"
    assert (found["beside"], found["devices"]) == (1, [0, 1])


def test_launches_that_are_not_ours_are_not_left_out(notes: dict[str, dict[str, Any]]) -> None:
    found = notes["another's launch"]
    assert (found["passes"], found["compiled"], found["beside"]) == ([2], 1, 0)


def test_without_tritons_mode_work_runs_as_it_is(notes: dict[str, dict[str, Any]]) -> None:
    found = notes["no such mode"]
    assert (found["passes"], found["compiled"], found["beside"]) == ([1], 1, 0)


def test_an_error_of_work_without_kernels_is_raised_at_once() -> None:
    calls = []

    def work() -> None:
        calls.append("work")
        raise ValueError("not here")

    with pytest.raises(ValueError, match="not here"):
        rehearsed(work)
    assert len(calls) == 1


# --- what is rehearsed ----------------------------------------------------------------------------------------------


class Rehearsing(Tape):
    """Warms up twice, as on a machine without compiled kernels: the first time kernels leave NaN.

    Attributes:
        kernels_run: how many left it.
        warm_ups: so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.warm_ups, self.kernels_run, self._rehearses = 0, 0, False

    def warm_up(self, work: Callable[[], Any], device: torch.device) -> Any:
        self.warm_ups += 1
        self._rehearses = True
        work()
        self._rehearses = False
        return work()

    def left_out(self, kernel: Callable[..., Any]) -> Callable[..., Any]:
        """The kernel, which does nothing in a rehearsal."""

        def launched(*arguments: Any, **options: Any) -> Any:
            out = kernel(*arguments, **options)
            if self._rehearses:
                self.kernels_run += 1
                for x in out if isinstance(out, tuple) else (out,):
                    x.fill_(torch.nan)
            return out

        return launched


@pytest.fixture(name="twins")
def _twins(monkeypatch: pytest.MonkeyPatch) -> Twins:
    """With all that is computed apart: prompts, time embeddings, summed weights."""

    def summed_weights(weight, out=None):
        sums = reference.summed_weights_reference(weight, dtype=weight.dtype)
        return sums if out is None else out.copy_(sums)

    norms_without_kernels(monkeypatch)
    forwards.kernels.upsampled_convolution = upsampled_convolution  # of the stand-ins
    monkeypatch.setattr(summed, "kernels", types.SimpleNamespace(summed_weights=summed_weights))
    monkeypatch.setattr(forwards, "_sums_for_upsampled", lambda conv, x: summed.sums_of(conv))
    monkeypatch.setattr(forwards, "upsample_reasons", lambda x: [])
    monkeypatch.setattr(forwards, "upsampled_convolution_reasons", lambda *_: [])
    monkeypatch.setattr(schedules, "device_reasons", lambda device: [])
    twins = Twins(monkeypatch, (fused.NORMS, fused.SHARED), Rehearsing())
    assert isinstance(twins.recorder, Rehearsing)
    for namespace in (forwards.kernels, summed.kernels):
        for name, kernel in vars(namespace).items():
            setattr(namespace, name, twins.recorder.left_out(kernel))
    for pipe in twins.both:
        diffopt.optimize(pipe).keep_timesteps(pipe)
        assert any(type(module) is Upsample2D and fused.is_ours(module) for module in pipe.unet.modules())
    return twins


def warm_ups(twins: Twins) -> int:
    assert isinstance(twins.recorder, Rehearsing)
    return twins.recorder.warm_ups


def test_pictures_after_a_rehearsal_are_those_of_uncaptured_calls(twins: Twins) -> None:
    """Whatever was made from NaN and kept would make the picture NaN."""
    first = twins.same_picture()
    assert isinstance(twins.recorder, Rehearsing)
    assert twins.recorder.kernels_run > 10, "the test is void"
    assert not first.isnan().any()
    step = twins.handle.summary()["step"]
    assert not step["uncaptured"]
    assert (step["prologues"], step["tables"], step["sums"]) == (1, 1, 1)
    assert torch.equal(twins.same_picture(), first)


def test_each_sum_is_made_once_per_playback(twins: Twins) -> None:
    """Convolutions that use sums are noted in both runs of a warm-up."""
    twins.same_picture()
    (bucket,) = twins.captured.unet.diffopt_graphs.buckets
    (_, convs), *others = twins.captured.unet.diffopt_graphs._apart._sums
    assert not others
    assert len(convs) == len(bucket.summed.sums)


def test_a_kind_of_call_that_is_there_is_not_warmed_up_again(twins: Twins) -> None:
    twins.same_picture()
    before = warm_ups(twins)
    twins.same_picture()
    assert warm_ups(twins) == before
    twins.same_picture(width=24)
    assert warm_ups(twins) == before + 1, "the table of timesteps is there"


# --- decoders -------------------------------------------------------------------------------------------------------


@pytest.fixture(name="decoder")
def _decoder(monkeypatch: pytest.MonkeyPatch) -> tuple[torch.nn.Module, list[str]]:
    """A fused decoder on stand-ins for kernels, and what its calls were: "rehearsed"."""
    norms_without_kernels(monkeypatch)
    monkeypatch.setattr(forwards.kernels, "upsample", lambda x: F.interpolate(x, scale_factor=2.0))
    calls: list[str] = []

    def twice(work: Callable[[], Any]) -> Any:
        calls.append("rehearsed")
        work().fill_(torch.nan)
        return work()

    monkeypatch.setattr(forwards, "rehearsed", twice)
    decoder = tiny_pipeline(norm_num_groups=2).vae.decoder.requires_grad_(False)
    fused.put_on(decoder, frozenset((fused.NORMS,)))
    return decoder, calls


LATENTS = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))


def decoded(decoder: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return decoder(LATENTS)


def test_a_decoder_is_rehearsed(decoder: tuple[torch.nn.Module, list[str]]) -> None:
    model, calls = decoder
    picture = decoded(model)
    assert calls == ["rehearsed"]
    fused.take_off(model)
    assert torch.allclose(picture, decoded(model), atol=1e-5)
    assert len(calls) == 1


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_a_decoder_that_someone_watches_runs_once(before: bool, decoder: tuple[torch.nn.Module, list[str]]) -> None:
    model, calls = decoder
    seen = []
    block: Any = model.get_submodule("mid_block")
    note = lambda *_: seen.append("seen")  # noqa: E731
    handle = block.register_forward_pre_hook(note) if before else block.register_forward_hook(note)
    decoded(model)
    assert (calls, seen) == ([], ["seen"])
    handle.remove()
    decoded(model)
    assert calls == ["rehearsed"]


@pytest.mark.parametrize(
    "register", [register_module_forward_pre_hook, register_module_forward_hook], ids=["before", "after"]
)
def test_a_decoder_runs_once_where_all_modules_are_watched(
    register: Callable[..., Any], decoder: tuple[torch.nn.Module, list[str]]
) -> None:
    model, calls = decoder
    handle = register(lambda *_: None)
    try:
        decoded(model)
    finally:
        handle.remove()
    assert calls == []


def test_a_decoder_with_a_forward_that_keeps_what_it_saw_runs_once(decoder: tuple[torch.nn.Module, list[str]]) -> None:
    """What it keeps of a rehearsal would be in the picture."""
    model, calls = decoder
    block: Any = model.get_submodule("up_blocks.0.resnets.0")
    ours, kept = block.forward, []

    @functools.wraps(ours)
    def keeping(*arguments: Any, **keywords: Any) -> torch.Tensor:
        kept[:] = kept or [ours(*arguments, **keywords)]
        return kept[0]

    block.forward = keeping
    decoded(model)
    assert calls == []
