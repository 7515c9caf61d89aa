"""A Stable Diffusion model of 0.2 M random weights in diffusers' layout, for tests about files and requests."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

TOKENIZER = Path(__file__).parent.parent / "diffopt" / "assets" / "emoji" / "tokenizer"
UNET, VAE = "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """For modules that import it: on layers this small, threads that wait for each other cost ten times the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny_pipeline(**unet_options) -> StableDiffusionPipeline:
    """64×64 pixels, UNet channels 16 and 32 with 2 heads; the bundled model's tokenizer."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER, local_files_only=True)
    text_config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    unet = UNet2DConditionModel(
        **{
            "sample_size": 32,
            "block_out_channels": (16, 32),
            "layers_per_block": 1,
            "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": 16,
            "attention_head_dim": 2,
            "norm_num_groups": 8,
            **unet_options,
        }
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=64,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text_config),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DPMSolverMultistepScheduler(beta_schedule="scaled_linear", steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save_tiny_model(folder: Path) -> Path:
    """Save it to `folder`, which is returned."""
    tiny_pipeline().save_pretrained(folder)
    return folder


def to_single_file(folder: Path, path: Path) -> Path:
    """Rewrite a saved tiny model as one file with the names of the original Stable Diffusion releases."""
    from safetensors.torch import load_file, save_file

    weights = {f"model.diffusion_model.{_unet_key(key)}": value for key, value in load_file(folder / UNET).items()}
    for key, value in load_file(folder / VAE).items():
        name = _vae_key(key)
        is_attention = ".mid.attn_1." in name and name.endswith("weight") and value.dim() == 2
        weights[f"first_stage_model.{name}"] = value[:, :, None, None].contiguous() if is_attention else value
    for key, value in load_file(folder / TEXT).items():
        prefix = "" if key.startswith("text_model.") else "text_model."
        weights[f"cond_stage_model.transformer.{prefix}{key}"] = value
    weights["betas"] = torch.ones(1000)  # real files hold such constants beside the models
    save_file(weights, path)
    return path


_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_TOP = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def _unet_key(key: str) -> str:
    """Two levels, one layer per block down and two up: blocks 1, 3 down with 2 between, 0 to 3 up."""
    for new, old in _TOP.items():
        if key.startswith(new + "."):
            return old + key[len(new) :]
    parts = key.split(".")
    if parts[0] == "mid_block":
        if parts[1] == "attentions":
            return ".".join(["middle_block", "1", *parts[3:]])
        return ".".join(["middle_block", str(2 * int(parts[2])), *_resnet(parts[3:])])
    level, kind, index, rest = int(parts[1]), parts[2], int(parts[3]), parts[4:]
    if parts[0] == "down_blocks":
        if kind == "downsamplers":
            return ".".join([f"input_blocks.{2 * level + 2}.0.op", *rest[1:]])
        place = f"input_blocks.{2 * level + 1}"
    else:
        place = f"output_blocks.{2 * level + index}"
        if kind == "upsamplers":
            return ".".join([f"output_blocks.{2 * level + 1}.2", *rest])
    if kind == "resnets":
        return ".".join([place, "0", *_resnet(rest)])
    return ".".join([place, "1", *rest])


def _resnet(parts: list[str]) -> list[str]:
    return [_RESNET[parts[0]], *parts[1:]]


def _vae_key(key: str) -> str:
    if key.startswith(("quant_conv", "post_quant_conv")):
        return key
    side, rest = key.split(".", 1)
    rest = rest.replace("conv_norm_out", "norm_out")
    for level in range(2):
        up = 1 - level  # the original numbers the decoder's levels from the small end
        rest = rest.replace(f"down_blocks.{level}.resnets.", f"down.{level}.block.")
        rest = rest.replace(f"down_blocks.{level}.downsamplers.0.", f"down.{level}.downsample.")
        rest = rest.replace(f"up_blocks.{level}.resnets.", f"up.{up}.block.")
        rest = rest.replace(f"up_blocks.{level}.upsamplers.0.", f"up.{up}.upsample.")
    rest = rest.replace("mid_block.resnets.0.", "mid.block_1.").replace("mid_block.resnets.1.", "mid.block_2.")
    rest = rest.replace("mid_block.attentions.0.", "mid.attn_1.").replace("conv_shortcut", "nin_shortcut")
    for new, old in {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out", "group_norm": "norm"}.items():
        rest = rest.replace(f"attn_1.{new}.", f"attn_1.{old}.")
    return f"{side}.{rest}"
