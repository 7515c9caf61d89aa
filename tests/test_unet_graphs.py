"""Captured UNet calls: what makes a kind of call, what is captured anew, what runs as it came. No GPU needed.

`Tape` stands in for CUDA graphs: it repeats the operations on the same buffers, and no Python runs then.
"""

import copy
import functools
import types
import weakref

import numpy as np
import pytest
import torch
from adapters import random_image_embeds, random_ip_adapter, random_lora
from diffusers import PNDMScheduler, StableDiffusionImg2ImgPipeline, UNet2DConditionModel, UniPCMultistepScheduler
from diffusers.models import attention_processor as stock
from diffusers.models.attention import GatedSelfAttentionDense
from diffusers.models.attention_processor import AttnProcessor
from pipelines import distance, make_pipeline, picture
from quantized import quantized
from recorders import Tape
from tiny_model import one_thread, tiny_pipeline  # noqa: F401

import diffopt
from diffopt.errors import OptimizeError
from diffopt.unet import graphs
from diffopt.unet.fingerprint import ModelWatch


@pytest.fixture
def recorder(monkeypatch):
    recorder = Tape()
    monkeypatch.setattr("diffopt.handle.CudaCapturer", lambda: recorder)
    return recorder


@pytest.fixture
def pipe():
    return make_pipeline("bundled")


def step(handle) -> dict:
    return handle.summary()["step"]


def uncaptured(handle) -> dict[str, int]:
    return {row["reason"]: row["calls"] for row in step(handle)["uncaptured"]}


def replays(handle) -> list[int]:
    return [bucket["replays"] for bucket in step(handle)["buckets"]]


