"""Kinds of pipelines and ControlNets, optimized: the latents of stock, what is captured, counted, kept and given back.

Everything runs on any machine with `Recorder` for CUDA graphs; on a GPU in float16 with true graphs, too.
"""

import copy
import itertools
from typing import Any

import pytest
import torch
from accelerate import cpu_offload_with_hook
from diffusers import ControlNetModel, MultiControlNetModel
from diffusers.models import attention_processor as stock
from pipeline_kinds import KINDS, images, latents, made, random_controlnet, xl_pipeline
from pipelines import distance, make_pipeline, same_picture
from recorders import Recorder
from tiny_model import one_thread, tiny_pipeline  # noqa: F401

import diffopt
from diffopt.attention.layers import attention_modules
from diffopt.attention.processors import is_ours
from diffopt.errors import OptimizeError
from diffopt.measure.exactness import relative_l2
from diffopt.measure.teacher_forced import FACTOR, floor, reference_dtype
from diffopt.unet import conditioning, fused, graphs, sharing

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
GRAPHS = ["stand-in", pytest.param("graphs", marks=pytest.mark.gpu)]


@pytest.fixture
def recorded(monkeypatch):
    """The stand-in for graphs."""
    monkeypatch.setattr("diffopt.handle.CudaCapturer", Recorder)


@pytest.fixture(params=GRAPHS)
def captured(request, monkeypatch):
    """Calls are captured: by the stand-in, and on a GPU as true graphs."""
    if request.param == "stand-in":
        monkeypatch.setattr("diffopt.handle.CudaCapturer", Recorder)


def pipeline(kind: str) -> tuple[Any, dict[str, Any]]:
    """The bundled model in a pipeline of a kind, and what it is called with."""
    return KINDS[kind].make(make_pipeline("bundled")), KINDS[kind].options()


def steps_of(handle) -> list[dict[str, Any]]:
    """Of the UNet and of each ControlNet: what was captured."""
    summary = handle.summary()
    return [summary["step"], *(net["step"] for net in summary["controlnets"])]


def captures(handle) -> list[int]:
    """Graphs made, of the UNet and of each ControlNet; none of their calls ran uncaptured."""
    steps = steps_of(handle)
    assert not any(step["uncaptured"] for step in steps)
    return [step["captures"] for step in steps]


def replays(handle) -> list[int]:
    return [sum(bucket["replays"] for bucket in step["buckets"]) for step in steps_of(handle)]


# --- whole pipelines ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_makes_the_latents_of_stock(captured, kind):
    pipe, options = pipeline(kind)
    before = latents(pipe, **options)
    handle = diffopt.optimize(pipe)
    for _ in range(2):
        assert same_picture(latents(pipe, **options), before)
    assert captures(handle) == [1] * (1 + KINDS[kind].nets)
    handle.restore()
    assert same_picture(latents(pipe, **options), before)


def test_sdxl_with_a_controlnet(captured):
    pipe, options = xl_pipeline(DEVICE)
    before = latents(pipe, **options)
    handle = diffopt.optimize(pipe)
    for _ in range(2):
        assert same_picture(latents(pipe, **options), before)
    assert captures(handle) == [1, 1]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["ControlNet", "one ControlNet twice"])
def test_captured_steps_make_the_latents_of_uncaptured_ones(kind):
    pipe, options = pipeline(kind)
    with diffopt.optimized(pipe, capture=False):
        before = latents(pipe, **options)
    handle = diffopt.optimize(pipe)
    for _ in range(2):
        assert same_picture(latents(pipe, **options), before)
    assert captures(handle) == [1, 1]


def test_images_change_what_is_drawn(captured):
    """Comparisons above would see a ControlNet's residuals overwritten by those of the next image."""
    pipe, options = pipeline("one ControlNet twice")
    before = latents(pipe, **options)
    diffopt.optimize(pipe)
    assert same_picture(latents(pipe, **options), before)
    first, second = options["image"]
    assert not same_picture(latents(pipe, **{**options, "image": [first, first]}), before)
    assert not same_picture(latents(pipe, **{**options, "image": [second, second]}), before)


