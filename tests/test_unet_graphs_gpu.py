"""Captured UNet calls on a GPU: the pictures of stock, and graphs that notice what changed beneath them."""

import copy

import pytest
import torch
from adapters import random_image_embeds, random_ip_adapter, random_lora
from diffusers import DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler, UniPCMultistepScheduler
from pipelines import ROUNDING, distance, make_pipeline, picture, same_picture

import diffopt
from diffopt.unet.capturers import CudaCapturer

pytestmark = pytest.mark.gpu


@pytest.fixture
def pipe():
    return make_pipeline("bundled")


def replays(handle) -> int:
    return sum(bucket["replays"] for bucket in handle.summary()["step"]["buckets"])


def no_reasons(handle) -> bool:
    return not handle.summary()["step"]["uncaptured"]


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler, UniPCMultistepScheduler])
@pytest.mark.parametrize("guidance", [5.0, 1.0])
def test_captured_steps_make_the_picture_of_uncaptured_ones(pipe, scheduler, guidance):
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    uncaptured = diffopt.optimize(pipe, capture=False)
    arguments = {
        "prompt": "a red apple",
        "guidance_scale": guidance,
        "output_type": "latent",
        "width": 64,
        "height": 64,
    }

    def run():
        return pipe(**arguments, num_inference_steps=8, generator=torch.Generator().manual_seed(0)).images

    before = run()
    uncaptured.restore()
    handle = diffopt.optimize(pipe)
    for _ in range(2):
        assert distance(run(), before) < ROUNDING["bundled"]
    assert no_reasons(handle)
    assert replays(handle) >= 16


def test_sizes_take_turns(pipe):
    sizes = [(64, 64), (128, 64), (72, 64)]
    before = [picture(pipe, "bundled", width=w, height=h) for w, h in sizes]
    handle = diffopt.optimize(pipe)
    for _ in range(3):
        for (w, h), expected in zip(sizes, before, strict=True):
            assert same_picture(picture(pipe, "bundled", width=w, height=h), expected)
    assert len(handle.summary()["step"]["buckets"]) == len(sizes)


def test_weights_changed_in_place_show(pipe):
    handle = diffopt.optimize(pipe)
    plain = picture(pipe, "bundled")
    weight = pipe.unet.conv_in.weight
    with torch.no_grad():
        weight.mul_(1.5)
    changed = picture(pipe, "bundled")
    assert distance(changed, plain) > 0.05
    assert len(handle.summary()["step"]["buckets"]) == 1
    handle.restore()
    assert same_picture(changed, picture(pipe, "bundled"))


def test_weights_that_moved_show(pipe):
    before = picture(pipe, "bundled")
    diffopt.optimize(pipe)
    picture(pipe, "bundled")
    pipe.to("cpu")
    torch.cuda.empty_cache()
    pipe.to("cuda")
    assert same_picture(picture(pipe, "bundled"), before)


def test_lora_scale_in_mid_run_shows(pipe):
    pipe.load_lora_weights(random_lora(pipe.unet), adapter_name="one")

    def callback(pipeline, i, t, kwargs):
        pipeline.set_adapters(["one"], [0.2 if i == 1 else 1.0])
        return kwargs

    options = {"steps": 4, "callback_on_step_end": callback}
    pipe.set_adapters(["one"], [1.0])
    before = picture(pipe, "bundled", **options)
    pipe.set_adapters(["one"], [1.0])
    handle = diffopt.optimize(pipe)
    assert same_picture(picture(pipe, "bundled", **options), before)
    assert no_reasons(handle)


def test_ip_adapter_is_captured(pipe):
    pipe.load_ip_adapter(random_ip_adapter(pipe.unet), subfolder="", weight_name="", image_encoder_folder=None)
    image = {"ip_adapter_image_embeds": random_image_embeds(pipe.unet)}
    pipe.set_ip_adapter_scale(0.7)
    before = picture(pipe, "bundled", **image)
    handle = diffopt.optimize(pipe)
    assert same_picture(picture(pipe, "bundled", **image), before)
    pipe.set_ip_adapter_scale(0.1)
    assert not same_picture(picture(pipe, "bundled", **image), before)
    assert no_reasons(handle)


def test_a_deep_copy_has_graphs_of_its_own(pipe):
    before = picture(pipe, "bundled")
    diffopt.optimize(pipe)
    picture(pipe, "bundled")
    twin = copy.deepcopy(pipe)
    with torch.no_grad():
        pipe.unet.conv_in.weight.zero_()
    assert same_picture(picture(twin, "bundled"), before)


def test_another_stream_waits_for_the_last_playback(pipe):
    before = picture(pipe, "bundled")
    diffopt.optimize(pipe)
    picture(pipe, "bundled")
    side = torch.cuda.Stream()
    for _ in range(5):
        with torch.cuda.stream(side):
            other = picture(pipe, "bundled")
        ours = picture(pipe, "bundled")
        torch.cuda.synchronize()
        assert same_picture(other, before)
        assert same_picture(ours, before)


def test_out_of_memory_while_capturing_runs_as_it_comes(pipe, monkeypatch):
    before = picture(pipe, "bundled")

    class Greedy(CudaCapturer):
        def capture(self, work, device):
            def more():
                work()
                return torch.empty(1 << 50, dtype=torch.uint8, device=device)

            return super().capture(more, device)

    monkeypatch.setattr("diffopt.handle.CudaCapturer", Greedy)
    handle = diffopt.optimize(pipe)
    assert same_picture(picture(pipe, "bundled"), before)
    (row,) = handle.summary()["step"]["uncaptured"]
    assert row["reason"].startswith("capturing failed: OutOfMemoryError")
    assert torch.cuda.current_stream() == torch.cuda.default_stream()


def test_graphs_survive_that_workspaces_are_dropped():
    """`torch.compile` drops PyTorch's workspaces of cuBLAS; split products of captured calls need theirs."""
    linear = torch.nn.Linear(16384, 64, device="cuda", dtype=torch.float16).requires_grad_(False)
    x = torch.randn(64, 16384, device="cuda", dtype=torch.float16)
    capturer = CudaCapturer()
    with torch.no_grad():
        capturer.warm_up(lambda: linear(x), x.device)
        play_back, output = capturer.capture(lambda: linear(x), x.device)
        play_back()
        expected = output.clone()
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        others = [torch.full((1 << 24,), 7, dtype=torch.int8, device="cuda") for _ in range(16)]
        for _ in range(3):
            play_back()
    assert torch.equal(output, expected)
    assert all((other == 7).all() for other in others)


def test_an_offloaded_pipeline_runs_as_it_comes(pipe):
    before = picture(pipe, "bundled")
    pipe.to("cpu")
    pipe.enable_model_cpu_offload()
    handle = diffopt.optimize(pipe)
    assert same_picture(picture(pipe, "bundled"), before)
    assert handle.summary()["step"] is None
    assert "UNet calls are not captured: UNet2DConditionModel has a forward of its own" in handle.report()
