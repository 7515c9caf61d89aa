"""What people do in and between runs of captured calls: guidance, batches, adapters, interruptions, SDXL's own ways.

Everything runs with a stand-in for graphs; on a GPU in float16 with true graphs, too.
"""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from adapters import random_lora
from pipeline_kinds import KINDS, latents, xl_base_and_refiner, xl_with_encoders
from pipelines import ROUNDING, distance, make_pipeline, same_picture
from recorders import Recorder, Tape
from tiny_model import one_thread  # noqa: F401
from twins import at_step

import diffopt
from diffopt.models.schedulers import make_scheduler
from diffopt.unet import schedules

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
GRAPHS = ["stand-in", pytest.param("graphs", marks=pytest.mark.gpu)]
SIZE = KINDS["text to image"].options()


@pytest.fixture(params=GRAPHS, autouse=True)
def _captured(request, monkeypatch):
    """Calls are captured: by a stand-in, and on a GPU as true graphs; timesteps stay on the CPU."""
    monkeypatch.setattr(schedules, "device_reasons", lambda device: [])
    if request.param == "stand-in":  # a tape has PyTorch's operations alone, and a GPU runs more
        monkeypatch.setattr("diffopt.handle.CudaCapturer", Tape if DEVICE.type == "cpu" else Recorder)


@pytest.fixture
def pipe() -> Any:
    return make_pipeline("bundled")


def drawn(pipe: Any, **options: Any) -> torch.Tensor:
    return latents(pipe, **{"steps": 4, "guidance_scale": 5.0, **SIZE, **options})


def shows(a: torch.Tensor, b: torch.Tensor) -> bool:
    """A change that rounding does not explain: what was not followed is caught."""
    return distance(a, b) > 2 * ROUNDING["bundled"]


def replays(handle: Any) -> list[int]:
    """Of each graph; no call ran uncaptured."""
    step = handle.summary()["step"]
    assert not step["uncaptured"]
    return [bucket["replays"] for bucket in step["buckets"]]


# --- guidance and batches -------------------------------------------------------------------------------------------


def changed(pipe: Any, tensors: dict[str, Any]) -> None:
    pipe._guidance_scale = 1.5


def switched_off(pipe: Any, tensors: dict[str, Any]) -> None:
    pipe._guidance_scale = 0.0
    tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]


@pytest.mark.parametrize(("change", "of_each"), [(changed, [4]), (switched_off, [2, 2])])
def test_guidance_in_mid_run(pipe, change, of_each):
    plain, before = drawn(pipe), drawn(pipe, **at_step(1, change))
    assert shows(before, plain)
    handle = diffopt.optimize(pipe)
    assert same_picture(drawn(pipe, **at_step(1, change)), before)
    assert replays(handle) == of_each
    assert same_picture(drawn(pipe), plain)


@pytest.mark.parametrize("count", [3, 16])
def test_pictures_of_a_batch(pipe, count):
    """Each of its own prompt and noise, beside other sizes of batches."""
    prompts = [["a red apple", "a blue bird", "a dog"][i % 3] for i in range(count)]
    several = {"prompt": prompts, "negative_prompt": ["blue"] * count, "steps": 2}
    expected, one = drawn(pipe, **several), drawn(pipe, steps=2)
    handle = diffopt.optimize(pipe)
    for _ in range(2):
        ours = drawn(pipe, **several)
        assert ours.shape[0] == count
        assert all(same_picture(a, b) for a, b in zip(ours, expected, strict=True))
        assert same_picture(drawn(pipe, steps=2), one)
    assert all(shows(a, b) for a, b in itertools.pairwise(expected))
    assert sorted(replays(handle)) == [4, 4]


# --- adapters -------------------------------------------------------------------------------------------------------


def weigh(names: list[str], weights: list[Any]) -> Callable[[Any], None]:
    return lambda pipe: pipe.set_adapters(names, weights)