def inputs(pipe, batch: int = 2, side: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    parameter = next(pipe.unet.parameters())
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(batch, 4, side, side, generator=generator).to(parameter)
    context = torch.randn(batch, 77, pipe.unet.config.cross_attention_dim, generator=generator).to(parameter)
    return sample, torch.tensor(7, device=parameter.device), context


def call(pipe, *arguments, **keywords) -> torch.Tensor:
    with torch.no_grad():
        return pipe.unet(*arguments, return_dict=False, **keywords)[0]


def test_one_capture_serves_every_step_and_the_next_picture(recorder, pipe):
    before = picture(pipe, "bundled", steps=4)
    handle = diffopt.optimize(pipe)
    for _ in range(2):
        assert torch.equal(picture(pipe, "bundled", steps=4), before)
    assert recorder.captures == 1
    assert replays(handle) == [8]
    assert "captured: 2×4×16×16 float32, 3 inputs, 8 replays" in handle.report()


@pytest.mark.parametrize("scheduler", [PNDMScheduler, UniPCMultistepScheduler])
def test_schedulers_that_keep_outputs_get_tensors_of_their_own(recorder, pipe, scheduler):
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    before = picture(pipe, "bundled", steps=6)
    diffopt.optimize(pipe)
    assert torch.equal(picture(pipe, "bundled", steps=6), before)
    assert recorder.captures == 1


def test_outputs_share_no_memory(recorder):
    pipe = tiny_pipeline()
    diffopt.optimize(pipe)
    first = call(pipe, *inputs(pipe))
    kept = first.clone()
    sample, timestep, context = inputs(pipe)
    second = call(pipe, sample + 1, timestep, context)
    assert torch.equal(first, kept)
    assert not torch.equal(first, second)


def test_values_may_change_in_place_between_calls(recorder):
    pipe = tiny_pipeline()
    handle = diffopt.optimize(pipe)
    sample, timestep, context = inputs(pipe)
    call(pipe, sample, timestep, context)
    sample.mul_(2)
    timestep.add_(100)
    context.neg_()
    ours = call(pipe, sample, timestep, context)
    assert recorder.captures == 1
    handle.restore()
    assert torch.equal(ours, call(pipe, sample, timestep, context))


@pytest.mark.parametrize("timestep", [7, 7.0, 500.5, torch.tensor(7), torch.tensor([7, 7]), torch.tensor(7.5)])
def test_a_timestep_may_be_a_number_or_a_tensor(recorder, timestep):
    pipe = tiny_pipeline()
    sample, _, context = inputs(pipe)
    expected = [call(pipe, sample, t, context) for t in (timestep, timestep + 100)]
    handle = diffopt.optimize(pipe)
    ours = [call(pipe, sample, t, context) for t in (timestep, timestep + 100)]
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    assert replays(handle) == [2]


def test_another_shape_or_layout_or_constant_is_another_capture(recorder):
    pipe = tiny_pipeline()
    diffopt.optimize(pipe)
    sample, timestep, context = inputs(pipe)
    mask = torch.ones(2, 77)
    kinds = [
        lambda: call(pipe, sample, timestep, context),
        lambda: call(pipe, sample[:1], timestep, context[:1]),
        lambda: call(pipe, sample.to(memory_format=torch.channels_last), timestep, context),
        lambda: call(pipe, sample, timestep, context[:, :70]),
        lambda: call(pipe, sample, timestep, context, encoder_attention_mask=mask),
        lambda: call(pipe, sample, 7, context),
        lambda: call(pipe, sample, timestep, context, cross_attention_kwargs={"scale": 0.5}),
        lambda: call(pipe, sample, timestep, context, cross_attention_kwargs={"scale": 0.6}),
    ]
    for _ in range(2):
        for kind in kinds:
            kind()
            kind()  # so that none looks like a kind that never comes again
    assert recorder.captures == len(kinds)


def test_return_dict_gives_what_diffusers_gives(recorder):
    pipe = tiny_pipeline()
    with torch.no_grad():
        expected = pipe.unet(*inputs(pipe))
        diffopt.optimize(pipe)
        ours = pipe.unet(*inputs(pipe))
    assert type(ours) is type(expected)
    assert torch.equal(ours.sample, expected.sample)
    assert ours.sample is ours[0]


def test_residuals_are_inputs(recorder):
    pipe = tiny_pipeline()
    sample, timestep, context = inputs(pipe)
    shapes = [(2, 16, 8, 8), (2, 16, 8, 8), (2, 16, 4, 4), (2, 32, 4, 4)]
    residuals = {
        "down_block_additional_residuals": [torch.randn(shape) for shape in shapes],
        "mid_block_additional_residual": torch.randn(2, 32, 4, 4),
    }
    expected = call(pipe, sample, timestep, context, **residuals)
    diffopt.optimize(pipe)
    assert torch.equal(call(pipe, sample, timestep, context, **residuals), expected)
    residuals["mid_block_additional_residual"] = residuals["mid_block_additional_residual"] + 1
    assert not torch.equal(call(pipe, sample, timestep, context, **residuals), expected)
    assert recorder.captures == 1


def test_lists_are_used_up_as_by_stock(recorder):
    """A UNet takes a T2I-Adapter's features out of the list it is given: whoever gives it twice gives nothing then."""
    stock, ours = tiny_pipeline(), tiny_pipeline()
    diffopt.optimize(ours)
    sample, timestep, context = inputs(ours)
    generator = torch.Generator().manual_seed(2)
    features = [torch.randn(shape, generator=generator) for shape in ((2, 16, 8, 8), (2, 32, 4, 4))]
    lists = list(features), list(features)
    for given, left in ((2, 0), (0, 0)):
        assert [len(x) for x in lists] == [given] * 2
        expected, found = (
            call(pipe, sample, timestep, context, down_intrablock_additional_residuals=x)
            for pipe, x in zip((stock, ours), lists, strict=True)
        )
        assert torch.equal(found, expected)
        assert [len(x) for x in lists] == [left] * 2


def test_guidance_switched_off_in_mid_run(recorder, pipe):
    def callback(pipeline, i, t, kwargs):
        if i == 2:
            pipeline._guidance_scale = 0.0
            kwargs["prompt_embeds"] = kwargs["prompt_embeds"].chunk(2)[-1]
        return kwargs

    options = {"steps": 5, "callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    before = picture(pipe, "bundled", **options)
    handle = diffopt.optimize(pipe)
    assert torch.equal(picture(pipe, "bundled", **options), before)
    assert replays(handle) == [3, 2]


def test_lora_loaded_scaled_switched_and_unloaded_is_captured_anew(recorder, pipe):
    handle = diffopt.optimize(pipe)
    plain = picture(pipe, "bundled")
    pipe.load_lora_weights(random_lora(pipe.unet), adapter_name="one")
    full = picture(pipe, "bundled")
    assert distance(full, plain) > 0.05
    assert recorder.captures == 2
    pipe.set_adapters(["one"], [0.5])
    half = picture(pipe, "bundled")
    assert distance(half, full) > 0.05
    pipe.set_adapters(["one"], [1.0])
    assert torch.equal(picture(pipe, "bundled"), full)
    assert recorder.captures == 3, "a state that was there before needs no new capture"
    pipe.disable_lora()
    assert torch.equal(picture(pipe, "bundled"), plain)
    pipe.enable_lora()
    pipe.fuse_lora(components=["unet"])
    assert distance(picture(pipe, "bundled"), full) < 1e-3
    pipe.unfuse_lora(components=["unet"])
    pipe.unload_lora_weights()
    assert distance(picture(pipe, "bundled"), plain) < 1e-3
    assert not uncaptured(handle)


@pytest.mark.parametrize("what", ["scale", "adapter", "processor", "weights"])
def test_a_change_in_mid_run_is_captured_anew(recorder, pipe, what):
    pipe.load_lora_weights(random_lora(pipe.unet), adapter_name="one")
    pipe.load_lora_weights(random_lora(pipe.unet, seed=1), adapter_name="two")
    pipe.set_adapters(["one"], [1.0])

    def callback(pipeline, i, t, kwargs):
        if i == 1:
            if what == "scale":
                pipeline.set_adapters(["one"], [0.5])
            elif what == "adapter":
                pipeline.set_adapters(["two"], [1.0])
            elif what == "processor":
                pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn1.set_processor(stock.AttnProcessor())
            else:
                pipeline.unet.conv_in.weight = torch.nn.Parameter(pipeline.unet.conv_in.weight * 1.5)
        return kwargs

    diffopt.optimize(pipe)
    twin = copy.deepcopy(pipe)
    picture(pipe, "bundled", steps=4, callback_on_step_end=callback)
    assert recorder.captures == 2
    assert picture(twin, "bundled", steps=4).isfinite().all()


def test_ip_adapter_scale_in_mid_run_is_captured_anew(recorder, pipe):
    pipe.load_ip_adapter(random_ip_adapter(pipe.unet), subfolder="", weight_name="", image_encoder_folder=None)
    image = {"ip_adapter_image_embeds": random_image_embeds(pipe.unet)}

    def callback(pipeline, i, t, kwargs):
        pipeline.set_ip_adapter_scale(0.2 if i == 1 else 0.7)
        return kwargs

    pipe.set_ip_adapter_scale(0.7)
    before = picture(pipe, "bundled", steps=4, callback_on_step_end=callback, **image)
    pipe.set_ip_adapter_scale(0.7)
    handle = diffopt.optimize(pipe)
    assert torch.equal(picture(pipe, "bundled", steps=4, callback_on_step_end=callback, **image), before)
    assert sorted(replays(handle)) == [1, 3]
    assert not uncaptured(handle)


def scaled_lora(pipe, scale):
    if not hasattr(pipe.unet, "peft_config"):
        pipe.load_lora_weights(random_lora(pipe.unet), adapter_name="one")
    pipe.set_adapters(["one"], [scale])
    return {}


def scaled_image(pipe, scale):
    if pipe.unet.encoder_hid_proj is None:
        pipe.load_ip_adapter(random_ip_adapter(pipe.unet), subfolder="", weight_name="", image_encoder_folder=None)
    pipe.set_ip_adapter_scale(scale)
    return {"added_cond_kwargs": {"image_embeds": random_image_embeds(pipe.unet)}}


def scaled_skips(pipe, scale):
    pipe.enable_freeu(s1=scale, s2=scale, b1=1 + scale, b2=1 + scale)
    return {}


def scaled_resnet(pipe, scale):
    pipe.unet.mid_block.resnets[0].output_scale_factor = scale
    return {}


@pytest.mark.parametrize("change", [scaled_lora, scaled_image, scaled_skips, scaled_resnet])
def test_scales_that_are_numbers_of_numpy(recorder, change):
    """Whoever tries several takes them from `np.linspace`. Each is another graph, as numbers of Python are."""
    stock, ours = tiny_pipeline(), tiny_pipeline()
    handle = diffopt.optimize(ours)
    sample, timestep, context = inputs(ours)
    pictures = []
    for scale in np.linspace(0.2, 1.0, 3):
        expected, found = (
            call(pipe, sample, timestep, context.clone(), **change(pipe, scale)) for pipe in (stock, ours)
        )
        assert torch.equal(found, expected)
        pictures.append(found)
    assert recorder.captures == 3
    assert not uncaptured(handle)
    assert not torch.equal(pictures[0], pictures[1])


def tiled(unet, around: bool) -> None:
    unet.conv_in.padding_mode = "circular" if around else "zeros"


def tiled_by_a_method(unet, around: bool) -> None:
    """As recipes for pictures that can be tiled have it; they switch it on and off at steps."""

    def pads_around(conv, x, weight, bias):
        return torch.nn.functional.conv2d(torch.nn.functional.pad(x, (1, 1, 1, 1), "circular"), weight, bias)

    if around:
        unet.conv_in._conv_forward = types.MethodType(pads_around, unet.conv_in)
    else:
        unet.conv_in.__dict__.pop("_conv_forward", None)


def weaker(unet, around: bool) -> None:
    unet.mid_block.resnets[0].output_scale_factor = 2.0 if around else 1.0


def centered(unet, around: bool) -> None:
    unet.register_to_config(center_input_sample=around)


@pytest.mark.parametrize("change", [tiled, tiled_by_a_method, weaker, centered])
def test_attributes_set_in_mid_run_or_by_who_keeps_the_embeddings(recorder, change):
    """A loop of the user's own has the very same embeddings for all its pictures: no new ones say that a run begins."""
    stock, ours = tiny_pipeline(), tiny_pipeline()
    diffopt.optimize(ours)
    sample, _, context = inputs(ours)
    for around, timestep in ((False, 900), (True, 500), (False, 100), (True, 900)):
        for pipe in (stock, ours):
            change(pipe.unet, around)
        assert torch.equal(call(ours, sample, timestep, context), call(stock, sample, timestep, context))


def test_freeu_is_captured_anew(recorder, pipe):
    plain = picture(pipe, "bundled")
    diffopt.optimize(pipe)
    assert torch.equal(picture(pipe, "bundled"), plain)
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    assert not torch.equal(picture(pipe, "bundled"), plain)
    pipe.disable_freeu()
    assert torch.equal(picture(pipe, "bundled"), plain)
    assert 2 <= recorder.captures <= 3  # FreeU leaves its attributes behind, set to None


class Remembering(stock.AttnProcessor2_0):
    """A processor that someone wrote."""


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda pipe: pipe.unet.mid_block.register_forward_hook(lambda *_: None), "mid_block has hooks"),
        (
            lambda pipe: pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.set_processor(Remembering()),
            "Remembering may keep something from step to step",
        ),
        (
            lambda pipe: setattr(pipe.unet.mid_block, "forward", pipe.unet.mid_block.forward),
            "mid_block has a forward of its own",
        ),
        (lambda pipe: setattr(pipe.unet, "_hf_hook", object()), "accelerate hooks move its weights (offloading)"),
        (
            lambda pipe: setattr(pipe.unet, "conv_act", type("Mine", (torch.nn.SiLU,), {})()),
            "conv_act is a test_unet_graphs.Mine, which diffopt does not know",
        ),
        (
            lambda pipe: setattr(pipe.unet.conv_in, "_conv_forward", pipe.unet.conv_in._conv_forward),
            "conv_in has a _conv_forward of its own",
        ),
        (
            lambda pipe: setattr(pipe.unet, "get_time_embed", pipe.unet.get_time_embed),
            "UNet2DConditionModel has a get_time_embed of its own",
        ),
        (
            lambda pipe: setattr(pipe.unet.mid_block.resnets[0].norm1, "_get_name", lambda: "mine"),
            "mid_block.resnets.0.norm1 has a _get_name of its own",
        ),
        (
            lambda pipe: setattr(
                pipe.unet.time_embedding.linear_1, "weight", quantized(pipe.unet.time_embedding.linear_1)
            ),
            "time_embedding.linear_1 has a quantized.Quantized, which diffopt does not know",
        ),
    ],
)
def test_what_a_graph_would_miss_runs_as_it_comes(recorder, change, reason):
    pipe = tiny_pipeline()
    handle = diffopt.optimize(pipe)
    arguments = inputs(pipe)
    call(pipe, *arguments)
    change(pipe)
    sample, timestep, context = arguments
    call(pipe, sample, timestep, context.clone())
    assert uncaptured(handle) == {reason: 1}
    assert recorder.captures == 1


