"""Decoders whose values are scaled so that float16 holds them: by how much, proven, and how.

All that grows in a decoder is read by a GroupNorm next, and of s · x with eps · s² a norm makes what it makes of x with
eps. So the layers that write to such a stream from normed values have weights and biases times s = 2⁻ᵏ, those that map
the stream to itself only their biases, and norms eps · s²; powers of two change no digit. Each resnet's inner values
and each size of picture have a k of their own (an upsampler's weights bring the stream from one to the next), the
smallest for which `decode_bounds` proves that nothing in the decoder exceeds what float16 holds, of the very weights
that are used.
"""

import copy
import dataclasses
import itertools
import math
from typing import Any

import torch
from torch import nn

from diffopt.unet import decode_bounds

LARGEST = torch.finfo(torch.float16).max * (1 - 2**-6)
"""What no bound may exceed: float16's largest number, less a margin for what subnormal numbers are rounded by."""

SIDES = (2048, 1536, 1024)
"""Pictures up to this side squared, in pixels: the first that something can be proven for."""


@dataclasses.dataclass(frozen=True)
class Proven:
    """A scaled decoder and what is proven of it.

    Attributes:
        decoder: in float16.
        exponent: the largest k; values are scaled by down to 2⁻ᵏ.
        side: pictures may have up to side² pixels.
        latents: their largest absolute value, as the decoder gets them.
        bound: on every value.
    """

    decoder: Any
    exponent: int
    side: int
    latents: float
    bound: float


def prove(vae: Any, latent_limit: float) -> Proven | str:
    """A copy of a VAE's decoder in float16 with the largest of `SIDES` and the smallest exponents for which no value
    exceeds `LARGEST` and no weights lose digits; or why there is none.

    They do where that changes a stream by more than float16 rounds it, by the bounds.
    """
    parts = [part for part in (vae.decoder, vae.post_quant_conv) if part is not None]
    if not all(weight.isfinite().all() for part in parts for weight in part.parameters()):
        return "its weights are not finite"
    reason = ""
    with torch.inference_mode(False):
        for side in SIDES:
            streams = _bounds(vae, vae.decoder, side, latent_limit).streams
            for largest in (LARGEST, LARGEST / 2):  # the second where weights rounded to float16 need it
                exponents = exponents_for(streams, largest)
                decoder = scaled(vae.decoder, exponents)
                found = _bounds(vae, decoder, side, latent_limit)
                reason = _unproven(vae.decoder, decoder, exponents, found)
                if not reason:
                    return Proven(decoder, exponents.largest, side, latent_limit, found.largest)
    return f"{reason}, at {SIDES[-1]}×{SIDES[-1]} pixels"


def _unproven(decoder: Any, copied: Any, exponents: "Exponents", found: decode_bounds.Bounds) -> str:
    for name, layer in copied.named_modules():
        if _weighs(layer) and exponents.of_weight(name):
            error = _weight_error(decoder.get_submodule(name), layer, exponents.of_weight(name))
            if not error * _share(name, found.streams) <= decode_bounds.ROUNDING:
                return f"values would have to be scaled by 2^-{exponents.largest}, where weights of {name} lose digits"
    name, bound = max({**found.streams, **found.others}.items(), key=lambda item: item[1])
    return "" if bound <= LARGEST else f"nothing proves that {name} stays below 65504 (bound {bound:,.0f})"


def _share(name: str, streams: dict[str, float]) -> float:
    """How large what a layer writes is beside the stream that it is added to, by their bounds."""
    name = name.removesuffix(".0") if name.endswith("to_out.0") else name
    into = name.removesuffix(".conv2").removesuffix(".to_out")
    return streams[name] / streams[into] if streams[into] else 0.0


def _bounds(vae: Any, decoder: Any, side: int, latent_limit: float) -> decode_bounds.Bounds:
    pixels = side**2 // magnification(decoder) ** 2
    return decode_bounds.bounds(decoder, vae.post_quant_conv, latent_pixels=pixels, latent_limit=latent_limit)


