"""The certificate of `optimize(pipe, decode="float16")`: the same latents decoded so, exactly, and as stock would."""

import copy
from typing import Any

import torch

from diffopt.errors import OptimizeError
from diffopt.measure.decoding import Decode, DecodeCertificate, decode_certificate
from diffopt.measure.exactness import ieee_float32
from diffopt.unet import float16_decode, fused
from diffopt.unet.float16_decode import Float16Decoder

FAULT = "the scale of the last resnet wrong by a factor of two"


def check_decode(pipe: Any, latents: torch.Tensor) -> DecodeCertificate:
    """The certificate of a pipeline that decodes in float16.

    Args:
        pipe: one that was optimized with `decode="float16"`.
        latents: [B, 4, h, w] as the pipeline holds them, of standard deviation about 1.

    Raises:
        OptimizeError: it decodes as stock does, at all or these latents; says why.
    """
    standing = getattr(pipe.vae, float16_decode.ATTRIBUTE, None)
    if not isinstance(standing, Float16Decoder):
        reasons = float16_decode.summary([pipe])[0]["reasons"]
        raise OptimizeError(f"its VAE decodes as stock does: {', '.join(reasons)}")
    with torch.no_grad():
        return decode_certificate(
            latents.float() / pipe.vae.config.scaling_factor,
            ours=_as_pipelines(copy.deepcopy(pipe.vae)),
            fault=_as_pipelines(_faulty(pipe.vae)),
            fault_name=FAULT,
            float16=_stock(pipe.vae, torch.float16),
            bfloat16=_stock(pipe.vae, torch.bfloat16),
            reference=_stock(pipe.vae, torch.float32),
        )


def _faulty(vae: Any) -> Any:
    faulty = copy.deepcopy(vae)
    getattr(faulty, float16_decode.ATTRIBUTE).proven.decoder.up_blocks[-1].resnets[-1].conv2.weight.mul_(2)
    return faulty


def _as_pipelines(vae: Any) -> Decode:
    """As pipelines that bring their VAE to float32 decode with it."""
    torch.nn.Module.to(vae, torch.float32)
    standing = getattr(vae, float16_decode.ATTRIBUTE)

    def decode(z: torch.Tensor) -> torch.Tensor:
        before, elsewhere = standing.decodes, dict(standing.stock)
        picture = vae.decode(z, return_dict=False)[0]
        if standing.decodes == before:
            reasons = [reason for reason, count in standing.stock.items() if count != elsewhere.get(reason)]
            raise OptimizeError(f"these latents are decoded as stock does: {', '.join(reasons)}")
        return picture

    return decode


def _stock(vae: Any, dtype: torch.dtype) -> Decode:
    stock = copy.deepcopy(vae)
    float16_decode.take_off(stock)
    fused.take_off(stock.decoder)
    torch.nn.Module.to(stock, dtype)

    def decode(z: torch.Tensor) -> torch.Tensor:
        with ieee_float32():
            return stock.decode(z.to(dtype), return_dict=False)[0].float()

    return decode