def test_training_with_dropout_and_gradients_run_as_they_come(recorder):
    pipe = tiny_pipeline(dropout=0.1)
    pipe.unet.eval()
    handle = diffopt.optimize(pipe)
    pipe.unet(*inputs(pipe))
    pipe.unet.train()
    call(pipe, *inputs(pipe))
    assert uncaptured(handle) == {"gradients are enabled": 1, "it is in training mode": 1}


def test_training_mode_is_no_reason_where_nothing_drops(recorder):
    pipe = tiny_pipeline()
    pipe.unet.train()
    handle = diffopt.optimize(pipe)
    call(pipe, *inputs(pipe))
    assert replays(handle) == [1]
    assert not uncaptured(handle)


def test_hooks_on_all_modules_run_at_every_call(recorder):
    pipe = tiny_pipeline()
    handle = diffopt.optimize(pipe)
    arguments = inputs(pipe)
    call(pipe, *arguments)
    seen = []
    hook = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        for calls in (1, 2):
            call(pipe, *arguments)
            assert seen.count(pipe.unet.conv_in) == calls
    finally:
        hook.remove()
    assert uncaptured(handle) == {"hooks on all modules are set": 2}


def test_autocast_runs_as_it_comes(recorder):
    stock, ours = tiny_pipeline(), tiny_pipeline()
    handle = diffopt.optimize(ours)
    call(ours, *inputs(ours))
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = call(ours, *inputs(ours)), call(stock, *inputs(stock))
    assert (found.dtype, expected.dtype) == (torch.bfloat16, torch.bfloat16)
    assert uncaptured(handle) == {"autocast is on": 1}


