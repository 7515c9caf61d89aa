"""A model's attention processors: ours where they may be, what was there before given back, and rows for a report."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from diffopt.attention import layers, processors
from diffopt.attention.backends import Backend
from diffopt.attention.layers import AttentionLayer
from diffopt.attention.plan import Plan


def put_on(model: torch.nn.Module, candidates: tuple[Backend, ...], plan: Plan, prefix: str = "") -> None:
    """Put our processors where they may be and are not yet; remember what was there.

    Args:
        model: a UNet or ControlNet.
        candidates: backends to try, as `AttentionLayer` has them.
        plan: where choices are kept.
        prefix: of the layers' names, for messages.
    """
    for name, attn in layers.attention_modules(model).items():
        layer: AttentionLayer | None = getattr(attn, layers.ATTRIBUTE, None)
        if layer is not None:  # a copied model carries the layer of the original's handle
            layer.candidates, layer.plan = candidates, plan
        if layer is None and processors.leaves_bias(attn.processor):  # set by a user who had kept it
            attn.set_processor(processors.stock_twin(attn.processor))  # type: ignore[arg-type]
        if processors.is_ours(attn.processor) or layers.reasons_to_keep(attn):
            continue
        if layer is None:
            layer = AttentionLayer(prefix + name, candidates, plan)
            setattr(attn, layers.ATTRIBUTE, layer)
        has_fused = type(attn.processor) in layers.FUSED
        layer.former[has_fused] = attn.processor
        ours = processors.DiffoptFusedAttnProcessor if has_fused else processors.DiffoptAttnProcessor
        attn.set_processor(ours())  # type: ignore[arg-type]


def take_off(model: torch.nn.Module) -> None:
    """The exact former processors again, where ours are still in place."""
    for attn in layers.attention_modules(model).values():
        layer = attn.__dict__.pop(layers.ATTRIBUTE, None)
        if layer is not None and processors.is_ours(attn.processor):
            attn.set_processor(layer.former[isinstance(attn.processor, processors.DiffoptFusedAttnProcessor)])


def rows(model: torch.nn.Module, replayed: Mapping[str, Counter[Any]]) -> list[dict[str, Any]]:
    """What is on each layer now and what ran there, as plain data.

    Args:
        model: a UNet or ControlNet.
        replayed: calls that playbacks of graphs stand for, per layer.
    """
    found = []
    for name, attn in layers.attention_modules(model).items():
        layer: AttentionLayer | None = getattr(attn, layers.ATTRIBUTE, None)
        optimized = layer is not None and processors.is_ours(attn.processor)
        reasons = [] if optimized else layers.reasons_to_keep(attn)
        if layer is None and processors.leaves_bias(attn.processor):
            reasons = ["it was set by hand and runs PyTorch's SDPA; optimize() again takes it in"]
        if not optimized and not reasons:
            reasons = ["diffusers replaced diffopt's processor; optimize() again puts it back"]
        runs = []
        if layer is not None:
            ran = layer.calls.copy() + replayed.get(name, Counter())  # other threads may count meanwhile
            runs = [_run(layer, call, calls) for call, calls in ran.items()]
        found.append(
            {
                "name": name,
                "kind": "cross" if layers.is_cross(attn) else "self",
                "processor": type(attn.processor).__name__,
                "optimized": optimized,
                "reasons": reasons,
                "runs": runs,
            }
        )
    return found


def _run(layer: AttentionLayer, call: tuple[Any, str, str], calls: int) -> dict[str, Any]:
    shape, backend, reason = call
    fallback = call in layer.fallbacks
    return {"shape": str(shape), "backend": backend, "reason": reason, "calls": calls, "fallback": fallback}


def fallbacks(rows: list[dict[str, Any]]) -> dict[str, int]:
    """Calls that fell back by reason, the most frequent first."""
    counts: dict[str, int] = {}
    for run in (run for row in rows for run in row["runs"] if run["fallback"]):
        counts[run["reason"]] = counts.get(run["reason"], 0) + run["calls"]
    return dict(sorted(counts.items(), key=lambda item: -item[1]))
