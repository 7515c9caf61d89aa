"""What captured UNet calls make of their prompt alone, computed apart and only when it may have become another.

A group of layers that are fed the prompt (`Together`) makes one product of it, the same at every step of a run. The
product is recorded on its own, into buffers that the recorded steps read. It is played back before a step unless all
that it was made from is known to be as it was: see `Provenance`.
"""

from collections.abc import Sequence
from typing import Any

import torch

from diffopt.attention.shared import Given, Together
from diffopt.unet.capturers import Capturer
from diffopt.unet.provenance import Provenance


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
            products = [context.new_empty((*context.shape[:-1], group.rows)) for group in groups]

        def work() -> list[torch.Tensor]:  # no method: what was recorded may hold it, and must not hold this object
            for group, buffer in zip(groups, products, strict=True):
                product = group.product(context)
                assert product is not None  # the weights lay together when this was made, and what moves them shows
                buffer.copy_(product)
            return products

        self.context = context
        self.runs = 0
        self._groups, self._products = tuple(groups), products
        self._provenance = Provenance(linear for group in groups for linear in group.linears)
        self._play_back, _ = capturer.capture(work, context.device)

    @property
    def given(self) -> dict[Together, Given]:
        """What a run of the model reads instead of computing it."""
        pairs = zip(self._groups, self._products, strict=True)
        return {group: (self.context, group.parts(product)) for group, product in pairs}

    def expire(self) -> None:
        """Something happened after which nothing is known of prompt and weights."""
        self._provenance.expire()

    def bring(self, context: torch.Tensor, timestep: Any) -> bool:
        """Make `context` and the products those of a call's prompt embeddings; whether that took a playback."""
        if self._provenance.stands((context,), timestep):
            return False
        with self._provenance.renewed((context,)):
            self.context.copy_(context)
            self._play_back()
        self.runs += 1
        return True
