"""Pipelines that the wrapper's tests run on: the bundled model anywhere, true-size random ones on a GPU."""

import copy
import functools
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

BUNDLED = Path(__file__).parent.parent / "diffopt" / "assets" / "emoji"

KINDS = [
    "bundled",
    *(pytest.param(kind, marks=[pytest.mark.gpu, pytest.mark.slow]) for kind in ("sd15", "sd21", "sdxl")),
]
"""For `parametrize`: model kinds, the true-size ones on a GPU only."""


@functools.cache
def _loaded_bundled():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.float32
    return StableDiffusionPipeline.from_pretrained(BUNDLED, dtype=dtype, local_files_only=True).to(device)


def make_pipeline(kind: str):
    """A fresh pipeline: `bundled` (float32 on a CPU, float16 on a GPU) or a true-size random one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "bundled":
        pipe = copy.deepcopy(_loaded_bundled())
    else:
        from diffopt.bench.random_models import random_pipeline

        pipe = random_pipeline(kind, device=device, dtype=torch.float16)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prompt_inputs(pipe, kind: str) -> dict:
    """Keyword arguments that stand for a prompt."""
    if kind == "bundled":
        return {"prompt": "a red apple", "negative_prompt": "blue"}
    from diffopt.bench.random_models import random_prompt

    parameter = next(pipe.unet.parameters())
    return dict(random_prompt(kind, device=parameter.device, dtype=parameter.dtype))


def picture(pipe, kind: str, *, steps: int = 2, seed: int = 0, **options) -> torch.Tensor:
    """What a short run with guidance makes, always from the same noise.

    For the bundled model the final latents [1, 4, h, w]. For true-size random models the UNet's first prediction
    [2, 4, h, w]: their later steps amplify rounding until two stock backends differ too.
    """
    if kind == "bundled":
        options = {"width": 64, "height": 64, **options}
    predictions: list[torch.Tensor] = []
    hook = pipe.unet.register_forward_hook(lambda module, inputs, output: predictions.append(output[0].clone()))
    try:
        out = pipe(
            **prompt_inputs(pipe, kind),
            num_inference_steps=steps if kind == "bundled" else 1,
            guidance_scale=5.0,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
            **options,
        )
    finally:
        hook.remove()
    return out.images if kind == "bundled" else predictions[0]


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative L2 distance of a to b; NaN counts as infinitely far."""
    value = float((a.double() - b.double()).norm() / b.double().norm())
    return value if value == value else float("inf")


def same_picture(a: torch.Tensor, b: torch.Tensor, kind: str = "bundled") -> bool:
    """The same computation: bitwise on a CPU, where both call PyTorch's SDPA; within float16 rounding on a GPU."""
    return torch.equal(a, b) if a.device.type == "cpu" else distance(a, b) < ROUNDING[kind]


ROUNDING = {"bundled": 0.03, "sd15": 0.03, "sd21": 0.03, "sdxl": 0.1}
"""Two float16 computations of the same prediction differ by less. Random weights with sharp scores amplify rounding:
PyTorch's own backends are up to 0.005 (SD1.5) and 0.003 (SD2.1) from float32, and SDXL's
deeper stacks amplify more (reports/, exactness of the steps)."""
