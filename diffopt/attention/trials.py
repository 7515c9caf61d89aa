"""What `diffopt tune` does in processes of their own: check launches, and time them beside the other backends.

A launch is first checked on a handful of small awkward cases, so that a wrong one is neither timed nor disturbs the
timing; the few fastest are then checked on all cases that the kernels' self-check knows. Whatever is timed has its
result compared at the very shape first. The rule is that of `diffopt_kernels.attention_check` everywhere.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence

import torch

from diffopt.attention.backends import BACKENDS
from diffopt.attention.isolation import Send
from diffopt.errors import one_line
from diffopt.measure.ceilings import Ceilings, measure_ceilings
from diffopt.measure.timing import device_seconds, interleaved
from diffopt_kernels.attention import launch_attention
from diffopt_kernels.attention_cases import AttentionCase, awkward_cases, make_inputs, tiny_cases
from diffopt_kernels.attention_check import (
    Errors,
    LaunchResult,
    allowed_errors,
    check_launch,
    errors_against,
    sdpa_errors,
)
from diffopt_kernels.launch import AttentionLaunch, LaunchKey
from diffopt_kernels.reference import attention_reference

_GRAPH_SECONDS = 1e-3  # calls of one graph add up to this: its own launch, some microseconds, doesn't show
_CALLS = (3, 100)
_PEER_SCORES = 2**28  # SDPA math holds all scores at once, in float32


@dataclasses.dataclass(frozen=True)
class Trial:
    """What timing one shape gave.

    Attributes:
        microseconds: contender (a backend's name, a launch's label) to the median of its time per call.
        wrong: contender to why it was not timed.
    """

    microseconds: dict[str, float]
    wrong: dict[str, str]


def check(_send: Send, launch: AttentionLaunch, dtype: str, thorough: bool, device: str) -> str:
    """Why a launch is wrong in a dtype, in words; empty if it is right."""
    cases = awkward_cases(launch) if thorough else tiny_cases(launch)
    result = check_launch(launch, cases, [getattr(torch, dtype)], torch.device(device))
    return "" if result.right else _what_is_wrong(result)


def ceilings(_send: Send, device: str) -> Ceilings:
    """The device's measured ceilings."""
    return measure_ceilings(torch.device(device))


def time_shape(
    send: Send,
    key: LaunchKey,
    dtype: str,
    launches: Sequence[AttentionLaunch],
    backends: Sequence[str],
    rounds: int,
    device: str,
) -> Trial:
    """Compare, capture and time launches and backends at one shape.

    Sends the name of each before its first run, and "" before the timing: if the process dies, the last one is why.
    """
    place = torch.device(device)
    if place.type == "cuda" and place.index is not None:
        torch.cuda.set_device(place)  # graphs are captured on the current one
    case = AttentionCase("tuning", key.batch, key.n_q, key.n_k, key.heads)
    q, k, v = make_inputs(case, key.head_dim, getattr(torch, dtype), place, seed=1)
    expected = attention_reference(q, k, v)
    limit = _limit(q, k, v, expected)
    out = torch.empty(q.shape, dtype=q.dtype, device=place)
    calls: dict[str, Callable[[], torch.Tensor]] = {
        name: lambda backend=BACKENDS[name]: backend.run(q, k, v, None, None) for name in backends
    }
    scale = key.head_dim**-0.5
    for launch in launches:
        calls[launch.label] = lambda launch=launch: launch_attention(q, k, v, out, scale, launch)

    wrong, ready = {}, {}
    for name, call in calls.items():
        send(name)
        reasons = BACKENDS[name].call_reasons(q, k, v, None) if name in BACKENDS else []
        if reasons:
            wrong[name] = f"can't serve this shape: {', '.join(reasons)}"
            continue
        out.fill_(math.nan)
        try:
            errors = errors_against(call(), expected)
            if errors.within(limit):
                ready[name] = _captured(call, place)
            else:
                wrong[name] = f"{_error(errors, limit)} at this shape"
        except Exception as error:  # Triton's, PyTorch's and xFormers' have no root in common
            if "CUDA" in str(error):  # its context may be lost: end here, the rest is tried again without this one
                raise
            wrong[name] = one_line(error)
    send("")
    return Trial(_times(ready, rounds, place), wrong)


def _limit(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, expected: torch.Tensor) -> Errors:
    """What the rule allows, from PyTorch's errors on as many query rows as their scores fit into memory."""
    rows = max(1, _PEER_SCORES // (q.shape[0] * q.shape[2] * k.shape[1]))
    peers = sdpa_errors(q[:, :rows], k, v, expected[:, :rows])
    return allowed_errors([errors for errors in peers if errors is not None], expected, q.dtype)


def _captured(call: Callable[[], object], device: torch.device) -> tuple[Callable[[], object], int]:
    """A CUDA graph of several calls, replayed once, and how many calls it holds. On a CPU the call itself."""
    if device.type != "cuda":
        return call, 1
    seconds = min(device_seconds(call, device) for _ in range(3))
    calls = min(max(math.ceil(_GRAPH_SECONDS / seconds), _CALLS[0]), _CALLS[1])
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    graph.replay()
    torch.cuda.synchronize(device)
    return graph.replay, calls


def _times(
    ready: Mapping[str, tuple[Callable[[], object], int]], rounds: int, device: torch.device
) -> dict[str, float]:
    """Medians of `rounds` interleaved replays after one unmeasured round, in microseconds per call."""
    samples = interleaved(
        {name: replay for name, (replay, _) in ready.items()},
        repetitions=rounds,
        warmup=1,
        measure=lambda replay: device_seconds(replay, device),
    )
    return {name: round(statistics.median(taken) * 1e6 / ready[name][1], 2) for name, taken in samples.by_name.items()}


def _what_is_wrong(result: LaunchResult) -> str:
    if result.void:
        return f"its check is void: {result.void}"
    if not result.cases:
        return "no case was checked"
    wrong = next(case for case in result.cases if not case.right)
    if wrong.overrun:
        return f"wrote outside its output at {wrong.case} {wrong.dtype}"
    return f"{_error(wrong.ours, wrong.limit)} at {wrong.case} {wrong.dtype}"


def _error(errors: Errors, limit: Errors) -> str:
    if errors.relative_l2 > limit.relative_l2:
        return f"relative error {errors.relative_l2:.1e}, allowed {limit.relative_l2:.1e}"
    return f"largest error {errors.maximum:.1e}, allowed {limit.maximum:.1e}"
