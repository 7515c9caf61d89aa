"""What diffopt attaches to a diffusers `Attention` module, and which modules it may touch."""

import collections
import copy
import dataclasses
import pickle
from typing import Any, NoReturn

import torch
from diffusers.models import attention_processor as stock
from diffusers.models.attention_processor import Attention

from diffopt.attention.backends import AUTO, BACKENDS, Backend, Measured, auto_order, guesses, measured_order
from diffopt.attention.machine import machine
from diffopt.attention.plan import AttentionShape, Choice, Plan
from diffopt.errors import BackendError
from diffopt.gpus import OWN
from diffopt_kernels.launch import LaunchKey

ATTRIBUTE = "diffopt_layer"
"""The plain attribute on an `Attention` module that holds its `AttentionLayer`."""

SEPARATE = (
    stock.AttnProcessor,
    stock.AttnProcessor2_0,
    stock.SlicedAttnProcessor,
    stock.XFormersAttnProcessor,
)
FUSED = (stock.FusedAttnProcessor2_0,)
"""The allow-list: processors that compute plain attention, from three projections or from a fused one."""


def _measured(device: torch.device, dtype: torch.dtype, *sizes: int) -> Measured | None:
    return measured_order(device, LaunchKey(*sizes), str(dtype).removeprefix("torch."))


@torch.compiler.assume_constant_result
def _compiled_names(device: torch.device, dtype: torch.dtype, *sizes: int) -> tuple[str, ...]:
    """What compiled code asks, once per graph: `_measured` decides between diffopt's kernel and PyTorch's own choice.

    Whether one of PyTorch's variants can serve a call can't be asked while tracing.
    """
    measured = _measured(device, dtype, *sizes)
    return tuple(dict.fromkeys(name if name == OWN else "sdpa" for name in measured.names)) if measured else ()


def _sizes(q: torch.Tensor, k: torch.Tensor) -> tuple[int, int, int, int, int]:
    """batch, query tokens, key tokens, heads, head dim of q [B, N_q, H, D] and k [B, N_k, H, D]."""
    return q.shape[0], q.shape[1], k.shape[1], q.shape[2], q.shape[3]


def _known(sizes: tuple[int, ...]) -> bool:
    """Whether sizes are numbers; `torch.compile(dynamic=True)` traces with symbols instead."""
    if not torch.compiler.is_compiling():
        return True
    from torch.fx.experimental.symbolic_shapes import has_static_value  # a second of imports, which compiling has had

    return all(has_static_value(size) for size in sizes)


