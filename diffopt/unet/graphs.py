"""A UNet's (or ControlNet's) forward as captured work: one graph per kind of call, played back with new inputs.

The replacement is a method on the instance; its state is one plain attribute. Copying the model copies the method
(bound to the copy) and gives the copy a state of its own, with nothing captured.
"""

import collections
import dataclasses
import functools
import inspect
import threading
import types
import weakref
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import nn
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.nn.modules import module as module_state

from diffopt.attention.shared import Given, Together, one_run, serving
from diffopt.unet import attention_calls, sharing, summed
from diffopt.unet.apart import Apart
from diffopt.unet.arguments import (
    CallInputs,
    UncapturableError,
    copy_in,
    rebuilt,
    static_buffers,
    take_apart,
    with_timestep_beside,
)
from diffopt.unet.capturers import Capturer, CudaCapturer
from diffopt.unet.conditioning import copied, without_scale
from diffopt.unet.fingerprint import ModelWatch
from diffopt.unet.prologues import Prologue
from diffopt.unet.summed import SummedWeights
from diffopt.unet.times import TimeTable

ATTRIBUTE = "diffopt_graphs"
"""The plain attribute of a model that holds its `CapturedCalls`."""

LIMIT = 16
"""Graphs kept per model; the least recently used one goes."""

_UNUSED = 4  # graphs in a row that were never played back: then calls seem to differ every time


@dataclasses.dataclass
class Bucket:
    """One captured kind of call.

    Attributes:
        label: the inputs in words.
        statics: what inputs are copied into.
        play_back: runs the captured work.
        output: of the work, overwritten by each playback.
        chosen: what attention layers chose while it was captured, to be counted once per playback.
        prologue: what its prompt alone makes, if that is computed apart.
        table: what its timestep and added conditions make, if that is.
        summed: sums of weights that it reads, if it does.
        apart: places of `statics` that prologue and table care for.
        left: how many items the forward leaves in arguments that are lists.
        replays: playbacks so far.
    """

    label: str
    statics: list[torch.Tensor]
    play_back: Callable[[], None]
    output: Any
    chosen: attention_calls.Calls
    prologue: Prologue | None = None
    table: TimeTable | None = None
    summed: SummedWeights | None = None
    apart: frozenset[int] = frozenset()
    left: dict[str, int] = dataclasses.field(default_factory=dict)
    replays: int = 0

    def take(self, inputs: CallInputs) -> None:
        """Copy a call's inputs in."""
        copy_in(self.statics, inputs.tensors, self.apart)

    def use_up(self, keywords: dict[str, Any]) -> None:
        """Take from a call's lists what the forward takes: a T2I-Adapter's features, from the first one on."""
        for name, count in self.left.items():
            del keywords[name][: max(0, len(keywords[name]) - count)]