def test_derivatives_without_gradients_run_as_they_come(recorder):
    """Forward-mode derivatives and `torch.func` work where gradients are off; stock's output has them."""
    stock, ours = tiny_pipeline(), tiny_pipeline()
    for pipe in (stock, ours):
        pipe.unet.set_attn_processor(AttnProcessor())  # PyTorch has none for its fused attention
    handle = diffopt.optimize(ours, attention="sdpa-math")
    sample, timestep, context = inputs(ours)
    call(ours, sample, timestep, context)

    def derivative(pipe):
        with torch.no_grad():
            return torch.func.jvp(lambda x: call(pipe, x, timestep, context), (sample,), (torch.ones_like(sample),))[1]

    def mapped(pipe):
        return torch.func.vmap(lambda x: call(pipe, x, timestep, context))(torch.stack([sample, sample + 1]))

    for work in (derivative, mapped):
        assert distance(work(ours), work(stock)) < 1e-5
    assert uncaptured(handle) == {"a transform of torch.func or forward-mode derivatives are on": 2}


CUDA, CUDNN = torch.backends.cuda, torch.backends.cudnn


@pytest.mark.parametrize(
    ("enabled", "enable"),
    [
        *[
            (functools.partial(getattr, owner, name), functools.partial(setattr, owner, name))
            for owner, name in (
                *((CUDA.matmul, "allow_tf32"), (CUDA.matmul, "allow_fp16_accumulation")),
                (CUDA.matmul, "allow_fp16_reduced_precision_reduction"),
                (CUDA.matmul, "allow_bf16_reduced_precision_reduction"),
                *((CUDNN, "enabled"), (CUDNN, "benchmark"), (CUDNN, "deterministic"), (CUDNN, "allow_tf32")),
            )
        ],
        (CUDA.flash_sdp_enabled, CUDA.enable_flash_sdp),
        (CUDA.mem_efficient_sdp_enabled, CUDA.enable_mem_efficient_sdp),
        (CUDA.math_sdp_enabled, CUDA.enable_math_sdp),
        (CUDA.cudnn_sdp_enabled, CUDA.enable_cudnn_sdp),
        (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    ],
)
def test_a_setting_that_decides_over_kernels_is_another_capture(recorder, enabled, enable):
    pipe = tiny_pipeline()
    diffopt.optimize(pipe)
    arguments = inputs(pipe)
    call(pipe, *arguments)
    before = enabled()
    enable(not before)
    try:
        call(pipe, *arguments)
    finally:
        enable(before)
    call(pipe, *arguments)
    assert recorder.captures == 2, "the one before needs no new capture"


def test_precision_settings_that_contradict_each_other_run_as_they_come(recorder, monkeypatch):
    """PyTorch refuses to tell its old names' settings once someone used the new ones."""

    def mixed():
        raise RuntimeError("PyTorch is checking whether allow_tf32 is enabled: mix of the legacy and new APIs")

    stock, ours = tiny_pipeline(), tiny_pipeline()
    handle = diffopt.optimize(ours)
    monkeypatch.setattr(graphs, "_settings", mixed)
    assert torch.equal(call(ours, *inputs(ours)), call(stock, *inputs(stock)))
    assert uncaptured(handle) == {"PyTorch's precision settings contradict each other": 1}


def test_an_interrupted_capture_is_shared_with_no_other(recorder, monkeypatch):
    pipe = tiny_pipeline()
    expected = call(pipe, *inputs(pipe))
    diffopt.optimize(pipe)
    forgotten = []
    monkeypatch.setattr(recorder, "forget", lambda: forgotten.append(1))
    recorder.refuses = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        call(pipe, *inputs(pipe))
    assert forgotten
    recorder.refuses = None
    assert torch.equal(call(pipe, *inputs(pipe)), expected)


def test_an_argument_given_twice_is_refused_as_by_stock(recorder):
    pipe = tiny_pipeline()
    diffopt.optimize(pipe)
    sample, timestep, context = inputs(pipe)
    with pytest.raises(TypeError, match="multiple values for argument 'encoder_hidden_states'"):
        call(pipe, sample, timestep, context, encoder_hidden_states=context)


def test_unknown_arguments_run_as_they_come(recorder):
    pipe = tiny_pipeline()
    handle = diffopt.optimize(pipe)
    call(pipe, *inputs(pipe), added_cond_kwargs={"something": object()})
    assert uncaptured(handle) == {"added_cond_kwargs['something'] is a object": 1}
    with pytest.raises(TypeError, match="unexpected keyword"):
        call(pipe, *inputs(pipe), nonsense=1)


def test_a_failed_capture_is_counted_and_not_tried_again(recorder):
    pipe = tiny_pipeline()
    expected = call(pipe, *inputs(pipe))
    handle = diffopt.optimize(pipe)
    recorder.refuses = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")
    for _ in range(3):
        assert torch.equal(call(pipe, *inputs(pipe)), expected)
    assert uncaptured(handle) == {"capturing failed: OutOfMemoryError: CUDA out of memory. Tried to allocate": 3}
    recorder.refuses = None
    sample, timestep, context = inputs(pipe)
    call(pipe, sample[:1], timestep, context[:1])
    assert recorder.captures == 1


class Budget(Tape):
    """A GPU with memory for one kind of call: a forward fits where no graph of another kind keeps its pool."""

    def __init__(self, monkeypatch) -> None:
        super().__init__()
        self.graphs = weakref.WeakSet()  # by what plays them back
        stock = UNet2DConditionModel.forward

        @functools.wraps(stock)
        def forward(*arguments, **keywords):
            if self.graphs:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            return stock(*arguments, **keywords)

        monkeypatch.setattr(UNet2DConditionModel, "forward", forward)

    def capture(self, work, device):
        play_back, output = super().capture(work, device)
        self.graphs.add(play_back)
        return play_back, output


@pytest.fixture
def budget(monkeypatch):
    budget = Budget(monkeypatch)
    monkeypatch.setattr("diffopt.handle.CudaCapturer", lambda: budget)
    return budget


def test_graphs_make_room_for_a_call_that_memory_has_no_graph_for(budget):
    """What graphs keep, stock has: each kind of call fits alone, and has to run beside the graphs, too."""
    pipe = tiny_pipeline()
    sample, timestep, context = inputs(pipe)
    small, large = (sample[:1], timestep, context[:1]), (sample, timestep, context)
    expected = [call(pipe, *small), call(pipe, *large)]
    handle = diffopt.optimize(pipe)
    for _ in range(2):
        assert torch.equal(call(pipe, *small), expected[0])
        assert replays(handle) == [1]
        assert torch.equal(call(pipe, *large), expected[1]), "a kind that was refused has to fit again"
        assert replays(handle) == []
    reason = "capturing failed: OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"
    assert uncaptured(handle) == {reason: 2}
    assert budget.captures == 2
    calls = {sum(run["calls"] for run in row["runs"]) for row in handle.summary()["layers"]}
    assert calls == {4}, "playbacks of graphs that are gone count"


def test_a_capture_that_memory_ended_may_end_in_another_error(budget, monkeypatch):
    pipe = tiny_pipeline()
    sample, timestep, context = inputs(pipe)
    expected = call(pipe, sample, timestep, context)
    handle = diffopt.optimize(pipe)
    call(pipe, sample[:1], timestep, context[:1])

    def warm_up(work, device):
        try:
            return work()
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(budget, "warm_up", warm_up)
    assert torch.equal(call(pipe, sample, timestep, context), expected)
    assert replays(handle) == []


def test_a_capture_that_fails_otherwise_leaves_the_graphs_there_are(recorder):
    pipe = tiny_pipeline()
    handle = diffopt.optimize(pipe)
    sample, timestep, context = inputs(pipe)
    call(pipe, sample, timestep, context)
    recorder.refuses = RuntimeError("operation not permitted when stream is capturing")
    call(pipe, sample[:1], timestep, context[:1])
    call(pipe, sample, timestep, context)
    assert replays(handle) == [2]


def test_the_least_recently_used_graph_goes(recorder, monkeypatch):
    monkeypatch.setattr(graphs, "LIMIT", 2)
    pipe = tiny_pipeline()
    calls = graphs.CapturedCalls(recorder, limit=2)
    graphs.put_on(pipe.unet, calls)
    sample, timestep, context = inputs(pipe)
    for tokens in (70, 71, 70, 72, 70, 71):
        for _ in range(2):
            call(pipe, sample, timestep, context[:, :tokens])
    assert recorder.captures == 4
    assert len(calls.buckets) == 2


def test_states_that_are_forgotten_are_taken_for_no_other(recorder):
    """More states than are kept in mind, one of them again and again: each picture is of its own."""
    stock, ours = tiny_pipeline(), tiny_pipeline()
    graphs.put_on(ours.unet, graphs.CapturedCalls(recorder, limit=2))
    sample, timestep, context = inputs(ours)
    for scale in (1, 2, 3, 4, 5, *(scale for other in range(6, 20) for scale in (99, other))):
        for pipe in (stock, ours):
            pipe.unet.mid_block.resnets[0].output_scale_factor = float(scale)
        for _ in range(2):
            assert torch.equal(call(ours, sample, timestep, context), call(stock, sample, timestep, context)), scale


def test_a_report_while_another_thread_draws(recorder):
    """A page shows it in the middle of a picture, and every playback changes the order of the kinds of calls."""
    pipe = tiny_pipeline()
    handle = diffopt.optimize(pipe)
    sample, timestep, context = inputs(pipe, side=4)
    kinds = [context[:, :tokens] for tokens in (69, 70, 71)]
    for kind in kinds * 2:
        call(pipe, sample, timestep, kind)

    class Read(graphs.Bucket):
        """Another call comes whenever it is read, as one of another thread may."""

        def __getattribute__(self, name):
            value = super().__getattribute__(name)
            if name in ("label", "chosen"):
                call(pipe, sample, timestep, kinds[0])
            return value

    for bucket in getattr(pipe.unet, graphs.ATTRIBUTE).buckets:
        bucket.__class__ = Read
    assert len(step(handle)["buckets"]) == len(kinds)
    assert "3 inputs" in handle.report()


def test_kinds_that_never_come_again_are_not_all_captured(recorder):
    pipe = tiny_pipeline()
    handle = diffopt.optimize(pipe)
    sample, timestep, context = inputs(pipe)
    for i in range(12):
        call(pipe, sample, timestep, context, cross_attention_kwargs={"scale": i / 10})
    assert recorder.captures == 4
    assert uncaptured(handle) == {"the first call of its kind, where kinds change all the time": 8}


def test_a_deep_copy_captures_for_itself(recorder, pipe):
    before = picture(pipe, "bundled")
    handle = diffopt.optimize(pipe)
    picture(pipe, "bundled")
    twin = copy.deepcopy(pipe)
    assert twin.unet.forward.__self__ is twin.unet
    assert getattr(twin.unet, graphs.ATTRIBUTE) is not getattr(pipe.unet, graphs.ATTRIBUTE)
    twin.unet.conv_out.weight.data.zero_()
    assert not torch.equal(picture(twin, "bundled"), before)
    assert torch.equal(picture(pipe, "bundled"), before)
    handle.restore()
    assert "forward" not in pipe.unet.__dict__
    assert graphs.is_on(twin.unet)
    diffopt.optimize(twin).restore()
    assert "forward" not in twin.unet.__dict__
    assert graphs.ATTRIBUTE not in twin.unet.__dict__


def test_restore_leaves_what_others_put_over_it(recorder, pipe):
    before = picture(pipe, "bundled")
    handle = diffopt.optimize(pipe)
    ours = pipe.unet.forward
    wrapped = lambda *arguments, **keywords: ours(*arguments, **keywords)  # noqa: E731
    pipe.unet.forward = wrapped
    handle.restore()
    assert pipe.unet.forward is wrapped
    assert torch.equal(picture(pipe, "bundled"), before)
    assert recorder.captures == 0


def test_a_forward_of_its_own_is_kept_and_named(recorder, pipe):
    mine = pipe.unet.forward
    pipe.unet.forward = mine
    handle = diffopt.optimize(pipe)
    assert pipe.unet.forward is mine
    assert "UNet calls are not captured: UNet2DConditionModel has a forward of its own" in handle.report()
    handle.restore()
    assert pipe.unet.forward is mine


def test_capture_can_be_refused(recorder, pipe):
    handle = diffopt.optimize(pipe, capture=False)
    assert "forward" not in pipe.unet.__dict__
    assert step(handle) is None
    with pytest.raises(OptimizeError, match=r"already optimized with capture=False; call restore\(\)"):
        diffopt.optimize(pipe, capture=True)


def test_without_a_gpu_calls_run_as_they_come_and_are_counted(pipe):
    if pipe.device.type == "cuda":
        pytest.skip("about a machine without a GPU")
    handle = diffopt.optimize(pipe)
    picture(pipe, "bundled", steps=3)
    assert uncaptured(handle) == {"graphs need a CUDA GPU, the call is on cpu": 3}


def test_pipelines_that_share_a_unet_share_its_graphs(recorder, pipe):
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    handle = diffopt.optimize(pipe)
    assert diffopt.optimize(other) is handle
    picture(pipe, "bundled")
    assert recorder.captures == 1


def test_moved_and_cast_weights_are_captured_anew(recorder):
    pipe = tiny_pipeline()
    diffopt.optimize(pipe)
    sample, timestep, context = inputs(pipe)
    call(pipe, sample, timestep, context)
    for parameter in pipe.unet.parameters():
        parameter.data = parameter.data.clone()
    call(pipe, sample, timestep, context)
    assert recorder.captures == 2
    pipe.unet.to(torch.float64)
    assert call(pipe, sample.double(), timestep, context.double()).dtype == torch.float64
    assert recorder.captures == 3


def test_a_compiled_unet_is_traced_through(recorder, pipe):
    before = picture(pipe, "bundled")
    diffopt.optimize(pipe)
    torch._dynamo.reset()
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    try:
        assert distance(picture(pipe, "bundled"), before) < 1e-4
    finally:
        torch._dynamo.reset()
    assert recorder.captures == 0


@pytest.mark.parametrize("lora", [False, True])
def test_the_long_look_is_taken_only_after_changes(recorder, pipe, monkeypatch, lora):
    looks = []
    look = ModelWatch.look
    monkeypatch.setattr(ModelWatch, "look", lambda watch: looks.append(1) or look(watch))
    if lora:
        pipe.load_lora_weights(random_lora(pipe.unet), adapter_name="one")
    diffopt.optimize(pipe)
    for _ in range(3):
        picture(pipe, "bundled")
    assert len(looks) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda unet: setattr(unet.mid_block.resnets[0], "output_scale_factor", 2.0),
        lambda unet: setattr(unet.mid_block.resnets[0].norm1, "eps", 0.1),
        lambda unet: setattr(unet.mid_block, "mine", [1, [2]]),
        lambda unet: setattr(unet.conv_in, "padding", (1, 1, 1)),
        lambda unet: setattr(unet.conv_in.weight, "data", unet.conv_in.weight.data.transpose(2, 3)),
        lambda unet: setattr(unet.conv_in.weight, "data", unet.conv_in.weight.data[:8]),
    ],
)
def test_a_new_run_sees_changes_that_a_glance_does_not(change):
    unet = tiny_pipeline().unet
    watch = ModelWatch(unet)
    before = watch.look()
    glance = watch.glance()
    assert watch.unchanged()
    change(unet)
    assert watch.glance() == glance
    assert not watch.unchanged()
    assert watch.look() != before
    assert watch.unchanged()


