"""The kinds of pipelines around one model: its own, image to image, inpainting, and those with ControlNets."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers import ControlNetModel, MultiControlNetModel
from tiny_model import tiny_pipeline
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

SIDE = 64
STEPS = 3


def random_controlnet(unet: torch.nn.Module, vae: torch.nn.Module, seed: int = 0) -> ControlNetModel:
    """A ControlNet of the UNet's encoder whose residuals are not zero, in the UNet's dtype and on its device."""
    levels = len(vae.config.block_out_channels)
    torch.manual_seed(seed)
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8,) * levels)
    generator = torch.Generator().manual_seed(seed)
    picture = net.controlnet_cond_embedding
    for conv in (*net.controlnet_down_blocks, net.controlnet_mid_block, picture.conv_out):  # diffusers has zeros there
        spread = 0.3 * conv.weight[0].numel() ** -0.5
        conv.weight.data = torch.randn(conv.weight.shape, generator=generator) * spread
        conv.bias.data = torch.randn(conv.bias.shape, generator=generator) * 0.02
    net.requires_grad_(False)
    picture = picture.float()
    picture.conv_out.weight /= (picture(images(7)) - picture(images(8))).std()  # so that pictures matter,
    picture.conv_out.bias -= picture(images()).mean(dim=(0, 2, 3))  # and not what all have in common
    parameter = next(unet.parameters())
    return torch.nn.Module.to(net, parameter.device, parameter.dtype).eval()


def images(seed: int = 0) -> torch.Tensor:
    """A picture of squares [1, 3, SIDE, SIDE]."""
    squares = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(seed)).round()
    return squares.repeat_interleave(SIDE // 4, dim=-1).repeat_interleave(SIDE // 4, dim=-2)


def mask() -> torch.Tensor:
    """What to paint: the left half."""
    area = torch.zeros(1, 1, SIDE, SIDE)
    area[..., : SIDE // 2] = 1
    return area


def made(kind: str, pipe: Any, **parts: Any) -> Any:
    """A pipeline of another class around the same parts."""
    cls = getattr(diffusers, kind)
    known = {name: part for name, part in pipe.components.items() if name in inspect.signature(cls).parameters}
    new = cls(**{**known, **parts}, requires_safety_checker=False)
    new.set_progress_bar_config(disable=True)
    return new


def with_mask_channels(pipe: Any) -> Any:
    """Give the UNet the 9 input channels of inpainting models."""
    old = pipe.unet.conv_in
    conv = torch.nn.Conv2d(9, old.out_channels, old.kernel_size, padding=old.padding)
    weight = torch.randn(conv.weight.shape, generator=torch.Generator().manual_seed(5)) * 0.02
    weight[:, :4] = old.weight.float().cpu()
    conv.weight.data, conv.bias.data = weight, old.bias.float().cpu()
    pipe.unet.conv_in = conv.requires_grad_(False).to(old.weight.device, old.weight.dtype)
    pipe.unet.register_to_config(in_channels=9)
    return pipe


def _nets(pipe: Any, count: int) -> list[ControlNetModel]:
    return [random_controlnet(pipe.unet, pipe.vae, seed) for seed in range(count)]


def _with_net(name: str) -> Callable[[Any], Any]:
    return lambda pipe: made(name, pipe, controlnet=_nets(pipe, 1)[0])


def _with_two(pipe: Any) -> Any:
    return made("StableDiffusionControlNetPipeline", pipe, controlnet=_nets(pipe, 2))


def _with_one_twice(pipe: Any) -> Any:
    return made("StableDiffusionControlNetPipeline", pipe, controlnet=MultiControlNetModel(_nets(pipe, 1) * 2))


@dataclasses.dataclass(frozen=True)
class Kind:
    """How a pipeline is made of a text-to-image one, what it is called with, and how many ControlNets it has."""

    make: Callable[[Any], Any]
    options: Callable[[], dict[str, Any]]
    nets: int = 0


def _size() -> dict[str, Any]:
    return {"width": SIDE, "height": SIDE}


def _painting() -> dict[str, Any]:
    return {"image": images(), "mask_image": mask(), "strength": 1.0, **_size()}


_TWO = {"image": [images(7), images(8)], "controlnet_conditioning_scale": [0.8, 0.5]}
KINDS = {
    "text to image": Kind(lambda pipe: pipe, _size),
    "image to image": Kind(
        lambda pipe: made("StableDiffusionImg2ImgPipeline", pipe), lambda: {"image": images(), "strength": 0.7}
    ),
    "inpainting": Kind(lambda pipe: made("StableDiffusionInpaintPipeline", pipe), _painting),
    "inpainting with 9 channels": Kind(
        lambda pipe: made("StableDiffusionInpaintPipeline", with_mask_channels(pipe)), _painting
    ),
    "ControlNet": Kind(_with_net("StableDiffusionControlNetPipeline"), lambda: {"image": images(7)}, 1),
    "ControlNet in guess mode": Kind(
        _with_net("StableDiffusionControlNetPipeline"), lambda: {"image": images(7), "guess_mode": True}, 1
    ),
    "ControlNet, image to image": Kind(
        _with_net("StableDiffusionControlNetImg2ImgPipeline"),
        lambda: {"image": images(), "control_image": images(7), "strength": 0.7},
        1,
    ),
    "ControlNet, inpainting": Kind(
        _with_net("StableDiffusionControlNetInpaintPipeline"), lambda: {**_painting(), "control_image": images(7)}, 1
    ),
    "two ControlNets": Kind(_with_two, lambda: dict(_TWO), 2),
    "one ControlNet twice": Kind(_with_one_twice, lambda: dict(_TWO), 1),
}


def latents(pipe: Any, *, steps: int = STEPS, **options: Any) -> torch.Tensor:
    """The final latents of a short run with guidance, always from the same noise."""
    prompt = {"prompt": "a red apple", "negative_prompt": "blue"}
    if getattr(pipe, "text_encoder", None) is None:
        prompt = {}
    generator = torch.Generator().manual_seed(0)
    options = {"guidance_scale": 2.0, "output_type": "latent", "generator": generator, **prompt, **options}
    return pipe(num_inference_steps=steps, **options).images


def xl_base_and_refiner(device: torch.device) -> tuple[Any, Any, dict[str, Any]]:
    """SDXL's base, its refiner (other weights, with an aesthetics score), and the embeddings both are called with."""
    whole, options = xl_pipeline(device)
    del options["image"]
    names = ("vae", "unet", "scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    parts = {name: getattr(whole, name) for name in names}
    size = {"block_out_channels": (80, 160), "norm_num_groups": 16, "addition_embed_type": "text_time"}
    five_ids = {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 8 * 5 + 16}
    unet = tiny_pipeline(**size, **five_ids).unet.requires_grad_(False)
    parts_of_refiner = {**parts, "unet": torch.nn.Module.to(unet, device, whole.unet.dtype)}
    base = diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False)
    refiner = diffusers.StableDiffusionXLImg2ImgPipeline(
        **parts_of_refiner, requires_aesthetics_score=True, add_watermarker=False
    )
    for pipe in (base, refiner):
        pipe.set_progress_bar_config(disable=True)
    return base, refiner, options


