"""What captured UNet calls make of their prompt alone, computed apart and only when it may have become another.

A group of layers that are fed the prompt (`Together`) makes one product of it, the same at every step of a run. The
product is recorded on its own, into buffers that the recorded steps read. It is played back before a step unless all
that it was made from is known to be as it was: see `Prologue.bring`.
"""

import operator
import weakref
from collections.abc import Sequence
from typing import Any

import torch

from diffopt.attention.shared import Given, Together
from diffopt.unet.capturers import Capturer

_version = operator.attrgetter("_version")


class Prologue:
    """The products of one kind of prompt embeddings, and what they were last made from.

    Its buffers lie outside the graphs' pool, where no graph writes into them. For SDXL with guidance they take 51 MB,
    for SD1.5 8 MB. Kinds of calls with prompts of one shape share them: they are there once per number of pictures and
    tokens, not once per size, and at most as often as there may be graphs. They go with the last graph that reads them.

    Attributes:
        context: the prompt embeddings that the products are made from, at a fixed address.
        runs: playbacks so far.
    """

    def __init__(self, groups: Sequence[Together], context: torch.Tensor, capturer: Capturer) -> None:
        """Args: groups: those that make something of `context`, a buffer; all their weights lie together."""
        with torch.inference_mode(False):
            products = [context.new_empty((*context.shape[:-1], _rows(group))) for group in groups]

        def work() -> list[torch.Tensor]:  # no method: what was recorded may hold it, and must not hold this object
            for group, buffer in zip(groups, products, strict=True):
                product = group.product(context)
                assert product is not None  # the weights lay together when this was made, and what moves them shows
                buffer.copy_(product)
            return products

        self.context = context
        self.runs = 0
        self._groups, self._products = tuple(groups), products
        self._parameters = [linear._parameters for group in groups for linear in group.linears]
        self._play_back, _ = capturer.capture(work, context.device)
        self.expire()

    @property
    def given(self) -> dict[Together, Given]:
        """What a run of the model reads instead of computing it."""
        pairs = zip(self._groups, self._products, strict=True)
        return {group: (self.context, group.parts(product)) for group, product in pairs}

    def expire(self) -> None:
        """Something happened after which nothing is known of prompt and weights."""
        self._timestep: float | None = None
        self._made_from: tuple[Any, ...] | None = None

    def bring(self, context: torch.Tensor, timestep: Any) -> bool:
        """Make `context` and the products those of a call's prompt embeddings; whether that took a playback.

        It takes none within a run: the same tensor object, its memory and the group's weights neither replaced nor
        changed in place as far as PyTorch counts that (`_version`), and a timestep below the last one. Where a timestep
        stays or rises, a run may have begun; where it is on the GPU it can't be seen, nor changes of tensors of
        `torch.inference_mode` be counted. What PyTorch doesn't count, writes through `.data` or by kernels that it
        doesn't know, shows at the next playback: within a run nothing tells it, so whoever knows calls `expire`.
        """
        last, self._timestep = self._timestep, _on_host(timestep)
        falls = last is not None and self._timestep is not None and self._timestep < last
        if falls and self._made_from is not None and self._is_made_from(context):
            return False
        self._made_from = None  # until all is done
        sources = self._sources(context)
        self.context.copy_(context)
        self._play_back()
        self._made_from = sources
        self.runs += 1
        return True

    def _weights(self) -> list[torch.Tensor]:
        return [x for parameters in self._parameters for x in parameters.values() if x is not None]

    def _sources(self, context: torch.Tensor) -> tuple[Any, ...] | None:
        """What products of now are made from; None where changes in place aren't counted."""
        tensors = [context, *self._weights()]
        versions = _versions(tensors)
        return None if versions is None else (list(map(weakref.ref, tensors)), versions, context.data_ptr())

    def _is_made_from(self, context: torch.Tensor) -> bool:
        """Whether the products are those of a tensor and the weights as they are."""
        assert self._made_from is not None
        references, versions, address = self._made_from
        tensors = [context, *self._weights()]
        return (
            _versions(tensors) == versions
            and all(map(operator.is_, tensors, [reference() for reference in references]))
            and context.data_ptr() == address
        )


def _versions(tensors: Sequence[torch.Tensor]) -> list[int] | None:
    """How often each was changed in place; None where one was made in inference mode, which doesn't count."""
    try:
        return list(map(_version, tensors))
    except RuntimeError:
        return None


def _rows(group: Together) -> int:
    return sum(linear.out_features for linear in group.linears)


def _on_host(timestep: Any) -> float | None:
    """A timestep as a number, if it can be had without waiting for a GPU."""
    if isinstance(timestep, torch.Tensor):
        return timestep.item() if timestep.device.type == "cpu" and timestep.numel() == 1 else None
    return timestep
