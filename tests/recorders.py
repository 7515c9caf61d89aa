"""A stand-in for CUDA graphs on any device: it does the captured work again on the same buffers."""

from collections.abc import Callable
from typing import Any

import torch


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

    def warm_up(self, work: Callable[[], Any], device: torch.device) -> None:
        work()

    def capture(self, work: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
        if self.refuses is not None:
            raise self.refuses
        self.captures += 1
        output = work()

        def play_back() -> None:
            for old, new in zip(_tensors(output), _tensors(work()), strict=True):
                old.copy_(new)

        return play_back, output


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value
    return [tensor for item in items for tensor in _tensors(item)]
