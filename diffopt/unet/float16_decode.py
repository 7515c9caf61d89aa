"""A VAE that stock decodes in float32, because float16 overflows, decoded in float16 all the same, by a scaled decoder.

The scaled weights are a second decoder, 99 MB for SDXL. The VAE's own stay what they are, whatever its pipelines do to
their dtypes: encoding is stock's, and so is a decode that the proof does not cover.
"""

import collections
import copy
import types
from collections.abc import Iterable
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vae import DecoderOutput

from diffopt.unet import decode_bounds, fused
from diffopt.unet.parts import Parts
from diffopt.unet.scaled_decoder import Proven, in_float16, magnification, prove

STOCK, FLOAT16 = "stock", "float16"
MODES = (STOCK, FLOAT16)
"""What `optimize` takes as `decode`."""

ATTRIBUTE = "diffopt_float16"
"""The plain attribute of a VAE that holds its `Float16Decoder`, or in words why there is none."""

LATENTS = 32.0
"""Limit of latents as pipelines hold them, where their standard deviation is about 1 and 5 is rare."""

CHANGED = "its weights or modules are others than when diffopt.optimize() saw them"
NOT_FINITE = "the picture was not finite in float16"


class Float16Decoder:
    """What stands in for a VAE's decoder, and how often it did.

    Attributes:
        proven: the decoder and what it may be used for.
        decodes: how many calls this decoder served.
        stock: how many went stock's way instead, by reason.
    """

    def __init__(self, vae: Any, proven: Proven) -> None:
        self.proven = proven
        self.decodes = 0
        self.stock: collections.Counter[str] = collections.Counter()
        self._before = in_float16(vae.post_quant_conv)
        self._source = vae.decoder
        self._sums = _checksums(vae)

    def decode(self, vae: Any, z: torch.Tensor) -> torch.Tensor | None:
        """The picture [B, 3, H, W] of latents in float32; None, and counted, where stock has to make it."""
        reason = self._reason(vae, z)
        picture = None
        if not reason:
            picture = self._stand_in(vae).decode(z.half(), return_dict=False)[0].float()
            # One look at the GPU for all three; the picture is fetched next.
            same = (_checksums(vae) == self._sums).all()
            small, finite = z.abs().amax() <= self.proven.latents, picture.isfinite().all()
            reason = self._verdict(*torch.stack([same, small, finite]).tolist())
        if reason:
            self.stock[reason] += 1
            return None
        self.decodes += 1
        return picture

    def stands(self, vae: Any) -> bool:
        """Whether this was made from a VAE as it is."""
        here = next(self.proven.decoder.parameters()).device == next(vae.decoder.parameters()).device
        return here and not self._changed(vae) and bool((_checksums(vae) == self._sums).all())

    def _reason(self, vae: Any, z: torch.Tensor) -> str:
        """Why these latents are not decoded here, as far as it is known beforehand."""
        device = next(self.proven.decoder.parameters()).device
        height, width = z.shape[-2:]
        if vae.use_tiling:  # decoders see tiles, and an untiled picture is smaller than one
            height, width = (min(size, vae.tile_latent_min_size) for size in (height, width))
        if self._changed(vae):
            return CHANGED
        if z.dtype != torch.float32 or next(vae.decoder.parameters()).dtype != torch.float32:
            return "stock decodes it in float16, too"
        if z.device != device or next(vae.decoder.parameters()).device != device or "_hf_hook" in vae.__dict__:
            return "the VAE was moved or is offloaded"
        if torch.is_grad_enabled() or torch.is_autocast_enabled(device.type):
            return "gradients or autocast are on"
        if height * width * magnification(vae.decoder) ** 2 > self.proven.side**2:
            return f"the picture has more than {self.proven.side}×{self.proven.side} pixels"
        return ""

    def _changed(self, vae: Any) -> bool:
        return vae.decoder is not self._source or bool(_module_reasons(vae))

    def _verdict(self, same: bool, small: bool, finite: bool) -> str:
        if not same:
            return CHANGED
        if not small:
            return f"its latents exceed {self.proven.latents:.0f}"
        return "" if finite else NOT_FINITE

    def _stand_in(self, vae: Any) -> Any:
        """The VAE with its slices and tiles as they are set now, and this decoder."""
        other = copy.copy(vae)
        parts = {"decoder": self.proven.decoder, "post_quant_conv": self._before}
        other.__dict__["_modules"] = {**vae.__dict__["_modules"], **parts}
        other.__dict__.pop("decode", None)
        return other


class Float16Decoders(Parts):
    """VAEs that decode in float16, each with the pipeline that it is for."""

    def __init__(self) -> None:
        super().__init__(take_off)

    def add(self, pipe: Any) -> None:
        """Let a pipeline's VAE decode in float16, if stock doesn't and it can be proven to be safe. Done again, it does
        what is not done yet, and anew what was done to other weights.
        """
        vae = getattr(pipe, "vae", None)
        if vae is None or reasons(pipe):
            return
        self.note(vae, pipe)
        standing = getattr(vae, ATTRIBUTE, None)
        if not isinstance(standing, Float16Decoder) or not standing.stands(vae):
            take_off(vae)
            proven = prove(vae, LATENTS / vae.config.scaling_factor)
            setattr(vae, ATTRIBUTE, proven if isinstance(proven, str) else Float16Decoder(vae, proven))
        if isinstance(getattr(vae, ATTRIBUTE), Float16Decoder):
            vae.decode = types.MethodType(_decode, vae)


