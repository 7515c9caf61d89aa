"""Times the denoising loop of a real diffusers pipeline call, from outside."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from typing import Any

from diffopt.measure.timing import synchronize


@dataclasses.dataclass(frozen=True)
class LoopTime:
    """Seconds of one pipeline call.

    Attributes:
        loop_s: from the start of the first step to the last latent.
        call_s: of the whole call.
    """

    loop_s: float
    call_s: float


def time_loop(pipe: Any, arguments: dict[str, Any]) -> LoopTime:
    """Call `pipe(**arguments)` and time its denoising loop.

    The loop of diffusers' Stable Diffusion pipelines begins by entering `self.progress_bar(total=steps)`, after
    prompt, timesteps and first latents are ready: for the length of this call the instance's `progress_bar` is one
    that waits for the device and reads the clock. With `output_type="latent"` nothing but returning follows the last
    latent, so the loop ends when the call has returned and the device is idle. Guidance, scheduler and whatever the
    UNet prepares per prompt at its first step lie inside; work moved in front of the loop shows in `call_s`.

    Raises:
        RuntimeError: the pipeline never asked for a progress bar.
    """
    device = pipe.unet.device
    started: list[float] = []

    def progress_bar(*positional: Any, **keywords: Any) -> Any:
        synchronize(device)
        started.append(time.perf_counter())
        return type(pipe).progress_bar(pipe, *positional, **keywords)

    pipe.progress_bar = progress_bar
    try:
        with quiet(pipe):
            synchronize(device)
            called = time.perf_counter()
            pipe(**arguments, output_type="latent")
            synchronize(device)
            ended = time.perf_counter()
    finally:
        del pipe.progress_bar
    if len(started) != 1:
        raise RuntimeError(f"{type(pipe).__name__} entered {len(started)} denoising loops, expected one")
    return LoopTime(ended - started[0], ended - called)


@contextlib.contextmanager
def quiet(pipe: Any) -> Iterator[None]:
    """A block in which the pipeline draws no progress bar."""
    configured = getattr(pipe, "_progress_bar_config", None)
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        if configured is None:
            del pipe._progress_bar_config
        else:
            pipe._progress_bar_config = configured
