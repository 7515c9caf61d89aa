"""Whether what was computed apart from a step, and for more than one, still is what the next step would compute."""

import contextlib
import operator
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

_version = operator.attrgetter("_version")


class Provenance:
    """What something was last made from: tensors, weights, and the run of denoising steps it was made in.

    It stands within a run only: inputs are the same tensor objects and their memory, neither they nor the weights were
    replaced or changed in place as far as PyTorch counts that (`_version`), and the timestep is below the last one.
    Where a timestep stays or rises, a run may have begun; where it is on the GPU it can't be seen, nor changes of
    tensors of `torch.inference_mode` be counted. Nothing stands on inputs that learn or weights that have a gradient:
    steps of fused optimizers are not counted. What else PyTorch doesn't count, writes through `.data` or by kernels it
    doesn't know, shows at the next run: within one nothing tells it, so whoever knows calls `expire`.
    """

    def __init__(self, modules: Iterable[torch.nn.Module]) -> None:
        """Args: modules: those whose own weights are used."""
        self._parameters = [module._parameters for module in modules]
        self.expire()

    def expire(self) -> None:
        """Something happened after which nothing is known of inputs and weights."""
        self._timestep: float | None = None
        self._made_from: tuple[Any, ...] | None = None

    def stands(self, inputs: Sequence[torch.Tensor], timestep: Any) -> bool:
        """Whether a step with these inputs, the next one in order of calls, would make the same of them."""
        last, self._timestep = self._timestep, number_of(timestep)
        falls = last is not None and self._timestep is not None and self._timestep < last
        return falls and self._made_from is not None and self._is_made_from(inputs)

    @contextlib.contextmanager
    def renewed(self, inputs: Sequence[torch.Tensor]) -> Iterator[None]:
        """Around making it anew: nothing stands until that is done."""
        self._made_from = None
        sources = self._sources(inputs)
        yield
        self._made_from = sources

    def _tensors(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [*inputs, *(x for parameters in self._parameters for x in parameters.values() if x is not None)]

    def _sources(self, inputs: Sequence[torch.Tensor]) -> tuple[Any, ...] | None:
        """What is made from inputs now is made from this; None where changes in place aren't counted."""
        tensors = self._tensors(inputs)
        versions = None if any(map(_learns, inputs)) or any(map(_is_about_to_change, tensors)) else _versions(tensors)
        return None if versions is None else (list(map(weakref.ref, tensors)), versions, _addresses(inputs))

    def _is_made_from(self, inputs: Sequence[torch.Tensor]) -> bool:
        assert self._made_from is not None
        references, versions, addresses = self._made_from
        tensors = self._tensors(inputs)
        return (
            _versions(tensors) == versions
            and all(map(operator.is_, tensors, [reference() for reference in references]))
            and _addresses(inputs) == addresses
        )


def number_of(timestep: Any) -> float | None:
    """A timestep as a number, if it can be had without waiting for a GPU."""
    if isinstance(timestep, torch.Tensor):
        return timestep.item() if timestep.device.type == "cpu" and timestep.numel() == 1 else None
    return timestep


def _learns(x: torch.Tensor) -> bool:
    """Whether an optimizer may change x."""
    return x.is_leaf and x.requires_grad


def _is_about_to_change(x: torch.Tensor) -> bool:
    """Whether an optimizer has what it changes x by; weights want gradients wherever nobody said that they don't."""
    return x.is_leaf and x.grad is not None


def _versions(tensors: Sequence[torch.Tensor]) -> list[int] | None:
    """How often each was changed in place; None where one was made in inference mode, which doesn't count."""
    try:
        return list(map(_version, tensors))
    except RuntimeError:
        return None


def _addresses(tensors: Sequence[torch.Tensor]) -> list[int]:
    return [x.data_ptr() for x in tensors]