class CapturedCalls:
    """Captures and plays back one model's forward. Threads may share it; playbacks take turns.

    Attributes:
        uncaptured: reason to the number of calls that ran uncaptured for it.
        captures: graphs made so far.
        prologues: how often a prompt's keys and values were computed, for all playbacks that read them.
        tables: the same of time embeddings.
        sums: the same of summed weights.
        enabled: turned off, all calls run as they came.
    """

    def __init__(self, capturer: Capturer, ours: frozenset[Any] = frozenset(), limit: int = LIMIT) -> None:
        self.uncaptured: collections.Counter[str] = collections.Counter()
        self.captures = 0
        self.prologues = 0
        self.tables = 0
        self.sums = 0
        self.enabled = True
        self._capturer, self._ours, self._limit = capturer, ours, limit
        self._lock = threading.RLock()
        self._watch: ModelWatch | None = None
        self._state_count = 0
        self._apart = Apart(capturer)
        self.forget()

    def __deepcopy__(self, memo: dict[int, Any]) -> "CapturedCalls":
        """A copied model has captured nothing yet."""
        capturer = CudaCapturer() if isinstance(self._capturer, CudaCapturer) else self._capturer
        copied = CapturedCalls(capturer, self._ours, self._limit)
        copied.enabled = self.enabled
        return copied

    def __reduce__(self) -> Any:
        return CapturedCalls, (CudaCapturer(), self._ours, self._limit)

    @property
    def buckets(self) -> list[Bucket]:
        """The captured kinds of call, least recently used first; other threads may go on and change them."""
        return list(self._buckets.values())

    def forget(self) -> None:
        """Drop every graph: something they depend on that no fingerprint shows was changed on purpose."""
        with self._lock:
            self._buckets: collections.OrderedDict[tuple[int, Hashable, Hashable], Bucket] = collections.OrderedDict()
            self._refused: dict[Hashable, str] = {}
            self._starved: set[Hashable] = set()
            self._seen: collections.deque[Hashable] = collections.deque(maxlen=64)
            self._unused = 0
            self._states: dict[Hashable, int] = {}
            self._state = 0
            self._glance: Any = None
            self._reasons: tuple[str, ...] = ()
            self._context: weakref.ref[torch.Tensor] | None = None
            self._apart.forget()
            self._capturer.forget()

    def expire(self) -> None:
        """Compute anew at the next call what steps share: weights were changed in a way that doesn't show."""
        with self._lock:
            self._apart.expire()

    def expect(self, scheduler: Any) -> None:
        """Calls to come may have the timesteps of a scheduler."""
        with self._lock:
            self._apart.expect(scheduler)

    def run(self, model: torch.nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """The model's output for one call: played back where that is safe, else computed as it came."""
        with self._lock:
            try:
                return self._captured(model, arguments, keywords)
            except UncapturableError as reason:
                self.uncaptured[str(reason)] += 1
                if torch.is_grad_enabled():
                    self.expire()  # what learns changes, and PyTorch counts no step of a fused optimizer
        arguments, keywords = with_timestep_beside(arguments, keywords, _parameter_names(type(model))[:3])
        with one_run(model):
            return type(model).forward(model, *arguments, **keywords)

    def _captured(self, model: torch.nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        keywords, scale = without_scale(model, keywords)
        inputs = take_apart(arguments, keywords, _parameter_names(type(model))[:3])
        reasons = _state_reasons() + self._capturer.reasons(inputs.device)
        if reasons:
            raise UncapturableError(reasons[0])
        self._follow(model, arguments[2] if len(arguments) > 2 else keywords.get("encoder_hidden_states"))
        if self._reasons:
            raise UncapturableError("; ".join(self._reasons[:3]))
        key = (self._state, inputs.key, _numerics())
        self._capturer.ready(inputs.device)
        bucket = self._buckets.get(key)
        if bucket is None:
            bucket = self._add(key, model, inputs)
        else:
            bucket.take(inputs)
            self._buckets.move_to_end(key)
        if bucket.prologue is not None:
            self.prologues += bucket.prologue.bring(inputs.of("encoder_hidden_states"), inputs.of("timestep"))
        if bucket.table is not None:
            self.tables += bucket.table.bring(inputs, self._apart.schedulers)
        if bucket.summed is not None:
            self.sums += bucket.summed.bring(inputs.of("timestep"))
        bucket.play_back()
        bucket.replays += 1
        self._unused = 0 if bucket.replays > 1 else self._unused
        bucket.use_up(keywords)
        return _cloned(bucket.output, scale)

    def _follow(self, model: torch.nn.Module, context: Any) -> None:
        """Number the model's state, looked at anew where something of it changed since the last call.

        With new prompt embeddings a run begins: layouts are compared then, too, and nothing is known of values.
        """
        if self._watch is None:
            self._watch = ModelWatch(model, self._ours)
        same_run = self._context is not None and context is not None and self._context() is context
        known = self._glance is not None and self._watch.glance() == self._glance and self._watch.same_attributes()
        if not (known and same_run):
            self.expire()  # a look that equals an earlier one says nothing of values
        if known and (same_run or self._watch.unchanged()):
            self._context = weakref.ref(context) if isinstance(context, torch.Tensor) else None
            return
        sharing.renew(model)
        look, self._reasons = self._watch.look()
        if len(self._states) > 4 * self._limit:
            used = {key[0] for key in self._buckets}
            self._states = {state: number for state, number in self._states.items() if number in used}
        if look not in self._states:
            self._state_count += 1
        self._state = self._states.setdefault(look, self._state_count)
        self._glance = self._watch.glance()
        self._context = weakref.ref(context) if isinstance(context, torch.Tensor) else None

    def _add(self, key: tuple[int, Hashable, Hashable], model: torch.nn.Module, inputs: CallInputs) -> Bucket:
        if key in self._refused:
            if key in self._starved:
                self._make_room(model)
            raise UncapturableError(self._refused[key])
        if self._unused >= _UNUSED and key not in self._seen:
            self._seen.append(key)
            raise UncapturableError("the first call of its kind, where kinds change all the time")
        try:
            bucket = self._made(key, model, inputs)
        except Exception as error:  # whatever went wrong, the call itself can still run
            reason = _failure(error)
            if len(self._refused) > 64:
                self._refused.clear()
                self._starved.clear()
            self._refused[key] = reason
            self._capturer.forget()
            if _ran_out_of_memory(error):
                self._starved.add(key)
                self._make_room(model)
            raise UncapturableError(reason) from error
        except BaseException:  # an interrupt
            self._capturer.forget()
            raise
        self.captures += 1
        self._unused += 1
        self._buckets[key] = bucket
        while len(self._buckets) > self._limit:
            self._evict(model)
        return bucket

    def _evict(self, model: torch.nn.Module) -> None:
        """Drop the least recently used graph; its playbacks go on counting."""
        _, gone = self._buckets.popitem(last=False)
        attention_calls.add(model, gone.chosen, gone.replays)

    def _make_room(self, model: torch.nn.Module) -> None:
        """Drop every graph: their memory, which stock would have, is what a call that runs as it comes may need."""
        if self._buckets:
            while self._buckets:
                self._evict(model)
            self._capturer.forget()
            torch.cuda.empty_cache()  # does nothing where CUDA was never used

    def _made(self, key: tuple[int, Hashable, Hashable], model: torch.nn.Module, inputs: CallInputs) -> Bucket:
        statics = static_buffers(inputs)
        copy_in(statics, inputs.tensors)
        forward, run = type(model).forward, model
        place = inputs.places.get("encoder_hidden_states")
        given: dict[Together, Given] = {}
        prologue, sums, apart, left = None, None, set[int](), dict[str, int]()
        table = self._apart.table((key[0], key[2]), model, inputs, statics)
        if table is not None:
            table.bring(inputs, self._apart.schedulers)  # so that the first run, too, has values that make sense
            given.update(table.given)
            run = table.stand_in(model)
            apart.update(inputs.places[name] for name in table.reads)

        def first() -> tuple[list[Together], list[nn.Conv2d]]:
            with one_run(model, given), summed.collected() as convs:
                named = rebuilt(inputs, statics)
                forward(run, **named)
                left.update({name: len(value) for name, value in named.items() if type(value) is list})
                return [] if place is None else serving(model, statics[place]), convs

        def work() -> Any:
            with one_run(model, given), summed.given({} if sums is None else sums.sums):
                return forward(run, **rebuilt(inputs, statics))

        before = attention_calls.counted(model)
        try:
            groups, convs = self._capturer.warm_up(first, inputs.device)
            if self._watch is not None and self._watch.glance() != self._glance:
                raise UncapturableError("the call itself changes the model")  # a scale of 0 sets adapters' own to 1
            warm = attention_calls.counted(model)
            if place is not None and groups:
                prologue = self._apart.prologue((key[0], key[2]), tuple(groups), statics[place])
                statics[place] = prologue.context
                apart.add(place)
                given.update(prologue.given)
            if convs:
                sums = self._apart.sums((key[0], key[2]), tuple(convs))
            play_back, output = self._capturer.capture(work, inputs.device)
            chosen = attention_calls.difference(attention_calls.counted(model), warm)
        finally:
            attention_calls.set_back(model, before)  # only calls that served someone count
        return Bucket(_label(inputs), statics, play_back, output, chosen, prologue, table, sums, frozenset(apart), left)

    def attention_calls(self) -> attention_calls.Calls:
        """Attention calls that playbacks stand for, per layer."""
        total: attention_calls.Calls = {}
        for bucket in self.buckets:
            for name, calls in bucket.chosen.items():
                counter = total.setdefault(name, collections.Counter())
                for call, number in calls.items():
                    counter[call] += number * bucket.replays
        return total

    def summary(self) -> dict[str, Any]:
        """As plain data: graphs made, how often keys and values of the prompt ("prologues"), time embeddings ("tables")
        and summed weights ("sums") were computed for them, and per kind of call its playbacks, or the reason it ran
        uncaptured.
        """
        return {
            "captures": self.captures,
            "prologues": self.prologues,
            "tables": self.tables,
            "sums": self.sums,
            "buckets": [{"inputs": bucket.label, "replays": bucket.replays} for bucket in self.buckets],
            "uncaptured": [{"reason": reason, "calls": calls} for reason, calls in self.uncaptured.copy().items()],
        }


def forward(model: torch.nn.Module, *arguments: Any, **keywords: Any) -> Any:
    """What stands in for a model's forward: same arguments, same output, in tensors of their own."""
    if torch.compiler.is_compiling():
        return type(model).forward(model, *arguments, **keywords)
    calls: CapturedCalls | None = model.__dict__.get(ATTRIBUTE)
    if calls is None or not calls.enabled:
        return type(model).forward(model, *arguments, **keywords)
    return calls.run(model, arguments, keywords)


def kept_forward(model: torch.nn.Module) -> str:
    """Why a model's calls can't be captured: its forward is someone else's and stays. Empty where it isn't."""
    if "forward" not in model.__dict__ or is_on(model):
        return ""
    return f"{type(model).__name__} has a forward of its own, which is kept"


def fuse_lora(model: Any, *arguments: Any, **keywords: Any) -> Any:
    """What stands in for a model's `fuse_lora`: it changes weights in a way that nothing counts.

    Loaded, fused and unloaded between two steps of a run, an adapter leaves no other trace.
    """
    try:
        return type(model).fuse_lora(model, *arguments, **keywords)
    finally:
        calls: CapturedCalls | None = model.__dict__.get(ATTRIBUTE)
        if calls is not None:
            calls.expire()


def put_on(model: torch.nn.Module, calls: CapturedCalls) -> str:
    """Capture a model's calls from now on; the reason, where it has a forward that must stay."""
    if reason := kept_forward(model):
        return reason
    setattr(model, ATTRIBUTE, calls)
    model.forward = types.MethodType(forward, model)
    if hasattr(type(model), "fuse_lora") and "fuse_lora" not in model.__dict__:
        model.__dict__["fuse_lora"] = types.MethodType(fuse_lora, model)
    return ""


def is_on(model: torch.nn.Module) -> bool:
    """Whether a model's forward is ours."""
    return getattr(model.__dict__.get("forward"), "__func__", None) is forward


def take_off(model: torch.nn.Module) -> None:
    """The class's own forward again, where ours is still in place; wrapped by others, it runs calls as they come."""
    calls = model.__dict__.pop(ATTRIBUTE, None)
    if calls is not None:
        calls.forget()
    if getattr(model.__dict__.get("fuse_lora"), "__func__", None) is fuse_lora:
        del model.__dict__["fuse_lora"]
    if is_on(model):
        del model.forward


def expect(model: Any, scheduler: Any) -> None:
    """Calls of a model to come may have the timesteps of a scheduler."""
    calls: CapturedCalls | None = getattr(model, ATTRIBUTE, None)
    if calls is not None:
        calls.expect(scheduler)


@functools.cache
def _parameter_names(kind: type[torch.nn.Module]) -> tuple[str, ...]:
    return tuple(inspect.signature(kind.forward).parameters)[1:]


def _state_reasons() -> list[str]:
    """What of PyTorch's state speaks against capturing now."""
    if torch.is_grad_enabled():
        return ["gradients are enabled"]
    if forward_ad._current_level >= 0 or peek_interpreter_stack() is not None:
        return ["a transform of torch.func or forward-mode derivatives are on"]
    if torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu"):
        return ["autocast is on"]
    if module_state._global_forward_hooks or module_state._global_forward_pre_hooks:
        return ["hooks on all modules are set"]
    return []


def _numerics() -> Hashable:
    """PyTorch's settings that decide which kernels a captured call holds."""
    try:
        return _settings()
    except RuntimeError as error:  # PyTorch's old and new names of precisions were mixed
        raise UncapturableError("PyTorch's precision settings contradict each other") from error


def _settings() -> Hashable:
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    return (
        *(cuda.matmul.allow_tf32, cuda.matmul.allow_fp16_reduced_precision_reduction),
        *(cuda.matmul.allow_bf16_reduced_precision_reduction, cuda.matmul.allow_fp16_accumulation),
        *(cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32),
        *(cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled()),
        *(cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled()),
        torch.are_deterministic_algorithms_enabled(),
    )


def _cloned(output: Any, scale: float | None) -> Any:
    """The same nesting with tensors of its own, times the scale; diffusers' outputs stay what they are."""
    if isinstance(output, torch.Tensor):
        return copied(output, scale)
    if isinstance(output, dict):  # diffusers' outputs are dicts and dataclasses at once
        return type(output)(**{name: _cloned(item, scale) for name, item in output.items()})
    if isinstance(output, (tuple, list)):
        return type(output)(_cloned(item, scale) for item in output)
    return output


def _failure(error: Exception) -> str:
    """Why a kind of call can't be captured, in one line."""
    if isinstance(error, UncapturableError):
        return str(error)
    words = str(error).splitlines()[0][:160] if str(error) else ""
    return f"capturing failed: {type(error).__name__}: {words}"


def _ran_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one it came after, says so: a capture that memory ended may not end as it should, either."""
    return error is not None and (isinstance(error, torch.OutOfMemoryError) or _ran_out_of_memory(error.__context__))


def _label(inputs: CallInputs) -> str:
    tensors = [x for x in inputs.tensors if isinstance(x, torch.Tensor)]
    sample = tensors[0]
    shape = "×".join(map(str, sample.shape))
    return f"{shape} {str(sample.dtype).removeprefix('torch.')}, {len(inputs.tensors)} inputs"