@dataclasses.dataclass
class AttentionLayer:
    """State of one optimized layer. It lives on the module, so a deep copy of the model copies it along.

    Attributes:
        name: the module's path in the UNet, or in the pipeline for a ControlNet.
        candidates: backends to try, in order, for calls that were not measured (`auto` leaves diffopt's kernel out in
            float32); a single one is an explicit request.
        plan: choices shared by the layers of one handle.
        former: what `restore` puts back, keyed by whether it used a fused projection.
        calls: (shape, backend name, reason) to the number of calls counted outside compiled code.
        fallbacks: those of them that a backend before it could not serve.
    """

    name: str
    candidates: tuple[Backend, ...]
    plan: Plan
    former: dict[bool, Any] = dataclasses.field(default_factory=dict)
    calls: collections.Counter[tuple[AttentionShape, str, str]] = dataclasses.field(default_factory=collections.Counter)
    fallbacks: set[tuple[AttentionShape, str, str]] = dataclasses.field(default_factory=set)
    _chosen: dict[Any, tuple[Backend, tuple[AttentionShape, str, str]]] = dataclasses.field(default_factory=dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> "AttentionLayer":
        """A copied model has its own plan and former processors, and has not been called yet."""
        plan, former = copy.deepcopy((self.plan, self.former), memo)
        return AttentionLayer(self.name, self.candidates, plan, former)

    def __reduce__(self) -> NoReturn:
        raise pickle.PicklingError(
            "an optimized UNet or ControlNet can't be pickled; allowed: handle.restore() first, or save_pretrained or "
            "state_dict, which work as it is"
        )

    @property
    def forced(self) -> bool:
        """Whether one backend was asked for by name."""
        return self.plan.attention != AUTO

    def serving(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        *,
        planned: str | None = None,
    ) -> tuple[Backend, dict[str, list[str]]]:
        """The first backend that can serve a call, and the reasons of those before it. Changes nothing.

        Raises:
            BackendError: none can; only where one was asked for by name, since PyTorch's SDPA serves every call.
        """
        candidates = self._unmeasured(q.dtype)
        if planned is not None and not self.forced:
            candidates = (BACKENDS[planned], *(other for other in candidates if other.name != planned))
        elif names := self._ranked(q, k, mask):
            candidates = tuple(BACKENDS[name] for name in names)
        refused: dict[str, list[str]] = {}
        for backend in candidates:
            on_device = [] if torch.compiler.is_compiling() else backend.device_reasons(q.device)
            reasons = on_device or backend.call_reasons(q, k, v, mask)
            if not reasons:
                return backend, refused
            refused[backend.name] = reasons
        where = f"layer {self.name}, {AttentionShape.of(q, k, mask)}"
        raise BackendError(refused, allowed=f"in {where}; attention='auto' would use PyTorch's SDPA there")

    def _unmeasured(self, dtype: torch.dtype) -> tuple[Backend, ...]:
        """What to try for calls of a dtype that were not measured."""
        return self.candidates if self.forced else guesses(self.candidates, dtype)

    def _ranked(self, q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None) -> tuple[str, ...]:
        """Names of backends as the tuned table ranks them for a call that `auto` may choose for; none if it does not.

        Not in the table: masked calls, and compiled code that was asked to serve any size.
        """
        sizes = _sizes(q, k)
        if self.forced or mask is not None or not _known(sizes):
            return ()
        if torch.compiler.is_compiling():
            return _compiled_names(q.device, q.dtype, *sizes)
        measured = _measured(q.device, q.dtype, *sizes)
        return measured.names if measured else ()

    def _follow(self, device: torch.device) -> None:
        """Choices made for one device mean nothing on another: start over when the model was moved."""
        here = machine(device)
        if here != self.plan.made_for:
            self.plan.made_for = here
            self.plan.choices.clear()
        if not self.forced:
            self.candidates = auto_order(device)

    def _select(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[Backend, Choice]:
        shape = AttentionShape.of(q, k, mask)
        planned = self.plan.choices.get(shape)
        backend, refused = self.serving(q, k, v, mask, planned=planned.backend if planned else None)
        if refused:
            reason = "; ".join(f"{name}: {', '.join(texts)}" for name, texts in refused.items())
        elif planned is not None:
            reason = planned.reason
        elif self._ranked(q, k, mask) and (measured := _measured(q.device, q.dtype, *_sizes(q, k))):
            reason = measured.evidence
        elif self.forced:
            reason = "asked for"
        else:
            order = self._unmeasured(q.dtype)
            reason = f"first of {', '.join(other.name for other in order)}"
            if order != self.candidates:
                reason += f"; {OWN}'s {shape.dtype} kernel was never timed"
        return backend, Choice(backend.name, reason, bool(refused) or (planned is not None and planned.fallback))

    def choose(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> Backend:
        """The backend for a call, remembered per kind of call and counted; not for compiled code."""
        key = (
            q.shape, k.shape, q.dtype, k.dtype, v.dtype, q.device,
            q.stride(-1), k.stride(-1), v.stride(-1),
            None if mask is None else (mask.shape, mask.dtype),
            torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad),
            torch.is_grad_enabled() and mask is not None and mask.requires_grad,
        )  # fmt: skip
        chosen = self._chosen.get(key)
        if chosen is None:
            self._follow(q.device)
            backend, choice = self._select(q, k, v, mask)
            shape = AttentionShape.of(q, k, mask)
            self.plan.choices.setdefault(shape, choice)
            chosen = self._chosen[key] = backend, (shape, choice.backend, choice.reason)
            if choice.fallback:
                self.fallbacks.add(chosen[1])
        self.calls[chosen[1]] += 1
        return chosen[0]


def reads_scale(processor: object) -> bool:
    """Whether one of diffusers' processors multiplies scores by `Attention.scale`."""
    return type(processor) in (stock.AttnProcessor, stock.SlicedAttnProcessor, stock.XFormersAttnProcessor)


def attention_modules(unet: torch.nn.Module) -> dict[str, Attention]:
    """Every diffusers `Attention` module of a model by its path."""
    return {name: module for name, module in unet.named_modules() if isinstance(module, Attention)}


def reasons_to_keep(attn: Attention) -> list[str]:
    """Why a module's present processor must stay; empty when diffopt may replace it."""
    processor = attn.processor
    kind = type(processor)
    if kind not in SEPARATE + FUSED:
        return [f"{kind.__name__} computes something of its own and is kept"]
    reasons = []
    if attn.added_kv_proj_dim is not None:
        reasons.append("it has added key and value projections")
    if attn.norm_q is not None or attn.norm_k is not None:
        reasons.append("it normalizes queries or keys")
    head_dim = attn.inner_dim // attn.heads
    if abs(attn.scale - head_dim**-0.5) > 1e-9:
        reasons.append(f"its scale is {attn.scale:g}, not head dim ** -0.5")
    return reasons


def is_cross(attn: Attention) -> bool:
    """Whether keys come from the prompt. `cross_attention_dim` equals `query_dim` in self-attention."""
    return bool(attn.is_cross_attention)
