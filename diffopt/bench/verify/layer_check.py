"""The kernel rule for each attention shape of a model: what its plan runs there, against float64, beside PyTorch's own.

The inputs are the attention suite's: random, once with flat scores and once with scores of standard deviation 3, where
a wrong scale shows in every dtype. The suite times every peer; here the backends that serve this model are checked.
"""

import dataclasses
from collections.abc import Callable

import torch

from diffopt.attention.backends import BACKENDS
from diffopt.attention.plan import AttentionShape, Choice
from diffopt.bench.attention.inputs import CONTENTS, SEED, shape_inputs
from diffopt.bench.attention.judge import judged, recorded
from diffopt.bench.attention.record import AttentionErrors, AttentionRule
from diffopt.bench.verify.record import LayerErrors, share_of
from diffopt.bench.workloads import AttentionShape as Shape
from diffopt.handle import Handle
from diffopt.measure.exactness import nonfinite_count
from diffopt_kernels.attention_cases import Content
from diffopt_kernels.attention_check import NEAR, REDRAWS, errors_against


def check_layers(handle: Handle, device: torch.device, on_shape: Callable[[int, int], None]) -> list[LayerErrors]:
    """Every unmasked shape that the handle's plan has met, largest first.

    Args:
        on_shape: told the number of shapes done and of all.
    """
    counts = _layers(handle)
    choices = {shape: choice for shape, choice in handle.plan.choices.items() if not shape.masked}
    shapes = sorted(choices, key=lambda shape: (-shape.query_tokens * shape.key_tokens, str(shape)))
    found = []
    for number, shape in enumerate(shapes):
        on_shape(number, len(shapes))
        found.append(_check(shape, choices[shape], counts.get(str(shape), 0), device))
    on_shape(len(shapes), len(shapes))
    return found


def masked_shapes(handle: Handle) -> list[str]:
    """Shapes that were called with a mask, which `check_layers` leaves to the kernels' own self-check."""
    return sorted(str(shape) for shape in handle.plan.choices if shape.masked)


def _layers(handle: Handle) -> dict[str, int]:
    """Shape in words to the number of layers that ran it."""
    counts: dict[str, int] = {}
    for layer in handle.summary()["layers"]:
        for shape in {run["shape"] for run in layer["runs"]}:
            counts[shape] = counts.get(shape, 0) + 1
    return counts


def _check(shape: AttentionShape, choice: Choice, layers: int, device: torch.device) -> LayerErrors:
    drawn, redrawn = [], 0
    for content in CONTENTS:
        draw = _draw(shape, choice.backend, device, content, SEED)
        if draw.near:  # as the kernels' own check: the largest error of a few thousand elements is a draw
            redrawn += 1
            further = [_draw(shape, choice.backend, device, content, SEED + 1 + n) for n in range(REDRAWS)]
            draw = max(further, key=lambda other: other.share)
        drawn.append(draw)
    return LayerErrors(
        shape=str(shape),
        layers=layers,
        backend=choice.backend,
        reason=choice.reason,
        rules=[draw.rule for draw in drawn],
        errors={draw.rule.content: draw.errors for draw in drawn},
        nonfinite=sum(draw.nonfinite for draw in drawn),
        redrawn=redrawn,
        fault_can_show=shape.key_tokens > 1,  # a single key has a weight of 1 whatever the scale
    )


@dataclasses.dataclass(frozen=True)
class _Draw:
    """One content with inputs of one seed."""

    rule: AttentionRule
    errors: AttentionErrors
    nonfinite: int

    @property
    def share(self) -> float:
        return share_of(self.errors, self.rule.limit)

    @property
    def near(self) -> bool:
        """Beyond the limit by so little that it may be the draw."""
        return 1 < self.share <= NEAR and self.nonfinite == 0


@torch.no_grad()
def _draw(shape: AttentionShape, backend: str, device: torch.device, content: Content, seed: int) -> _Draw:
    sizes = Shape(str(shape), shape.batch, shape.query_tokens, shape.key_tokens, shape.heads, shape.head_dim)
    inputs = shape_inputs(sizes, shape.dtype, device, content, seed)
    rule, expected = judged(inputs, content)
    out = BACKENDS[backend].run(*inputs, None, None)
    return _Draw(rule, recorded(errors_against(out, expected)), nonfinite_count(out))