@dataclasses.dataclass(frozen=True)
class Exponents:
    """The k of 2⁻ᵏ by which values are scaled.

    Attributes:
        inner: of what each resnet's first convolution writes, by its name.
        sizes: of the stream, from the size of the latents to that of the picture.
    """

    inner: dict[str, int]
    sizes: tuple[int, ...]

    @property
    def largest(self) -> int:
        """Of all."""
        return max(*self.inner.values(), *self.sizes)

    def of_output(self, name: str) -> int:
        """Of what a layer writes."""
        if name.endswith(_UNREAD):
            return 0
        return self.inner[name] if name in self.inner else self.sizes[_size(name)]

    def of_input(self, norm: str) -> int:
        """Of what a norm reads."""
        return self.of_output(norm.replace(".norm2", ".conv1")) if norm != "conv_norm_out" else self.sizes[-1]

    def of_weight(self, name: str) -> int:
        """Of a layer's weight: of what it writes, less that of what it reads."""
        if name.endswith("conv_shortcut"):
            return 0
        return self.of_output(name) - (self.sizes[_size(name) - 1] if ".upsamplers." in name else 0)


_UNREAD = ("to_q", "to_k", "to_v", "conv_out")
"""Ends of names of layers that write what no GroupNorm reads."""


def _size(name: str) -> int:
    """At which of a decoder's sizes a layer writes."""
    parts = name.split(".")
    return 0 if parts[0] != "up_blocks" else int(parts[1]) + (parts[2] == "upsamplers")


def exponents_for(streams: dict[str, float], largest: float) -> Exponents:
    """The smallest exponents that bring bounds on streams (`Bounds.streams`) down to `largest`; no size has a smaller
    one than the size before it.
    """
    inner = {name: _exponent(bound, largest) for name, bound in streams.items() if name.endswith(".conv1")}
    sizes = [0] * (1 + max(_size(name) for name in streams))
    for name, bound in streams.items():
        if name not in inner:
            sizes[_size(name)] = max(sizes[_size(name)], _exponent(bound, largest))
    return Exponents(inner, tuple(itertools.accumulate(sizes, max)))


def _exponent(bound: float, largest: float) -> int:
    return max(0, math.ceil(math.log2(bound / largest))) if bound > 0 else 0


@torch.no_grad()
def scaled(decoder: Any, exponents: Exponents) -> Any:
    """A copy of a decoder in float16 with its streams scaled."""
    copied = in_float16(decoder)
    for name, layer in copied.named_modules():
        if type(layer) is nn.GroupNorm:
            layer.eps *= 4.0 ** -exponents.of_input(name)
        elif _weighs(layer):
            exact: Any = decoder.get_submodule(name)
            layer.weight.copy_(exact.weight.float() * 2.0 ** -exponents.of_weight(name))
            if layer.bias is not None:
                layer.bias.copy_(exact.bias.float() * 2.0 ** -exponents.of_output(name))
    return copied


def _weighs(layer: nn.Module) -> bool:
    return type(layer) in (nn.Conv2d, nn.Linear)


def _weight_error(exact: Any, layer: Any, exponent: int) -> float:
    """How far scaled weights are from the weights, relative; small ones become subnormal numbers."""
    error = layer.weight.double() * 2.0**exponent - exact.weight.double()
    return (error.norm() / exact.weight.double().norm().clamp(min=1e-30)).item()


def in_float16(module: Any) -> Any:
    """A copy that nobody trains; of no module none."""
    return None if module is None else nn.Module.to(copy.deepcopy(module), torch.float16).requires_grad_(False).eval()


def magnification(decoder: Any) -> int:
    """How many times as high a picture is as its latents."""
    return 2 ** sum(len(block.upsamplers or ()) for block in decoder.up_blocks)