def test_any_scale_is_the_same_graph(captured):
    pipe, options = pipeline("ControlNet")
    scales = [1.0, 0.3, 0.0, 0.7]
    before = [latents(pipe, **options, controlnet_conditioning_scale=scale) for scale in scales]
    handle = diffopt.optimize(pipe)
    ours = [latents(pipe, **options, controlnet_conditioning_scale=scale) for scale in scales]
    assert all(same_picture(a, b) for a, b in zip(ours, before, strict=True))
    assert not any(same_picture(a, b) for a, b in itertools.pairwise(before)), "scales change nothing"
    assert captures(handle) == [1, 1]


@pytest.mark.parametrize(
    ("kind", "control", "graphs_made"),
    [
        ("ControlNet", {"control_guidance_end": 0.5}, [1, 1]),
        ("ControlNet in guess mode", {"control_guidance_end": 0.5}, [1, 2]),
        ("two ControlNets", {"control_guidance_start": [0.0, 0.5], "control_guidance_end": [0.5, 1.0]}, [1, 1, 1]),
        ("one ControlNet twice", {"control_guidance_start": [0.0, 0.5], "control_guidance_end": [0.5, 1.0]}, [1, 1]),
    ],
)
def test_control_that_begins_late_and_ends_early(captured, kind, control, graphs_made):
    pipe, options = pipeline(kind)
    options.update(control)
    before = latents(pipe, steps=4, **options)
    handle = diffopt.optimize(pipe)
    assert same_picture(latents(pipe, steps=4, **options), before)
    assert captures(handle) == graphs_made


# --- one ControlNet's calls -----------------------------------------------------------------------------------------


def tiny(nets: int = 1, device: torch.device = DEVICE, **unet_options: Any) -> Any:
    """A tiny pipeline with ControlNets, in float32."""
    pipe = tiny_pipeline(**unet_options).to(device)
    for part in (pipe.unet, pipe.vae):
        part.requires_grad_(False)
    found = [random_controlnet(pipe.unet, pipe.vae, seed) for seed in range(nets)]
    return made("StableDiffusionControlNetPipeline", pipe, controlnet=found if nets > 1 else found[0])


def call(net: Any, image: int = 0, **keywords: Any) -> Any:
    """A ControlNet's residuals for a picture, the last one being the middle's."""
    parameter = next(net.parameters())
    generator = torch.Generator().manual_seed(2)
    sample = torch.randn(2, 4, 8, 8, generator=generator).to(parameter)
    context = torch.randn(2, 77, net.config.cross_attention_dim, generator=generator).to(parameter)
    side = 8 * 2 ** (len(net.config.conditioning_embedding_out_channels) - 1)
    picture = images(image)[..., :side, :side].to(parameter)
    arguments = {"encoder_hidden_states": context, "controlnet_cond": picture}
    with torch.no_grad():
        down, middle = net(sample, torch.tensor(7), **arguments, return_dict=False, **keywords)
    return [*down, middle]


