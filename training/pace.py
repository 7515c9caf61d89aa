"""What both training loops share: how a step is run, the learning rate over the time given, averaged weights."""

import contextlib
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def say(text: str) -> None:
    """Print one line with the time of day, at once."""
    print(time.strftime("%H:%M:%S"), text, flush=True)


@dataclass(frozen=True)
class Mode:
    """How steps run on a device: `graph` (compiled, and captured as a CUDA graph), `compile` or `eager`."""

    name: str
    device: torch.device

    def compiled(self, function: Function) -> Function:
        """The function through torch.compile, or as it is in eager mode."""
        return function if self.name == "eager" else torch.compile(function, dynamic=False)  # pyright: ignore[reportReturnType]

    def autocast(self) -> AbstractContextManager[Any]:
        """bfloat16 where it is fast: on a GPU."""
        if self.device.type != "cuda":
            return contextlib.nullcontext()
        # Without the cache of cast weights: it would keep tensors of one captured step for the next.
        return torch.autocast("cuda", torch.bfloat16, cache_enabled=False)

    def wait(self) -> None:
        """Wait until the device has done what was asked of it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def rate(peak: float, steps: int, progress: float, warm_up: int) -> float:
    """The learning rate after `steps`, at a progress of 0..1 through the time given: warm-up, then half a cosine."""
    return peak * min(1.0, (steps + 1) / warm_up) * max(0.003, 0.5 + 0.5 * math.cos(math.pi * min(1.0, progress)))


class Average:
    """An exponential moving average of a module's parameters; up to step `start` it is a copy of them."""

    def __init__(self, module: torch.nn.Module, decay: float, start: int) -> None:
        self.live = [parameter.detach() for parameter in module.parameters()]
        self.kept = [parameter.clone() for parameter in self.live]
        self.decay, self.start = decay, start

    def update(self, step: int) -> None:
        """Take the parameters after a step into the average."""
        if step <= self.start:
            torch._foreach_copy_(self.kept, self.live)  # pyright: ignore[reportPrivateImportUsage]
        else:
            torch._foreach_lerp_(self.kept, self.live, 1 - self.decay)  # pyright: ignore[reportPrivateImportUsage]

    @torch.no_grad()
    def copy_to(self, module: torch.nn.Module) -> None:
        """Put the average into a module of the same architecture."""
        live = [parameter.detach() for parameter in module.parameters()]
        torch._foreach_copy_(live, self.kept)  # pyright: ignore[reportPrivateImportUsage]
