"""A model call's arguments, taken apart into tensors that may change between calls and all else, which may not."""

import dataclasses
from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Any

import torch


class UncapturableError(Exception):
    """A call that can't be captured; the text is the reason, in words for a report."""


@dataclasses.dataclass(frozen=True)
class CallInputs:
    """One call's arguments.

    Attributes:
        key: equal for calls that differ only in the tensors' values (and addresses).
        tensors: in a fixed order; a timestep given as a number or on the CPU is the number.
        structure: what `rebuilt` makes arguments of again.
        device: of all tensors.
        places: where each of `tensors` came from: its index by the argument's name, or by a path within one, e.g.
            "added_cond_kwargs['time_ids']".
    """

    key: Hashable
    tensors: tuple[Any, ...]
    structure: Any
    device: torch.device
    places: dict[str, int]

    def of(self, name: str) -> Any:
        """An argument, or part of one, that is a tensor or a timestep's number; None where it is something else."""
        return self.tensors[self.places[name]] if name in self.places else None


_CONSTANTS = (bool, int, float, str, type(None))


def take_apart(arguments: Sequence[Any], keywords: dict[str, Any], names: Sequence[str]) -> CallInputs:
    """Take the arguments of a UNet's or ControlNet's forward apart.

    Args:
        arguments: positional ones.
        keywords: the others.
        names: what the positional parameters are called.

    Raises:
        UncapturableError: an argument of a type or on a device that a graph can't be given.
    """
    if len(arguments) > len(names):
        raise UncapturableError(f"{len(arguments)} positional arguments were given")
    if twice := keywords.keys() & set(names[: len(arguments)]):
        raise UncapturableError(f"{min(twice)} was given twice")
    named = {**dict(zip(names, arguments, strict=False)), **keywords}
    sample = named.get("sample")
    if type(sample) is not torch.Tensor:
        raise UncapturableError(f"sample is a {type(sample).__name__}")
    tensors: list[Any] = []
    keys: list[Hashable] = []
    structure: dict[str, Any] = {}
    places: dict[str, int] = {}
    for name, value in named.items():
        if value is not None:
            structure[name] = _taken(value, name, sample.device, tensors, keys, places)
    return CallInputs((tuple(structure), tuple(keys)), tuple(tensors), structure, sample.device, places)


def with_timestep_beside(
    arguments: Sequence[Any], keywords: dict[str, Any], names: Sequence[str]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same arguments with a timestep that is on the CPU brought to the sample's device.

    A model would copy one of no dimension, and wait for the device until that is done. One for each picture it expects
    there: made of a scheduler's that are kept on the CPU (`schedules`), they are not.
    """
    named = {**dict(zip(names, arguments, strict=False)), **keywords}
    sample, timestep = named.get("sample"), named.get("timestep")
    if type(timestep) is not torch.Tensor or type(sample) is not torch.Tensor:
        return tuple(arguments), keywords
    if timestep.device.type != "cpu" or sample.device.type == "cpu":
        return tuple(arguments), keywords
    if timestep.dim():
        there = timestep.to(sample.device)
    else:
        there = torch.full((), timestep.item(), dtype=timestep.dtype, device=sample.device)
    if "timestep" in keywords:
        return tuple(arguments), {**keywords, "timestep": there}
    place = list(names).index("timestep")
    return (*arguments[:place], there, *arguments[place + 1 :]), keywords


def _taken(
    value: Any,
    path: str,
    device: torch.device,
    tensors: list[Any],
    keys: list[Hashable],
    places: dict[str, int],
) -> Any:
    """Notes what an argument or a part of one is made of; returns what makes it again of static buffers."""
    kind = type(value)
    if kind is torch.Tensor or (path == "timestep" and kind in (int, float)):
        places[path] = len(tensors)
    if kind is torch.Tensor:
        if value.device != device:
            if path != "timestep" or value.dim() or value.device.type != "cpu":
                raise UncapturableError(f"{path} is on {value.device}, sample on {device}")
            keys.append(("number", value.dtype, ()))
            return _slot(tensors, value.item())
        keys.append((value.shape, value.stride(), value.dtype, device))
        return _slot(tensors, value)
    if path == "timestep" and kind in (int, float):
        keys.append(("number", torch.float64 if kind is float else torch.int64, (1,)))  # as the UNet makes it one
        return _slot(tensors, value)
    if kind in _CONSTANTS:
        keys.append((path, kind, value))
        return lambda _: value
    if kind in (list, tuple):
        parts = [_taken(item, f"{path}[{i}]", device, tensors, keys, places) for i, item in enumerate(value)]
        keys.append((path, kind, len(parts)))
        return lambda statics: kind(part(statics) for part in parts)
    if kind is dict:
        named = {name: _taken(item, f"{path}[{name!r}]", device, tensors, keys, places) for name, item in value.items()}
        keys.append((path, tuple(named)))
        return lambda statics: {name: part(statics) for name, part in named.items()}
    raise UncapturableError(f"{path} is a {kind.__name__}")


def _slot(tensors: list[Any], value: Any) -> Callable[[Sequence[torch.Tensor]], torch.Tensor]:
    index = len(tensors)
    tensors.append(value)
    return lambda statics: statics[index]


def rebuilt(inputs: CallInputs, statics: Sequence[torch.Tensor]) -> dict[str, Any]:
    """The keyword arguments again, with `statics` in place of the tensors and fresh containers around them."""
    return {name: part(statics) for name, part in inputs.structure.items()}


def static_buffers(inputs: CallInputs) -> list[torch.Tensor]:
    """Empty tensors like the call's, to copy inputs into; they outlive inference mode."""
    numbers = iter([key for key in inputs.key[1] if key[0] == "number"])  # type: ignore[index]
    with torch.inference_mode(False):
        return [
            torch.empty_like(x) if isinstance(x, torch.Tensor) else _number_buffer(next(numbers), inputs.device)
            for x in inputs.tensors
        ]


def _number_buffer(key: tuple[Any, ...], device: torch.device) -> torch.Tensor:
    _, dtype, shape = key
    return torch.empty(shape, dtype=dtype, device=device)


def copy_in(statics: Sequence[torch.Tensor], tensors: Sequence[Any], but: Collection[int] = ()) -> None:
    """Copy one call's values into the static buffers, `but` for some indices, without waiting for the device."""
    for index, (static, value) in enumerate(zip(statics, tensors, strict=True)):
        if index in but:
            continue
        if isinstance(value, torch.Tensor):
            static.copy_(value)
        else:
            static.fill_(value)
