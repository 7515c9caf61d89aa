"""What a captured graph of a model depends on besides its inputs, and a glance at it that is cheap at every step.

A graph reads weights by address and has everything else baked in: modules, processors, adapters and their scales,
hooks, numbers in Python. `ModelWatch.look` snapshots all of that, which takes tens of milliseconds. `glance` (object
identities, addresses) and `same_attributes` say at every step whether it need be taken again; `unchanged` when a run
begins.
"""

import copy
import enum
import itertools
import weakref
from collections.abc import Hashable
from typing import Any

import numpy as np
import torch
from diffusers.models import attention_processor as stock
from diffusers.models.attention import GatedSelfAttentionDense

from diffopt.attention.layers import FUSED, SEPARATE
from diffopt.attention.processors import is_ours

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_ASIDE = frozenset(
    (
        *("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_internal_dict", "processor"),
        *("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs"),
        *("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
        *("_is_full_backward_hook", *_HOOKS),
    )
)
"""Attributes of modules that are looked at in another way, or that a forward doesn't read."""

_PLAIN = frozenset((bool, int, float, str, bytes, type(None), torch.dtype, torch.device, torch.Size))
_HOMES = ("torch.nn.", "diffusers.", "peft.", "diffopt.")
_PROCESSORS = (
    *SEPARATE,
    *FUSED,
    stock.IPAdapterAttnProcessor,
    stock.IPAdapterAttnProcessor2_0,
)
_CALLED = frozenset(("get_time_embed", "get_class_embed", "get_aug_embed", "process_encoder_hidden_states"))
"""Methods of a model that its forward calls."""

_IDLE = (torch.nn.ModuleDict, torch.nn.ModuleList, torch.nn.ParameterDict, torch.nn.Identity)
"""Modules that compute nothing; with adapters most are of these."""

_address = torch.Tensor.data_ptr


class ModelWatch:
    """Looks at one model's state; holds strong references to its parts, so it must not outlive the model.

    Args:
        model: the UNet or ControlNet.
        ours: functions that diffopt puts on modules as their `forward`.
    """

    def __init__(self, model: torch.nn.Module, ours: frozenset[Any] = frozenset()) -> None:
        self._model = weakref.ref(model)
        self._ours = ours
        self._collect(model)

    def _collect(self, model: torch.nn.Module) -> None:
        modules = self._parts = list(model.modules())
        below = modules[1:]  # hooks of the model itself run outside its forward
        self._dicts = [module.__dict__ for module in below]
        self._all_dicts = [model.__dict__, *self._dicts]
        self._working_dicts = [module.__dict__ for module in modules if type(module) not in _IDLE]
        self._children = [module._modules for module in modules if module._modules]
        self._hooks = [getattr(module, name) for module in below for name in _HOOKS]
        tensors = [d for module in modules for d in (module._parameters, module._buffers) if d]
        self._tensors = [d for d in tensors if None not in d.values()]
        self._tensors_or_none = [d for d in tensors if None in d.values()]
        self._with_processor = [d for d in self._dicts if "processor" in d]
        self._adapters = [d for d in self._dicts if "_active_adapter" in d]
        self._image_adapters = [d for d in self._dicts if isinstance(d.get("scale"), list)]
        self._gates = [module.__dict__ for module in modules if isinstance(module, GatedSelfAttentionDense)]
        self._blocks = [block.__dict__ for block in getattr(model, "up_blocks", ())]

    def glance(self) -> tuple[Any, ...]:
        """What changes when weights move, modules, processors or forwards are swapped, adapters switched or scaled.

        Two glances are equal when none of that happened in between. Not for keeping beyond the next one.
        """
        chain = itertools.chain.from_iterable
        rest = [value for d in self._tensors_or_none for value in d.values() if value is not None]
        return (
            list(map(_address, itertools.chain(chain(map(dict.values, self._tensors)), rest))),
            list(chain(map(dict.values, self._children))),
            list(map(dict.get, self._dicts, itertools.repeat("forward"))),
            [d.get("processor") for d in self._with_processor],
            any(self._hooks),
            [(d.get("s1"), d.get("s2"), d.get("b1"), d.get("b2")) for d in self._blocks],
            [_adapter_state(d) for d in self._adapters],
            [list(d["scale"]) for d in self._image_adapters],
            [d.get("enabled") for d in self._gates],  # GLIGEN's pipeline closes them in mid-run
        )

    def unchanged(self) -> bool:
        """Whether all that the last `look` saw and a glance does not is still as it was."""
        try:
            return (
                self.same_attributes()
                and self._shapes() == self._seen_shapes
                and self._all_dicts == self._seen_dicts  # compares identities first, so it takes about a millisecond
                and [d.get(key) for d, key in self._containers] == self._seen_plain
                and [_frozen(d.get(key)) for d, key in self._nested] == self._seen_nested
            )
        except (RuntimeError, ValueError):  # tensors that are other objects now can't be compared by equality
            return False

    def same_attributes(self) -> bool:
        """Of `unchanged`, what is cheap enough for every step: classes, configuration and attributes that were set."""
        try:
            return (
                list(map(type, self._parts)) == self._seen_kinds
                and self._working_dicts == self._seen_working_dicts
                and self._config() == self._seen_config
            )
        except (RuntimeError, ValueError):
            return False

    def _shapes(self) -> list[Any]:
        tensors = [x for d in (*self._tensors, *self._tensors_or_none) for x in d.values() if x is not None]
        return [*map(torch.Tensor.stride, tensors), *(x.shape for x in tensors), *(x.dtype for x in tensors)]

    def _config(self) -> Hashable:
        """What the model's forward looks up in its configuration: attributes, which may be set one by one."""
        return _frozen(getattr(self._all_dicts[0].get("_internal_dict"), "__dict__", None))

    def _remember(self) -> None:
        """Shallow copies to compare with; containers that may change in place are copied too."""
        self._seen_kinds = list(map(type, self._parts))
        self._seen_config = self._config()
        self._seen_dicts = [d.copy() for d in self._all_dicts]
        seen = zip(self._parts, self._seen_dicts, strict=True)
        self._seen_working_dicts = [d for module, d in seen if type(module) not in _IDLE]
        self._seen_shapes = self._shapes()
        found = [(d, key) for d in self._all_dicts for key, value in d.items() if _is_container(key, value)]
        self._nested = [(d, key) for d, key in found if any(type(x) not in _PLAIN for x in _items(d[key]))]
        nested = {(id(d), key) for d, key in self._nested}
        self._containers = [(d, key) for d, key in found if (id(d), key) not in nested]
        self._seen_plain = [copy.copy(d[key]) for d, key in self._containers]
        self._seen_nested = [_frozen(d[key]) for d, key in self._nested]

    def look(self) -> tuple[Hashable, tuple[str, ...]]:
        """Everything, module by module: a fingerprint to compare by equality, and reasons against capturing."""
        model = self._model()
        assert model is not None
        self._collect(model)
        reasons: dict[str, None] = {}
        states = []
        for name, module in model.named_modules():
            below = module is not model
            states.append(self._state(name, module, reasons, below))
        self._remember()
        return (*states, self._seen_config), tuple(reasons)

    def _state(self, name: str, module: torch.nn.Module, reasons: dict[str, None], below: bool) -> Hashable:
        kind, attributes = type(module), module.__dict__
        if not kind.__module__.startswith(_HOMES):
            reasons[f"{name} is a {kind.__module__}.{kind.__name__}, which diffopt does not know"] = None
        if "_hf_hook" in attributes:
            reasons["accelerate hooks move its weights (offloading)"] = None
        forward = attributes.get("forward")
        if below and forward is not None and getattr(forward, "__func__", None) not in self._ours:
            reasons[f"{name} has a forward of its own"] = None
        for method in _own_methods(kind, attributes) if below else _CALLED & attributes.keys():
            reasons[f"{name or kind.__name__} has a {method} of its own"] = None
        for weight in {type(x) for x in module._parameters.values()} - {type(None), torch.Tensor}:
            if not weight.__module__.startswith(_HOMES):  # it may have no address that could be looked at
                reasons[f"{name} has a {weight.__module__}.{weight.__name__}, which diffopt does not know"] = None
        if below and any(attributes[hooks] for hooks in _HOOKS):
            reasons[f"{name} has hooks"] = None
        if module.training and _drops(module):
            reasons["it is in training mode"] = None
        processor = attributes.get("processor") or module._modules.get("processor")
        if processor is not None and not is_ours(processor) and type(processor) not in _PROCESSORS:
            reasons[f"{type(processor).__name__} may keep something from step to step"] = None
        return (
            *(name, kind, type(processor)),
            tuple((key, _tensor(value)) for key, value in module._parameters.items() if value is not None),
            tuple((key, _tensor(value)) for key, value in module._buffers.items() if value is not None),
            tuple((key, _frozen(value)) for key, value in attributes.items() if key not in _ASIDE),
        )


def _adapter_state(d: dict[str, Any]) -> tuple[Any, ...]:
    """PEFT's switches of one adapted layer."""
    active, merged = d["_active_adapter"], d.get("merged_adapters")
    return (
        active if isinstance(active, str) else tuple(active or ()),
        d.get("_disable_adapters"),
        tuple(merged or ()),
        tuple(d["scaling"].values()) if "scaling" in d else (),
    )


def _own_methods(kind: type, attributes: dict[str, Any]) -> list[str]:
    """Methods of a module's class that its instance has others for; `forward` is looked at by itself."""
    return [
        key
        for key, value in attributes.items()
        if callable(value) and key not in ("forward", "_compiled_call_impl") and hasattr(kind, key)
    ]


def _drops(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.modules.dropout._DropoutNd) and module.p > 0


def _is_container(key: str, value: Any) -> bool:
    return key not in _ASIDE and isinstance(value, (list, dict, set))


def _items(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value


def _tensor(x: torch.Tensor) -> Hashable:
    return x.data_ptr(), x.shape, x.stride(), x.dtype, x.device


def _frozen(value: Any) -> Hashable:
    """Values that compare by what they hold; of objects that are not plain data, the class."""
    kind = type(value)
    if kind in _PLAIN:
        return value
    if isinstance(value, (np.generic, enum.Enum)):  # scales, where they come from `np.linspace`
        return kind, value
    if kind is torch.Tensor or kind is torch.nn.Parameter:
        return _tensor(value)
    if isinstance(value, (list, tuple)):
        return (kind, *map(_frozen, value))
    if isinstance(value, dict):
        return (kind, *((_frozen(key), _frozen(item)) for key, item in value.items()))
    if isinstance(value, (set, frozenset)):
        return frozenset(map(_frozen, value))
    return kind
