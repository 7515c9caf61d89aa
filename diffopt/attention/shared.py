"""Linear layers that share an input: their weights lie behind each other in one buffer, so one product serves all.

The buffer is never held: weights stay Parameters of their modules, views of one storage, and whether they still lie
behind each other is looked up at each use. Changes in place (`fuse_lora`) show, and whatever separates them again
(adapters that wrap a layer, moved or reloaded weights, a copied model) ends the sharing by itself.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

TOGETHER = "diffopt_together"
"""The plain attribute of a module: (`Together`, index of its first layer there); of a model, all of its `Together`s."""

JOINED = "diffopt_joined"
"""The plain attribute of a self-attention layer whose three projections were laid together."""

_MOST_INPUTS = 2  # of one run: the layers of a group are fed one tensor, so more means that something differs here


def joined(linears: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """Weight [sum of rows, C] and bias of the layers as one, if they are plain and lie behind each other; views."""
    if torch.compiler.is_compiling() or not all(_plain(linear) for linear in linears):
        return None
    weight = _joined([linear.weight for linear in linears])
    biases = [linear.bias for linear in linears]
    if weight is None or all(bias is None for bias in biases):
        return None if weight is None else (weight, None)
    bias = None if any(bias is None for bias in biases) else _joined(biases)
    return None if bias is None else (weight, bias)


def has_plain_weights(module: nn.Module) -> bool:
    """Whether a module's weights lie in memory as they are: quantized ones are of classes of their own (torchao's)."""
    return all(x is None or type(x) in (nn.Parameter, torch.Tensor) for x in module._parameters.values())


def _plain(linear: Any) -> bool:
    return (
        type(linear) is nn.Linear
        and has_plain_weights(linear)
        and not linear._forward_hooks
        and not linear._forward_pre_hooks
        and "forward" not in linear.__dict__
    )


def _joined(parts: list[torch.Tensor]) -> torch.Tensor | None:
    first = parts[0]
    address, storage = first.data_ptr(), first.untyped_storage().data_ptr()
    for part in parts:
        if part.data_ptr() != address or part.untyped_storage().data_ptr() != storage or part.dtype != first.dtype:
            return None
        if part.shape[1:] != first.shape[1:] or not part.is_contiguous():
            return None
        address += part.numel() * part.element_size()
    rows = sum(part.shape[0] for part in parts)
    return first.detach().as_strided((rows, *first.shape[1:]), first.stride())


def lay_together(linears: Sequence[nn.Linear]) -> bool:
    """Move the layers' weights and biases into shared buffers, values unchanged; whether that can be done."""
    weights, biases = [linear.weight for linear in linears], [linear.bias for linear in linears]
    alike = {(w.shape[1:], w.dtype, w.device, type(w), b is None) for w, b in zip(weights, biases, strict=True)}
    if len(alike) != 1 or not all(_plain(linear) for linear in linears):
        return False
    if joined(linears) is None:
        moved = [weights] if biases[0] is None else [weights, biases]
        buffers = [_buffer(parts) for parts in moved]  # all of them first: where memory ends, nothing was moved
        for parts, buffer in zip(moved, buffers, strict=True):
            _move(parts, buffer)
    return True


