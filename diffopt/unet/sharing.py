"""Which layers of a UNet share an input: a layer's queries, keys and values, those of the prompt, time embeddings."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from diffopt.attention.layers import is_cross
from diffopt.attention.processors import DiffoptAttnProcessor
from diffopt.attention.shared import JOINED, TOGETHER, Together, joined, lay_apart, lay_together


def _ours(model: nn.Module, *, cross: bool) -> list[Attention]:
    """Attention layers with our processor and three projections."""
    return [
        module
        for module in model.modules()
        if isinstance(module, Attention)
        and type(module.processor) is DiffoptAttnProcessor
        and is_cross(module) == cross
        and module.to_k is not None
    ]


def _groups(model: nn.Module) -> Iterator[Together]:
    """Layers all over the model that are fed the same tensor."""
    by_width: dict[int, list[Attention]] = {}
    for attn in _ours(model, cross=True):
        if attn.norm_cross is None:
            by_width.setdefault(attn.cross_attention_dim, []).append(attn)
    for layers in by_width.values():
        yield Together([(attn, name) for attn in layers for name in ("to_k", "to_v")])
    blocks = [
        module
        for module in model.modules()
        if type(module) is ResnetBlock2D
        and module.time_emb_proj is not None
        and module.time_embedding_norm == "default"
        and not module.skip_time_act
        and type(module.nonlinearity) is nn.SiLU
    ]
    if blocks:
        yield Together([(block, "time_emb_proj") for block in blocks], F.silu)


def put_on(model: nn.Module) -> None:
    """Lay the weights together. Done again, it does what is not done yet or was undone by others."""
    for attn in _ours(model, cross=False):
        if _lay_together_if_plain(_projections(attn)):
            setattr(attn, JOINED, True)
    groups: list[Together] = []
    try:
        for group in _groups(model):
            if _lay_together_if_plain(group.linears):
                groups.append(group)
                for index, (owner, _) in reversed(list(enumerate(group.owners))):
                    setattr(owner, TOGETHER, (group, index))  # of an owner's layers, the first one's index stays
    except BaseException:
        setattr(model, TOGETHER, (*model.__dict__.get(TOGETHER, ()), *groups))  # for `take_off`
        raise
    setattr(model, TOGETHER, tuple(groups))


def renew(model: nn.Module) -> None:
    """Lay together again what moving or reloading weights has separated."""
    if TOGETHER not in model.__dict__:
        return
    for module in model.modules():
        if JOINED in module.__dict__ and joined(_projections(module)) is None:
            _lay_together_if_plain(_projections(module))
    for group in model.__dict__[TOGETHER]:
        if joined(group.linears) is None:
            _lay_together_if_plain(group.linears)


def _lay_together_if_plain(linears: Sequence[Any]) -> bool:
    return all(type(linear) is nn.Linear for linear in linears) and lay_together(linears)


def take_off(model: nn.Module) -> None:
    """Lay what was laid together apart again."""
    groups: tuple[Together, ...] = model.__dict__.pop(TOGETHER, ())
    for group in groups:
        for owner, _ in group.owners:
            owner.__dict__.pop(TOGETHER, None)
        lay_apart(group.linears)
    for module in model.modules():
        if module.__dict__.pop(JOINED, False):
            lay_apart(_projections(module))


def summary(model: nn.Module) -> list[dict[str, Any]]:
    """What shares products now: the layers' number and what they make."""
    rows = []
    alone = sum(joined(_projections(attn)) is not None for attn in _ours(model, cross=False))
    if alone:
        rows.append({"what": "queries, keys and values, layer by layer", "layers": 3 * alone})
    groups: tuple[Together, ...] = model.__dict__.get(TOGETHER, ())
    for group in groups:
        if joined(group.linears) is not None:
            what = "time embeddings" if group.owners[0][1] == "time_emb_proj" else "keys and values of the prompt"
            rows.append({"what": what, "layers": len(group.owners)})
    return rows


def _projections(attn: Any) -> tuple[Any, ...]:
    return attn.to_q, attn.to_k, attn.to_v
