"""Forwards of diffusers' blocks on the step kernels: what diffusers 0.42 computes, in fewer passes over memory.

Each takes the module first and what the class's own forward takes after it.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.vae import Decoder
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_blocks import CrossAttnUpBlock2D, UpBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn
from torch.nn.modules import module as module_state

from diffopt.attention import processors, shared
from diffopt.unet import summed
from diffopt_kernels import step as kernels
from diffopt_kernels.rehearsal import rehearsed
from diffopt_kernels.step.group_norm import MOST_PER_GROUP, group_norm_launch
from diffopt_kernels.step.layer_norm import MAX_COLUMNS
from diffopt_kernels.step.products import (
    convolution_reasons,
    favours_convolution,
    geglu_product_reasons,
    has_products,
)
from diffopt_kernels.step.summed_weights import summed_weights_reasons
from diffopt_kernels.step.thin_convolution import thin_convolution_reasons
from diffopt_kernels.step.upsample import upsample_reasons
from diffopt_kernels.step.upsampled_convolution import takes_upsampled, upsampled_convolution_reasons
from diffopt_kernels.support import DTYPES, interpreted

_GRID = 65535  # programs along the second axis of CUDA's grids


def fits(x: torch.Tensor) -> bool:
    """Whether the kernels can run on tensors like x now; where autocast chooses dtypes, they don't."""
    here = (x.is_cuda or interpreted()) and x.dtype in DTYPES
    return here and not torch.is_grad_enabled() and not torch.is_autocast_enabled(x.device.type)


def _products_run_on(x: torch.Tensor) -> bool:
    """Whether products can run on tensors like x now: on Hopper GPUs, in 16 bits."""
    return fits(x) and not torch.compiler.is_compiling() and has_products(x.device)


def plain(module: Any, kind: type[nn.Module]) -> bool:
    """Whether calling a module does what its class says and nothing else, so that its weights may be used directly."""
    forward = module.__dict__.get("forward")
    return (
        type(module) is kind
        and shared.has_plain_weights(module)
        and "_conv_forward" not in module.__dict__  # for pictures that can be tiled, it pads around the edges
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and (forward is None or getattr(forward, "__func__", None) in (group_norm, convolution))
    )


def _is_exchanged(block: Any, kind: type[nn.Module]) -> bool:
    """Whether a block was given another class since its forward became ours, as those do who merge tokens."""
    return type(block) is not kind


def is_image(x: torch.Tensor) -> bool:
    """Whether x [B, C, H, W] lies in channels-last memory."""
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)


def _same_kind(x: torch.Tensor, *parameters: torch.Tensor | None) -> bool:
    return all(p is not None and p.dtype == x.dtype and p.device == x.device for p in parameters)


# --- images ---------------------------------------------------------------------------------------------------------


def group_norm(norm: nn.GroupNorm, x: torch.Tensor) -> torch.Tensor:
    """`nn.GroupNorm.forward`, of images and of what a VAE's attention makes of them, [B, C, H · W]."""
    image = x.unsqueeze(-1) if x.dim() == 3 else x
    if _is_exchanged(norm, nn.GroupNorm) or not (fits(x) and _group_norm_fits(norm, image)):
        return type(norm).forward(norm, x)
    out = kernels.group_norm(image, norm.num_groups, norm.weight, norm.bias, norm.eps)
    return out.squeeze(-1) if x.dim() == 3 else out


def _group_norm_fits(norm: Any, x: torch.Tensor) -> bool:
    return (
        is_image(x)
        and _same_kind(x, norm.weight, norm.bias)
        and norm.num_channels // norm.num_groups <= MOST_PER_GROUP
        and _is_launchable((x.shape[0], norm.num_channels, *x.shape[2:]), norm.num_groups)  # x may be a part of them
    )


