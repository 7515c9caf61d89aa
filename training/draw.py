"""Pictures from a pipeline, each from a seed of its own: the same whatever else is drawn beside it, up to rounding."""

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from training.pace import say

if TYPE_CHECKING:
    from pathlib import Path

    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline


def load_pipeline(folder: "Path", device: torch.device) -> "StableDiffusionPipeline":
    """The model in a folder, float32, with its default scheduler."""
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(
    pipeline: "StableDiffusionPipeline",
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int,
    guidance: float,
    batch: int = 8,
    title: str = "",
) -> torch.Tensor:
    """One picture for each prompt and seed: uint8 [P, 3, H, W] on the CPU. With a title, says how far it is."""
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts and {len(seeds)} seeds")
    drawn: list[torch.Tensor] = []
    said = time.monotonic()
    for start in range(0, len(prompts), batch):
        images = pipeline(
            list(prompts[start : start + batch]),
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds[start : start + batch]],
            output_type="np",
        ).images  # pyright: ignore[reportAttributeAccessIssue]
        rgb = torch.from_numpy(np.asarray(images)).permute(0, 3, 1, 2)
        if not math.isfinite(rgb.sum().item()):
            raise FloatingPointError(f"a picture of {prompts[start : start + batch]} holds NaN")
        drawn.append((rgb * 255).round().to(torch.uint8))
        done = min(start + batch, len(prompts))
        if title and (time.monotonic() - said > 20 or done == len(prompts)):
            say(f"{title}: {done} of {len(prompts)} pictures")
            said = time.monotonic()
    return torch.cat(drawn)