def reasons(pipe: Any) -> list[str]:
    """Why a pipeline's VAE decodes as stock does, before anything is said of its numbers; empty if it need not."""
    vae: Any = pipe.vae
    if type(vae) is not AutoencoderKL:
        return ["diffopt does not know this VAE"]
    if vae.dtype != torch.float16:
        return [f"stock decodes it in {str(vae.dtype).removeprefix('torch.')}, its own dtype"]
    if not (vae.config["force_upcast"] and hasattr(pipe, "upcast_vae")):
        return ["stock decodes it in float16, too"]
    if "_hf_hook" in vae.__dict__:
        return ["it is offloaded"]
    if "decode" in vae.__dict__ and not is_on(vae):
        return ["it has a decode of its own"]
    return _module_reasons(vae)


def _module_reasons(vae: Any) -> list[str]:
    found = decode_bounds.reasons(vae.decoder)
    for part in [] if found else [*vae.decoder.modules(), vae.post_quant_conv]:
        if part is None:
            continue
        own = "forward" in part.__dict__ and not fused.is_ours(part)
        if own or "_conv_forward" in part.__dict__ or part._forward_hooks or part._forward_pre_hooks:
            found.append(f"its {type(part).__name__} has hooks or a forward of its own")
    return found


def is_on(vae: Any) -> bool:
    """Whether a VAE decodes in float16 by this module."""
    return getattr(vae.__dict__.get("decode"), "__func__", None) is _decode


def take_off(vae: Any) -> None:
    """Stock's decode again, where ours is still in place."""
    if is_on(vae):
        del vae.decode
    vae.__dict__.pop(ATTRIBUTE, None)  # a decode that somebody put around ours is stock's without it


def _decode(vae: Any, z: torch.Tensor, return_dict: bool = True, generator: Any = None) -> Any:
    """`AutoencoderKL.decode`."""
    standing = vae.__dict__.get(ATTRIBUTE)
    picture = _decoded(standing, vae, z) if isinstance(standing, Float16Decoder) else None
    if picture is None:
        return type(vae).decode(vae, z, return_dict, generator)
    return DecoderOutput(sample=picture) if return_dict else (picture,)


@torch.compiler.disable()  # it looks at what a graph would have baked in
def _decoded(standing: Float16Decoder, vae: Any, z: torch.Tensor) -> torch.Tensor | None:
    return standing.decode(vae, z)


@torch.no_grad()
def _checksums(vae: Any) -> torch.Tensor:
    """The sum of the bits of each weight of a decoder and of what stands before it, in float32."""
    parts = [part for part in (vae.decoder, vae.post_quant_conv) if part is not None]
    weights = [weight for part in parts for weight in part.parameters()]
    return torch.stack([weight.float().view(torch.int32).sum() for weight in weights])


def summary(pipelines: Iterable[Any]) -> list[dict[str, Any]]:
    """How the VAEs of pipelines decode, once each, as plain data.

    Returns:
        For each VAE "reasons" why it decodes as stock does; where there are none, "exponent", "side" (pixels),
        "latents" and "bound" (`Proven`), and how many calls were decoded so ("decodes") and as stock ("stock",
        by reason).
    """
    users = {id(vae): pipe for pipe in pipelines if (vae := getattr(pipe, "vae", None)) is not None}
    return [_row(pipe, getattr(pipe.vae, ATTRIBUTE, None)) for pipe in users.values()]


def _row(pipe: Any, standing: Float16Decoder | str | None) -> dict[str, Any]:
    if not isinstance(standing, Float16Decoder):
        return {"reasons": reasons(pipe) or [standing or "it is new here; optimize() again changes that"]}
    return {
        "reasons": [],
        "exponent": standing.proven.exponent,
        "side": standing.proven.side,
        "latents": standing.proven.latents,
        "bound": standing.proven.bound,
        "decodes": standing.decodes,
        "stock": dict(standing.stock),
    }


def lines(row: dict[str, Any]) -> list[str]:
    """A row of `summary` in words."""
    if row["reasons"]:
        return [f"decodes as stock, decode='float16' has no effect: {', '.join(row['reasons'])}"]
    found = [
        f"decodes in float16: values scaled by down to 2^-{row['exponent']}, below 65504 for pictures of up to "
        f"{row['side']}×{row['side']} pixels and latents up to {row['latents']:.0f} (bound {row['bound']:,.0f}), "
        f"{row['decodes']} so far"
    ]
    return found + [f"decoded as stock: {count} times: {reason}" for reason, count in row["stock"].items()]
