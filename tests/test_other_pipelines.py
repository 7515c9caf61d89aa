"""What pipelines beside the usual ones ask of a UNet, and unusual arguments: the latents of uncaptured calls, bitwise.

`Tape` stands in for CUDA graphs, as in `Twins`. What is not captured must say why.
"""

from typing import Any

import diffusers
import pytest
import torch
from adapters import random_image_embeds, random_ip_adapter, random_lora
from diffusers import ControlNetXSAdapter, T2IAdapter
from peft import LoraConfig
from pipeline_kinds import images
from pipelines import picture
from recorders import Tape
from tiny_model import one_thread, tiny_pipeline  # noqa: F401
from twins import SIDE, Twins, at_step

import diffopt
from diffopt.attention.processors import is_ours

NO_CHECKER = {"requires_safety_checker": False}


def made(kind: str, twins: Twins, **parts: Any) -> list[Any]:
    """Pipelines of another class around both UNets."""
    cls = getattr(diffusers, kind)
    found = []
    for pipe in twins.both:
        known = {name: part for name, part in pipe.components.items() if name != "image_encoder"}
        found.append(cls(**known, **parts, **NO_CHECKER))
        found[-1].set_progress_bar_config(disable=True)
    return found


def latents(pipe: Any, prompt: Any = "a red apple", **options: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 3, "output_type": "latent", "generator": generator, **options}
    return pipe(**({} if prompt is None else {"prompt": prompt}), **options).images


def same(pipes: list[Any], **options: Any) -> torch.Tensor:
    ours, expected = (latents(pipe, **options) for pipe in pipes)
    assert torch.equal(ours, expected)
    return ours


def uncaptured(twins: Twins) -> dict[str, int]:
    return {row["reason"]: row["calls"] for row in twins.handle.summary()["step"]["uncaptured"]}


def replays(twins: Twins) -> list[int]:
    return [bucket["replays"] for bucket in twins.handle.summary()["step"]["buckets"]]


# --- other pipelines ------------------------------------------------------------------------------------------------


def test_perturbed_attention_runs_as_it_comes_and_gives_the_layers_back(monkeypatch):
    twins = Twins(monkeypatch)
    pipes = made("StableDiffusionPAGPipeline", twins, pag_applied_layers=["mid"])
    perturbed = same(pipes, pag_scale=3.0, **SIDE)
    assert uncaptured(twins) == {"PAGCFGIdentitySelfAttnProcessor2_0 may keep something from step to step": 3}
    assert all(map(is_ours, twins.captured.unet.attn_processors.values()))
    assert not torch.equal(same(pipes, pag_scale=0.0, **SIDE), perturbed)
    assert replays(twins) == [3], "without it, calls are captured"


def test_residuals_of_a_t2i_adapter_are_inputs(monkeypatch):
    twins = Twins(monkeypatch)
    torch.manual_seed(1)
    adapter = T2IAdapter(channels=[16, 32], num_res_blocks=1, downscale_factor=2)
    pipes = made("StableDiffusionAdapterPipeline", twins, adapter=adapter)
    options = {"image": images(7)[..., :16, :16], **SIDE}
    found = [same(pipes, adapter_conditioning_scale=scale, **options) for scale in (1.0, 0.2)]
    assert not torch.equal(*found)
    assert replays(twins) == [6]


def test_guidance_that_is_embedded(monkeypatch):
    """Latent consistency models take the guidance scale as a condition of the time embedding."""
    twins = Twins(monkeypatch, time_cond_proj_dim=8)
    for pipe in twins.both:
        pipe.scheduler = diffusers.LCMScheduler.from_config(pipe.scheduler.config)
    found = [same(list(twins.both), guidance_scale=scale, **SIDE) for scale in (2.0, 8.0)]
    assert not torch.equal(*found)
    assert replays(twins) == [6]


