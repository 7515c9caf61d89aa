"""The processors diffopt puts on diffusers' `Attention` modules.

diffusers re-creates processors with `type(processor)()` when an IP-Adapter is loaded or unloaded, filters keyword
arguments by the names in `__call__`, and branches on "Added" and "XFormers" in class names: so these take no
arguments, hold no state, and carry neither word. What a layer runs is on the module (`diffopt.attention.layers`).
"""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, FusedAttnProcessor2_0

from diffopt.attention import shared
from diffopt.attention.layers import ATTRIBUTE, AttentionLayer, reads_scale


def _separate_projections(
    attn: Attention, hidden_states: torch.Tensor, context: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if context is None:
        together = shared.self_projections(attn, hidden_states)
        if together is not None:
            return together[0], together[1], together[2]
    elif attn.norm_cross is None and (pair := shared.outputs_of(attn, context, 2)) is not None:
        return attn.to_q(hidden_states), pair[0], pair[1]
    query = attn.to_q(hidden_states)
    context = hidden_states if context is None else context
    assert attn.to_k is not None  # None only with added projections, which are kept
    assert attn.to_v is not None
    return query, attn.to_k(context), attn.to_v(context)


def _fused_projections(
    attn: Attention, hidden_states: torch.Tensor, context: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if context is None:
        query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
    else:
        query = attn.to_q(hidden_states)
        key, value = attn.to_kv(context).chunk(2, dim=-1)
    return query, key, value


def _attend(
    attn: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """Attention of q [B, N_q, H, D] over k and v [B, N_k, H, D] through the layer's backend; out [B, N_q, H, D]."""
    layer = getattr(attn, ATTRIBUTE, None)
    if layer is None:  # a processor of ours on a module diffopt never saw: the stock computation
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
        return out.transpose(1, 2)
    if torch.compiler.is_compiling():  # nothing is counted: a changing integer would recompile at every call
        backend = layer.candidates[0] if layer.forced else layer.serving(q, k, v, mask)[0]
    else:
        backend = layer.choose(q, k, v, mask)
    return backend.run(q, k, v, mask, _scale(attn, layer, q.shape[-1]))


def _scale(attn: Attention, layer: AttentionLayer, head_dim: int) -> float | None:
    """What a layer's scale was set to since it was optimized, for who asked for a processor that reads it; PyTorch's
    SDPA, diffusers' default, is not told of it. None for head_dim ** -0.5.
    """
    if abs(attn.scale - head_dim**-0.5) <= 1e-9 or not reads_scale(layer.former.get(False)):
        return None
    return attn.scale


def _process(
    project, attn: Attention, hidden_states: torch.Tensor, context, mask: torch.Tensor | None, temb, leave_bias: bool
) -> torch.Tensor:
    """What diffusers' own processors do around attention, without copies where the layout allows."""
    residual = hidden_states
    if attn.spatial_norm is not None:
        hidden_states = attn.spatial_norm(hidden_states, temb)
    image_shape = hidden_states.shape if hidden_states.ndim == 4 else None
    if image_shape is not None:
        hidden_states = hidden_states.flatten(2).transpose(1, 2)
    batch_size, key_tokens, _ = (hidden_states if context is None else context).shape
    if mask is not None:
        mask = attn.prepare_attention_mask(mask, key_tokens, batch_size)
        mask = mask.view(batch_size, attn.heads, -1, mask.shape[-1])
    if attn.group_norm is not None:
        hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
    if context is not None and attn.norm_cross is not None:
        context = attn.norm_encoder_hidden_states(context)

    q, k, v = (x.unflatten(-1, (attn.heads, -1)) for x in project(attn, hidden_states, context))
    hidden_states = _attend(attn, q, k, v, mask).flatten(2)

    assert attn.to_out is not None  # None only in transformer blocks that diffopt does not touch
    last: Any = attn.to_out[0]
    hidden_states = attn.to_out[1](F.linear(hidden_states, last.weight) if leave_bias else last(hidden_states))
    if image_shape is not None:
        hidden_states = hidden_states.transpose(-1, -2).reshape(image_shape)
    if attn.residual_connection:
        hidden_states = hidden_states + residual
    factor = attn.rescale_output_factor
    return hidden_states if factor == 1 else hidden_states / factor  # dividing by 1 is a pass over memory for nothing


class DiffoptAttnProcessor:
    """Attention from separate query, key and value projections, through the layer's chosen backend."""

    _project = staticmethod(_separate_projections)

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        scale: float | None = None,
        leave_bias: bool = False,
    ) -> torch.Tensor:
        """hidden_states [B, N, C] or [B, C, H, W]; encoder_hidden_states [B, N_k, C_k] for cross-attention.

        `scale` is taken and ignored, as diffusers' own processors do (LoRA's scale is applied by PEFT). With
        `leave_bias` the last product comes without its bias, for who adds that in a pass of its own.
        """
        return _process(self._project, attn, hidden_states, encoder_hidden_states, attention_mask, temb, leave_bias)


class DiffoptFusedAttnProcessor(DiffoptAttnProcessor):
    """The same from the projections that `fuse_qkv_projections()` made."""

    _project = staticmethod(_fused_projections)


def leaves_bias(processor: object) -> bool:
    """Whether a processor knows `leave_bias`: one of ours, and not somebody's subclass with another signature."""
    return type(processor) in (DiffoptAttnProcessor, DiffoptFusedAttnProcessor)


def stock_twin(processor: "DiffoptAttnProcessor") -> AttnProcessor2_0 | FusedAttnProcessor2_0:
    """What diffusers itself would have in place of one of ours."""
    return FusedAttnProcessor2_0() if isinstance(processor, DiffoptFusedAttnProcessor) else AttnProcessor2_0()


def is_ours(processor: object) -> bool:
    """Whether diffopt made this processor."""
    return isinstance(processor, DiffoptAttnProcessor)