def _is_launchable(shape: Sequence[int], groups: int) -> bool:
    """Whether the kernel's offsets in an image [B, C, H, W] and its programs along a second axis stay in their range.

    At 4096×4096 pixels of 128 channels they don't: a decoder's last blocks see as many, where it doesn't work in tiles.
    """
    batch, channels, height, width = shape
    pixels = height * width
    if pixels * channels >= 2**31:
        return False
    if pixels <= 32 * _GRID:  # no program has fewer than 32 pixels
        return True
    launch = group_norm_launch(batch, pixels, channels, groups)
    return -(-pixels // (launch.pixels * launch.stores)) <= _GRID


def _normed(
    norm: Any, x: torch.Tensor, shift: torch.Tensor | None = None, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """SiLU of the norm of x + shift [B, C] + bias [C]."""
    if plain(norm, nn.GroupNorm) and _group_norm_fits(norm, x):
        options = {"shift": shift, "channel_bias": bias}
        return kernels.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps, silu=True, **options)
    x = x if bias is None else x + bias[:, None, None]
    return F.silu(norm(x if shift is None else x + shift[:, :, None, None]))


def convolution(conv: Any, x: torch.Tensor) -> torch.Tensor:
    """`nn.Conv2d.forward`."""
    if _convolution_fits(conv, x):
        return kernels.convolution(x, conv.weight, conv.bias, None, conv.stride[0])
    if not (fits(x) and plain(conv, nn.Conv2d)):
        return type(conv).forward(conv, x)
    if _is_three_by_three(conv) and conv.stride == (1, 1) and not thin_convolution_reasons(x, conv.weight, conv.bias):
        return kernels.thin_convolution(x, conv.weight, conv.bias)
    if not is_image(x):
        return nn.Conv2d.forward(conv, x)
    out, bias = _without_bias(conv, x)
    if bias is None:
        return out
    return kernels.bias_add(out, bias) if is_image(out) and _same_kind(out, bias) else out + bias[:, None, None]


def _convolution_fits(conv: Any, x: torch.Tensor, residual: torch.Tensor | None = None) -> bool:
    """Whether our kernel can take a convolution of x, with the residual if there is one, and is the faster one."""
    if not (_is_three_by_three(conv) and _products_run_on(x)):
        return False
    stride = conv.stride[0]
    return not convolution_reasons(x, conv.weight, conv.bias, residual, stride) and favours_convolution(
        x, conv.out_channels, residual=residual is not None, stride=stride
    )


def _is_three_by_three(conv: Any) -> bool:
    """Whether a convolution does what our kernels of nine neighbours do."""
    return (
        plain(conv, nn.Conv2d)
        and conv.kernel_size == (3, 3)
        and conv.dilation == (1, 1)
        and conv.stride in ((1, 1), (2, 2))
        and conv.padding in ((1, 1), 1)
        and (conv.groups, conv.padding_mode) == (1, "zeros")
        and conv.bias is not None
    )


def _convolved(conv: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The convolution without its bias, and the bias, for who can add it on the way; None where it is added."""
    if _convolution_fits(conv, x):
        return kernels.convolution(x, conv.weight, conv.bias, None, conv.stride[0]), None
    return _without_bias(conv, x) if plain(conv, nn.Conv2d) else (conv(x), None)


def _without_bias(conv: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A plain convolution without its bias, and the bias; None where it is added."""
    if conv.padding_mode != "zeros" or conv.bias is None:
        return nn.Conv2d.forward(conv, x), None
    out = F.conv2d(x, conv.weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)
    return out, conv.bias


def _convolved_onto(conv: Any, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """residual plus the convolution."""
    if _convolution_fits(conv, x, residual):
        return kernels.convolution(x, conv.weight, conv.bias, residual, conv.stride[0])
    return _added(*_convolved(conv, x), residual)


def _added(x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor) -> torch.Tensor:
    """Images: x + bias + residual."""
    if bias is None:
        return residual + x
    if is_image(x) and is_image(residual) and _same_kind(x, bias, residual):
        return kernels.bias_add(x, bias, residual)
    return residual + (x + bias[:, None, None])


def _is_pointwise(conv: Any) -> bool:
    return (
        plain(conv, nn.Conv2d)
        and conv.kernel_size == conv.stride == (1, 1)
        and conv.padding in ((0, 0), 0)
        and conv.groups == 1
    )


def _pointwise(conv: Any, x: torch.Tensor) -> torch.Tensor:
    """A 1×1 convolution of x [B, C, H, W]; in channels-last memory it is a product with the bias in its epilogue."""
    if not (_is_pointwise(conv) and is_image(x)):
        return conv(x)
    return F.linear(x.permute(0, 2, 3, 1), conv.weight.flatten(1), conv.bias).permute(0, 3, 1, 2)


def resnet(
    block: Any,
    input_tensor: torch.Tensor,
    temb: torch.Tensor,
    *arguments: Any,
    second: torch.Tensor | None = None,
    **keywords: Any,
) -> torch.Tensor:
    """`ResnetBlock2D.forward` without a change of size; of [input_tensor, second] if there is a second."""
    normed = None
    if second is not None and _takes_pair(block.norm1, input_tensor, second):
        norm = block.norm1
        normed, input_tensor = kernels.group_norm_joined(
            input_tensor, second, norm.num_groups, norm.weight, norm.bias, norm.eps, silu=True
        )
    elif second is not None:
        input_tensor = torch.cat([input_tensor, second], dim=1)
    unusual = arguments or keywords or _is_exchanged(block, ResnetBlock2D)
    if unusual or not (fits(input_tensor) and is_image(input_tensor)):
        return type(block).forward(block, input_tensor, temb, *arguments, **keywords)
    normed = _normed(block.norm1, input_tensor) if normed is None else normed
    hidden, bias = _convolved(block.conv1, normed)
    if block.time_emb_proj is not None:
        together = shared.outputs_of(block, temb, 1)
        if together is not None:
            shift = together[0]
        else:
            shift = block.time_emb_proj(temb if block.skip_time_act else block.nonlinearity(temb))
    else:
        shift = None if temb is None or block.time_embedding_norm == "group" else temb[:, :, 0, 0]
    hidden = block.dropout(_normed(block.norm2, hidden, shift, bias))
    residual = input_tensor if block.conv_shortcut is None else _pointwise(block.conv_shortcut, input_tensor)
    out = _convolved_onto(block.conv2, hidden, residual)
    return out if block.output_scale_factor == 1 else out / block.output_scale_factor


def _takes_pair(norm: Any, x: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether a norm can read its input from two tensors, and concatenate them for whoever reads it after the norm."""
    return (
        fits(x)
        and is_image(second)
        and _same_kind(x, second)
        and plain(norm, nn.GroupNorm)
        and _group_norm_fits(norm, x)
    )


def _after_skip(block: Any, x: torch.Tensor, skip: torch.Tensor, temb: torch.Tensor | None) -> torch.Tensor:
    """A resnet of [x, skip]. Only ours takes two tensors, and whoever is to see its input sees one."""
    forward = getattr(block.__dict__.get("forward"), "__func__", None)
    if forward is resnet and not block._forward_hooks and not block._forward_pre_hooks:
        return block(x, temb, second=skip)
    return block(torch.cat([x, skip], dim=1), temb)


def _is_usual(block: Any, x: torch.Tensor) -> bool:
    """Whether an up block does nothing to skips but concatenate them."""
    return fits(x) and not all(getattr(block, name, None) for name in ("s1", "s2", "b1", "b2"))  # FreeU's


def _upsampled(block: Any, x: torch.Tensor, size: Any) -> torch.Tensor:
    for upsampler in block.upsamplers or ():
        x = upsampler(x, size)
    return x


def up_block(
    block: Any,
    hidden_states: torch.Tensor,
    res_hidden_states_tuple: tuple[torch.Tensor, ...],
    temb: torch.Tensor | None = None,
    upsample_size: int | None = None,
    *arguments: Any,
    **keywords: Any,
) -> torch.Tensor:
    """`UpBlock2D.forward`, with no pass of its own for a concatenation that a resnet's norm can store."""
    skips = res_hidden_states_tuple
    if arguments or keywords or _is_exchanged(block, UpBlock2D) or not _is_usual(block, hidden_states):
        return type(block).forward(block, hidden_states, skips, temb, upsample_size, *arguments, **keywords)
    for i, resnet_block in enumerate(block.resnets):
        hidden_states = _after_skip(resnet_block, hidden_states, skips[-1 - i], temb)
    return _upsampled(block, hidden_states, upsample_size)


def attention_up_block(
    block: Any,
    hidden_states: torch.Tensor,
    res_hidden_states_tuple: tuple[torch.Tensor, ...],
    temb: torch.Tensor | None = None,
    encoder_hidden_states: torch.Tensor | None = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
    upsample_size: int | None = None,
    attention_mask: torch.Tensor | None = None,
    encoder_attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """`CrossAttnUpBlock2D.forward`, likewise."""
    skips = res_hidden_states_tuple
    scaled = cross_attention_kwargs is not None and cross_attention_kwargs.get("scale") is not None
    if scaled or _is_exchanged(block, CrossAttnUpBlock2D) or not _is_usual(block, hidden_states):
        return type(block).forward(
            *(block, hidden_states, skips, temb, encoder_hidden_states, cross_attention_kwargs, upsample_size),
            *(attention_mask, encoder_attention_mask),
        )
    for i, (resnet_block, attention) in enumerate(zip(block.resnets, block.attentions, strict=False)):
        hidden_states = attention(
            _after_skip(resnet_block, hidden_states, skips[-1 - i], temb),
            encoder_hidden_states=encoder_hidden_states,
            cross_attention_kwargs=cross_attention_kwargs,
            attention_mask=attention_mask,
            encoder_attention_mask=encoder_attention_mask,
            return_dict=False,
        )[0]
    return _upsampled(block, hidden_states, upsample_size)


def decoder(model: Any, sample: torch.Tensor, latent_embeds: torch.Tensor | None = None) -> torch.Tensor:
    """`Decoder.forward` of a VAE; the picture is contiguous, as stock's from contiguous weights."""
    unusual = latent_embeds is not None or _is_exchanged(model, Decoder)
    if unusual or not fits(sample) or not plain(model.conv_act, nn.SiLU):
        return type(model).forward(model, sample, latent_embeds)
    if _may_run_twice(model, sample):
        return rehearsed(lambda: _decoded(model, sample))
    return _decoded(model, sample)


def _may_run_twice(model: nn.Module, sample: torch.Tensor) -> bool:
    """Whether nobody watches, records or keeps what a decoder does."""
    if torch.compiler.is_compiling() or (sample.is_cuda and torch.cuda.is_current_stream_capturing()):
        return False
    if module_state._global_forward_hooks or module_state._global_forward_pre_hooks:
        return False
    return not any(map(_is_changed, model.modules()))


def _is_changed(module: nn.Module) -> bool:
    """Whether a module of a decoder has hooks or somebody's forward, which may do something once."""
    forward = module.__dict__.get("forward")
    ours = (decoder, resnet, upsample, group_norm, convolution)
    own = forward is not None and getattr(forward, "__func__", None) not in ours
    return bool(own or module._forward_hooks or module._forward_pre_hooks)


def _decoded(model: Any, sample: torch.Tensor) -> torch.Tensor:
    x = model.mid_block(model.conv_in(sample), None)
    for block in model.up_blocks:
        x = block(x, None)
    return model.conv_out(_normed(model.conv_norm_out, x)).contiguous()


def upsample(
    block: Any, hidden_states: torch.Tensor, output_size: Any = None, *arguments: Any, **keywords: Any
) -> torch.Tensor:
    """`Upsample2D.forward` to twice the size."""
    twice = [2 * size for size in hidden_states.shape[2:]]
    unusual = arguments or keywords or (output_size is not None and list(output_size) != twice)
    if _is_exchanged(block, Upsample2D) or unusual or not fits(hidden_states) or upsample_reasons(hidden_states):
        return type(block).forward(block, hidden_states, output_size, *arguments, **keywords)
    if not block.use_conv:
        return kernels.upsample(hidden_states)
    conv = block.conv if block.name == "conv" else block.Conv2d_0
    sums = _sums_for_upsampled(conv, hidden_states)
    if sums is not None and not upsampled_convolution_reasons(hidden_states, sums, conv.bias):
        return kernels.upsampled_convolution(hidden_states, sums, conv.bias)
    return conv(kernels.upsample(hidden_states))


def _sums_for_upsampled(conv: Any, x: torch.Tensor) -> torch.Tensor | None:
    """What our convolution of x at twice its size multiplies with; None where another one has to run."""
    if not (_is_three_by_three(conv) and conv.stride == (1, 1) and _products_run_on(x) and _same_kind(x, conv.weight)):
        return None
    if summed_weights_reasons(conv.weight) or not takes_upsampled(x, conv.out_channels):
        return None
    return summed.sums_of(conv)


def transformer(
    model: Any,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor | None = None,
    timestep: torch.Tensor | None = None,
    added_cond_kwargs: dict[str, torch.Tensor] | None = None,
    class_labels: torch.Tensor | None = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
    attention_mask: torch.Tensor | None = None,
    encoder_attention_mask: torch.Tensor | None = None,
    return_dict: bool = True,
) -> Any:
    """`Transformer2DModel.forward` for images: tokens are views of them, there and back."""
    masks = [mask for mask in (attention_mask, encoder_attention_mask) if mask is not None]
    scaled = cross_attention_kwargs is not None and cross_attention_kwargs.get("scale") is not None
    unusual = scaled or any(mask.ndim == 2 for mask in masks) or _is_exchanged(model, Transformer2DModel)
    if unusual or not (fits(hidden_states) and is_image(hidden_states)):
        return type(model).forward(
            *(model, hidden_states, encoder_hidden_states, timestep, added_cond_kwargs, class_labels),
            *(cross_attention_kwargs, attention_mask, encoder_attention_mask, return_dict),
        )
    batch, _, height, width = hidden_states.shape
    x = model.norm(hidden_states)
    x = model.proj_in(_tokens(x)) if model.use_linear_projection else _tokens(_pointwise(model.proj_in, x))
    for block in model.transformer_blocks:
        x = block(
            x,
            attention_mask=attention_mask,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            timestep=timestep,
            cross_attention_kwargs=cross_attention_kwargs,
            class_labels=class_labels,
        )
    out = _added(*_projected(model, x, batch, height, width), hidden_states)
    return Transformer2DModelOutput(sample=out) if return_dict else (out,)


def _projected(
    model: Any, x: torch.Tensor, batch: int, height: int, width: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A transformer's last projection of tokens, as an image without its bias, and the bias; None where it is added."""
    last = model.proj_out
    if plain(last, nn.Linear) or _is_pointwise(last):
        return _image(F.linear(x, last.weight.flatten(1)), batch, height, width), last.bias
    if model.use_linear_projection:
        return _image(last(x), batch, height, width), None
    return last(_image(x, batch, height, width)), None


def _tokens(x: torch.Tensor) -> torch.Tensor:
    """[B, C, H, W] as [B, H · W, C]; moves nothing in channels-last memory."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _image(x: torch.Tensor, batch: int, height: int, width: int) -> torch.Tensor:
    """[B, H · W, C] as [B, C, H, W] in channels-last memory."""
    return x.reshape(batch, height, width, -1).permute(0, 3, 1, 2)


# --- tokens ---------------------------------------------------------------------------------------------------------


def _norm_fits(norm: Any, x: torch.Tensor) -> bool:
    return (
        plain(norm, nn.LayerNorm)
        and norm.normalized_shape == (x.shape[-1],)
        and _same_kind(x, norm.weight, norm.bias)
        and x.shape[-1] <= MAX_COLUMNS
        and x.is_contiguous()
    )


def _layer_norm(norm: Any, x: torch.Tensor) -> torch.Tensor:
    if not _norm_fits(norm, x):
        return norm(x)
    return kernels.layer_norm(x, norm.weight, norm.bias, norm.eps)


def _add_layer_norm(
    norm: Any, x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """x + bias + residual and its norm."""
    if not _add_norm_fits(norm, x, bias, residual):
        total = (x if bias is None else x + bias) + residual
        return total, norm(total)
    return kernels.add_layer_norm(x, residual, norm.weight, norm.bias, norm.eps, x_bias=bias)


def _add_norm_fits(norm: Any, x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor) -> bool:
    alike = x.shape == residual.shape and residual.is_contiguous() and _same_kind(x, residual)
    return alike and _norm_fits(norm, x) and (bias is None or _same_kind(x, bias))


def _fed_forward(block: Any, x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor) -> torch.Tensor:
    """x + bias + residual, plus the feed-forward of its norm."""
    last = _last_linear(block.ff)
    if last is None or not (_add_norm_fits(block.norm3, x, bias, residual) and _same_kind(x, last.weight, last.bias)):
        total, normed = _add_layer_norm(block.norm3, x, bias, residual)
        return block.ff(normed) + total
    norm = block.norm3
    # With the last layer's bias in it already, the sum is what the last product adds itself to.
    biases = {"sum_bias": last.bias, "x_bias": bias}
    total, normed = kernels.add_layer_norm(x, residual, norm.weight, norm.bias, norm.eps, **biases)
    hidden = block.ff.net[0](normed).flatten(0, -2)
    total.view(-1, total.shape[-1]).addmm_(hidden, last.weight.t())
    return total


def _last_linear(ff: Any) -> Any:
    """The last layer of a feed-forward of two, with nothing in between or around that does something; else None."""
    if type(ff) is not FeedForward or not plain(ff, FeedForward) or len(ff.net) != 3:
        return None
    dropout, last = ff.net[1], ff.net[2]
    return last if _is_idle(dropout) and plain(last, nn.Linear) and last.bias is not None else None


def _is_idle(dropout: Any) -> bool:
    return plain(dropout, nn.Dropout) and not (dropout.training and dropout.p)


def _attended(attn: Any, x: torch.Tensor, **keywords: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """An attention layer's output without its last product's bias, and the bias; None where it is added."""
    if not (plain(attn, Attention) and processors.leaves_bias(attn.processor) and len(attn.to_out) == 2):
        return attn(x, **keywords), None
    last, dropout = attn.to_out
    added_after = attn.residual_connection or attn.rescale_output_factor != 1
    if added_after or not (plain(last, nn.Linear) and last.bias is not None and _is_idle(dropout)):
        return attn(x, **keywords), None
    return attn(x, leave_bias=True, **keywords), last.bias


def transformer_block(
    block: Any,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    encoder_hidden_states: torch.Tensor | None = None,
    encoder_attention_mask: torch.Tensor | None = None,
    timestep: torch.Tensor | None = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
    class_labels: torch.Tensor | None = None,
    added_cond_kwargs: dict[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    """`BasicTransformerBlock.forward` with layer norms and two attention layers."""
    keywords = cross_attention_kwargs or {}
    unusual = keywords.get("gligen") is not None or keywords.get("scale") is not None or block._chunk_size is not None
    if _is_exchanged(block, BasicTransformerBlock) or unusual or hidden_states.dim() != 3 or not fits(hidden_states):
        return type(block).forward(
            *(block, hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, timestep),
            *(cross_attention_kwargs, class_labels, added_cond_kwargs),
        )
    keywords = {name: value for name, value in keywords.items() if name not in ("gligen", "scale")}
    attended, bias = _attended(
        block.attn1,
        _layer_norm(block.norm1, hidden_states),
        encoder_hidden_states=encoder_hidden_states if block.only_cross_attention else None,
        attention_mask=attention_mask,
        **keywords,
    )
    hidden_states, normed = _add_layer_norm(block.norm2, attended, bias, hidden_states)
    attended, bias = _attended(
        block.attn2,
        normed,
        encoder_hidden_states=encoder_hidden_states,
        attention_mask=encoder_attention_mask,
        **keywords,
    )
    return _fed_forward(block, attended, bias, hidden_states)


def geglu(module: Any, hidden_states: torch.Tensor, *arguments: Any, **keywords: Any) -> torch.Tensor:
    """`GEGLU.forward`."""
    if arguments or keywords or _is_exchanged(module, GEGLU) or not fits(hidden_states):
        return type(module).forward(module, hidden_states, *arguments, **keywords)
    if _geglu_product_fits(module.proj, hidden_states):
        return kernels.geglu_product(hidden_states, module.proj.weight, module.proj.bias)
    x = module.proj(hidden_states)
    if not fits(x) or not x.is_contiguous():
        hidden, gate = x.chunk(2, dim=-1)
        return hidden * module.gelu(gate)
    return kernels.geglu(x)


def _geglu_product_fits(linear: Any, x: torch.Tensor) -> bool:
    return (
        plain(linear, nn.Linear)
        and linear.bias is not None
        and _products_run_on(x)
        and not geglu_product_reasons(x, linear.weight, linear.bias)
    )
