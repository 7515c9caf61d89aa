"""The parts of the bundled model: Stable Diffusion 1.x's classes at a small size, and their schedulers."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
    from transformers import CLIPTextModel, CLIPTokenizer

PICTURE = 128  # pixels a side
LATENT = 32  # latents a side
LATENT_CHANNELS = 4
TEXT_WIDTH = 256

# Channels over heads give the head dims of SD 1.5's UNet: 40, 80, 160. diffusers calls the number of heads of
# these models `attention_head_dim`.
UNET: dict[str, Any] = {
    "sample_size": LATENT,
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "block_out_channels": (80, 160, 160),
    "attention_head_dim": (2, 2, 1),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3,
    "up_block_types": ("CrossAttnUpBlock2D",) * 3,
    "cross_attention_dim": TEXT_WIDTH,
    "norm_num_groups": 16,  # 32 does not divide 80
}

AUTOENCODER: dict[str, Any] = {
    "sample_size": PICTURE,
    "latent_channels": LATENT_CHANNELS,
    "block_out_channels": (32, 64, 128),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 1,
    "norm_num_groups": 16,
    "mid_block_add_attention": False,
    # Means and scales of the latents' channels are folded into quant_conv and post_quant_conv (autoencoder.py).
    "scaling_factor": 1.0,
}

TEXT: dict[str, Any] = {
    "hidden_size": TEXT_WIDTH,
    "intermediate_size": 4 * TEXT_WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "projection_dim": TEXT_WIDTH,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
}

# SD 1.x's schedule with more noise at its end: at 32x32 latents SD's own leaves the mean of the picture readable
# at the last timestep, and sampling starts where no such mean is. No zero terminal SNR: PNDM can't do it.
NOISE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.02,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "timestep_spacing": "leading",
    "steps_offset": 1,
}

# Options of other schedulers that read the same file: without them PNDM runs its slow start and DDIM clips.
OTHER_SCHEDULERS: dict[str, Any] = {"clip_sample": False, "set_alpha_to_one": False, "skip_prk_steps": True}


def build_unet() -> "UNet2DConditionModel":
    """The denoiser: float32, random weights, latents [B, 4, 32, 32], 11.2 M parameters."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    return UNet2DConditionModel(**UNET)


def build_autoencoder() -> "AutoencoderKL":
    """The autoencoder: pictures [B, 3, 128, 128] in -1..1 to latents [B, 4, 32, 32], 2.6 M parameters."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    return AutoencoderKL(**AUTOENCODER)


def build_text_encoder(words: "CLIPTokenizer") -> "CLIPTextModel":
    """The text encoder for a tokenizer's vocabulary: float32, random weights, ids [B, 77] to [B, 77, 256]."""
    from transformers import CLIPTextConfig, CLIPTextModel

    specials: dict[str, Any] = {
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
    }
    return CLIPTextModel(CLIPTextConfig(vocab_size=len(words), dtype="float32", **specials, **TEXT))


def build_scheduler() -> "DPMSolverMultistepScheduler":
    """The scheduler saved with the model: DPM-Solver++ (2M), good at 20 steps."""
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler(algorithm_type="dpmsolver++", solver_order=2, **NOISE)
