"""One worker per pipeline: diffusers pipelines are not thread-safe, so pictures are made one after another."""

import collections
import dataclasses
import functools
import inspect
import platform
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

import diffopt
from diffopt.engine.certificate import LayerRun, picture_certificate, stock_certificate
from diffopt.engine.clock import LoopClock
from diffopt.engine.metadata import SCHEMA, AttentionUsed, DeviceUsed, PictureCertificate, PictureMetadata
from diffopt.engine.requests import GenerationRequest
from diffopt.errors import DiffoptError, ModelError
from diffopt.measure.environment import installed_version
from diffopt.models import ModelConfig, make_scheduler, model_hash

if TYPE_CHECKING:
    from PIL.Image import Image

    from diffopt.handle import Handle

STOCK = "stock"
"""As `attention=`: the pipeline as it was, without diffopt."""

_ARGUMENTS = (
    "prompt",
    "negative_prompt",
    "num_inference_steps",
    "guidance_scale",
    "generator",
    "width",
    "height",
    "callback_on_step_end",
)


@dataclasses.dataclass(frozen=True)
class Progress:
    """A step that was taken: `iteration` of `iterations` of picture `index` (from 0) of `count`."""

    index: int
    count: int
    seed: int
    iteration: int
    iterations: int


@dataclasses.dataclass(frozen=True)
class GeneratedPicture:
    """A finished picture.

    Attributes:
        image: RGB, of the size asked for.
        seed: of this picture.
        seconds: from prompt to decoded picture in host memory.
        its: iterations per second of the denoising loop, from the start of its first step to the last latent, with the
            device idle at both ends. An iteration is one UNet call, guidance included, and the scheduler's step; most
            schedulers take one per step, heun two and pndm one more in all.
        metadata: the fields of `PictureMetadata` as plain data.
    """

    image: "Image"
    seed: int
    seconds: float
    its: float
    metadata: dict[str, Any]


class _Stopped(Exception):
    """Leaves the denoising loop at a step: nothing is decoded, nothing of the picture remains."""


