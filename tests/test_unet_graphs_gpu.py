"""Captured UNet calls on a GPU: the pictures of stock, and graphs that notice what changed beneath them."""

import copy

import pytest
import torch
from adapters import random_image_embeds, random_ip_adapter, random_lora
from diffusers import DDIMScheduler
from pipelines import ROUNDING, distance, make_pipeline, picture, same_picture
from scheduler_params import ALL, scheduler_of

import diffopt
from diffopt.unet import apart, fused, graphs
from diffopt.unet.capturers import CudaCapturer

pytestmark = pytest.mark.gpu


@pytest.fixture
def pipe():
    return make_pipeline("bundled")


def replays(handle) -> int:
    return sum(bucket["replays"] for bucket in handle.summary()["step"]["buckets"])


def no_reasons(handle) -> bool:
    return not handle.summary()["step"]["uncaptured"]


@pytest.mark.parametrize("scheduler", ALL)
@pytest.mark.parametrize("guidance", [5.0, 1.0])
def test_captured_steps_make_the_picture_of_uncaptured_ones(pipe, scheduler, guidance):
    pipe.scheduler = scheduler_of(scheduler, pipe.scheduler)
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


def prompt_changed(pipeline, i, t, kwargs):
    """A callback that changes the prompt in mid-run, in place and then by another tensor."""
    if i == 1:
        kwargs["prompt_embeds"].mul_(0.5)
    if i == 3:
        kwargs["prompt_embeds"] = -kwargs["prompt_embeds"]
    return kwargs


def test_keys_and_values_of_the_prompt_once_per_run_are_the_same_bits(pipe, monkeypatch):
    """Captured apart and captured in every step: the pictures are equal, prompts and sizes taking turns."""
    change = {"callback_on_step_end": prompt_changed, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    options = {"num_inference_steps": 6, "output_type": "latent", "guidance_scale": 5.0}

    def pictures():
        handle = diffopt.optimize(pipe)
        fused.put_on(pipe.unet, frozenset((fused.SHARED,)))  # needs no kernel, so no check of kernels either
        found = [
            pipe(text, width=side, height=side, generator=torch.Generator().manual_seed(0), **options, **more).images
            for side in (64, 128, 64)
            for text in ("a red apple", "a blue bird")
            for more in ({}, change)
        ]
        torch.cuda.synchronize()
        assert no_reasons(handle)
        times = handle.summary()["step"]["prologues"]
        handle.restore()
        return found, times

    ours, times = pictures()
    assert times == 6 * (1 + 3)
    with monkeypatch.context() as patched:
        patched.setattr(graphs, "serving", lambda model, context: [])
        expected, none = pictures()
    assert none == 0
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    assert len({float(x.double().norm()) for x in expected}) == 8


def test_prompts_of_a_loop_take_turns_between_steps(pipe):
    handle = diffopt.optimize(pipe)
    fused.put_on(pipe.unet, frozenset((fused.SHARED,)))
    generator = torch.Generator().manual_seed(0)
    width = pipe.unet.config.cross_attention_dim
    sample = torch.randn(2, 4, 8, 8, generator=generator).to("cuda", torch.float16)
    contexts = [torch.randn(2, 77, width, generator=generator).to("cuda", torch.float16) for _ in range(2)]

    def outputs():
        with torch.no_grad():
            steps = [(t, x) for t in (900, 700, 500) for x in (*contexts, contexts[1])]
            return [pipe.unet(sample, t - i, x, return_dict=False)[0] for i, (t, x) in enumerate(steps)]

    ours = outputs()
    assert handle.summary()["step"]["prologues"] == 6
    captured = getattr(pipe.unet, graphs.ATTRIBUTE)
    captured.enabled = False
    assert all(distance(a, b) < ROUNDING["bundled"] for a, b in zip(ours, outputs(), strict=True))
    captured.enabled = True
    with torch.no_grad():
        pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_v.weight.mul_(-1)
    assert not torch.equal(outputs()[0], ours[0])


def test_time_embeddings_do_not_depend_on_what_came_before(pipe, monkeypatch):
    """A row has the same bits at any place among those that are computed together, and nearly those of a step's own."""
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    width = pipe.unet.config.cross_attention_dim
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(2, 4, 8, 8, generator=generator).to("cuda", torch.float16)
    context = torch.randn(2, 77, width, generator=generator).to("cuda", torch.float16)
    pipe.scheduler.set_timesteps(40)
    timesteps = pipe.scheduler.timesteps.tolist()

    def outputs(order):
        handle = diffopt.optimize(pipe)
        fused.put_on(pipe.unet, frozenset((fused.SHARED,)))
        with torch.no_grad():
            found = {t: pipe.unet(sample, torch.tensor(t), context, return_dict=False)[0] for t in order}
        torch.cuda.synchronize()
        assert no_reasons(handle)
        tables = handle.summary()["step"]["tables"]
        handle.restore()
        return [found[t] for t in timesteps], tables

    ours, tables = outputs(timesteps)
    assert tables == 2, "32 and the 8 others"
    for order in (timesteps[5:] + timesteps[:5], timesteps[::-1]):
        assert all(torch.equal(a, b) for a, b in zip(outputs(order)[0], ours, strict=True))
    monkeypatch.setattr(apart, "replaced", lambda *_: ())
    expected, tables = outputs(timesteps)
    assert tables == 0
    assert all(distance(a, b) < ROUNDING["bundled"] for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("used", [0, 40], ids=["fresh streams", "used streams"])
def test_graphs_survive_that_workspaces_are_dropped(used: int):
    """`torch.compile` drops PyTorch's workspaces of cuBLAS; split products of captured calls need theirs.

    In a process that has used all of PyTorch's 32 streams there is a workspace for each before anything is recorded.
    """
    linear = torch.nn.Linear(16384, 64, device="cuda", dtype=torch.float16).requires_grad_(False)
    x = torch.randn(64, 16384, device="cuda", dtype=torch.float16)
    capturer = CudaCapturer()
    with torch.no_grad():
        for _ in range(used):
            with torch.cuda.stream(torch.cuda.Stream()):
                linear(x)
        torch.cuda.synchronize()
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
