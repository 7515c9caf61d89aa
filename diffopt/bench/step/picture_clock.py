"""Times a whole pipeline call from prompt to pixels in host memory, and its stages, from outside."""

import contextlib
import dataclasses
import io
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from diffopt.bench.step.loop_clock import quiet
from diffopt.bench.step.record import Pictures
from diffopt.measure.environment import energy_j
from diffopt.measure.timing import synchronize

PICTURE_CLOCK = (
    "pictures: host clock around the pipeline call, prompt to PIL images; the device is idle at both ends and at the "
    "borders of text encoder, denoising loop and VAE; energy: the driver's counter for the whole GPU around the call"
)


@dataclasses.dataclass(frozen=True)
class PictureTime:
    """Seconds of one call and of its stages; joules of the GPU, None where the driver gives none; the pictures."""

    whole_s: float
    text_encoder_s: float | None
    unet_s: float
    vae_s: float
    png_s: float
    energy_j: float | None
    images: tuple[Any, ...] = ()


def time_pictures(pipe: Any, arguments: dict[str, Any]) -> PictureTime:
    """Call `pipe(**arguments)` and time it.

    For the length of the call three methods of these instances are wrapped: `encode_prompt`, `progress_bar` (which the
    denoising loop enters first) and the VAE's `decode`. The loop lies between the progress bar and the decoding.

    Raises:
        RuntimeError: the pipeline didn't encode a prompt, loop and decode, once each and in this order.
    """
    device = pipe.unet.device
    marks: list[tuple[str, float]] = []

    def mark(name: str) -> float:
        synchronize(device)
        now = time.perf_counter()
        marks.append((name, now))
        return now

    joules = energy_j(device)
    with contextlib.ExitStack() as wrapped:
        wrapped.enter_context(_wrapped(pipe, "encode_prompt", lambda: mark("prompt"), lambda: mark("prompt ready")))
        wrapped.enter_context(_wrapped(pipe, "progress_bar", lambda: mark("loop"), lambda: None))
        wrapped.enter_context(_wrapped(pipe.vae, "decode", lambda: mark("latents"), lambda: mark("pixels")))
        wrapped.enter_context(quiet(pipe))
        start = mark("start")
        images = pipe(**arguments, output_type="pil").images
        end = mark("end")
    used = energy_j(device)
    if [name for name, _ in marks] != ["start", "prompt", "prompt ready", "loop", "latents", "pixels", "end"]:
        raise RuntimeError(f"{type(pipe).__name__} ran as {', '.join(name for name, _ in marks)}")
    at = dict(marks)
    return PictureTime(
        whole_s=end - start,
        text_encoder_s=None if "prompt_embeds" in arguments else at["prompt ready"] - at["prompt"],
        unet_s=at["latents"] - at["loop"],
        vae_s=at["pixels"] - at["latents"],
        png_s=_png_seconds(images),
        energy_j=None if joules is None or used is None else used - joules,
        images=tuple(images),
    )


def pictures_of(times: Sequence[PictureTime], batch: int) -> Pictures:
    """The record of at least one call that made `batch` pictures."""
    whole_s = [time.whole_s for time in times]
    text_s = [time.text_encoder_s for time in times if time.text_encoder_s is not None]
    joules = [time.energy_j for time in times if time.energy_j is not None]
    metered = len(joules) == len(times) and sum(joules) > 0
    return Pictures(
        whole_s=whole_s,
        text_encoder_s=text_s or None,
        unet_s=[time.unet_s for time in times],
        vae_s=[time.vae_s for time in times],
        png_s=[time.png_s for time in times],
        images_per_s=batch / statistics.median(whole_s),
        energy_j=joules if metered else None,
        energy_per_image_j=sum(joules) / (batch * len(times)) if metered else None,
        power_w=sum(joules) / sum(whole_s) if metered else None,
    )


@contextlib.contextmanager
def _wrapped(owner: Any, name: str, before: Callable[[], object], after: Callable[[], object]) -> Iterator[None]:
    """A method of this instance with something done before and after each call."""
    method = getattr(owner, name)
    held = vars(owner).get(name)

    def call(*arguments: Any, **keywords: Any) -> Any:
        before()
        result = method(*arguments, **keywords)
        after()
        return result

    vars(owner)[name] = call
    try:
        yield
    finally:
        del vars(owner)[name]
        if held is not None:
            vars(owner)[name] = held


def _png_seconds(images: Sequence[Any]) -> float:
    start = time.perf_counter()
    for image in images:
        image.save(io.BytesIO(), format="PNG")
    return time.perf_counter() - start
