"""A stand-in for CUDA graphs on any device: it does the captured work again on the same buffers."""

import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from diffopt.unet import forwards
from diffopt_kernels.step import reference


class Recorder:
    """Plays back by calling the work again and writing its result over the first one's tensors."""

    def __init__(self) -> None:
        self.captures = 0
        self.playing = True
        self.refuses: Exception | None = None

    def reasons(self, device: torch.device) -> list[str]:
        return []

    def ready(self, device: torch.device) -> None:
        pass

    def forget(self) -> None:
        pass

    def warm_up(self, work: Callable[[], Any], device: torch.device) -> Any:
        return work()

    def capture(self, work: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
        if self.refuses is not None:
            raise self.refuses
        self.captures += 1
        output = work()

        def play_back() -> None:
            for old, new in zip(_tensors(output), _tensors(work()), strict=True):
                old.copy_(new)

        return play_back, output


class _Operations(TorchDispatchMode):
    """Notes every operation, its arguments and its result."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        self.noted.append((func, args, kwargs or {}, output))
        return output


class Tape(Recorder):
    """Plays back the operations alone, on the same tensors. As with a graph, what Python read before is baked in."""

    def capture(self, work: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
        if self.refuses is not None:
            raise self.refuses
        self.captures += 1
        with _Operations() as operations:
            output = work()

        def play_back() -> None:
            for func, args, kwargs, before in operations.noted:
                for old, new in zip(_tensors(before), _tensors(func(*args, **kwargs)), strict=True):
                    if old.data_ptr() != new.data_ptr():  # else it is a view, or was changed in place
                        old.copy_(new)

        return play_back, output


def products_row_by_row(monkeypatch) -> None:
    """From now on the bits of a product of up to 64 rows don't depend on how many they are.

    Time embeddings are made of other numbers of rows for recorded steps than without; on a CPU that shows.
    """
    linear = torch.nn.functional.linear

    def by_row(x, weight, bias=None):
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) > 64:
            return linear(x, weight, bias)
        return torch.cat([linear(row, weight, bias) for row in rows.split(1)]).view(*x.shape[:-1], -1)

    monkeypatch.setattr("torch.nn.functional.linear", by_row)


def norms_without_kernels(monkeypatch) -> None:
    """From now on fused blocks run on a CPU, and not in Triton's interpreter, which is slow."""

    def image(x: torch.Tensor) -> torch.Tensor:
        return x.contiguous(memory_format=torch.channels_last)

    def group_norm(x, *arguments, **options):
        return image(reference.group_norm_reference(x, *arguments, **options, dtype=x.dtype))

    def group_norm_joined(x, second, *arguments, **options):
        joined = image(torch.cat([x, second], dim=1))
        return group_norm(joined, *arguments, **options), joined

    def bias_add(x, bias, residual=None):
        return image(x + bias[:, None, None] + (0 if residual is None else residual))

    stand_ins = {
        "group_norm": group_norm,
        "group_norm_joined": group_norm_joined,
        "bias_add": bias_add,
        "thin_convolution": lambda x, weight, bias: image(F.conv2d(x, weight, bias, padding=1)),
        "upsample": lambda x: F.interpolate(x, scale_factor=2.0),
    }
    monkeypatch.setattr(forwards, "fits", lambda x: not torch.is_grad_enabled())
    monkeypatch.setattr(forwards, "kernels", types.SimpleNamespace(**stand_ins))


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if not isinstance(value, (dict, list, tuple)):
        return []
    items = value.values() if isinstance(value, dict) else value
    return [tensor for item in items for tensor in _tensors(item)]
