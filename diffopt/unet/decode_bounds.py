"""How large the values of a VAE's decoder can get, whatever the picture: bounds that are proven, not measured.

A GroupNorm over n elements gives values whose squares sum to at most n, before its weight and bias; |silu(y)| ≤ |y|. So
after a norm of C channels and P pixels every patch z of normed values satisfies Σ (z / weight)² ≤ C · P, and what a
convolution W makes of it at one pixel, a vector of channels, lies in an ellipsoid {x : d · x ≤ √(d'Qd) for every d}
with Q = C · P · W diag(weight²) W'. From there to the next norm all is linear: sums, shortcuts, convolutions of the
image at twice its size. A matrix A makes AQA' of Q, and the sum of ellipsoids is inside of one again (`_sum`: that of
the smallest trace). The bound on channel c is √Q[c, c]. Pixels of a picture at 2ˡ times the latents' size have an
ellipsoid for each of their 4ˡ places within a latent pixel; neighbours outside of the picture are zero and inside of
every ellipsoid. Attention gives mixtures of values with weights that sum to 1, and ellipsoids are convex.

Every product is computed with errors of `ROUNDING` of each output and `_SUMMING` of each of its terms, norms with
`_NORMING`; a ball of the errors' length is added to the ellipsoid. Assumed are sums in float32 and exact statistics in
norms: of a group whose values vary by less than a thousandth of their mean that is not so, in stock's float32 neither.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.autoencoders.vae import Decoder
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2D, UpDecoderBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn

ROUNDING = 2.0**-11
"""Unit roundoff of float16: an output's, and that of weights which a kernel adds up first."""

_SUMMING = 2.0**-23  # a term's share of error for each term that is added in float32, even where digits are cut off
_NORMING = 2.0**-8  # of a norm's outputs and of attention's weights, relative; a few roundings of float16 each

