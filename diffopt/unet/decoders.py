"""The decoders of pipelines' VAEs: fused while an optimized pipeline uses them; which, and why others are not.

Only modules inside the decoder change. Tiles and slices are calls of it like others, encoders and the 1×1 convolution
before a decoder (which has no layout to change) stay as they are. Pipelines that move a VAE to float32 and back for
each picture move its weights' values alone: their layout stays.
"""

from collections.abc import Iterable
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.autoencoders.vae import Decoder

from diffopt.attention.backends import pytorch_choice
from diffopt.attention.layers import attention_modules
from diffopt.unet import fused
from diffopt.unet.parts import Parts

STAGES = frozenset((fused.NORMS, fused.PRODUCTS))


class FusedDecoders(Parts):
    """Decoders whose blocks are fused, each with the pipeline that it is for."""

    def __init__(self) -> None:
        super().__init__(fused.take_off)

    def add(self, pipe: Any, device: torch.device) -> None:
        """Fuse the decoder of a pipeline's VAE, if it has one that can be. Done again, it does what is not done yet."""
        vae = getattr(pipe, "vae", None)
        if vae is not None and not reasons(vae, device):
            self.note(vae.decoder, pipe)  # first: what fails halfway is to be taken off, too
            fused.put_on(vae.decoder, STAGES)


def reasons(vae: Any, device: torch.device) -> list[str]:
    """Why a VAE's decoder stays as it is, where the step's kernels run on `device`; empty if it can be fused."""
    decoder = getattr(vae, "decoder", None)
    if type(decoder) is not Decoder:
        return ["diffopt does not know this decoder"]
    here = _device(vae)
    if here.type == device.type and (None in (here.index, device.index) or here.index == device.index):
        return []
    return [f"it runs on {here}, the UNet on {device}"]


def _device(vae: Any) -> torch.device:
    """Where a VAE runs: while a whole model is offloaded, the hook that moves it knows."""
    hooked = getattr(getattr(vae, "_hf_hook", None), "execution_device", None)
    return torch.device(next(vae.decoder.parameters()).device if hooked is None else hooked)


def summary(pipelines: Iterable[Any], device: torch.device, unfused: list[str]) -> list[dict[str, Any]]:
    """The VAEs of pipelines, once each, as plain data.

    Args:
        device: where the pipelines run.
        unfused: why the step's kernels don't run there.

    Returns:
        For each VAE its class ("kind"), what of its decoder is "fused" and "kept" (as `fused.summary`), "reasons" why
        the decoder as a whole is not, and its "attention", which stays as it is: name, heads, head_dim, processor, and
        which of its kernels PyTorch's SDPA takes there ("sdpa", empty for processors that call something else).
    """
    vaes = {id(vae): vae for pipe in pipelines if (vae := getattr(pipe, "vae", None)) is not None}
    rows = []
    for vae in vaes.values():
        decoder = getattr(vae, "decoder", None)
        if isinstance(decoder, torch.nn.Module) and fused.is_on(decoder):
            row = {**fused.summary(decoder), "reasons": []}
        else:
            why = unfused or reasons(vae, device) or ["it is new here; optimize() again changes that"]
            row = {"fused": {}, "kept": [], "shared": [], "reasons": why}
        rows.append({"kind": type(vae).__name__, **row, "attention": _attention(decoder, device)})
    return rows


def _attention(decoder: Any, device: torch.device) -> list[dict[str, Any]]:
    if not isinstance(decoder, torch.nn.Module):
        return []
    return [
        {
            "name": name,
            "heads": attn.heads,
            "head_dim": attn.inner_dim // attn.heads,
            "processor": type(attn.processor).__name__,
            "sdpa": _sdpa(attn, device),
        }
        for name, attn in attention_modules(decoder).items()
    ]


def _sdpa(attn: Attention, device: torch.device) -> str:
    if type(attn.processor) is not AttnProcessor2_0:
        return ""
    return pytorch_choice(attn.heads, attn.inner_dim // attn.heads, attn.to_q.weight.dtype, device)
