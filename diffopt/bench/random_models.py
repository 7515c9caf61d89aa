"""True-size Stable Diffusion pipelines with random weights: no network, the shapes and the work of the real ones.

Random weights as they come have attention scores near zero, so every softmax is flat and a fault in attention
changes next to nothing. `random_pipeline` therefore scales `to_q` and `to_k` of each attention layer, measured on a
forward pass, until its scores have a standard deviation of `SCORE_STD` (at about 8 the network is chaotic and
rounding alone swamps everything). Deep stacks of random transformer blocks are chaotic even so: what a block adds to
its input is scaled by 1/√depth. On an SDXL of half the width, rounding to half precision then moves the output by
0.5% to 1% and a softmax scale wrong by 1% moves it 4.5 to 5 times as far; unscaled, by 25% and 46%.
"""

import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from torch import nn

from diffopt.bench.random_configs import KINDS, RandomModelConfig
from diffopt.errors import InputError
from diffopt.models.weights import find_weights, load_component

SCORE_STD = 3.0
_BIAS_STD = 0.1  # not zero: a bias that an optimized path forgets must show
_WRITTEN = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}
_SAMPLED_ROWS = 128  # query rows per head that the standard deviation of the scores is measured on


@dataclasses.dataclass(frozen=True)
class RandomModelInfo:
    """Where a random pipeline comes from; on the pipeline as `pipe.diffopt_random_model`.

    Attributes:
        kind: a key of `random_configs.KINDS`.
        seed: of the weights.
        config_hash: SHA-256 (hex) of the configuration.
        score_std: attention layer to the standard deviation of its scores after scaling, on inputs other than
            those it was scaled on.
    """

    kind: str
    seed: int
    config_hash: str
    score_std: dict[str, float]


def random_pipeline(kind: str, *, device: torch.device | str, dtype: torch.dtype, seed: int = 0) -> Any:
    """A pipeline of the true configuration with random weights and no text encoders, made on `device` in `dtype`.

    Prompts are given as embeddings (`random_prompt`). The weights depend on the seed and on the kind of device.

    Raises:
        InputError: unknown kind.
    """
    config = _config(kind)
    device = torch.device(device)
    generator = torch.Generator(device).manual_seed(seed)
    unet = _materialise(UNet2DConditionModel, config.unet, device, dtype, generator)
    vae = _materialise(AutoencoderKL, config.vae, device, dtype, generator)
    _scale_branches(unet)
    pipe = _assemble(config, unet, vae)
    inputs = [_calibration_inputs(config, device, dtype, generator) for _ in range(2)]
    with torch.no_grad():
        _visit_scores(unet, inputs[0], scale_to=SCORE_STD)
        output = unet(**inputs[0], return_dict=False)[0]
        unet.conv_out.weight /= output.float().std().to(dtype)  # a noise prediction has unit variance
        score_std = _visit_scores(unet, inputs[1])
    pipe.diffopt_random_model = RandomModelInfo(kind, seed, config_hash(kind), score_std)
    return pipe


def write_weights(pipe: Any, folder: Path) -> None:
    """Keep a random pipeline's weights as files, for `read_random_pipeline`."""
    for name in _WRITTEN:
        getattr(pipe, name).save_pretrained(folder / name)


def read_random_pipeline(kind: str, folder: Path, *, device: torch.device | str, dtype: torch.dtype) -> Any:
    """The pipeline whose weights `write_weights` kept, read as `diffopt.load` reads a model: nothing is computed.

    Raises:
        InputError: unknown kind.
        ModelError: missing or damaged files.
    """
    config = _config(kind)
    parts = {
        name: load_component(cls, folder / name, find_weights(folder / name), dtype) for name, cls in _WRITTEN.items()
    }
    return _assemble(config, **parts).to(device)


def random_prompt(
    kind: str, *, device: torch.device | str, dtype: torch.dtype, seed: int = 0, batch: int = 1
) -> dict[str, torch.Tensor]:
    """Prompt embeddings as keyword arguments of the pipeline's call: `[batch, 77, C]`, SDXL's pooled `[batch, P]`."""
    config = _config(kind)
    generator = torch.Generator("cpu").manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    width = config.unet["cross_attention_dim"]
    prompt = {
        "prompt_embeds": normal(batch, 77, width),
        "negative_prompt_embeds": normal(batch, 77, width),
    }
    if config.xl:
        prompt["pooled_prompt_embeds"] = normal(batch, _pooled_width(config))
        prompt["negative_pooled_prompt_embeds"] = normal(batch, _pooled_width(config))
    return prompt


def config_hash(kind: str) -> str:
    """SHA-256 (hex) of a kind's configuration: with the seed it names the model."""
    return hashlib.sha256(json.dumps(dataclasses.asdict(_config(kind)), sort_keys=True).encode()).hexdigest()


