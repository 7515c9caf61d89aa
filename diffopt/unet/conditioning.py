"""A ControlNet's conditioning scale, taken out of captured calls: one graph serves every scale.

The last thing a ControlNet does is to multiply its residuals by that number. A graph that multiplies by 1 leaves them
as they are, and whoever copies them out multiplies: the same product of the same values, rounded once, bit for bit.
"""

from typing import Any

import torch
from diffusers.models.controlnets.controlnet import ControlNetModel


def without_scale(model: torch.nn.Module, keywords: dict[str, Any]) -> tuple[dict[str, Any], float | None]:
    """A call's keyword arguments with a scale of 1, and the scale; None where it has to stay.

    In guess mode a ControlNet rounds the scale together with a factor per residual, and pooled residuals are averages
    of products: neither is the same from outside.
    """
    scale = keywords.get("conditioning_scale")
    if type(model) is not ControlNetModel or type(scale) not in (int, float):
        return keywords, None
    if keywords.get("guess_mode", False) is not False or model.config["global_pool_conditions"]:
        return keywords, None
    return {**keywords, "conditioning_scale": 1.0}, scale


def copied(x: torch.Tensor, scale: float | None) -> torch.Tensor:
    """A copy of x times the scale, laid out as stock's from contiguous weights."""
    if scale is None:
        return x.clone(memory_format=torch.contiguous_format)
    return torch.mul(x, scale, out=torch.empty_like(x, memory_format=torch.contiguous_format))