def same(ours: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def same_residuals(ours: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    """The same computation: bitwise on a CPU; on a GPU convolutions of float32 may be in TF32, whatever the layout."""
    if DEVICE.type == "cpu":
        return same(ours, expected)
    return all(torch.equal(a, b) or distance(a, b) < 1e-2 for a, b in zip(ours, expected, strict=True))


SCALES = [{"conditioning_scale": scale} for scale in (1.0, 0.1, 0, 0.3, 7, -0.25)]


@pytest.mark.parametrize("scale", SCALES, ids=str)
def test_the_scale_is_that_of_stock_bit_for_bit(recorded, scale):
    pipe = tiny()
    net = pipe.controlnet
    expected = call(net, **scale)
    diffopt.optimize(pipe)
    for _ in range(2):
        ours = call(net, **scale)
        assert [x.stride() for x in ours] == [x.stride() for x in expected]
        assert same_residuals(ours, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_product_outside_of_the_graph_is_the_product_inside(dtype):
    x = torch.randn(2, 24, 5, 3, device=DEVICE).to(dtype).to(memory_format=torch.channels_last)
    for scale in (0.1, 1 / 3, 0.0, 3, -1.7, 1e-7):
        copy_of = conditioning.copied(x * 1.0, scale)
        assert torch.equal(copy_of, x * scale)
        assert copy_of.is_contiguous()


def test_residuals_share_no_memory(captured):
    pipe = tiny()
    diffopt.optimize(pipe)
    first = call(pipe.controlnet, 0, conditioning_scale=0.5)
    kept = [x.clone() for x in first]
    second = call(pipe.controlnet, 1, conditioning_scale=0.5)
    assert same(first, kept)
    assert not any(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    second[-1].add_(1)  # as diffusers does with the middle's of several ControlNets
    assert same_residuals(call(pipe.controlnet, 0, conditioning_scale=0.5), kept)


@pytest.mark.parametrize("pooled", [False, True])
def test_scales_that_stay_inside_make_a_bounded_number_of_graphs(recorded, pooled):
    pipe = tiny(device=torch.device("cpu"))
    net = pipe.controlnet
    net.register_to_config(global_pool_conditions=pooled)
    calls = [{"conditioning_scale": i / 10, "guess_mode": not pooled} for i in range(2 * graphs.LIMIT)]
    expected = [call(net, **keywords) for keywords in calls]
    diffopt.optimize(pipe)
    for keywords, residuals in zip(calls, expected, strict=True):
        assert same(call(net, **keywords), residuals)
        assert same(call(net, **keywords), residuals)
    captured_calls = getattr(net, graphs.ATTRIBUTE)
    assert len(captured_calls.buckets) == graphs.LIMIT
    assert captured_calls.captures == len(calls)


def test_diffusers_output_is_what_it_was(recorded):
    pipe = tiny()
    sample = torch.zeros(1, 4, 8, 8, device=DEVICE)
    context, image = torch.zeros(1, 77, 16, device=DEVICE), images()[..., :16, :16].to(DEVICE)
    arguments = {"encoder_hidden_states": context, "controlnet_cond": image, "conditioning_scale": 0.5}
    with torch.no_grad():
        expected = pipe.controlnet(sample, 7, **arguments)
        diffopt.optimize(pipe)
        ours = pipe.controlnet(sample, 7, **arguments)
    assert type(ours) is type(expected)
    assert type(ours.down_block_res_samples) is type(expected.down_block_res_samples)
    assert distance(ours.mid_block_res_sample, expected.mid_block_res_sample) < 1e-2


def test_a_controlnets_weights_are_followed(captured):
    pipe, options = pipeline("ControlNet")
    before = latents(pipe, **options)
    handle = diffopt.optimize(pipe)
    latents(pipe, **options)
    with torch.no_grad():
        pipe.controlnet.controlnet_mid_block.weight.mul_(3)
    changed = latents(pipe, **options)
    assert not same_picture(changed, before)
    assert captures(handle) == [1, 1], "a change in place needs no new graph"
    pipe.controlnet.conv_in.weight = torch.nn.Parameter(pipe.controlnet.conv_in.weight * 2, requires_grad=False)
    assert not same_picture(latents(pipe, **options), changed)
    assert captures(handle) == [1, 2]


# --- blocks and attention -------------------------------------------------------------------------------------------


def exact(net: Any, **keywords: Any) -> list[torch.Tensor]:
    """What stock computes in higher precision, without TF32."""
    precise = copy.deepcopy(net)
    torch.nn.Module.to(precise, reference_dtype(net.dtype))
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        return call(precise, **keywords)
    finally:
        torch.backends.cudnn.allow_tf32 = allowed


def assert_as_exact_as_stock(pipe: Any) -> Any:
    """The step rule for residuals: at most 1.5 times stock's distance to the exact ones; a fault must be found."""
    net, scale = pipe.controlnet, {"conditioning_scale": 0.7}
    reference, expected = exact(net, **scale), call(net, **scale)
    limits = [FACTOR * relative_l2(a, b) + floor(net.dtype) for a, b in zip(expected, reference, strict=True)]
    handle = diffopt.optimize(pipe)
    assert fused.summary(net)["fused"]
    ours = call(net, **scale)
    assert not torch.equal(ours[-1], expected[-1]), "the kernels did not run"
    assert all(relative_l2(a, b) <= limit for a, b, limit in zip(ours, reference, limits, strict=True))
    for attn in attention_modules(net).values():
        attn.to_q.weight.data.mul_(1.5)
        attn.to_v.weight.data.mul_(1.05)
    assert relative_l2(call(net, **scale)[-1], reference[-1]) > limits[-1], "the check is void"
    return handle


def test_residuals_are_as_exact_as_stocks(monkeypatch):
    monkeypatch.setattr("diffopt.attention.backends.step_kernel_reasons", lambda device: [])
    pipe = tiny(norm_num_groups=2)
    handle = assert_as_exact_as_stock(pipe)
    (row,) = handle.summary()["controlnets"]
    found = dict(row["modules"]["fused"])
    assert found.pop("Conv2d") >= 2, "the first and the hint's last, at least"
    counts = {kind: sum(type(m).__name__ == kind for m in pipe.controlnet.modules()) for kind in found}
    assert found == counts
    assert set(counts) == {"ResnetBlock2D", "Transformer2DModel", "BasicTransformerBlock", "GEGLU", "GroupNorm"}
    assert {shared["what"] for shared in sharing.summary(pipe.controlnet)} == {
        *("queries, keys and values, layer by layer", "keys and values of the prompt", "time embeddings")
    }
    assert "controlnet: fused: " in handle.report()


@pytest.mark.gpu
def test_residuals_in_half_precision_are_as_exact_as_stocks():
    pipe, _ = pipeline("ControlNet")
    assert_as_exact_as_stock(pipe)


def test_calls_that_are_not_captured_are_named():
    pipe = tiny(device=torch.device("cpu"))
    handle = diffopt.optimize(pipe)
    call(pipe.controlnet)
    assert "controlnet: not captured: 1 ControlNet calls: graphs need a CUDA GPU, the call is on cpu" in handle.report()


def test_every_layer_of_every_controlnet_is_counted():
    pipe, options = pipeline("two ControlNets")
    handle = diffopt.optimize(pipe)
    latents(pipe, steps=2, **options)
    summary = handle.summary()
    assert [net["name"] for net in summary["controlnets"]] == ["controlnet.nets.0", "controlnet.nets.1"]
    for net, row in zip(pipe.controlnet.nets, summary["controlnets"], strict=True):
        assert [layer["name"] for layer in row["layers"]] == list(attention_modules(net))
        assert all(layer["optimized"] for layer in row["layers"])
        assert {sum(run["calls"] for run in layer["runs"]) for layer in row["layers"]} == {2}
    report = handle.report()
    assert "controlnet.nets.0.mid_block.attentions.0.transformer_blocks.0.attn1 " in report


def test_one_that_is_in_it_twice_is_counted_once_and_called_twice(recorded):
    pipe, options = pipeline("one ControlNet twice")
    handle = diffopt.optimize(pipe)
    latents(pipe, steps=2, **options)
    (row,) = handle.summary()["controlnets"]
    assert row["name"] == "controlnet.nets.0"
    assert replays(handle) == [2, 4]
    assert "controlnet.nets.0: captured: 2×4×16×16 " in handle.report()


def test_a_forced_backend_serves_controlnets_too(recorded):
    pipe, options = pipeline("ControlNet")
    before = latents(pipe, **options)
    handle = diffopt.optimize(pipe, attention="sdpa-math")
    assert distance(latents(pipe, **options), before) < (1e-4 if DEVICE.type == "cpu" else 0.03)
    (row,) = handle.summary()["controlnets"]
    assert {run["backend"] for layer in row["layers"] for run in layer["runs"]} == {"sdpa-math"}


def test_a_plan_holds_a_controlnets_shapes(recorded, tmp_path):
    pipe = tiny()
    net = random_controlnet(tiny_pipeline(attention_head_dim=4).unet.to(DEVICE), pipe.vae)
    pipe = made("StableDiffusionControlNetPipeline", pipe, controlnet=net)
    handle = diffopt.optimize(pipe)
    call(net)
    assert {shape.heads for shape in handle.plan.choices} == {4}
    handle.plan.save(tmp_path / "plan.json")
    handle.restore()
    diffopt.optimize(pipe, plan=tmp_path / "plan.json").restore()
    without = made("StableDiffusionPipeline", pipe)
    with pytest.raises(OptimizeError, match="the plan has a layer with"):
        diffopt.optimize(without, plan=tmp_path / "plan.json")


# --- what is kept, and the way back ---------------------------------------------------------------------------------


def test_restoring_leaves_nothing(monkeypatch, recorded):
    monkeypatch.setattr("diffopt.attention.backends.step_kernel_reasons", lambda device: [])
    pipe = tiny(nets=2)
    nets = list(pipe.controlnet.nets)
    former = [[attn.processor for attn in attention_modules(net).values()] for net in nets]
    values = [{name: (p, p.data.clone(), p.stride()) for name, p in net.named_parameters()} for net in nets]
    attributes = [{name: set(module.__dict__) for name, module in net.named_modules()} for net in nets]
    handle = diffopt.optimize(pipe)
    for net in nets:
        assert graphs.is_on(net)
        assert fused.is_on(net)
        assert all(is_ours(attn.processor) for attn in attention_modules(net).values())
    handle.restore()
    for net, processors, parameters, names in zip(nets, former, values, attributes, strict=True):
        assert all(a.processor is b for a, b in zip(attention_modules(net).values(), processors, strict=True))
        assert {name: set(module.__dict__) for name, module in net.named_modules()} == names
        for name, p in net.named_parameters():
            assert p is parameters[name][0]
            assert torch.equal(p, parameters[name][1])
            assert p.stride() == parameters[name][2]


def test_a_controlnet_stays_optimized_while_another_pipeline_has_it(recorded):
    pipe = tiny()
    net = pipe.controlnet
    other = made("StableDiffusionControlNetPipeline", tiny(), controlnet=net)
    first, second = diffopt.optimize(pipe), diffopt.optimize(other)
    assert first is not second
    first.restore()
    assert graphs.is_on(net)
    assert not graphs.is_on(pipe.unet)
    second.restore()
    assert not graphs.is_on(net)
    assert not any(is_ours(attn.processor) for attn in attention_modules(net).values())


@pytest.mark.parametrize("options", [{"attention": "sdpa-math"}, {"capture": False}], ids=str)
def test_other_arguments_for_the_same_controlnet_are_refused(recorded, options):
    pipe = tiny()
    other = made("StableDiffusionControlNetPipeline", tiny(), controlnet=pipe.controlnet)
    handle = diffopt.optimize(pipe)
    with pytest.raises(OptimizeError, match=r"its ControlNet is already optimized .* attention='auto', capture=True"):
        diffopt.optimize(other, **options)
    assert not graphs.is_on(other.unet)
    assert not any(is_ours(attn.processor) for attn in attention_modules(other.unet).values())
    handle.restore()
    diffopt.optimize(other, **options).restore()


def test_a_new_controlnet_is_optimized_on_the_next_call(recorded):
    pipe = tiny()
    handle = diffopt.optimize(pipe)
    former, pipe.controlnet = pipe.controlnet, random_controlnet(tiny_pipeline().unet, pipe.vae)
    assert "note: controlnet is not optimized: it is new here; optimize() again changes that" in handle.report()
    assert diffopt.optimize(pipe) is handle
    assert graphs.is_on(pipe.controlnet)
    handle.restore()
    assert not graphs.is_on(pipe.controlnet)
    assert not graphs.is_on(former)


def test_a_pipeline_that_shares_the_unet_brings_its_controlnet(recorded):
    pipe = tiny()
    plain = made("StableDiffusionPipeline", pipe)
    handle = diffopt.optimize(plain)
    assert handle.summary()["controlnets"] == []
    assert not graphs.is_on(pipe.controlnet)
    assert diffopt.optimize(pipe) is handle
    assert graphs.is_on(pipe.controlnet)
    with diffopt.optimized(plain):
        pass
    handle.restore()
    handle.restore()
    assert not graphs.is_on(pipe.controlnet)


def test_a_deep_copy_has_graphs_of_its_own(captured):
    pipe, options = pipeline("ControlNet")
    before = latents(pipe, **options)
    handle = diffopt.optimize(pipe)
    latents(pipe, **options)
    twin = copy.deepcopy(pipe)
    with torch.no_grad():
        pipe.controlnet.controlnet_mid_block.weight.zero_()
    assert same_picture(latents(twin, **options), before)
    handle.restore()
    assert graphs.is_on(twin.controlnet)
    diffopt.optimize(twin).restore()
    assert not graphs.is_on(twin.controlnet)
    assert not any(is_ours(attn.processor) for attn in attention_modules(twin.controlnet).values())


class Mine(ControlNetModel):
    """A ControlNet that someone wrote."""


def test_an_unknown_controlnet_is_kept_and_named(recorded):
    pipe = tiny()
    net = Mine.from_config(pipe.controlnet.config)
    several = MultiControlNetModel([net, pipe.controlnet])
    pipe = made("StableDiffusionControlNetPipeline", pipe, controlnet=several)
    handle = diffopt.optimize(pipe)
    assert "note: controlnet.nets.0 is not optimized: diffopt does not know Mine" in handle.report()
    assert not any(is_ours(attn.processor) for attn in attention_modules(net).values())
    assert graphs.is_on(several.nets[1])


class Remembering(stock.AttnProcessor2_0):
    """A processor that someone wrote."""


def test_what_was_compiled_is_optimized_inside(recorded):
    pipe = tiny(nets=2)
    nets = list(pipe.controlnet.nets)
    pipe.controlnet.nets[0] = torch.compile(nets[0])
    handle = diffopt.optimize(pipe)
    assert all(graphs.is_on(net) for net in nets)
    assert "is not optimized" not in handle.report()
    handle.restore()
    assert not any(graphs.is_on(net) for net in nets)
    assert not any(is_ours(attn.processor) for net in nets for attn in attention_modules(net).values())


def test_one_whose_attention_is_kept_is_reported_all_the_same(recorded):
    pipe = tiny()
    for attn in attention_modules(pipe.controlnet).values():
        attn.set_processor(Remembering())
    handle = diffopt.optimize(pipe)
    call(pipe.controlnet)
    (row,) = handle.summary()["controlnets"]
    assert not row["reasons"]
    assert row["step"]["uncaptured"] == [{"reason": "Remembering may keep something from step to step", "calls": 1}]
    assert not any(layer["optimized"] for layer in row["layers"])


def test_one_on_another_device_is_kept_and_named(recorded):
    pipe = tiny(nets=2)
    pipe.controlnet.nets[1].to("meta")
    report = diffopt.optimize(pipe).report()
    assert f"note: controlnet.nets.1 is not optimized: it is on meta, the UNet on {DEVICE}" in report
    assert [graphs.is_on(net) for net in pipe.controlnet.nets] == [True, False]


def test_an_offloaded_controlnet_is_not_captured(recorded):
    pipe = tiny(device=torch.device("cpu"))
    expected = call(pipe.controlnet, conditioning_scale=0.5)
    cpu_offload_with_hook(pipe.controlnet, "cpu")
    handle = diffopt.optimize(pipe)
    assert "note: controlnet: calls are not captured: ControlNetModel has a forward of its own" in handle.report()
    assert same(call(pipe.controlnet, conditioning_scale=0.5), expected)
    assert all(is_ours(attn.processor) for attn in attention_modules(pipe.controlnet).values())


def test_without_capture_the_rest_is_done(recorded):
    pipe, options = pipeline("ControlNet")
    before = latents(pipe, **options)
    handle = diffopt.optimize(pipe, capture=False)
    assert same_picture(latents(pipe, **options), before)
    (row,) = handle.summary()["controlnets"]
    assert row["step"] is None
    assert "forward" not in pipe.controlnet.__dict__
    assert "not captured" not in handle.report()


def test_what_diffusers_replaced_is_put_back(recorded):
    pipe = tiny()
    handle = diffopt.optimize(pipe)
    pipe.controlnet.set_attn_processor(stock.AttnProcessor())
    assert "diffusers replaced diffopt's processor; optimize() again puts it back" in handle.report()
    diffopt.optimize(pipe)
    assert all(is_ours(attn.processor) for attn in attention_modules(pipe.controlnet).values())
