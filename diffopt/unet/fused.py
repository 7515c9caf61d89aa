"""Blocks of a UNet or decoder on diffopt's step kernels: which modules get another forward, and theirs back.

Forwards are methods on instances, so a copied model's are bound to the copy's modules. Every forward looks at its
modules anew at each call and uses the stock computation where something does not fit: adapters that wrap a layer,
hooks, another device or layout.
"""

import collections
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.autoencoders.vae import Decoder
from diffusers.models.modeling_utils import get_parameter_dtype
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_blocks import CrossAttnUpBlock2D, UpBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn

from diffopt.unet import forwards, sharing
from diffopt_kernels.step.products import product_device_reasons
from diffopt_kernels.step.thin_convolution import is_thin
from diffopt_kernels.support import DTYPES, device_reasons

LAYOUT = "diffopt_layout"
"""The plain attribute of a model that names the weights whose layout was changed."""

Reasons = Callable[[Any], list[str]]


def _resnet_reasons(block: ResnetBlock2D) -> list[str]:
    reasons = []
    if block.time_embedding_norm not in ("default", "group"):  # "group" is diffusers' word for none, in decoders
        reasons.append(f"its time embedding is {block.time_embedding_norm!r}")
    if block.upsample is not None or block.downsample is not None:
        reasons.append("it changes the size")
    if type(block.nonlinearity) is not nn.SiLU:
        reasons.append(f"its activation is {type(block.nonlinearity).__name__}")
    return reasons


def _upsample_reasons(block: Upsample2D) -> list[str]:
    reasons = [] if block.norm is None else [f"it has a norm, a {type(block.norm).__name__}"]
    if block.use_conv_transpose:
        reasons.append("it is a transposed convolution")
    elif not block.interpolate:
        reasons.append("it doesn't interpolate")
    return reasons


def _transformer_reasons(model: Transformer2DModel) -> list[str]:
    return [] if model.is_input_continuous else ["its input is not an image"]


def _block_reasons(block: BasicTransformerBlock) -> list[str]:
    reasons = []
    if block.norm_type != "layer_norm":
        reasons.append(f"its norms are {block.norm_type!r}")
    if block.pos_embed is not None:
        reasons.append("it has positional embeddings")
    if block.attn2 is None:
        reasons.append("it has one attention layer")
    return reasons


def _decoder_reasons(model: Decoder) -> list[str]:
    norm = model.conv_norm_out
    return [] if type(norm) is nn.GroupNorm else [f"its last norm is a {type(norm).__name__}"]


def _no_product_reasons(conv: nn.Conv2d) -> list[str]:
    known = conv.kernel_size == (3, 3) and conv.stride in ((1, 1), (2, 2))
    reasons = [] if known else ["it is no 3×3 convolution of stride 1 or 2"]
    thin = is_thin(conv.in_channels, conv.out_channels)  # runs on every GPU that our kernels run on
    return reasons + (device_reasons if thin else product_device_reasons)(conv.weight.device)


def _no_reasons(_: Any) -> list[str]:
    return []


NORMS, ROWS, SHARED, PRODUCTS = "norms", "rows", "shared", "products"
"""Stages that can be switched on one by one, for measurements. PRODUCTS is of convolutions that stand alone; blocks of
the other stages hand theirs over by themselves (`forwards`).
"""

_KINDS: dict[type[nn.Module], tuple[str, Callable[..., Any], Reasons]] = {
    ResnetBlock2D: (NORMS, forwards.resnet, _resnet_reasons),
    UpBlock2D: (NORMS, forwards.up_block, _no_reasons),
    CrossAttnUpBlock2D: (NORMS, forwards.attention_up_block, _no_reasons),
    Transformer2DModel: (NORMS, forwards.transformer, _transformer_reasons),
    Upsample2D: (NORMS, forwards.upsample, _upsample_reasons),
    nn.GroupNorm: (NORMS, forwards.group_norm, _no_reasons),
    Decoder: (NORMS, forwards.decoder, _decoder_reasons),
    BasicTransformerBlock: (ROWS, forwards.transformer_block, _block_reasons),
    GEGLU: (ROWS, forwards.geglu, _no_reasons),
    nn.Conv2d: (PRODUCTS, forwards.convolution, _no_product_reasons),
}

OURS = frozenset(forward for _, forward, _ in _KINDS.values())
"""Functions that stand in for a module's forward."""


