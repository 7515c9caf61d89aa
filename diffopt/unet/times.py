"""A model's time embeddings and what all its resnets make of them, for many timesteps of a schedule at once.

Both depend on the timestep, SDXL's added conditions and weights alone, and take 17 launches in every step of SD1.5. A
playback of a `TimeTable` makes rows for a timestep and those that come after it in a scheduler's list; each step copies
its row to where recorded steps read it. A list is a hint only: rows are used for the very timesteps they were made of,
and as long as they stand (`Provenance`).
"""

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn

from diffopt.attention.shared import TOGETHER, Given, Together, has_plain_weights, joined
from diffopt.unet.arguments import CallInputs
from diffopt.unet.capturers import Capturer
from diffopt.unet.provenance import Provenance, number_of

AT_ONCE = 32
"""Timesteps of one playback, always: a product's bits depend on how many rows it has, and those of a picture must not
depend on what was computed before it. So a timestep that no list has fills all rows.
"""

_ADDED = {None: (), "text_time": ("added_cond_kwargs['text_embeds']", "added_cond_kwargs['time_ids']")}
"""The added conditions of a model by its `addition_embed_type`."""

_PLAIN = frozenset((Timesteps, TimestepEmbedding, nn.Linear, nn.SiLU))
_METHODS = frozenset(("get_time_embed", "get_class_embed", "get_aug_embed"))


def replaced(model: Any, inputs: CallInputs) -> tuple[str, ...]:
    """The arguments of a call that recorded steps need not read where a table has what is made of them: by paths as in
    `CallInputs.places`, the timestep first. Empty where a step must compute its own.
    """
    if type(model) not in (UNet2DConditionModel, ControlNetModel) or model.config["addition_embed_type"] not in _ADDED:
        return ()
    added = _ADDED[model.config["addition_embed_type"]]
    names = ("timestep", *added)
    if not inputs.places.keys() >= set(names) or inputs.structure.keys() & {"timestep_cond", "class_labels"}:
        return ()
    if getattr(model, "time_embed_act", None) is not None or _METHODS & model.__dict__.keys():
        return ()
    if not all(_is_plain(part) for part in _parts(model)):
        return ()
    timestep, batch = inputs.of("timestep"), len(inputs.of("sample"))
    if isinstance(timestep, torch.Tensor) and timestep.numel() != 1:  # one for each picture
        return ()
    return names if all(len(inputs.of(name)) == batch for name in added) else ()


def shifts_of(model: nn.Module, sample: torch.Tensor) -> Together | None:
    """The layers of a model that are fed the time embedding, if one product of embeddings like a sample serves them."""
    for group in model.__dict__.get(TOGETHER, ()):
        joint = joined(group.linears) if group.owners[0][1] == "time_emb_proj" else None
        if joint is not None and (joint[0].dtype, joint[0].device) == (sample.dtype, sample.device):
            return group
    return None


def _parts(model: Any) -> list[nn.Module]:
    names = ["time_proj", "time_embedding"]
    if model.config["addition_embed_type"] is not None:
        names += ["add_time_proj", "add_embedding"]
    return [getattr(model, name) for name in names]


def _is_plain(part: nn.Module) -> bool:
    """Whether calling a part does what its class says, with weights as they are: no adapters, no hooks."""
    return all(
        type(module) in _PLAIN
        and has_plain_weights(module)
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and "forward" not in module.__dict__
        for module in part.modules()
    )


