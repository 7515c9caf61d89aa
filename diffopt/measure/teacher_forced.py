"""The step rule: on stock's own latents, an optimized UNet is as close to the exact one as PyTorch's backends are.

Free-running pictures diverge from rounding alone, so they prove little. Here every UNet call of a stock run is
replayed on the same inputs: with the optimized UNet, with stock attention on each of PyTorch's backends, with a
reference of higher precision, and with a planted fault that the rule must find.
"""

import contextlib
import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from diffopt.measure.environment import STRICT
from diffopt.measure.exactness import ieee_float32, nonfinite_count, relative_l2

FACTOR = 1.5
ROWS_AT_ONCE = 2  # of the reference: a picture with guidance, whatever the batch
SCORES_AT_ONCE = 1 << 30  # of plain math attention; in float32 4 GiB, and softmax needs as much again
_STOCK = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-math": SDPBackend.MATH,
}


@dataclasses.dataclass(frozen=True)
class UNetCall:
    """Inputs of one UNet forward, cloned from a running pipeline (`record_unet_calls`)."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    @property
    def timestep(self) -> float:
        """The (first row's) timestep."""
        value = self.arguments[1] if len(self.arguments) > 1 else self.keywords["timestep"]
        return float(torch.as_tensor(value).flatten()[0])

    @property
    def rows(self) -> int:
        """Rows of the batch: pictures, twice as many with guidance."""
        sample = self.arguments[0] if self.arguments else self.keywords["sample"]
        return sample.shape[0]

    def by_rows(self, count: int) -> Iterator["UNetCall"]:
        """The same call cut into calls of at most so many rows; a row's output doesn't depend on the others."""
        rows = self.rows

        def cut(first: int) -> Callable[[torch.Tensor], torch.Tensor]:
            return lambda x: x[first : first + count] if x.dim() and x.shape[0] == rows else x

        for first in range(0, rows, count):
            yield UNetCall(*_mapped((self.arguments, self.keywords), cut(first)))

    def to(self, device: torch.device | str) -> "UNetCall":
        """The same call with its tensors on a device."""
        return UNetCall(*_mapped((self.arguments, self.keywords), lambda x: x.to(device)))

    def with_timestep_on_cpu(self) -> "UNetCall":
        """The same call, told its timestep on the CPU; its other tensors are the same objects."""
        if len(self.arguments) > 1:
            sample, timestep, *more = self.arguments
            return UNetCall((sample, _mapped(timestep, torch.Tensor.cpu), *more), self.keywords)
        timestep = _mapped(self.keywords["timestep"], torch.Tensor.cpu)
        return UNetCall(self.arguments, {**self.keywords, "timestep": timestep})

    def run(self, unet: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The UNet's output `[B, C, H, W]` on these inputs, floating-point ones in `dtype` if given."""
        arguments, keywords = _mapped((self.arguments, self.keywords), lambda x: _cast(x, dtype))
        with torch.no_grad():
            return unet(*arguments, **{**keywords, "return_dict": False})[0]


Forward = Callable[[UNetCall], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class StepDistance:
    """Relative L2 distances of the UNet's output to the reference at one step.

    Attributes:
        step: number of the UNet call in the stock run. timestep: what the UNet was told.
        ours: the optimized UNet's distance. fault: the same with the planted fault.
        stock: distance of stock attention by PyTorch backend.
        allowed: the rule's limit for `ours`.
    """

    step: int
    timestep: float
    ours: float
    fault: float
    stock: dict[str, float]
    allowed: float
    __pydantic_config__ = STRICT

    @property
    def ok(self) -> bool:
        """Our distance is within the limit; a NaN isn't, and a stock backend that broke down sets no limit."""
        return self.ours <= self.allowed < math.inf

    @property
    def fault_caught(self) -> bool:
        """The planted fault is finite and beyond the limit."""
        return math.isfinite(self.fault) and self.fault > self.allowed


@dataclasses.dataclass(frozen=True)
class Certificate:
    """What the step rule found.

    Attributes:
        dtype: of the UNet under test. reference_dtype: of the reference.
        factor, floor: the limit is factor times the largest stock distance at the step, plus floor.
        steps: the distances.
        unet_calls: UNet calls of the stock run, of which `steps` were replayed.
        fault: the planted fault in words.
        nonfinite: NaN and infinite elements in our outputs, all steps together.
        bitwise_stock: our outputs are bit for bit those of the stock pipeline as it came.
    """

    dtype: str
    reference_dtype: str
    factor: float
    floor: float
    steps: tuple[StepDistance, ...]
    unet_calls: int
    fault: str
    nonfinite: int
    bitwise_stock: bool
    __pydantic_config__ = STRICT

    @property
    def void(self) -> bool:
        """The check proves nothing: no steps, or the planted fault went unnoticed."""
        return not any(step.fault_caught for step in self.steps)

    @property
    def passed(self) -> bool:
        """Every step is within its limit, every output finite, and the check isn't void."""
        return not self.void and self.nonfinite == 0 and all(step.ok for step in self.steps)

    @property
    def worst(self) -> StepDistance | None:
        """The step where our distance is the largest share of its limit; a NaN is worse than any number."""

        def share(step: StepDistance) -> float:
            value = step.ours / step.allowed if step.allowed else math.inf
            return math.inf if math.isnan(value) else value

        return max(self.steps, key=share, default=None)

    def verdict(self) -> str:
        """One line: passed, failed or void, with the numbers that decided."""
        worst = self.worst
        if worst is None:
            return "void: no step was checked"
        numbers = f"worst step {worst.step}: {worst.ours:.2e} of {worst.allowed:.2e} allowed"
        if self.void:
            largest = max(step.fault for step in self.steps)
            return f"void: the planted fault ({self.fault}) was not caught, {largest:.2e}; {numbers}"
        caught = sum(step.fault_caught for step in self.steps)
        found = f"planted fault caught at {caught} of {len(self.steps)} steps"
        return f"{'passed' if self.passed else 'FAILED'}: {numbers}; {found}"


def record_unet_calls(unet: Any, run: Callable[[], object]) -> tuple[list[UNetCall], list[torch.Tensor]]:
    """Run a pipeline and keep every UNet call's inputs and output, as clones.

    A tensor that several calls get is one clone in them, until its values change: by such objects captured calls know
    the steps of a run, and a replay must have what they compute once per run as the run had it.
    """
    calls: list[UNetCall] = []
    outputs: list[torch.Tensor] = []
    clones = WeakTensorKeyDictionary()

    def clone(tensor: torch.Tensor) -> torch.Tensor:
        kept = clones.get(tensor)
        if kept is None or not torch.equal(kept, tensor):
            kept = clones[tensor] = tensor.clone()
        return kept

    def before(_: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        calls.append(UNetCall(*_mapped((arguments, keywords), clone)))

    def after(_: Any, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        outputs.append(output[0].clone())

    hooks = [
        unet.register_forward_pre_hook(before, with_kwargs=True),
        unet.register_forward_hook(after, with_kwargs=True),
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return calls, outputs


def spread_out(count: int, wanted: int) -> list[int]:
    """Indices of `wanted` of `count` steps, evenly spaced with the first and the last; all of them for 0."""
    if wanted <= 0 or wanted >= count:
        return list(range(count))
    if wanted == 1:
        return [count - 1]
    return [round(i * (count - 1) / (wanted - 1)) for i in range(wanted)]


def reference_dtype(dtype: torch.dtype) -> torch.dtype:
    """Precision of the reference: float32 for the half types, float64 for float32."""
    return torch.float64 if dtype == torch.float32 else torch.float32


def floor(dtype: torch.dtype) -> float:
    """The rule's stated floor: the unit roundoff of the model's dtype, the error of rounding the output once."""
    return torch.finfo(dtype).eps / 2


def stock_forwards(unet: Any) -> dict[str, Forward]:
    """Stock attention on each PyTorch backend that works here: name to a forward of `unet`.

    The UNet has its own stock processors. Where a backend can't serve a layer, plain math does.
    """
    parameter = next(unet.parameters())

    def forward(backend: SDPBackend) -> Forward:
        def run(call: UNetCall) -> torch.Tensor:
            with _sdpa(backend):
                return call.run(unet)

        return run

    return {name: forward(backend) for name, backend in _STOCK.items() if _serves(backend, parameter)}


def using_stock(name: str) -> AbstractContextManager[None]:
    """A block in which stock attention runs on the PyTorch backend of this name, as in `stock_forwards`.

    The setting is the whole process's, so only measurements use it, never the library.
    """
    return _sdpa(_STOCK[name])


def reference_forward(unet: Any) -> Forward:
    """A copy of the UNet in higher precision with plain math attention, IEEE arithmetic, no TF32.

    It takes `ROWS_AT_ONCE` of a batch and the queries that `SCORES_AT_ONCE` allows, so that memory bounds no size.
    """
    dtype = reference_dtype(next(unet.parameters()).dtype)
    exact = copy.deepcopy(unet)
    torch.nn.Module.to(exact, dtype)
    for module in exact.modules():
        if isinstance(module, Attention):
            module.set_processor(cast(Any, AttnProcessor2_0()))

    def run(call: UNetCall) -> torch.Tensor:
        with _sdpa(SDPBackend.MATH), ieee_float32():
            return torch.cat([rows.run(exact, dtype) for rows in call.by_rows(ROWS_AT_ONCE)])

    return run


def teacher_forced(
    calls: Sequence[UNetCall],
    *,
    ours: Forward,
    fault: Forward,
    fault_name: str,
    stock: Mapping[str, Forward],
    reference: Forward,
    dtype: torch.dtype,
    steps: Sequence[int] | None = None,
    stock_outputs: Sequence[torch.Tensor] | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Certificate:
    """Replay UNet calls and compare the distances to the reference.

    Args:
        calls: the stock run's UNet calls (`record_unet_calls`).
        ours, fault, stock, reference: forwards of the UNets; `fault` is ours with a planted fault.
        dtype: of the UNet under test.
        steps: which calls to replay; all by default.
        stock_outputs: what the stock pipeline itself got, for the bitwise flag.
        on_step: called with the number of replayed steps so far.
    """
    distances, nonfinite, bitwise = [], 0, stock_outputs is not None
    for number in range(len(calls)) if steps is None else steps:
        call = calls[number]
        exact = reference(call)
        output = ours(call)
        nonfinite += nonfinite_count(output)
        if stock_outputs is not None:
            bitwise = bitwise and torch.equal(output, stock_outputs[number])
        by_backend = {name: relative_l2(forward(call), exact) for name, forward in stock.items()}
        distances.append(
            StepDistance(
                step=number,
                timestep=call.timestep,
                ours=relative_l2(output, exact),
                fault=relative_l2(fault(call), exact),
                stock=by_backend,
                allowed=FACTOR * max(by_backend.values()) + floor(dtype),
            )
        )
        if on_step is not None:
            on_step(len(distances))
    return Certificate(
        dtype=_name(dtype),
        reference_dtype=_name(reference_dtype(dtype)),
        factor=FACTOR,
        floor=floor(dtype),
        steps=tuple(distances),
        unet_calls=len(calls),
        fault=fault_name,
        nonfinite=nonfinite,
        bitwise_stock=bitwise,
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextlib.contextmanager
def _sdpa(backend: SDPBackend) -> Iterator[None]:
    """Attention on a backend; plain math where it can't serve a layer."""
    alone = backend is SDPBackend.MATH
    backends = [backend] if alone else [backend, SDPBackend.MATH]
    with sdpa_kernel(backends, set_priority=True), _QueriesInTurn() if alone else contextlib.nullcontext():
        yield


class _QueriesInTurn(TorchFunctionMode):
    """Attention of as many queries at a time as `SCORES_AT_ONCE` allows: their rows don't depend on each other.

    Plain math has all scores in memory, 256 GiB of them for SD1.5 at 2048x2048 in float32.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or len(args) != 3 or kwargs.get("is_causal"):
            return func(*args, **kwargs)
        query, key, value = args
        mask = kwargs.pop("attn_mask", None)
        of_query = query[..., 0, 0].numel() * key.shape[-2]
        at_once = max(1, SCORES_AT_ONCE // max(1, of_query))
        if query.shape[-2] <= at_once:
            return func(query, key, value, attn_mask=mask, **kwargs)
        parts = []
        for i in range(0, query.shape[-2], at_once):
            rows = slice(i, i + at_once)
            its_mask = mask if mask is None or mask.shape[-2] == 1 else mask[..., rows, :]
            parts.append(func(query[..., rows, :], key, value, attn_mask=its_mask, **kwargs))
        return torch.cat(parts, dim=-2)


def _serves(backend: SDPBackend, like: torch.Tensor) -> bool:
    q = torch.zeros(1, 1, 64, 64, dtype=like.dtype, device=like.device)
    try:
        with sdpa_kernel(backend), torch.no_grad():
            torch.nn.functional.scaled_dot_product_attention(q, q, q)
    except RuntimeError:
        return False
    return True


def _cast(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)


def _mapped(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same nesting of tuples, lists and dicts with every tensor changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, (tuple, list)):
        return type(value)(_mapped(item, change) for item in value)
    if isinstance(value, dict):
        return {key: _mapped(item, change) for key, item in value.items()}
    return value