def xl_with_encoders(device: torch.device) -> Any:
    """A tiny SDXL pipeline with random text encoders of three layers; float16 on a GPU."""
    whole, _ = xl_pipeline(device)
    tokenizer = tiny_pipeline().tokenizer
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,  # of each: the UNet's 16 are both
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=77,
        projection_dim=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    encoders = {"text_encoder": CLIPTextModel(config), "text_encoder_2": CLIPTextModelWithProjection(config)}
    pipe = diffusers.StableDiffusionXLPipeline(
        vae=whole.vae,
        unet=whole.unet,
        scheduler=whole.scheduler,
        **{name: torch.nn.Module.to(model.eval(), device, whole.unet.dtype) for name, model in encoders.items()},
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def xl_pipeline(device: torch.device) -> tuple[Any, dict[str, Any]]:
    """A tiny SDXL pipeline with a ControlNet, and what it is called with; float16 on a GPU."""
    stock = tiny_pipeline(
        block_out_channels=(80, 160),
        norm_num_groups=16,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=8 * 6 + 16,
    )
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    for part in (stock.unet, stock.vae):
        torch.nn.Module.to(part, device, dtype).requires_grad_(False)
    net = random_controlnet(stock.unet, stock.vae)
    parts = {"vae": stock.vae, "unet": stock.unet, "scheduler": stock.scheduler, "controlnet": net}
    parts |= dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    pipe = diffusers.StableDiffusionXLControlNetPipeline(**parts, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    embeds = {
        f"{negative}{name}": torch.randn(shape, generator=generator).to(device, dtype)
        for negative in ("", "negative_")
        for name, shape in (("prompt_embeds", (1, 77, 16)), ("pooled_prompt_embeds", (1, 16)))
    }
    return pipe, {"image": images(7), **embeds}