def test_several_adapters(pipe):
    """Weighed together, alone, block by block, exchanged in mid-run and removed: what uncaptured calls draw."""
    changes: list[tuple[Callable[[Any], None], dict[str, Any]]] = [
        (weigh(["a", "b"], [0.5, 0.8]), {}),
        (weigh(["b"], [1.0]), {}),
        (weigh(["a", "b"], [0.8, {"unet": {"down": 0.2, "mid": 1.0, "up": 0.5}}]), {}),
        (weigh(["a"], [1.0]), at_step(1, lambda pipe, _: pipe.set_adapters(["b"], [1.0]))),
        (lambda pipe: pipe.delete_adapters("a"), {}),
        (lambda pipe: pipe.unload_lora_weights(), {}),
    ]

    def pictures() -> list[torch.Tensor]:
        for seed, name in enumerate("ab"):
            pipe.load_lora_weights(random_lora(pipe.unet, seed=seed, strength=0.3), adapter_name=name)
        found = []
        for change, options in changes:
            change(pipe)
            found.append(drawn(pipe, **options))
        return found

    with diffopt.optimized(pipe, capture=False):  # not stock: adapters amplify rounding
        expected = pictures()
    assert all(shows(a, b) for a, b in itertools.pairwise(expected))
    handle = diffopt.optimize(pipe)
    assert all(same_picture(a, b) for a, b in zip(pictures(), expected, strict=True))
    assert sum(replays(handle)) > 0


# --- runs that end early --------------------------------------------------------------------------------------------


def interrupt(pipe: Any, tensors: dict[str, Any]) -> None:
    pipe._interrupt = True


def fail(pipe: Any, tensors: dict[str, Any]) -> None:
    raise ZeroDivisionError


def test_an_interrupted_run_leaves_the_next_one_alone(pipe):
    plain, half = drawn(pipe), drawn(pipe, **at_step(1, interrupt))
    assert shows(half, plain)
    handle = diffopt.optimize(pipe)
    assert same_picture(drawn(pipe, **at_step(1, interrupt)), half)
    assert replays(handle) == [2]
    assert same_picture(drawn(pipe), plain)
    with pytest.raises(ZeroDivisionError):
        drawn(pipe, **at_step(1, fail))
    assert same_picture(drawn(pipe), plain)


# --- clip_skip ------------------------------------------------------------------------------------------------------


def test_sdxl_with_layers_of_its_encoders_left_out():
    pipe = xl_with_encoders(DEVICE)
    options = [{}, {"clip_skip": 1}, {"clip_skip": 2}, {"clip_skip": 1, "guidance_scale": 1.0}]
    options = [{**SIZE, "width": 32, "height": 32, **more} for more in options]
    expected = [latents(pipe, **more) for more in options]
    handle = diffopt.optimize(pipe)
    for _ in range(2):
        assert all(same_picture(latents(pipe, **more), x) for more, x in zip(options, expected, strict=True))
    assert len({float(x.double().norm()) for x in expected}) == len(expected)
    assert sorted(replays(handle)) == [6, 18]


def test_sd15_fails_with_them_as_stock_does(pipe):
    """diffusers asks the text model for an attribute that transformers' has no more."""
    try:
        drawn(pipe, clip_skip=1)
    except AttributeError as error:
        words = str(error)
    else:
        pytest.skip("these versions of diffusers and transformers know clip_skip for SD1.5")
    plain = drawn(pipe)
    diffopt.optimize(pipe)
    with pytest.raises(AttributeError) as caught:
        drawn(pipe, clip_skip=1)
    assert str(caught.value) == words
    assert same_picture(drawn(pipe), plain)


# --- SDXL's base and its refiner ------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", ["euler", "heun", "pndm", "unipc"])
def test_sdxl_and_its_refiner_share_the_steps(scheduler):
    base, refiner, options = xl_base_and_refiner(DEVICE)
    for pipe in (base, refiner):
        pipe.scheduler = make_scheduler(scheduler, pipe.scheduler)

    def refined() -> torch.Tensor:
        first = latents(base, steps=6, denoising_end=0.6, width=32, height=32, **options)
        return latents(refiner, steps=6, denoising_start=0.6, image=first, **options)

    expected = refined()
    handles = [diffopt.optimize(pipe) for pipe in (base, refiner)]
    assert all(same_picture(refined(), expected) for _ in range(2))
    assert [len(replays(handle)) for handle in handles] == [1, 1]
    assert [handle.summary()["step"]["captures"] for handle in handles] == [1, 1]