def moved(tensor: torch.Tensor) -> torch.Tensor:
    """Equal values at another address; returns what was there, so that nothing new comes to lie there."""
    before = tensor.data
    tensor.data = before.clone()
    return before


@pytest.mark.parametrize(
    "tensor",
    [
        lambda unet: unet.conv_in.weight,
        lambda unet: unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight,
        lambda unet: unet.mid_block.numbers,
    ],
    ids=["with a bias", "without", "buffer"],
)
def test_a_glance_sees_every_tensor_that_moves(tensor):
    unet = tiny_pipeline().unet
    unet.mid_block.register_buffer("numbers", torch.ones(3))
    watch = ModelWatch(unet)
    states, glance = watch.look(), watch.glance()
    before = moved(tensor(unet))
    assert watch.glance() != glance
    assert watch.look() != states
    assert torch.equal(tensor(unet), before)


def exchange_class(unet) -> None:
    class Half(type(unet.mid_block)):
        def forward(self, *arguments, **keywords):
            return super().forward(*arguments, **keywords) * 0.5

    unet.mid_block.__class__ = Half


@pytest.mark.parametrize(
    "change",
    [
        lambda unet: unet.register_to_config(center_input_sample=True),
        lambda unet: setattr(unet.config, "center_input_sample", True),  # as IP-Adapters set theirs
        exchange_class,
    ],
    ids=["registered", "attribute", "class"],
)
def test_a_new_run_sees_another_configuration_and_class(recorder, change):
    """Forwards read both, and neither lies in a module's attributes."""
    pipe = tiny_pipeline()
    handle = diffopt.optimize(pipe)
    sample, timestep, context = inputs(pipe)
    call(pipe, sample, timestep, context)
    change(pipe.unet)
    ours = call(pipe, sample, timestep, context.clone())
    handle.restore()
    assert torch.equal(ours, call(pipe, sample, timestep, context))


