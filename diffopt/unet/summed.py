"""Summed weights of convolutions of images at twice their size: what recorded steps share instead of adding it up.

A step recorded on its own would add weights up each time: SD1.5 reads 66 MB for it and writes 118 MB. So that work is a
graph of its own that writes into buffers outside the graphs' pool; it is played back when a run may have begun, or
weights have changed, by the rules of `Provenance`.
"""

import contextlib
import contextvars
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from diffopt.unet.capturers import Capturer
from diffopt.unet.provenance import Provenance
from diffopt_kernels import step as kernels

Sums = Mapping[nn.Module, torch.Tensor]

_used: contextvars.ContextVar[list[nn.Conv2d] | None] = contextvars.ContextVar("used", default=None)
_given: contextvars.ContextVar[Sums] = contextvars.ContextVar("given", default={})  # noqa: B039  (never changed)


def sums_of(conv: nn.Conv2d) -> torch.Tensor:
    """A convolution's `summed_weights`: those that are given to this run, else made here."""
    used = _used.get()
    if used is not None:
        used.append(conv)
    sums = _given.get().get(conv)
    return kernels.summed_weights(conv.weight) if sums is None else sums


@contextlib.contextmanager
def collected() -> Iterator[list[nn.Conv2d]]:
    """The convolutions whose sums are used from here on."""
    used: list[nn.Conv2d] = []
    token = _used.set(used)
    try:
        yield used
    finally:
        _used.reset(token)


@contextlib.contextmanager
def given(sums: Sums) -> Iterator[None]:
    """Sums for the convolutions they belong to, instead of making them."""
    token = _given.set(sums)
    try:
        yield
    finally:
        _given.reset(token)


class SummedWeights:
    """The sums of some convolutions of a model, and what they were last made from.

    For SD1.5 they take 118 MB, for SDXL 66 MB, once for all kinds of calls. They go with the last graph that reads
    them.

    Attributes:
        sums: of each convolution, at a fixed address.
        runs: playbacks so far.
    """

    def __init__(self, convs: Sequence[nn.Conv2d], capturer: Capturer) -> None:
        with torch.inference_mode(False):
            sums: dict[nn.Module, torch.Tensor] = {conv: kernels.summed_weights(conv.weight) for conv in convs}

        def work() -> list[torch.Tensor]:  # no method: what was recorded may hold it, and must not hold this object
            return [kernels.summed_weights(conv.weight, sums[conv]) for conv in convs]

        self.sums: Sums = sums
        self.runs = 0
        self._provenance = Provenance(convs)
        self._play_back, _ = capturer.capture(work, convs[0].weight.device)

    def expire(self) -> None:
        """Something happened after which nothing is known of the weights."""
        self._provenance.expire()

    def bring(self, timestep: Any) -> bool:
        """Make the sums those of the weights as they are; whether that took a playback."""
        if self._provenance.stands((), timestep):
            return False
        with self._provenance.renewed(()):
            self._play_back()
        self.runs += 1
        return True