def put_on(model: nn.Module, stages: frozenset[str] = frozenset((NORMS, ROWS, SHARED, PRODUCTS))) -> None:
    """Replace the forwards that can be replaced, put convolution weights into channels-last memory, and weights of
    layers that share an input into one buffer.

    Weights keep their values and Parameter objects. Done again, it does what is not done yet: convolutions become ours
    where they lie on a GPU that ours are written for.
    """
    for module in model.modules():
        kind = _KINDS.get(type(module))
        if kind is None or kind[0] not in stages or "forward" in module.__dict__ or kind[2](module):
            continue
        module.forward = types.MethodType(kind[1], module)
    put_channels_last(model)
    if SHARED in stages:
        sharing.put_on(model)


def put_channels_last(model: nn.Module) -> None:
    """Convolution weights in channels-last memory; the names of those that were changed stay on the model."""
    changed: set[str] = set(model.__dict__.get(LAYOUT, ()))
    try:
        for name, weight in _image_weights(model):
            if not weight.is_contiguous(memory_format=torch.channels_last):
                _lay_out(weight, torch.channels_last)
                changed.add(name)
    finally:  # what was changed before memory ended has to be found, too
        setattr(model, LAYOUT, frozenset(changed))


def take_off(model: nn.Module) -> None:
    """Stock forwards and layouts again, where ours are still in place.

    Under sequential offloading ours lie below accelerate's forwards and are replaced there; layouts stay, because the
    weights are elsewhere.
    """
    for module in model.modules():
        if is_ours(module):
            del module.forward
        elif getattr(module.__dict__.get("_old_forward"), "__func__", None) in OURS:  # what accelerate's hook calls
            module.__dict__["_old_forward"] = types.MethodType(type(module).forward, module)
    sharing.take_off(model)
    changed = model.__dict__.pop(LAYOUT, ())
    for name, weight in _image_weights(model):
        if name in changed and not weight.is_contiguous():
            _lay_out(weight, torch.contiguous_format)


def _lay_out(weight: nn.Parameter, layout: torch.memory_format) -> None:
    """The same values in other memory, which stays fit for training where this happens in inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        weight.data = weight.data.contiguous(memory_format=layout)


def is_on(model: nn.Module) -> bool:
    """Whether `put_on` was called for this model, and `take_off` not since."""
    return hasattr(model, LAYOUT)


def is_ours(module: nn.Module) -> bool:
    """Whether a module's forward is one of ours."""
    return getattr(module.__dict__.get("forward"), "__func__", None) in OURS


def summary(model: nn.Module) -> dict[str, Any]:
    """As plain data: how many modules of each kind are fused, and, once `put_on` was called, which are kept and why.

    A module whose forward is ours counts as kept where its weights have a dtype that sends calls to stock.
    """
    fused: collections.Counter[str] = collections.Counter()
    kept = []
    dtype, on = get_parameter_dtype(model), is_on(model)
    for name, module in model.named_modules():
        kind = _KINDS.get(type(module))
        reasons = []
        if is_ours(module):
            reasons = _dtype_reasons(module, dtype)
            if not reasons:
                fused[type(module).__name__] += 1
        elif on and kind is not None and kind[0] != PRODUCTS:  # most convolutions have reasons, and lose little by them
            reasons = kind[2](module)
            if not reasons and "forward" in module.__dict__:
                reasons = ["it has a forward of its own"]
        if reasons:
            kept.append({"name": name, "kind": type(module).__name__, "reasons": reasons})
    return {"fused": dict(fused), "kept": kept, "shared": sharing.summary(model)}


def _dtype_reasons(module: nn.Module, dtype: torch.dtype) -> list[str]:
    """Why kernels don't serve a module of ours in a model of some dtype, as far as weights tell."""
    found = {weight.dtype for layer in _read_layers(module) for weight in layer.parameters(recurse=False)}
    found = {kind for kind in found if kind.is_floating_point} or {dtype}
    unknown = found - set(DTYPES)
    words = sorted(str(kind).removeprefix("torch.") for kind in unknown or found - {dtype})
    if unknown:
        return [f"no kernel takes {' or '.join(words)}"]
    here = str(dtype).removeprefix("torch.")
    return [f"it has parameters of {' and '.join(words)} in a model of {here}"] if words else []


def _read_layers(module: nn.Module) -> list[nn.Module]:
    """The layers whose weights a forward of ours hands to kernels; not those that others wrapped or gave a forward."""
    if isinstance(module, (UpBlock2D, CrossAttnUpBlock2D)):  # all they fuse is a norm's input
        layers = [resnet.norm1 for resnet in module.resnets if type(resnet) is ResnetBlock2D]
    else:
        layers = [module, *module.children()]
    known = (nn.GroupNorm, nn.LayerNorm, nn.Conv2d, nn.Linear)
    return [x for x in layers if type(x) in known and ("forward" not in x.__dict__ or is_ours(x))]


def _image_weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Weights of 4 dimensions by name: those of convolutions."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 4 and type(parameter) is nn.Parameter and parameter.is_floating_point():
            yield name, parameter
