"""Pipelines on a GPU that is not the current one, where a machine has two: the pictures of stock, on the right GPU."""

import gc
import threading

import pytest
import torch
from pipelines import make_pipeline, picture, same_picture

import diffopt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


@pytest.fixture
def pipe():
    return make_pipeline("bundled").to("cuda:1")


def captured_replays(handle) -> int:
    step = handle.summary()["step"]
    assert not step["uncaptured"]
    return sum(bucket["replays"] for bucket in step["buckets"])


def decoded(pipe) -> torch.Tensor:
    """A picture [1, 3, 64, 64] in 0 to 1."""
    options = {"width": 64, "height": 64, "num_inference_steps": 2, "output_type": "pt"}
    return pipe("a red apple", generator=torch.Generator().manual_seed(0), **options).images


@pytest.mark.parametrize("kind", ["bundled", pytest.param("sd15", marks=pytest.mark.slow)])
def test_a_pipeline_on_the_second_gpu(kind):
    pipe = make_pipeline(kind).to("cuda:1")
    before = picture(pipe, kind)
    gc.collect()
    taken = torch.cuda.memory_allocated(0)
    handle = diffopt.optimize(pipe)
    for _ in range(3):
        after = picture(pipe, kind)
        assert after.device == torch.device("cuda:1")
        assert same_picture(after, before, kind)
    assert captured_replays(handle) > 0
    assert torch.cuda.current_device() == 0
    assert torch.cuda.memory_allocated(0) <= taken


def test_a_decode_on_the_second_gpu(pipe):
    before = decoded(pipe)
    handle = diffopt.optimize(pipe)
    for _ in range(3):
        after = decoded(pipe)
        assert float((after.float() - before.float()).abs().max()) < 0.02
    assert captured_replays(handle) > 0


def test_a_pipeline_that_moves_between_gpus(pipe):
    diffopt.optimize(pipe)
    there = picture(pipe, "bundled")
    pipe.to("cuda:0")
    here = picture(pipe, "bundled")
    assert here.device.index == 0
    assert same_picture(here.cpu(), there.cpu())
    pipe.to("cuda:1")
    assert same_picture(picture(pipe, "bundled"), there)


def test_a_pipeline_on_each_gpu_in_turn_and_at_once(pipe):
    pipes = [make_pipeline("bundled").to("cuda:0"), pipe]
    before = [picture(each, "bundled") for each in pipes]
    handles = [diffopt.optimize(each) for each in pipes]
    for _ in range(2):
        for each, expected in zip(pipes, before, strict=True):
            assert same_picture(picture(each, "bundled"), expected)
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(4):
            if not same_picture(picture(pipes[index], "bundled"), before[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert all(captured_replays(handle) > 0 for handle in handles)
