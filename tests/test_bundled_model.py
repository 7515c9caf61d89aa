"""The bundled model loads as it is, is what the README says, and draws. Nothing here depends on its weights."""

import json
import logging
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

FOLDER = Path(__file__).parent.parent / "diffopt" / "assets" / "emoji"
PARTS = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}


@pytest.fixture(scope="module")
def pipeline():
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(FOLDER)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def words(pipeline):
    return pipeline.tokenizer


def plain(words, prompt: str) -> str:
    return words.decode(words(prompt)["input_ids"], skip_special_tokens=True).strip()


def test_it_loads_without_a_warning(caplog: pytest.LogCaptureFixture):
    from diffusers import StableDiffusionPipeline

    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    for logger in loggers:
        logger.addHandler(caplog.handler)  # they do not pass their records on
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            StableDiffusionPipeline.from_pretrained(FOLDER)
    finally:
        for logger in loggers:
            logger.removeHandler(caplog.handler)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("part", PARTS)
def test_the_files_hold_exactly_the_weights_of_the_modules(pipeline, part: str):
    from safetensors.torch import load_file

    stored, module = load_file(FOLDER / PARTS[part]), getattr(pipeline, part).state_dict()
    assert set(stored) == set(module)
    for name, value in stored.items():
        assert value.dtype == torch.float16, name
        assert torch.equal(value.float(), module[name]), name
        assert value.isfinite().all(), name


def test_all_weights_together_are_at_most_40_mb():
    assert sum(file.stat().st_size for file in FOLDER.rglob("*.safetensors")) <= 40e6


def test_everything_loads_as_float32(pipeline):
    assert {getattr(pipeline, part).dtype for part in PARTS} == {torch.float32}


