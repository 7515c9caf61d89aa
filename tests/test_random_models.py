"""True-size pipelines with random weights: the right shapes, live attention, finite latents, the same for a seed."""

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from diffopt.bench.random_configs import KINDS
from diffopt.bench.random_models import (
    SCORE_STD,
    config_hash,
    random_pipeline,
    random_prompt,
    read_random_pipeline,
    write_weights,
)
from diffopt.errors import InputError
from diffopt.unet.float16_decode import LATENTS

CPU = {"device": "cpu", "dtype": torch.float32}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Layers this small gain nothing from two threads, which wait for each other where another process has a core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("kind", "parameters"),
    [("sd15", 859_520_964), ("sd21", 865_910_724), ("sdxl", 2_567_463_684)],  # of the published weights
)
def test_the_true_configurations_have_the_published_size(kind, parameters):
    with torch.device("meta"):
        unet = UNet2DConditionModel(**KINDS[kind].unet)
        vae = AutoencoderKL(**KINDS[kind].vae)
    assert sum(weight.numel() for weight in unet.parameters()) == parameters
    assert sum(weight.numel() for weight in vae.parameters()) == 83_653_863


@pytest.fixture(scope="module", params=["tiny", "tiny-xl"])
def pipe(request):
    made = random_pipeline(request.param, **CPU)
    made.set_progress_bar_config(disable=True)
    return made


def test_attention_is_alive_in_every_layer(pipe):
    info = pipe.diffopt_random_model
    attention = [name for name, _ in pipe.unet.named_modules() if name.endswith(("attn1", "attn2"))]
    assert set(info.score_std) == set(attention)
    assert all(abs(std - SCORE_STD) < 0.5 for std in info.score_std.values()), info.score_std


def test_v_prediction_keeps_latents_as_small_as_trained_weights_do():
    """What decodes in float16 takes latents up to 32; a random UNet that predicts noise leaves most of it."""
    ours, theirs = KINDS["sdxl-v"], KINDS["sdxl"]
    assert ours.scheduler_config == {**theirs.scheduler_config, "prediction_type": "v_prediction"}
    assert (ours.unet, ours.vae, ours.scheduler) == (theirs.unet, theirs.vae, theirs.scheduler)
    pipe = random_pipeline("tiny-xl", **CPU)
    pipe.set_progress_bar_config(disable=True)
    size = {"width": 64, "height": 64, "num_inference_steps": 20, "output_type": "latent"}
    largest = {}
    for prediction in ("epsilon", "v_prediction"):
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, prediction_type=prediction)
        generator = torch.Generator().manual_seed(0)
        largest[prediction] = pipe(**random_prompt("tiny-xl", **CPU), **size, generator=generator).images.abs().max()
    assert largest["v_prediction"] < LATENTS / 2
    assert largest["epsilon"] > LATENTS


def test_a_picture_comes_out_finite(pipe):
    prompt = random_prompt(pipe.diffopt_random_model.kind, **CPU)
    images = pipe(**prompt, num_inference_steps=2, output_type="pt").images
    assert images.shape == (1, 3, 128, 128)
    assert torch.isfinite(images).all()
    assert images.std() > 0.01


def test_a_noise_prediction_has_unit_variance(pipe):
    kind = pipe.diffopt_random_model.kind
    prompt = random_prompt(kind, **CPU)
    outputs = []
    hook = pipe.unet.register_forward_hook(lambda *call: outputs.append(call[2][0]))
    pipe(**prompt, num_inference_steps=1, output_type="latent")
    hook.remove()
    assert outputs[0].std().item() == pytest.approx(1, abs=0.3)


def test_a_seed_means_the_same_weights():
    one, again, other = (random_pipeline("tiny", **CPU, seed=seed) for seed in (1, 1, 2))
    weights = [pipe.unet.state_dict() for pipe in (one, again, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not any(
        torch.equal(weights[0][name], weights[2][name]) for name in weights[0] if name.endswith("to_q.weight")
    )


def test_weights_are_read_as_they_were_written(pipe, tmp_path):
    write_weights(pipe, tmp_path)
    again = read_random_pipeline(pipe.diffopt_random_model.kind, tmp_path, **CPU)
    assert type(again) is type(pipe)
    assert again.scheduler.config == pipe.scheduler.config
    for name in ("unet", "vae"):
        kept, read = getattr(pipe, name).state_dict(), getattr(again, name).state_dict()
        assert kept.keys() == read.keys()
        assert all(torch.equal(kept[key], read[key]) for key in kept)


def test_prompts_have_the_models_shapes():
    plain = random_prompt("sd21", **CPU, batch=2)
    assert {name: tuple(value.shape) for name, value in plain.items()} == {
        "prompt_embeds": (2, 77, 1024),
        "negative_prompt_embeds": (2, 77, 1024),
    }
    xl = random_prompt("sdxl", **CPU)
    assert xl["prompt_embeds"].shape == (1, 77, 2048)
    assert xl["pooled_prompt_embeds"].shape == xl["negative_pooled_prompt_embeds"].shape == (1, 1280)
    assert torch.equal(xl["prompt_embeds"], random_prompt("sdxl", **CPU)["prompt_embeds"])
    assert not torch.equal(xl["prompt_embeds"], xl["negative_prompt_embeds"])


def test_kinds_are_told_apart():
    assert len({config_hash(kind) for kind in KINDS}) == len(KINDS)
    with pytest.raises(InputError, match=r"sd99.*sd15, sd21, sdxl"):
        random_pipeline("sd99", **CPU)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["sd15", "sd21", "sdxl"])
def test_true_size_models_are_finite_in_half_precision(kind):
    pipe = random_pipeline(kind, device="cuda", dtype=torch.float16)
    pipe.set_progress_bar_config(disable=True)
    scores = pipe.diffopt_random_model.score_std.values()
    assert all(abs(std - SCORE_STD) < 1 for std in scores), (min(scores), max(scores))
    prompt = random_prompt(kind, device="cuda", dtype=torch.float16)
    latents = pipe(**prompt, num_inference_steps=2, output_type="latent").images
    assert torch.isfinite(latents).all()