def test_gates_closed_in_mid_run(recorder):
    """GLIGEN's pipeline lets its boxes steer the first steps only."""
    pipe = tiny_pipeline(attention_type="gated")
    gates = [module for module in pipe.unet.modules() if isinstance(module, GatedSelfAttentionDense)]
    for gate in gates:
        gate.alpha_attn.data.fill_(1)
    sample, _, context = inputs(pipe)
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(2, 3, 16, generator=generator)
    boxes = {"boxes": torch.rand(2, 3, 4, generator=generator), "masks": torch.ones(2, 3)}

    def steps() -> list[torch.Tensor]:
        found = []
        for timestep, enabled in ((900, True), (800, False), (700, False)):
            for gate in gates:
                gate.enabled = enabled
            gligen = {**boxes, "positive_embeddings": embeddings}
            found.append(call(pipe, sample, timestep, context, cross_attention_kwargs={"gligen": gligen}))
        return found

    expected = steps()
    diffopt.optimize(pipe)
    assert all(torch.equal(a, b) for a, b in zip(steps(), expected, strict=True))
    assert recorder.captures == 2


def test_a_call_that_changes_the_model_runs_as_it_comes(recorder, pipe):
    """A scale of 0 given to one call makes diffusers set the adapters' own scales to 1, for good."""
    pipe.load_lora_weights(random_lora(pipe.unet), adapter_name="one")

    def pictures() -> list[torch.Tensor]:
        found = []
        for _ in range(2):
            pipe.set_adapters(["one"], [0.5])
            found.append(picture(pipe, "bundled", cross_attention_kwargs={"scale": 0.0}))
            found.append(picture(pipe, "bundled"))
        return found

    expected = pictures()
    handle = diffopt.optimize(pipe)
    assert all(torch.equal(a, b) for a, b in zip(pictures(), expected, strict=True))
    assert uncaptured(handle) == {"the call itself changes the model": 2}, "a step in each run; then it is 1"


