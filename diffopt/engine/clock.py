"""Times the denoising loop of a picture that is being made."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch


class LoopClock:
    """Times the denoising loop inside a pipeline call, which begins where the pipeline enters its progress bar."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._started = 0.0
        self.its = 0.0

    @contextlib.contextmanager
    def around(self, pipe: Any) -> Iterator[None]:
        """For the length of the block this one pipeline's progress bar also starts the clock."""

        def progress_bar(*positional: Any, **keywords: Any) -> Any:
            self._started = self._now()
            return type(pipe).progress_bar(pipe, *positional, **keywords)

        pipe.progress_bar = progress_bar
        try:
            yield
        finally:
            del pipe.progress_bar

    def stop(self, iterations: int) -> None:
        """The last latent is queued: wait for it and take the rate."""
        self.its = iterations / (self._now() - self._started)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
