"""The pipelines a benchmark compares: the model of a case, its arguments, and twins of equal weights."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from diffopt.bench.random_configs import random_kind
from diffopt.bench.random_models import random_pipeline, random_prompt
from diffopt.bench.step.prompts import PROMPTS
from diffopt.bench.step.record import ModelIdentity
from diffopt.bench.workloads import Case
from diffopt.models import load, model_hash

_PROMPT, _NEGATIVE = "a red apple", ""


@dataclasses.dataclass(frozen=True)
class Subject:
    """A pipeline to measure.

    Attributes:
        pipe: stock, on the device.
        identity: of the model, for the record.
        arguments: makes the keyword arguments of one pipeline call; every call gets a fresh generator of one seed.
        whole_arguments: the same with the prompt as text, where there is a text encoder.
        prompt_arguments: the same for one picture of the prompt and seed of this number, from 0.
    """

    pipe: Any
    identity: ModelIdentity
    arguments: Callable[[], dict[str, Any]]
    whole_arguments: Callable[[], dict[str, Any]]
    prompt_arguments: Callable[[int], dict[str, Any]]


def load_subject(case: Case, device: torch.device) -> Subject:
    """Load a case's model: float16 on a GPU, float32 on a CPU (where half precision is emulated).

    Raises:
        InputError: unknown random kind or model.
        ModelError: a model that can't be loaded.
    """
    dtype, kind = dtype_on(device), random_kind(case.model)
    text = _text(case, device)
    if kind is not None:
        pipe = random_pipeline(kind, device=device, dtype=dtype, seed=case.seed)
        prompt = text

        def prompt_of(number: int) -> dict[str, Any]:
            return random_prompt(kind, device=device, dtype=dtype, seed=case.seed + number)

        info = pipe.diffopt_random_model
        scores = info.score_std.values()
        identity = ModelIdentity(
            name=case.model,
            hash=info.config_hash,
            seed=info.seed,
            score_std=(min(scores), max(scores)),
            parameters=_parameters(pipe),
        )
    else:
        pipe: Any = load(case.model, device=str(device), dtype=dtype)
        prompt = _encode(pipe, case, device)
        identity = ModelIdentity(name=case.model, hash=model_hash(pipe), parameters=_parameters(pipe))

        def prompt_of(number: int) -> dict[str, Any]:
            return {"prompt": PROMPTS[number % len(PROMPTS)], "negative_prompt": _NEGATIVE}

    return Subject(
        pipe,
        identity,
        lambda: _arguments(case, prompt, case.seed),
        lambda: _arguments(case, text, case.seed),
        lambda number: _arguments(case, prompt_of(number), case.seed + number),
    )


def dtype_on(device: torch.device) -> torch.dtype:
    """Of the weights that are measured on a device."""
    return torch.float32 if device.type == "cpu" else torch.float16


def whole_arguments(case: Case, device: torch.device) -> dict[str, Any]:
    """The keyword arguments of one whole call, as `Subject.whole_arguments` makes them, without a pipeline at hand."""
    return _arguments(case, _text(case, device), case.seed)


def _text(case: Case, device: torch.device) -> dict[str, Any]:
    """The prompt as text, or as embeddings for random weights, which have no text encoder."""
    kind = random_kind(case.model)
    if kind is not None:
        return random_prompt(kind, device=device, dtype=dtype_on(device), seed=case.seed, batch=case.batch)
    return {"prompt": [_PROMPT] * case.batch, "negative_prompt": [_NEGATIVE] * case.batch}


def _arguments(case: Case, words: dict[str, Any], seed: int) -> dict[str, Any]:
    return {
        **words,
        "width": case.width,
        "height": case.height,
        "num_inference_steps": case.steps,
        "guidance_scale": case.guidance,
        "generator": torch.Generator("cpu").manual_seed(seed),
    }


def twin(pipe: Any) -> Any:
    """A pipeline of the same kind with a UNet, a VAE (equal weights) and a scheduler of its own; the rest is shared.

    What `optimize` changes must not be stock's too.
    """
    parts = dict(pipe.components)
    parts["unet"], parts["vae"] = copy.deepcopy((pipe.unet, pipe.vae))
    parts["scheduler"] = type(pipe.scheduler).from_config(pipe.scheduler.config)
    extra = {"requires_safety_checker": False} if "safety_checker" in parts else {"add_watermarker": False}
    return type(pipe)(**parts, **extra)


def _encode(pipe: Any, case: Case, device: torch.device) -> dict[str, torch.Tensor]:
    """The prompt as embeddings; SDXL's pipeline has pooled ones besides."""
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    with torch.no_grad():
        encoded = pipe.encode_prompt(
            prompt=[_PROMPT] * case.batch,
            device=device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=True,
            negative_prompt=[_NEGATIVE] * case.batch,
        )
    return dict(zip(names, encoded, strict=False))


def _parameters(pipe: Any) -> int:
    return sum(parameter.numel() for parameter in pipe.unet.parameters())