def test_three_branches_of_guidance(monkeypatch):
    twins = Twins(monkeypatch, in_channels=8)
    pipes = made("StableDiffusionInstructPix2PixPipeline", twins)
    picture = images(7)[..., :32, :32]
    found = [same(pipes, image=picture, image_guidance_scale=scale) for scale in (1.5, 3.0)]
    assert not torch.equal(*found)
    assert replays(twins) == [6]


def test_a_controlnet_that_is_part_of_the_unet(monkeypatch):
    """It is named as not optimized by itself; the UNet that has it inside is captured like any."""
    monkeypatch.setattr("diffopt.handle.CudaCapturer", Tape)
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 2,
    }
    parts = {name: part for name, part in tiny_pipeline(**blocks).components.items() if name != "image_encoder"}
    torch.manual_seed(0)
    net = ControlNetXSAdapter.from_unet(parts["unet"], size_ratio=1.0, conditioning_embedding_out_channels=(8, 8))
    pipe = diffusers.StableDiffusionControlNetXSPipeline(**parts, controlnet=net, **NO_CHECKER)
    pipe.set_progress_bar_config(disable=True)
    scales = [{"image": images(7), "controlnet_conditioning_scale": scale} for scale in (1.0, 0.3)]
    expected = [latents(pipe, **options) for options in scales]
    handle = diffopt.optimize(pipe)
    assert all(torch.equal(latents(pipe, **options), x) for options, x in zip(scales, expected, strict=True))
    assert "controlnet is not optimized: diffopt does not know ControlNetXSAdapter" in handle.report()
    assert not handle.summary()["step"]["uncaptured"]
    handle.restore()
    assert torch.equal(latents(pipe, **scales[0]), expected[0])


# --- arguments and states -------------------------------------------------------------------------------------------


def test_masks_and_scales_of_an_image_adapter(monkeypatch):
    twins = Twins(monkeypatch)
    for pipe in twins.both:
        pipe.load_ip_adapter(random_ip_adapter(pipe.unet), subfolder="", weight_name="", image_encoder_folder=None)
    image = {"ip_adapter_image_embeds": random_image_embeds(twins.captured.unet)}
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., :8] = 1
    found = []
    for scale, options in (
        (0.7, {}),
        (0.7, {"cross_attention_kwargs": {"ip_adapter_masks": [mask]}}),
        (0.7, {"cross_attention_kwargs": {"ip_adapter_masks": [1 - mask]}}),
        ({"up": {"block_0": [0.0, 1.0]}}, {}),
        (0.0, {}),
    ):
        for pipe in twins.both:
            pipe.set_ip_adapter_scale(scale)
        found.append(twins.same_picture(**image, **options))
    assert len({float(x.double().norm()) for x in found}) == len(found)
    assert not uncaptured(twins)


def test_several_adapters_weighed_block_by_block_removed_and_fused(monkeypatch):
    twins = Twins(monkeypatch)
    for pipe in twins.both:
        for seed, name in enumerate("ab"):
            pipe.load_lora_weights(random_lora(pipe.unet, seed=seed), adapter_name=name)
    found = []
    for change in (
        lambda pipe: pipe.set_adapters(["a", "b"], [0.5, 0.8]),
        lambda pipe: pipe.set_adapters(["b"], [1.0]),
        lambda pipe: pipe.set_adapters(["a", "b"], [0.5, {"unet": {"down": 0.2, "mid": 1.0, "up": 0.5}}]),
        lambda pipe: pipe.delete_adapters("a"),
        lambda pipe: pipe.fuse_lora(components=["unet"], adapter_names=["b"], lora_scale=0.7),
        lambda pipe: pipe.unload_lora_weights(),
    ):
        for pipe in twins.both:
            change(pipe)
        found.append(twins.same_picture())
    distinct = {float(x.double().norm()) for x in found}
    assert len(distinct) >= len(found) - 1, "unloaded, the fused adapter stays in the weights"
    assert not uncaptured(twins)


