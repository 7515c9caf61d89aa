"""A model of a denoising step, a UNet or ControlNet: what diffopt puts on it is taken off and reported together."""

from typing import Any

import torch

from diffopt.attention import attached
from diffopt.unet import fused, graphs
from diffopt.unet.graphs import CapturedCalls


def uncompiled(model: Any) -> Any:
    """The model inside what `torch.compile(model)` returns, which traces whatever is on that; others are themselves."""
    inside = getattr(model, "_modules", {})
    return inside["_orig_mod"] if set(inside) == {"_orig_mod"} else model


def take_off(model: torch.nn.Module) -> None:
    """The exact former processors, forwards and layouts again, where ours are still in place."""
    attached.take_off(model)
    graphs.take_off(model)
    fused.take_off(model)


def summary(model: torch.nn.Module) -> dict[str, Any]:
    """As plain data.

    Returns:
        "step": captured and uncaptured calls (`CapturedCalls.summary`; None where nothing is captured); "kept": why its
        forward rules that out, if it does; "modules": what is fused (`fused.summary`); "layers": what is on the
        attention layers now and what ran, playbacks included.
    """
    captured: CapturedCalls | None = getattr(model, graphs.ATTRIBUTE, None)
    return {
        "step": captured.summary() if captured else None,
        "kept": "" if captured else graphs.kept_forward(model),
        "modules": fused.summary(model),
        "layers": attached.rows(model, captured.attention_calls() if captured else {}),
    }