@pytest.mark.parametrize("prepared", [False, True])
def test_adapters_exchanged_without_new_layers(recorder, pipe, prepared):
    """`hotswap` writes into the weights; prepared for compiled models, scales are tensors, too."""
    if prepared:
        pipe.enable_lora_hotswap(target_rank=8)
    pipe.load_lora_weights(random_lora(pipe.unet), adapter_name="one")
    handle = diffopt.optimize(pipe)

    def exchanged(*_):
        pipe.load_lora_weights(random_lora(pipe.unet, seed=1), adapter_name="one", hotswap=True)
        return {}

    before = picture(pipe, "bundled")
    pictures = [picture(pipe, "bundled", callback_on_step_end=exchanged), picture(pipe, "bundled")]
    assert not uncaptured(handle)
    handle.restore()
    assert torch.equal(pictures[1], picture(pipe, "bundled"))
    pipe.load_lora_weights(random_lora(pipe.unet), adapter_name="one", hotswap=True)
    assert torch.equal(before, picture(pipe, "bundled"))
    assert torch.equal(pictures[0], picture(pipe, "bundled", callback_on_step_end=exchanged))
    assert len({float(x.double().norm()) for x in (before, *pictures)}) == 3


def test_containers_changed_in_place_are_seen():
    unet = tiny_pipeline().unet
    unet.mid_block.numbers, unet.mid_block.nested = {"one": 0.5}, [1, [2.0]]
    watch = ModelWatch(unet)
    watch.look()
    unet.mid_block.numbers["one"] = 0.6
    assert not watch.unchanged()
    watch.look()
    unet.mid_block.nested[1][0] = 3.0
    assert not watch.unchanged()
