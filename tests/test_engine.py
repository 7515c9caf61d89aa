"""The engine: pictures that can be made again alone, stops at a step, and metadata that says what ran."""

import gc
import inspect
import math
import threading

import numpy as np
import pytest
import torch
from tiny_model import one_thread, tiny_pipeline  # noqa: F401

import diffopt
from diffopt.engine.metadata import PictureMetadata
from diffopt.engine.requests import GenerationRequest
from diffopt.engine.worker import Engine, Progress
from diffopt.errors import DiffoptError, ModelError
from diffopt.models import SCHEDULERS, model_config_for
from diffopt.models.catalogue import generic_config

MODEL = generic_config("tiny", "tiny", 64)


def make_engine(*, optimized: bool = False) -> Engine:
    pipe = tiny_pipeline()
    return Engine(pipe, MODEL, diffopt.optimize(pipe) if optimized else None)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return make_engine(optimized=True)


def request(**fields) -> GenerationRequest:
    return GenerationRequest.create(MODEL, **{"prompt": "a cat", "steps": 3, "seed": 7, **fields})


def pixels(picture) -> np.ndarray:
    return np.asarray(picture.image)


def test_a_picture_is_what_the_pipeline_alone_makes(engine):
    pipe = tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    alone = pipe(
        "a cat",
        negative_prompt="blue",
        num_inference_steps=3,
        guidance_scale=7.5,
        width=64,
        height=80,
        generator=torch.Generator("cpu").manual_seed(7),
    ).images[0]
    (made,) = engine.generate(request(negative_prompt="blue", height=80))
    assert made.image.size == (64, 80)
    assert np.array_equal(pixels(made), np.asarray(alone))


def test_each_picture_of_a_request_can_be_made_alone(engine):
    together = list(engine.generate(request(count=3)))
    assert [picture.seed for picture in together] == [7, 8, 9]
    assert not np.array_equal(pixels(together[0]), pixels(together[1]))
    for picture in together:
        (alone,) = engine.generate(request(seed=picture.seed))
        assert np.array_equal(pixels(alone), pixels(picture))
        assert alone.metadata == picture.metadata


@pytest.mark.parametrize("name", ["pndm", "unipc", "euler-a", "heun"])
def test_schedulers_keep_nothing_between_pictures(engine, name):
    own = engine.pipe.scheduler
    (first,) = engine.generate(request(scheduler=name))
    (other,) = engine.generate(request())
    (again,) = engine.generate(request(scheduler=name))
    assert np.array_equal(pixels(first), pixels(again))
    assert not np.array_equal(pixels(first), pixels(other))
    assert engine.pipe.scheduler is own
    assert first.metadata["scheduler_class"] == SCHEDULERS[name].class_name


def test_progress_counts_every_iteration(engine):
    seen: list[Progress] = []
    for _ in engine.generate(request(count=2), on_step=seen.append):
        pass
    assert [(step.index, step.iteration, step.iterations, step.seed) for step in seen] == [
        *((0, i, 3, 7) for i in (1, 2, 3)),
        *((1, i, 3, 8) for i in (1, 2, 3)),
    ]


def test_an_iteration_is_a_unet_call():
    """The rate is UNet calls over the loop's time: heun takes two per step but the last."""
    engine = make_engine()
    calls, seen = [], []
    engine.pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    (picture,) = engine.generate(request(scheduler="heun", steps=4), on_step=seen.append)
    assert len(calls) == 7 == seen[-1].iterations == len(seen)
    assert math.isfinite(picture.its)
    assert picture.its > 7 / picture.seconds  # the loop is a part of the whole


def test_the_clock_leaves_nothing_on_the_pipeline(engine):
    list(engine.generate(request()))
    assert "progress_bar" not in vars(engine.pipe)


def test_a_stop_ends_at_the_next_step_and_yields_nothing_unfinished():
    engine = make_engine()
    calls, stop = [], threading.Event()
    engine.pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    decodes = []
    decode = engine.pipe.vae.decode
    engine.pipe.vae.decode = lambda *args, **options: decodes.append(1) or decode(*args, **options)

    def after_two(step: Progress) -> None:
        if step.index == 1 and step.iteration == 2:
            stop.set()

    pictures = list(engine.generate(request(steps=5, count=3), on_step=after_two, stop=stop))
    assert [picture.seed for picture in pictures] == [7]
    assert len(calls) == 5 + 2
    assert len(decodes) == 1
    (again,) = engine.generate(request(steps=5))
    assert np.array_equal(pixels(again), pixels(pictures[0]))


def test_a_stop_after_the_last_step_keeps_the_picture(engine):
    stop = threading.Event()

    def at_the_end(step: Progress) -> None:
        if step.iteration == step.iterations:
            stop.set()

    assert len(list(engine.generate(request(count=2), on_step=at_the_end, stop=stop))) == 1


