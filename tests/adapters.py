"""Random adapters that fit a UNet: what tests load, scale, fuse and unload in place of downloaded ones."""

import torch
from diffusers.models.attention_processor import Attention


def random_lora(
    unet: torch.nn.Module, *, rank: int = 4, strength: float = 0.5, seed: int = 0
) -> dict[str, torch.Tensor]:
    """A LoRA state dict over the query, key, value and output projections of every attention layer.

    Values are scaled so that the change of a projection is about `strength` of the projection itself.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, module in unet.named_modules():
        if not isinstance(module, Attention):
            continue
        for projection in ("to_q", "to_k", "to_v", "to_out.0"):
            linear = module.get_submodule(projection)
            rows, columns = linear.weight.shape
            spread = float(linear.weight.detach().float().std())
            down = torch.randn(rank, columns, generator=generator)
            up = torch.randn(rows, rank, generator=generator) * spread * strength * rank**-0.5
            weights[f"unet.{name}.{projection}.lora_A.weight"] = down
            weights[f"unet.{name}.{projection}.lora_B.weight"] = up
    return weights


IMAGE_EMBEDDING = 64
"""Width of the image embeddings that `random_ip_adapter` takes."""


def random_ip_adapter(unet: torch.nn.Module, *, tokens: int = 4, seed: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    """An IP-Adapter state dict (plain kind, four image tokens) for every cross-attention layer."""
    generator = torch.Generator().manual_seed(seed)
    width = unet.config.cross_attention_dim
    image = {
        "proj.weight": torch.randn(tokens * width, IMAGE_EMBEDDING, generator=generator) * IMAGE_EMBEDDING**-0.5,
        "proj.bias": torch.zeros(tokens * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    adapter = {}
    number = 1
    for name in unet.attn_processors:
        if name.endswith("attn2.processor"):
            attn = unet.get_submodule(name.removesuffix(".processor"))
            for projection in ("to_k_ip", "to_v_ip"):
                shape = (attn.inner_dim, width)
                adapter[f"{number}.{projection}.weight"] = torch.randn(shape, generator=generator) * width**-0.5
            number += 2
    return {"image_proj": image, "ip_adapter": adapter}


def random_image_embeds(unet: torch.nn.Module, *, seed: int = 0) -> list[torch.Tensor]:
    """Image embeddings [2, 1, IMAGE_EMBEDDING] for `ip_adapter_image_embeds`: the negative one first."""
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(2, 1, IMAGE_EMBEDDING, generator=generator)
    parameter = next(unet.parameters())
    return [embeds.to(parameter.device, parameter.dtype)]