def _config(kind: str) -> RandomModelConfig:
    if kind not in KINDS:
        raise InputError("kind", kind, f"known: {', '.join(KINDS)}")
    return KINDS[kind]


def _pooled_width(config: RandomModelConfig) -> int:
    return config.unet["projection_class_embeddings_input_dim"] - 6 * config.unet["addition_time_embed_dim"]


def _materialise(
    cls: Any, arguments: dict[str, Any], device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> Any:
    with torch.device("meta"):
        model = cls(**arguments)
    nn.Module.to(model, dtype)  # not model.to: diffusers warns about casting, and nothing is cast here
    model = model.to_empty(device=device).requires_grad_(False).eval()
    if list(model.buffers()):
        raise RuntimeError(f"{cls.__name__} has buffers, which to_empty leaves unset")
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
                centre = 1.0 if name == "weight" else 0.0
                parameter.normal_(centre, _BIAS_STD, generator=generator)
            elif name == "weight":
                fan_in = math.prod(parameter.shape[1:])
                parameter.normal_(0.0, fan_in**-0.5, generator=generator)
            elif name == "bias":
                parameter.normal_(0.0, _BIAS_STD, generator=generator)
            else:
                raise RuntimeError(f"no rule for {name} of {type(module).__name__}")
    return model


def _scale_branches(unet: Any) -> None:
    """Keep the variance that a stack of transformer blocks adds at that of one block."""
    for stack in unet.modules():
        if isinstance(stack, Transformer2DModel):
            blocks: Any = stack.transformer_blocks
            for last in (last for block in blocks for last in _last_layers(block)):
                for parameter in last.parameters():
                    parameter *= len(blocks) ** -0.5


def _last_layers(block: Any) -> tuple[nn.Module, ...]:
    """The layers whose output is added to the residual stream."""
    return block.attn1.to_out[0], block.attn2.to_out[0], block.ff.net[2]


def _assemble(config: RandomModelConfig, unet: Any, vae: Any) -> Any:
    scheduler = getattr(diffusers, config.scheduler)(**config.scheduler_config)
    parts: dict[str, Any] = {"vae": vae, "unet": unet, "scheduler": scheduler, "text_encoder": None, "tokenizer": None}
    if config.xl:
        parts |= {"text_encoder_2": None, "tokenizer_2": None, "add_watermarker": False}
        return StableDiffusionXLPipeline(**parts)
    parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return StableDiffusionPipeline(**parts)


def _calibration_inputs(
    config: RandomModelConfig, device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> dict[str, Any]:
    """Arguments of one UNet forward with a guidance batch of 2, at a quarter of the model's size or 16 latents."""
    side = max(16, config.unet["sample_size"] // 2)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    inputs: dict[str, Any] = {
        "sample": normal(2, 4, side, side),
        "timestep": torch.randint(0, 1000, (), generator=generator, device=device),
        "encoder_hidden_states": normal(2, 77, config.unet["cross_attention_dim"]),
    }
    if config.xl:
        size = 8 * side
        time_ids = torch.tensor([[size, size, 0, 0, size, size]] * 2, device=device, dtype=dtype)
        inputs["added_cond_kwargs"] = {"text_embeds": normal(2, _pooled_width(config)), "time_ids": time_ids}
    return inputs


def _visit_scores(unet: Any, inputs: dict[str, Any], scale_to: float | None = None) -> dict[str, float]:
    """Standard deviation of every attention layer's scores in one forward; with `scale_to`, set it on the way.

    A layer is scaled before it runs, so the layers after it see its final output.
    """
    found: dict[str, float] = {}

    def hook_for(name: str) -> Any:
        def hook(attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            context = kwargs.get("encoder_hidden_states")
            hidden = args[0] if args else kwargs["hidden_states"]
            found[name] = _score_std(attention, hidden, hidden if context is None else context)
            if scale_to is not None:
                for projection in (attention.to_q, attention.to_k):
                    projection.weight *= (scale_to / found[name]) ** 0.5

        return hook

    hooks = [
        module.register_forward_pre_hook(hook_for(name), with_kwargs=True)
        for name, module in unet.named_modules()
        if isinstance(module, Attention)
    ]
    try:
        unet(**inputs, return_dict=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _score_std(attention: Any, hidden: torch.Tensor, context: torch.Tensor) -> float:
    """Root mean square over query rows of the standard deviation over keys: what softmax doesn't cancel."""
    heads = attention.heads
    step = max(1, hidden.shape[1] // _SAMPLED_ROWS)
    query = attention.to_q(hidden[:, ::step]).float().unflatten(-1, (heads, -1)).transpose(1, 2)
    key = attention.to_k(context).float().unflatten(-1, (heads, -1)).transpose(1, 2)
    scores = query @ key.transpose(-1, -2) * attention.scale
    return scores.var(dim=-1).mean().sqrt().item()