def test_an_adapter_that_scales_whole_weights(monkeypatch):
    """DoRA: PEFT makes a factor of the weights' norms in each call."""
    twins = Twins(monkeypatch)
    plain = twins.same_picture()
    options = {"r": 2, "use_dora": True, "init_lora_weights": False, "target_modules": ["to_q", "to_k", "to_v"]}
    for pipe in twins.both:
        torch.manual_seed(5)
        pipe.unet.add_adapter(LoraConfig(**options), "one")
    assert not torch.equal(twins.same_picture(), plain)
    assert not torch.equal(twins.same_picture(**at_step(1, lambda pipe, _: weigh_anew(pipe))), plain)
    for pipe in twins.both:
        pipe.unet.disable_adapters()
    assert torch.equal(twins.same_picture(), plain)
    assert not uncaptured(twins)


def weigh_anew(pipe: Any) -> None:
    """Without a new layer, object or address."""
    for name, parameter in pipe.unet.named_parameters():
        if "lora_magnitude_vector" in name:
            parameter.mul_(1.5)


def test_prompt_embeddings_changed_in_place_between_pictures(monkeypatch):
    twins = Twins(monkeypatch)
    generator = torch.Generator().manual_seed(0)
    positive, negative = torch.randn(2, 1, 77, 16, generator=generator)
    embeds = {"prompt": None, "prompt_embeds": positive, "negative_prompt_embeds": negative}
    several = {"num_images_per_prompt": 2, "guidance_rescale": 0.5, "guidance_scale": 3.0}
    found = []
    for change in (lambda: None, lambda: positive.mul_(-1), lambda: negative.data.mul_(-1)):
        change()
        ours, expected = (
            latents(pipe, generator=[torch.Generator().manual_seed(i) for i in range(2)], **embeds, **several, **SIDE)
            for pipe in twins.both
        )
        assert torch.equal(ours, expected)
        found.append(ours)
    without = {"guidance_scale": 1.0, "prompt": None, "prompt_embeds": positive}
    found += [same(list(twins.both), **without, **SIDE)]
    positive.data.mul_(-1)
    found += [same(list(twins.both), **without, **SIDE)]
    assert len({float(x.double().norm()) for x in found}) == len(found)


@pytest.mark.parametrize("size", [(8, 8), (24, 40), (72, 16)], ids="{0[0]}x{0[1]}".format)
def test_sizes_that_halve_to_odd_ones(monkeypatch, size):
    twins = Twins(monkeypatch)
    width, height = size
    for count in (1, 3):
        same(list(twins.both), width=width, height=height, num_images_per_prompt=count)
    assert not uncaptured(twins)


@pytest.mark.parametrize("how", ["interrupted", "failed", "restored", "optimized again"])
def test_what_happens_in_mid_run_leaves_the_next_one_alone(monkeypatch, how):
    twins = Twins(monkeypatch)
    before = twins.same_picture()

    def change(pipe, kwargs):
        if how == "interrupted":
            pipe._interrupt = True
        if how == "failed":
            raise ZeroDivisionError
        if how == "restored" and pipe is twins.captured:
            twins.handle.restore()
        if how == "optimized again":
            diffopt.optimize(pipe)

    if how == "failed":
        for pipe in twins.both:
            with pytest.raises(ZeroDivisionError):
                picture(pipe, "bundled", steps=4, **SIDE, **at_step(1, change))
    elif how == "restored":
        picture(twins.captured, "bundled", steps=4, **SIDE, **at_step(1, change))
        assert not twins.handle.active
        stock = tiny_pipeline()
        stock.set_progress_bar_config(disable=True)
        expected = picture(stock, "bundled", steps=4, **SIDE)
        assert torch.equal(picture(twins.captured, "bundled", steps=4, **SIDE), expected)
        return
    else:
        assert torch.equal(twins.same_picture(**at_step(1, change)), before) == (how == "optimized again")
    assert torch.equal(twins.same_picture(), before)


def test_weights_that_are_cast_layer_by_layer_run_as_they_come(monkeypatch):
    twins = Twins(monkeypatch)
    plain = twins.same_picture()
    for pipe in twins.both:
        pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert not torch.equal(twins.same_picture(), plain)
    (reason,) = uncaptured(twins)
    assert "conv_in has a forward of its own" in reason