class Engine:
    """Makes pictures with one pipeline, which belongs to it from then on.

    Safe to call from several threads: they take turns, picture by picture.
    """

    def __init__(self, pipe: Any, model: ModelConfig, handle: "Handle | None" = None) -> None:
        """
        Args:
            pipe: a text-to-image Stable Diffusion pipeline (1.x, 2.x or XL) of diffusers.
            model: its name, defaults and limits.
            handle: what `diffopt.optimize(pipe)` returned; None for a stock pipeline.

        Raises:
            ModelError: another kind of pipeline.
        """
        missing = [name for name in _ARGUMENTS if name not in inspect.signature(pipe.__call__).parameters]
        if missing or not isinstance(getattr(pipe, "unet", None), torch.nn.Module):
            raise ModelError(
                f"model {model.name}: {type(pipe).__name__} is no text-to-image pipeline of Stable Diffusion 1, 2 or XL"
            )
        self.pipe = pipe
        self.model = model
        self.handle = handle
        self._own_scheduler = pipe.scheduler
        self._lock = threading.Lock()
        pipe.set_progress_bar_config(disable=True)

    @property
    def device(self) -> torch.device:
        """Where the UNet is."""
        return self.pipe.unet.device

    def generate(
        self,
        request: GenerationRequest,
        *,
        on_step: Callable[[Progress], None] | None = None,
        stop: threading.Event | None = None,
    ) -> Iterator[GeneratedPicture]:
        """Make the pictures of a request, one after another.

        Picture i has seed + i and a generator of its own, so a request of one with that seed gives the same bits.
        Random numbers are drawn on the CPU, whatever the device: a seed means the same noise everywhere.

        Args:
            on_step: called after every iteration, in the calling thread. On a GPU work may still be queued then.
            stop: looked at before each picture and after each iteration; once set, nothing more is yielded.

        Raises:
            DiffoptError: out of memory.
            BackendError: attention that was asked for by name can't serve these shapes.
        """
        for index, seed in enumerate(request.seeds):
            if stop is not None and stop.is_set():
                return
            try:
                with self._lock:
                    picture = self._make(request, index, seed, on_step, stop)
            except _Stopped:
                return
            yield picture

    def use_attention(self, attention: str) -> None:
        """Switch to another attention backend, between two pictures; "stock" takes diffopt out.

        Raises:
            InputError, BackendError: as `diffopt.optimize`; what was in use before stays in use.
        """
        from diffopt.handle import optimize

        with self._lock:
            before = self.handle
            was = STOCK if before is None else before.attention
            if attention == was:
                return
            if before is not None:
                before.restore()
            try:
                self.handle = None if attention == STOCK else optimize(self.pipe, attention=attention)
            except DiffoptError:
                self.handle = None if was == STOCK else optimize(self.pipe, attention=was)
                raise

    def notes(self, request: GenerationRequest) -> list[str]:
        """What a user should know before the work: a prompt's end that the model can't see."""
        found = []
        tokenizer = getattr(self.pipe, "tokenizer", None)
        if tokenizer is None:
            return found
        for field in ("prompt", "negative_prompt"):
            tokens, limit = len(tokenizer(getattr(request, field), verbose=False).input_ids), tokenizer.model_max_length
            if tokens > limit:
                found.append(f"{field}: the model reads {limit} tokens of it, it has {tokens}; the end has no effect")
        return found

    def _make(
        self,
        request: GenerationRequest,
        index: int,
        seed: int,
        on_step: Callable[[Progress], None] | None,
        stop: threading.Event | None,
    ) -> GeneratedPicture:
        pipe = self.pipe
        clock = LoopClock(self.device)

        def after_step(pipe: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            done, total = step + 1, pipe.num_timesteps
            if done == total:
                clock.stop(total)
            if on_step is not None:
                on_step(Progress(index, request.count, seed, done, total))
            if stop is not None and stop.is_set() and done < total:
                raise _Stopped
            return tensors

        pipe.scheduler = make_scheduler(request.scheduler, self._own_scheduler)
        if self.handle is not None:
            self.handle.keep_timesteps(pipe)
        scheduler_class = type(pipe.scheduler).__name__
        called_before = self._layer_calls()
        begun = time.perf_counter()
        try:
            with clock.around(pipe):
                result = pipe(
                    prompt=request.prompt,
                    negative_prompt=request.negative_prompt,
                    num_inference_steps=request.steps,
                    guidance_scale=request.guidance,
                    width=request.width,
                    height=request.height,
                    generator=torch.Generator("cpu").manual_seed(seed),
                    callback_on_step_end=after_step,
                )
        except torch.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            raise DiffoptError(
                f"out of memory on {self.device} at {request.width}x{request.height}: ask for a smaller size"
            ) from error
        finally:
            pipe.scheduler = self._own_scheduler
        seconds = time.perf_counter() - begun  # the picture is in host memory, so the device is done
        metadata = self._metadata(request, seed, scheduler_class, called_before)
        return GeneratedPicture(result.images[0], seed, seconds, clock.its, metadata.to_dict())

    def _metadata(
        self, request: GenerationRequest, seed: int, scheduler_class: str, called_before: dict[LayerRun, int]
    ) -> PictureMetadata:
        ran = {key for key, calls in self._layer_calls().items() if calls > called_before.get(key, 0)}
        dtype = str(self.pipe.unet.dtype).removeprefix("torch.")
        return PictureMetadata(
            schema=SCHEMA,
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            seed=seed,
            steps=request.steps,
            guidance=request.guidance,
            scheduler=request.scheduler,
            scheduler_class=scheduler_class,
            width=request.width,
            height=request.height,
            model=self.model.name,
            model_hash=self.model_hash,
            dtype=dtype,
            device=device_used(self.device),
            attention=self._attention_used(ran),
            versions=versions(),
            certificate=self._certificate(ran, dtype),
        )

    @functools.cached_property
    def model_hash(self) -> str:
        """SHA-256 over the weights, as `diffopt.models.model_hash`; taken once, when first needed."""
        return model_hash(self.pipe)

    def _layer_calls(self) -> dict[LayerRun, int]:
        """The number of calls so far."""
        calls: dict[LayerRun, int] = {}
        for layer in self.handle.summary()["layers"] if self.handle is not None else ():
            for run in layer["runs"]:
                key = (layer["name"], run["shape"], run["backend"])
                calls[key] = calls.get(key, 0) + run["calls"]
        return calls

    def _attention_used(self, ran: set[LayerRun]) -> AttentionUsed:
        if self.handle is None:
            return AttentionUsed(STOCK)
        layers = sorted({(layer, backend) for layer, _, backend in ran})
        counts = collections.Counter(backend for _, backend in layers)
        summary = self.handle.summary()
        kept = sum(not layer["optimized"] for layer in summary["layers"])
        return AttentionUsed(summary["attention"], dict(counts), kept)

    def _certificate(self, ran: set[LayerRun], dtype: str) -> PictureCertificate:
        if self.handle is None:
            return stock_certificate()
        return picture_certificate(
            ran,
            self.device,
            model=self.model.name,
            model_hash=self.model_hash,
            dtype=dtype,
            attention=self.handle.attention,
        )


def device_used(device: torch.device) -> DeviceUsed:
    """The device as a picture records it."""
    if device.type == "cuda":
        return DeviceUsed("cuda", torch.cuda.get_device_name(device))
    return DeviceUsed(device.type, platform.processor() or platform.machine(), torch.get_num_threads())


@functools.cache
def _installed_versions() -> dict[str, str | None]:
    packages = {name: installed_version(name) for name in ("diffusers", "transformers", "triton")}
    return {"diffopt": diffopt.__version__, "torch": torch.__version__, **packages}


def versions() -> dict[str, str | None]:
    """Versions of what decides a picture's bits; None: not installed."""
    return dict(_installed_versions())
