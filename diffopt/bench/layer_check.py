"""The kernel rule for each attention shape of a model: what its plan runs there, against float64, beside PyTorch's own.

The inputs are the attention suite's: random, once with flat scores and once with scores of standard deviation 3, where
a wrong scale shows in every dtype. The suite times every peer; here the backends that serve this model are checked.
"""

from collections.abc import Callable

import torch

from diffopt.attention.backends import BACKENDS
from diffopt.attention.plan import AttentionShape, Choice
from diffopt.bench.attention_inputs import CONTENTS, shape_inputs
from diffopt.bench.attention_judge import judged, recorded
from diffopt.bench.verify_record import LayerErrors
from diffopt.bench.workloads import AttentionShape as Shape
from diffopt.handle import Handle
from diffopt.measure.exactness import nonfinite_count
from diffopt_kernels.attention_check import errors_against


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


@torch.no_grad()
def _check(shape: AttentionShape, choice: Choice, layers: int, device: torch.device) -> LayerErrors:
    sizes = Shape(str(shape), shape.batch, shape.query_tokens, shape.key_tokens, shape.heads, shape.head_dim)
    rules, errors, nonfinite = [], {}, 0
    for content in CONTENTS:
        inputs = shape_inputs(sizes, shape.dtype, device, content)
        rule, expected = judged(inputs, content)
        out = BACKENDS[choice.backend].run(*inputs, None, None)
        rules.append(rule)
        errors[content] = recorded(errors_against(out, expected))
        nonfinite += nonfinite_count(out)
    return LayerErrors(
        shape=str(shape),
        layers=layers,
        backend=choice.backend,
        reason=choice.reason,
        rules=rules,
        errors=errors,
        nonfinite=nonfinite,
        fault_can_show=shape.key_tokens > 1,  # a single key has a weight of 1 whatever the scale
    )