class TimeTable:
    """Rows of time embeddings [C] and of all shifts made of them [R], one per timestep; they were made from the same.

    Its buffers lie outside the graphs' pool, where no graph writes into them. With guidance they take 1.5 MB for SD1.5,
    whose pictures all have the same rows, and 2.0 MB for SDXL, each of whose pictures has its own. Kinds of calls with
    as many pictures share them; they go with the last graph that reads them.

    Attributes:
        reads: the arguments of calls that it is brought, and steps need not read, by name.
    """

    def __init__(
        self,
        model: Any,
        shifts: Together,
        reads: tuple[str, ...],
        sample: torch.Tensor,
        added: Sequence[torch.Tensor],
        capturer: Capturer,
    ) -> None:
        """
        Args:
            model: one whose calls `replaced` lets read a table.
            shifts: what `shifts_of` found in it.
            reads: what `replaced` said.
            sample: like those of calls.
            added: buffers like the added conditions of calls, text embeddings [B, C] and time ids [B, N]; or none.
            capturer: records the work.
        """
        width = model.time_embedding.linear_2.out_features
        with torch.inference_mode(False):
            timesteps = sample.new_empty(AT_ONCE, dtype=torch.float32)  # as `Timesteps` makes them
            rows = sample.new_empty((AT_ONCE, len(sample) if added else 1, width + shifts.rows))
            row = sample.new_empty((len(sample), width + shifts.rows))

        def work() -> torch.Tensor:  # no method: what was recorded may hold it, and must not hold this object
            embeddings = _embeddings(model, timesteps, added, rows.dtype)
            product = shifts.product(embeddings)
            assert product is not None  # the weights lay together when this was made, and what moves them shows
            rows[..., :width].copy_(embeddings)
            rows[..., width:].copy_(product)
            return rows

        self.reads = reads
        self._added, self._shifts = tuple(added), shifts
        self._timesteps, self._rows, self._row = timesteps, rows.unbind(), row
        self._embedding, self._product = row[:, :width], row[:, width:]
        self._places: dict[float, int] = {}  # of timesteps among the rows
        linears = [module for part in _parts(model) for module in part.modules() if isinstance(module, nn.Linear)]
        self._provenance = Provenance([*linears, *shifts.linears])
        capturer.warm_up(work, sample.device)
        self._play_back, _ = capturer.capture(work, sample.device)

    @property
    def given(self) -> dict[Together, Given]:
        """What a run of `stand_in` reads instead of computing it."""
        return {self._shifts: (self._embedding, self._shifts.parts(self._product))}

    def stand_in(self, model: nn.Module) -> nn.Module:
        """The model, but that its time embedding is the table's row; the model itself stays as it is.

        It shares all modules but those at the top that make the embedding. Added conditions it is called with may be on
        the `meta` device, where what the model makes of them launches nothing.
        """
        twin = copy.copy(model)
        given = {"time_proj": _Constant(self._embedding), "time_embedding": _Constant(self._embedding)}
        if self._added:
            given["add_embedding"] = _Constant(None)  # models add nothing then
        twin.__dict__["_modules"] = {**model._modules, **given}
        return twin

    def expire(self) -> None:
        """Something happened after which nothing is known of conditions and weights."""
        self._provenance.expire()

    def bring(self, inputs: CallInputs, schedulers: Iterable[Any]) -> bool:
        """Make the row that steps read a call's; whether that took a playback.

        Args:
            inputs: the call's.
            schedulers: whose timesteps may be those of calls to come.
        """
        timestep, *added = map(inputs.of, self.reads)
        number = number_of(timestep)
        missing = not self._provenance.stands(added, timestep) or number not in self._places
        if missing:
            with self._provenance.renewed(added):
                for buffer, value in zip(self._added, added, strict=True):
                    buffer.copy_(value)
                self._places = self._load(timestep, number, schedulers)
                self._play_back()
        self._row.copy_(self._rows[0 if number is None else self._places[number]])
        return missing

    def _load(self, timestep: Any, number: float | None, schedulers: Iterable[Any]) -> dict[float, int]:
        """Fill the timesteps that a playback makes rows of; the places of those that are known."""
        if number is None:
            self._timesteps.copy_(timestep)
            return {}
        wanted = _upcoming(number, schedulers)
        if len(wanted) == 1:
            self._timesteps.fill_(number)
        else:
            device = self._timesteps.device
            filled = wanted + wanted[-1:] * (AT_ONCE - len(wanted))
            pinned = device.type == "cuda"  # so that none waits
            host = torch.tensor(filled, dtype=torch.float32, device="cpu", pin_memory=pinned)
            self._timesteps.copy_(host, non_blocking=True)
        return {value: place for place, value in enumerate(wanted)}


class _Constant(nn.Module):
    """Returns one and the same thing, whatever it is called with."""

    def __init__(self, value: torch.Tensor | None) -> None:
        super().__init__()
        self.value = value

    def forward(self, *_: Any) -> torch.Tensor | None:
        return self.value


def _upcoming(timestep: float, schedulers: Iterable[Any]) -> list[float]:
    """A timestep and up to `AT_ONCE` - 1 that follow it in the first scheduler that has it."""
    for scheduler in schedulers:
        timesteps = scheduler.timesteps
        if isinstance(timesteps, torch.Tensor) and timesteps.device.type == "cpu":
            known = list(dict.fromkeys(timesteps.tolist()))  # some schedulers have each twice
            if timestep in known and len(known) < scheduler.config["num_train_timesteps"]:  # all: not told of steps yet
                place = known.index(timestep)
                return known[place : place + AT_ONCE]
    return [timestep]


def _embeddings(model: Any, timesteps: torch.Tensor, added: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Time embeddings [N, B, C] of timesteps [N] as diffusers 0.42's models compute them; B is 1 without `added`."""
    embedding = model.time_embedding(model.time_proj(timesteps).to(dtype))[:, None]
    if not added:
        return embedding
    text, time_ids = added
    times = model.add_time_proj(time_ids.flatten()).reshape(len(text), -1)
    return embedding + model.add_embedding(torch.concat([text, times], dim=-1).to(dtype))
