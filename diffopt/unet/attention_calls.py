"""Counting attention calls that a graph plays back: nothing in Python runs then."""

import collections

import torch

from diffopt.attention.layers import ATTRIBUTE, AttentionLayer, attention_modules

Calls = dict[str, collections.Counter]
"""Layer name to its calls, as `AttentionLayer.calls` counts them."""


def _layers(model: torch.nn.Module) -> dict[str, AttentionLayer]:
    found = ((name, getattr(attn, ATTRIBUTE, None)) for name, attn in attention_modules(model).items())
    return {name: layer for name, layer in found if layer is not None}


def counted(model: torch.nn.Module) -> Calls:
    """What was counted so far."""
    return {name: layer.calls.copy() for name, layer in _layers(model).items()}


def difference(after: Calls, before: Calls) -> Calls:
    """What was counted between two looks."""
    return {name: calls - before.get(name, collections.Counter()) for name, calls in after.items()}


def set_back(model: torch.nn.Module, counted_before: Calls) -> None:
    """Uncount what came after a look."""
    for name, layer in _layers(model).items():
        layer.calls.clear()
        layer.calls.update(counted_before.get(name, {}))


def add(model: torch.nn.Module, chosen: Calls, times: int) -> None:
    """Count what a graph holds once per playback."""
    for name, layer in _layers(model).items():
        for call, calls in chosen.get(name, {}).items():
            layer.calls[call] += calls * times