def _buffer(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    first, rows = parts[0], sum(part.shape[0] for part in parts)
    with torch.inference_mode(False):  # weights made in inference mode could never be trained
        return torch.empty((rows, *first.shape[1:]), dtype=first.dtype, device=first.device)


def _move(parts: Sequence[torch.Tensor], buffer: torch.Tensor) -> None:
    with torch.inference_mode(False), torch.no_grad():
        for part, place in zip(parts, buffer.split([part.shape[0] for part in parts]), strict=True):
            place.copy_(part)
            part.data = place


def lay_apart(linears: Sequence[Any]) -> None:
    """Weights and biases in memory of their own again, where they still share it."""
    if joined(linears) is None:
        return
    with torch.inference_mode(False), torch.no_grad():
        for linear in linears:
            for part in (linear.weight, linear.bias):
                if part is not None:
                    part.data = part.data.clone()


def _learn(linears: Sequence[Any]) -> bool:
    """Whether layers have weights that want gradients, which a product with views of all of them would not bring."""
    return torch.is_grad_enabled() and any(
        x.requires_grad for linear in linears for x in linear._parameters.values() if x is not None
    )


def self_projections(attn: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, ...] | None:
    """Queries, keys and values of a self-attention layer as views of one product; None where weights lie apart."""
    linears = (attn.to_q, attn.to_k, attn.to_v)
    joint = joined(linears) if JOINED in attn.__dict__ else None
    if joint is None or _learn(linears):
        return None
    return F.linear(hidden, *joint).split([linear.out_features for linear in linears], dim=-1)


@dataclasses.dataclass
class _Run:
    """What a group's layers made in one run: of which input, how often that had been changed in place, and how many
    more inputs may come.
    """

    input: torch.Tensor | None
    outputs: tuple[torch.Tensor, ...] | None
    left: int = _MOST_INPUTS

    def __post_init__(self) -> None:
        self.version = None if self.input is None else _version(self.input)


def _version(x: torch.Tensor) -> int:
    """How often x was changed in place; nothing counts that for tensors of inference mode."""
    return 0 if x.is_inference() else x._version


_runs: contextvars.ContextVar[Mapping["Together", _Run]] = contextvars.ContextVar("runs", default={})  # noqa: B039
"""Of the run that goes on in this thread: others may run the same model meanwhile."""


class Together:
    """Layers all over a model that are fed one tensor: one product at the first of them serves the others.

    Its result is kept for one run of the model (`one_run`) and only for the very tensor it was made from, as it was (a
    hook may change it in place). A run may be given a result that was made before it.
    """

    def __init__(
        self, owners: Sequence[tuple[nn.Module, str]], before: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> None:
        """Args: owners: modules and the names of their layers. before: applied to the input first."""
        self.owners = tuple(owners)
        self._before = before

    @property
    def linears(self) -> list[Any]:
        """The layers as they are now: adapters may have wrapped them."""
        return [getattr(owner, name) for owner, name in self.owners]

    @property
    def rows(self) -> int:
        """Columns of all the layers' outputs."""
        return sum(linear.out_features for linear in self.linears)

    def outputs(self, x: torch.Tensor) -> tuple[torch.Tensor, ...] | None:
        """Every layer's output for x, in the order of `owners`; None where they have to be called one by one."""
        run = _runs.get().get(self)
        if run is None:
            return None
        version = _version(x)
        if run.input is not x or run.version != version:
            if run.left == 0:
                return None
            run.left -= 1
            run.input, run.version, run.outputs = x, version, self._computed(x)
        return run.outputs

    def holds(self, x: torch.Tensor) -> bool:
        """Whether this run has the outputs for x and looked for no other tensor's since."""
        run = _runs.get().get(self)
        return run is not None and run.input is x and run.outputs is not None

    def product(self, x: torch.Tensor) -> torch.Tensor | None:
        """All outputs for x in one tensor [..., sum of rows]; None where the layers' weights lie apart or learn."""
        linears = self.linears
        joint = None if _learn(linears) else joined(linears)
        if joint is None or joint[0].dtype != x.dtype or joint[0].device != x.device:
            return None
        return F.linear(x if self._before is None else self._before(x), *joint)

    def parts(self, product: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Each layer's share of a product, as views."""
        return product.split([linear.out_features for linear in self.linears], dim=-1)

    def _computed(self, x: torch.Tensor) -> tuple[torch.Tensor, ...] | None:
        product = self.product(x)
        return None if product is None else self.parts(product)


Given = tuple[torch.Tensor, tuple[torch.Tensor, ...]]
"""An input of a `Together`'s layers and what they make of it."""


def outputs_of(module: nn.Module, x: torch.Tensor, count: int) -> tuple[torch.Tensor, ...] | None:
    """The outputs of a module's `count` shared layers for x, if a run shares them."""
    place = module.__dict__.get(TOGETHER)
    if place is None or torch.compiler.is_compiling():
        return None
    together, index = place
    found = together.outputs(x)
    return None if found is None else found[index : index + count]


def serving(model: nn.Module, x: torch.Tensor) -> list[Together]:
    """Inside a run: the groups of a model whose layers were fed x itself."""
    groups: tuple[Together, ...] = model.__dict__.get(TOGETHER, ())
    return [group for group in groups if group.holds(x)]


@contextlib.contextmanager
def one_run(model: nn.Module, given: Mapping[Together, Given] = MappingProxyType({})) -> Iterator[None]:
    """One forward of a model, for whose length shared results are kept, those that are given to it from the start."""
    groups: tuple[Together, ...] = model.__dict__.get(TOGETHER, ())
    token = _runs.set({group: _Run(*given.get(group, (None, None))) for group in groups})
    try:
        yield
    finally:
        _runs.reset(token)
