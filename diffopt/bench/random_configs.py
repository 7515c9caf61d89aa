"""The configurations of the Stable Diffusion families whose random-weight twins tests and benchmarks build.

`sd15`, `sd21` and `sdxl` are the published configurations (Stable Diffusion 1.5; 2.1 at 768 pixels, v-prediction;
SDXL base 1.0), keys that equal the diffusers default left out; `sdxl-v` is `sdxl` with v-prediction. The tiny ones
have the same parts, small enough for a CPU test.
"""

import dataclasses
from typing import Any

_NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
_TINY_VAE = _VAE | {"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1, "norm_num_groups": 16}


@dataclasses.dataclass(frozen=True)
class RandomModelConfig:
    """What `diffopt.bench.random_models` builds a pipeline from.

    Attributes:
        xl: SDXL's pipeline (two text encoders, pooled embeddings, size conditioning) instead of SD's.
        unet: arguments of `UNet2DConditionModel`.
        vae: arguments of `AutoencoderKL`.
        scheduler: name of the default scheduler's class in diffusers.
        scheduler_config: its arguments.
    """

    xl: bool
    unet: dict[str, Any]
    vae: dict[str, Any]
    scheduler: str
    scheduler_config: dict[str, Any]


_CROSS_DOWN = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
_CROSS_UP = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3

SD15 = RandomModelConfig(
    xl=False,
    unet={
        "sample_size": 64,
        "block_out_channels": (320, 640, 1280, 1280),
        "down_block_types": _CROSS_DOWN,
        "up_block_types": _CROSS_UP,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,  # diffusers' old name: it holds the number of heads
    },
    vae=_VAE | {"sample_size": 512, "scaling_factor": 0.18215},
    scheduler="PNDMScheduler",
    scheduler_config=_NOISE | {"skip_prk_steps": True, "set_alpha_to_one": False},
)

SD21 = RandomModelConfig(
    xl=False,
    unet=SD15.unet
    | {
        "sample_size": 96,
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
        "upcast_attention": True,
    },
    vae=_VAE | {"sample_size": 768, "scaling_factor": 0.18215},
    scheduler="DDIMScheduler",
    scheduler_config=_NOISE | {"prediction_type": "v_prediction", "clip_sample": False, "set_alpha_to_one": False},
)

SDXL = RandomModelConfig(
    xl=True,
    unet={
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    vae=_VAE | {"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
    scheduler="EulerDiscreteScheduler",
    scheduler_config=_NOISE | {"timestep_spacing": "leading"},
)

SDXL_V = dataclasses.replace(SDXL, scheduler_config=SDXL.scheduler_config | {"prediction_type": "v_prediction"})
"""SDXL as it is fine-tuned to predict v. A random UNet that predicts noise takes none away, so its latents stay large:
with `tiny-xl` a standard deviation of 19 after 20 steps, and 2.8 with v-prediction. Trained weights end near 1."""

TINY = RandomModelConfig(
    xl=False,
    unet={
        "sample_size": 16,
        "block_out_channels": (80, 160),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 16,
        "cross_attention_dim": 64,
        "attention_head_dim": 2,
    },
    vae=_TINY_VAE | {"sample_size": 128, "scaling_factor": 0.18215},
    scheduler="PNDMScheduler",
    scheduler_config=SD15.scheduler_config,
)

TINY_XL = RandomModelConfig(
    xl=True,
    unet={
        "sample_size": 16,
        "block_out_channels": (64, 128),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 16,
        "transformer_layers_per_block": (1, 2),
        "cross_attention_dim": 64,
        "attention_head_dim": (1, 2),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 80,
    },
    vae=_TINY_VAE | {"sample_size": 128, "scaling_factor": 0.13025, "force_upcast": True},
    scheduler="EulerDiscreteScheduler",
    scheduler_config=SDXL.scheduler_config,
)

KINDS = {"sd15": SD15, "sd21": SD21, "sdxl": SDXL, "sdxl-v": SDXL_V, "tiny": TINY, "tiny-xl": TINY_XL}


def random_kind(model: str) -> str | None:
    """The kind of random weights that `random:<kind>` asks for, known (`KINDS`) or not; None for a model to load."""
    return model.removeprefix("random:") if model.startswith("random:") else None