def test_the_heads_have_40_80_and_160_channels_in_self_and_cross_attention(pipeline):
    for kind in ("attn1", "attn2"):
        heads = [m.inner_dim // m.heads for name, m in pipeline.unet.named_modules() if name.endswith(kind)]
        assert set(heads) == {40, 80, 160}


def test_there_is_nothing_that_stock_code_would_ask_for(pipeline):
    index = json.loads((FOLDER / "model_index.json").read_text())
    assert index["requires_safety_checker"] is False
    assert {index[name][0] for name in ("safety_checker", "feature_extractor", "image_encoder")} == {None}
    assert (FOLDER / "tokenizer" / "vocab.json").exists()
    assert (FOLDER / "tokenizer" / "merges.txt").exists()
    assert pipeline.unet.config.sample_size * pipeline.vae_scale_factor == 128


@pytest.mark.parametrize(
    "prompt",
    [
        "a red apple, noto style",
        "żółw z łóżka",  # letters outside ASCII, in the middle and at the end of words
        "größe straße café",
        "日本語 の リンゴ",  # three bytes a letter
        "red! apple? (blue) heart; star... don't",
        "🍎 apple 👩‍🚀",  # four bytes, and joined
        "q x zq jx vvv",  # endings that no caption has
    ],
)
def test_the_tokenizer_gives_back_what_it_was_given(words, prompt: str):
    assert plain(words, prompt).replace(" ", "") == prompt.lower().replace(" ", "")
    assert words.eos_token_id not in words(prompt)["input_ids"][1:-1]


def test_no_byte_at_the_end_of_a_word_becomes_the_end_token(words):
    from training.tokenizer import ENDING, byte_letters

    endings = [letter + ENDING for letter in byte_letters()]
    assert len(set(endings)) == 256
    unknown = [token for token in endings if words.convert_tokens_to_ids(token) == words.eos_token_id]
    assert unknown == []


def test_the_slow_files_and_the_fast_file_are_the_same_tokenizer(words):
    from training.tokenizer import build_tokenizer

    again = build_tokenizer(FOLDER / "tokenizer")
    for prompt in ("a red apple, noto style", "żółw", "🍎 don't"):
        assert again(prompt)["input_ids"] == words(prompt)["input_ids"]


def test_a_long_prompt_is_cut_to_77_tokens_with_its_end(words):
    ids = words("red apple " * 100, padding="max_length", truncation=True)["input_ids"]
    assert len(ids) == 77
    assert (ids[0], ids[-1]) == (words.bos_token_id, words.eos_token_id)
    assert words.eos_token_id not in ids[1:-1]


def test_the_text_encoder_knows_the_special_tokens(pipeline, words):
    config = pipeline.text_encoder.config
    assert (config.bos_token_id, config.eos_token_id) == (words.bos_token_id, words.eos_token_id)
    assert config.vocab_size == len(words)


def test_a_picture_comes_out(pipeline):
    generator = torch.Generator().manual_seed(7)
    image = pipeline(
        "a red apple", num_inference_steps=4, guidance_scale=4.0, generator=generator, output_type="np"
    ).images[0]
    assert image.shape == (128, 128, 3)
    assert np.isfinite(image).all()
    assert image.std() > 0.01


@pytest.mark.parametrize(
    "name", ["DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"]
)
def test_schedulers_read_the_same_file_and_draw(pipeline, name: str):
    import diffusers

    scheduler = getattr(diffusers, name).from_pretrained(FOLDER, subfolder="scheduler")
    assert scheduler.config.prediction_type == "v_prediction"
    assert torch.equal(scheduler.alphas_cumprod, pipeline.scheduler.alphas_cumprod)
    other = diffusers.StableDiffusionPipeline(
        **{**pipeline.components, "scheduler": scheduler}, requires_safety_checker=False
    )
    other.set_progress_bar_config(disable=True)
    latents = other(
        "cat", num_inference_steps=2, generator=torch.Generator().manual_seed(1), output_type="latent"
    ).images
    assert latents.shape == (1, 4, 32, 32)
    assert latents.isfinite().all()


@pytest.mark.parametrize("kind", ["StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"])
def test_pictures_can_be_changed(pipeline, kind: str):
    """Stock's pipelines over the same parts; where the mask is black, inpainting leaves the picture as it was."""
    import diffusers
    from PIL import Image

    other = getattr(diffusers, kind)(**pipeline.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    start = pipeline("a red apple", num_inference_steps=4, generator=torch.Generator().manual_seed(7)).images[0]
    mask = Image.new("L", start.size, 0)
    mask.paste(255, (64, 0, 128, 128))
    painting = {"mask_image": mask, "height": 128, "width": 128} if "Inpaint" in kind else {}
    changed = other(
        "a blue heart",
        image=start,
        strength=0.8,
        num_inference_steps=5,
        generator=torch.Generator().manual_seed(8),
        output_type="np",
        **painting,
    ).images[0]
    difference = np.abs(changed - np.asarray(start, dtype=np.float32) / 255)
    assert np.isfinite(changed).all()
    assert difference[:, 72:].mean() > 0.05
    if painting:
        assert difference[:, :56].mean() < 0.5 * difference[:, 72:].mean()


@pytest.mark.gpu
def test_half_precision_gives_no_nan():
    from diffusers import StableDiffusionPipeline

    half = StableDiffusionPipeline.from_pretrained(FOLDER, dtype=torch.float16).to("cuda")
    half.set_progress_bar_config(disable=True)
    images = half(
        ["a red apple", "a cat face", ""], guidance_scale=3.0, num_inference_steps=20, output_type="np"
    ).images  # fmt: skip
    assert np.isfinite(images).all()
    assert (images.std(axis=(1, 2, 3)) > 0.01).all()


def test_options_of_other_schedulers_are_in_the_file():
    import diffusers

    pndm = diffusers.PNDMScheduler.from_pretrained(FOLDER, subfolder="scheduler")
    ddim = diffusers.DDIMScheduler.from_pretrained(FOLDER, subfolder="scheduler")
    assert pndm.config.skip_prk_steps is True
    assert ddim.config.clip_sample is False
    assert ddim.config.steps_offset == pndm.config.steps_offset == 1


def test_the_model_card_names_every_source_and_its_license():
    from training.fetch import read_sources

    card = (FOLDER / "README.md").read_text()
    notice = (FOLDER.parent.parent.parent / "NOTICE").read_text()
    for source in read_sources():
        for text in (source.package, source.version):
            assert text in card
            assert text in notice
        assert source.license in card