Grid = list[list[torch.Tensor]]
"""Ellipsoids [C, C] by a pixel's place, row and column, within a latent pixel."""


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Largest absolute values by the layer that writes them.

    Attributes:
        streams: those that a GroupNorm reads, which may be scaled.
        others: those that may not: outputs of norms, queries, keys, values, attention, pictures.
    """

    streams: dict[str, float]
    others: dict[str, float]

    @property
    def largest(self) -> float:
        """Of all of them."""
        return max(*self.streams.values(), *self.others.values())


def reasons(decoder: Any) -> list[str]:
    """Why nothing can be proven of a decoder; empty if something can."""
    if type(decoder) is not Decoder:
        return ["diffopt does not know this decoder"]
    strange = {type(module).__name__ for module in decoder.modules() if type(module) not in _REASONS}
    if strange:
        return [f"diffopt does not know its {name}" for name in sorted(strange)]
    found = [(name, _REASONS[type(module)](module)) for name, module in decoder.named_modules()]
    return [f"{name} {reason}" for name, reason in found if reason]


def _resnet_reason(block: Any) -> str:
    changes = block.upsample is not None or block.downsample is not None or block.output_scale_factor != 1
    if changes or block.time_emb_proj is not None or type(block.nonlinearity) is not nn.SiLU:
        return "is no resnet of norms, SiLU and convolutions alone"
    return ""


def _attention_reason(attn: Any) -> str:
    plain = type(attn.processor) is AttnProcessor2_0 and attn.residual_connection and attn.rescale_output_factor == 1
    extra = (attn.spatial_norm, attn.norm_q, attn.norm_k, attn.norm_cross)
    if not plain or type(attn.group_norm) is not nn.GroupNorm or any(part is not None for part in extra):
        return "is not the attention of PyTorch's SDPA between a norm and a sum"
    return ""


def _convolution_reason(conv: nn.Conv2d) -> str:
    known = (conv.kernel_size, conv.padding) in (((1, 1), (0, 0)), ((3, 3), (1, 1)))
    usual = (conv.stride, conv.dilation, conv.groups, conv.padding_mode) == ((1, 1), (1, 1), 1, "zeros")
    return "" if known and usual else "is no 1×1 or 3×3 convolution that keeps the size"


def _upsample_reason(block: Any) -> str:
    usual = block.norm is None and block.use_conv and not block.use_conv_transpose and block.interpolate
    return "" if usual and block.name == "conv" else "doesn't double the size and convolve"


def _no_reason(_: nn.Module) -> str:
    return ""


_REASONS: dict[type[nn.Module], Any] = {
    **dict.fromkeys((Decoder, UNetMidBlock2D, UpDecoderBlock2D, nn.ModuleList, nn.Linear, nn.SiLU), _no_reason),
    ResnetBlock2D: _resnet_reason,
    Attention: _attention_reason,
    nn.Conv2d: _convolution_reason,
    Upsample2D: _upsample_reason,
    nn.GroupNorm: lambda norm: "" if norm.affine else "has no weight",
    nn.Dropout: lambda dropout: "drops values" if dropout.p else "",
}


@torch.no_grad()
def bounds(decoder: Any, before: nn.Conv2d | None, *, latent_pixels: int, latent_limit: float) -> Bounds:
    """Bounds on a decoder's values, from its weights as they are.

    Args:
        decoder: one without `reasons`, on any device, in any dtype.
        before: the 1×1 convolution of latents that stands before it, if there is one.
        latent_pixels: the largest height times width of latents.
        latent_limit: their largest absolute value.
    """
    return _Walk(latent_pixels).decoder(decoder, before, latent_limit)


class _Walk:
    """One walk along a decoder: where the stream is, and what was found so far."""

    def __init__(self, pixels: int) -> None:
        self._pixels = pixels
        self._streams: dict[str, float] = {}
        self._others: dict[str, float] = {}

    def decoder(self, decoder: Any, before: nn.Conv2d | None, limit: float) -> Bounds:
        channels = decoder.conv_in.in_channels
        device = decoder.conv_in.weight.device
        latents = torch.eye(channels, dtype=torch.float64, device=device) * channels * limit**2
        if before is not None:
            latents = _linear(before, [latents])
        self._others["latents"] = max(limit, _width(latents))
        stream = [[self._stream("conv_in", _linear(decoder.conv_in, [latents] * 9))]]
        mid = decoder.mid_block
        stream = self._resnet("mid_block.resnets.0", mid.resnets[0], stream)
        for i, (attn, resnet) in enumerate(zip(mid.attentions, mid.resnets[1:], strict=True)):
            if attn is not None:
                stream = self._attention(f"mid_block.attentions.{i}", attn, stream)
            stream = self._resnet(f"mid_block.resnets.{i + 1}", resnet, stream)
        for i, block in enumerate(decoder.up_blocks):
            for j, resnet in enumerate(block.resnets):
                stream = self._resnet(f"up_blocks.{i}.resnets.{j}", resnet, stream)
            for j, upsampler in enumerate(block.upsamplers or ()):
                stream = self._upsampled(f"up_blocks.{i}.upsamplers.{j}.conv", upsampler.conv, stream)
        picture = _of_normed(decoder.conv_out, self._normed("conv_norm_out", decoder.conv_norm_out, 9))
        self._others["conv_out"] = _width(picture)
        return Bounds(self._streams, self._others)

    def _stream(self, name: str, q: torch.Tensor) -> torch.Tensor:
        self._streams[name] = max(self._streams.get(name, 0.0), _width(q))
        return q

    def _normed(self, name: str, norm: nn.GroupNorm, taps: int) -> torch.Tensor:
        """Squared half-axes [C] of the ellipsoid of a patch of normed values, `taps` pixels in all."""
        weight, bias = norm.weight.double().square(), norm.bias.double().square()
        of_group = norm.num_channels // norm.num_groups * self._pixels
        self._others[name] = (weight.sqrt() * of_group**0.5 + bias.sqrt()).max().item() * (1 + _NORMING)
        # Normed values times the weight, in an ellipsoid, plus a share of the bias (silu(y) is y times less than 1).
        return _sum([weight * norm.num_channels * self._pixels, bias * norm.num_channels * taps]) * (1 + _NORMING) ** 2

    def _resnet(self, name: str, block: Any, stream: Grid) -> Grid:
        hidden = _of_normed(block.conv1, self._normed(f"{name}.norm1", block.norm1, 9))
        self._stream(f"{name}.conv1", hidden)
        new = _of_normed(block.conv2, self._normed(f"{name}.norm2", block.norm2, 9))
        self._stream(f"{name}.conv2", new)
        if block.conv_shortcut is not None:
            stream = [
                [self._stream(f"{name}.conv_shortcut", _linear(block.conv_shortcut, [q])) for q in row]
                for row in stream
            ]
        return self._added(name, new, stream)

    def _added(self, name: str, new: torch.Tensor, stream: Grid) -> Grid:
        return [[self._stream(name, _rounded_sum(q, new)) for q in row] for row in stream]

    def _attention(self, name: str, attn: Any, stream: Grid) -> Grid:
        normed = self._normed(f"{name}.group_norm", attn.group_norm, 1)
        for part in ("to_q", "to_k", "to_v"):
            self._others[f"{name}.{part}"] = _width(_of_normed(getattr(attn, part), normed)) * (1 + _NORMING)
        values = _of_normed(attn.to_v, normed) * (1 + _NORMING) ** 2
        heads = torch.arange(len(values), device=values.device).chunk(attn.heads)
        out = attn.to_out[0]
        weight = out.weight.double()
        parts = [(weight[:, head], values[head][:, head]) for head in heads]
        new = self._stream(f"{name}.to_out", _products(parts, out.bias))
        return self._added(name, new, stream)

    def _upsampled(self, name: str, conv: nn.Conv2d, stream: Grid) -> Grid:
        """Twice the size: a pixel has 4 neighbours there were before, with sums of the weights."""
        self._pixels *= 4
        places = len(stream)
        halves = [_halves(i, places) for i in range(2 * places)]
        kernel = conv.weight.double()

        def pixel(rows: Any, columns: Any) -> torch.Tensor:
            parts = [
                (kernel[:, :, slice(*taps)][:, :, :, slice(*others)].sum((2, 3)), stream[row][column])
                for row, taps in rows
                for column, others in columns
            ]
            return self._stream(name, _products(parts, conv.bias))

        return [[pixel(rows, columns) for columns in halves] for rows in halves]


def _halves(place: int, places: int) -> list[tuple[int, tuple[int, int]]]:
    """The two pixels of the small image that the three taps at one place of the large one read: where, which taps."""
    here = place // 2
    if place % 2 == 0:
        return [((here - 1) % places, (0, 1)), (here, (1, 3))]
    return [(here, (0, 2)), ((here + 1) % places, (2, 3))]


def _sum(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """An ellipsoid around the sum of ellipsoids, as matrices or as diagonals of them; the one of the smallest trace.

    (Σ √aᵢ)² ≤ Σ aᵢ / tᵢ for weights tᵢ that sum to 1.
    """
    roots = [_trace(part) ** 0.5 for part in parts]
    total = math.fsum(roots)
    found = torch.zeros_like(parts[0])
    for part, root in zip(parts, roots, strict=True):
        if root:
            found += part * (total / root)
    return found


def _trace(q: torch.Tensor) -> float:
    return (q.diagonal() if q.dim() == 2 else q).sum().item()


def _width(q: torch.Tensor) -> float:
    return q.diagonal().max().sqrt().item()


def _longest(q: torch.Tensor) -> float:
    """At least the longest half-axis."""
    return min(_trace(q), q.abs().sum(1).max().item()) ** 0.5


def _with_ball(q: torch.Tensor, radius: float) -> torch.Tensor:
    return _sum([q, torch.eye(len(q), dtype=q.dtype, device=q.device) * radius**2])


def _with_bias(parts: list[torch.Tensor], bias: torch.Tensor | None) -> torch.Tensor:
    return _sum(parts if bias is None else [*parts, torch.outer(bias.double(), bias.double())])


def _rounded_sum(q: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    total = _sum([q, other])
    return _with_ball(total, ROUNDING * _longest(total))


def _of_normed(layer: Any, normed: torch.Tensor) -> torch.Tensor:
    """What a layer makes of a patch of normed values, whose squared half-axes [C] are given."""
    weight = layer.weight.double().flatten(2) if layer.weight.dim() == 4 else layer.weight.double()[:, :, None]
    scaled = (weight * normed.sqrt()[:, None]).flatten(1)
    q = _with_bias([scaled @ scaled.T], layer.bias)
    return _with_ball(q, (ROUNDING + scaled.shape[1] * _SUMMING) * _trace(q) ** 0.5)


def _linear(conv: nn.Conv2d, taps: list[torch.Tensor]) -> torch.Tensor:
    """What a convolution makes of pixels that have these ellipsoids."""
    matrices = conv.weight.double().flatten(2).unbind(2)
    return _products(list(zip(matrices, taps, strict=True)), conv.bias)


def _products(parts: Sequence[tuple[torch.Tensor, torch.Tensor]], bias: torch.Tensor | None) -> torch.Tensor:
    """The sum of matrices times vectors that have these ellipsoids, and a bias."""
    q = _with_bias([matrix @ inner @ matrix.T for matrix, inner in parts], bias)
    terms = sum(matrix.shape[1] for matrix, _ in parts)
    lengths = math.fsum(matrix.norm().item() * _longest(inner) for matrix, inner in parts)
    return _with_ball(q, ROUNDING * _longest(q) + (ROUNDING + terms * _SUMMING) * lengths)