def test_a_stop_before_the_start_does_nothing(engine):
    stop = threading.Event()
    stop.set()
    assert list(engine.generate(request(), stop=stop)) == []


def test_threads_take_turns(engine):
    """diffusers pipelines are not thread-safe: without the lock, schedulers and pictures would mix."""
    expected = {seed: pixels(next(engine.generate(request(seed=seed)))) for seed in (1, 2)}
    inside, most = 0, 0
    results: dict[int, list[np.ndarray]] = {1: [], 2: []}

    def count(_module, _arguments):
        nonlocal inside, most
        inside += 1
        most = max(most, inside)

    def uncount(*_):
        nonlocal inside
        inside -= 1

    hooks = [engine.pipe.unet.register_forward_pre_hook(count), engine.pipe.unet.register_forward_hook(uncount)]

    def work(seed: int) -> None:
        for _ in range(3):
            results[seed].append(pixels(next(engine.generate(request(seed=seed)))))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for hook in hooks:
        hook.remove()
    assert most == 1
    for seed, made in results.items():
        assert len(made) == 3
        assert all(np.array_equal(picture, expected[seed]) for picture in made)


def test_an_abandoned_request_does_not_block_the_next(engine):
    pictures = engine.generate(request(count=3))
    next(pictures)
    assert len(list(engine.generate(request()))) == 1
    del pictures
    gc.collect()


def test_metadata_says_how_the_picture_was_made(engine):
    (picture,) = engine.generate(request(negative_prompt="blue", scheduler="euler", guidance=2))
    metadata = picture.metadata
    assert metadata["prompt"] == "a cat"
    assert metadata["negative_prompt"] == "blue"
    assert (metadata["seed"], metadata["steps"], metadata["guidance"]) == (7, 3, 2.0)
    assert (metadata["scheduler"], metadata["scheduler_class"]) == ("euler", "EulerDiscreteScheduler")
    assert (metadata["width"], metadata["height"], metadata["dtype"]) == (64, 64, "float32")
    assert (metadata["model"], len(metadata["model_hash"])) == ("tiny", 64)
    assert metadata["device"]["kind"] == "cpu"
    assert metadata["device"]["threads"] == torch.get_num_threads()
    assert metadata["attention"] == {"requested": "auto", "ran": {"sdpa": 14}, "kept": 0}
    assert metadata["versions"]["torch"] == torch.__version__
    assert metadata["certificate"]["state"] == "bitwise stock"
    assert set(metadata) == set(inspect.signature(PictureMetadata).parameters)


def test_attention_is_recorded_per_picture_not_since_the_start():
    engine = make_engine(optimized=True)
    first, second = engine.generate(request(count=2))
    assert first.metadata["attention"] == second.metadata["attention"]
    assert first.metadata["certificate"] == second.metadata["certificate"]


def test_a_stock_pipeline_says_stock():
    (picture,) = make_engine().generate(request())
    assert picture.metadata["attention"] == {"requested": "stock", "ran": {}, "kept": 0}
    assert picture.metadata["certificate"]["state"] == "stock"


def test_a_prompt_that_is_too_long_is_noted(engine):
    assert engine.notes(request()) == []
    (note,) = engine.notes(request(prompt="apple " * 100))
    assert note.startswith("prompt: the model reads 77 tokens")


def test_running_out_of_memory_is_one_line_and_survived(engine, monkeypatch):
    def fail(*_args, **_options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 TiB")

    with monkeypatch.context() as patch:
        patch.setattr(engine.pipe.vae, "decode", fail)
        with pytest.raises(DiffoptError, match="out of memory on cpu at 64x64"):
            list(engine.generate(request()))
    assert len(list(engine.generate(request()))) == 1


def test_other_pipelines_are_refused():
    class Other:
        unet = torch.nn.Linear(1, 1)

        def __call__(self, prompt):
            return prompt

    with pytest.raises(ModelError, match="Other is no text-to-image pipeline"):
        Engine(Other(), MODEL)


@pytest.mark.gpu
def test_on_a_gpu_pictures_can_be_made_again_alone():
    model = model_config_for("emoji")
    pipe = diffopt.load("emoji")
    engine = Engine(pipe, model, diffopt.optimize(pipe))
    together = list(engine.generate(GenerationRequest.create(model, prompt="blue heart", seed=7, count=2)))
    (alone,) = engine.generate(GenerationRequest.create(model, prompt="blue heart", seed=8))
    assert np.array_equal(pixels(alone), pixels(together[1]))
    assert alone.metadata == together[1].metadata
    assert (alone.metadata["dtype"], alone.metadata["device"]["kind"]) == ("float16", "cuda")
    assert alone.metadata["device"]["threads"] is None
    assert engine.device.type == "cuda"
