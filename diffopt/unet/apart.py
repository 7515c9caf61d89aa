"""What one model's recorded steps share, computed apart: prologues of prompts, tables of timesteps, summed weights.

They live as long as a graph that reads them. Schedulers that the model was told of are remembered for the tables.
"""

import weakref
from collections.abc import Hashable

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import nn

from diffopt.attention.shared import Together
from diffopt.unet.arguments import CallInputs
from diffopt.unet.capturers import Capturer
from diffopt.unet.prologues import Prologue
from diffopt.unet.summed import SummedWeights
from diffopt.unet.times import TimeTable, replaced, shifts_of

_SCHEDULERS = 8  # that are remembered; there may be a new one for each picture


class Apart:
    """Prologues, tables and summed weights of one model, by what they depend on besides values."""

    def __init__(self, capturer: Capturer) -> None:
        """Args: capturer: the one that records the model's calls."""
        self._capturer = capturer
        self._schedulers: list[weakref.ref[SchedulerMixin]] = []
        self.forget()

    def forget(self) -> None:
        """Nothing that there is now may serve another graph."""
        self._prologues: weakref.WeakValueDictionary[Hashable, Prologue] = weakref.WeakValueDictionary()
        self._tables: weakref.WeakValueDictionary[Hashable, TimeTable] = weakref.WeakValueDictionary()
        self._sums: weakref.WeakValueDictionary[Hashable, SummedWeights] = weakref.WeakValueDictionary()

    def expire(self) -> None:
        """All of it has to be computed anew before it is read."""
        for shared in (*self._prologues.values(), *self._tables.values(), *self._sums.values()):
            shared.expire()

    def expect(self, scheduler: SchedulerMixin) -> None:
        """Calls to come may have the timesteps of a scheduler; it is not kept alive."""
        others = [known for known in self._schedulers if known() not in (None, scheduler)]
        self._schedulers = [weakref.ref(scheduler), *others[: _SCHEDULERS - 1]]

    @property
    def schedulers(self) -> list[SchedulerMixin]:
        """Those that calls may have the timesteps of, the one told last first."""
        return [scheduler for known in self._schedulers if (scheduler := known()) is not None]

    def prologue(self, state: Hashable, groups: tuple[Together, ...], context: torch.Tensor) -> Prologue:
        """What the groups make of prompts like a static buffer; one for all kinds of calls with such prompts."""
        key = (state, groups, context.shape, context.stride(), context.dtype, context.device)
        prologue = self._prologues.get(key)
        if prologue is None:
            prologue = self._prologues[key] = Prologue(groups, context, self._capturer)
        return prologue

    def table(
        self, state: Hashable, model: torch.nn.Module, inputs: CallInputs, statics: list[torch.Tensor]
    ) -> TimeTable | None:
        """What a model makes of timesteps and added conditions like a call's, if steps need not; one for all kinds of
        calls with as many pictures. Takes those conditions' buffers from `statics`, where nothing reads them then.
        """
        sample, reads = inputs.of("sample"), replaced(model, inputs)
        shifts = shifts_of(model, sample) if reads else None
        if shifts is None:
            return None
        places = [inputs.places[name] for name in reads[1:]]
        added = [statics[place] for place in places]
        for place in places:
            statics[place] = statics[place].to("meta")
        kinds = tuple((x.shape, x.stride(), x.dtype) for x in added)
        key = (state, shifts, len(sample), sample.dtype, sample.device, kinds)
        table = self._tables.get(key)
        if table is None:
            table = self._tables[key] = TimeTable(model, shifts, reads, sample, added, self._capturer)
        return table

    def sums(self, state: Hashable, convs: tuple[nn.Conv2d, ...]) -> SummedWeights:
        """The summed weights of convolutions, for all kinds of calls that use them."""
        sums = self._sums.get((state, convs))
        if sums is None:
            sums = self._sums[state, convs] = SummedWeights(convs, self._capturer)
        return sums
