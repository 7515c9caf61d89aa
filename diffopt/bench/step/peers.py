"""Peers of denoising steps: what else makes a UNet faster exactly, each on a twin of the stock pipeline."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from diffopt.bench.step.alarm import OutOfTime, alarm
from diffopt.bench.step.check import distances_of
from diffopt.bench.step.contenders import twin
from diffopt.bench.step.loop_clock import LoopTime, time_loop
from diffopt.bench.step.peer_record import StepPeer, certificate_with
from diffopt.bench.workloads import COMPILE_PEERS, PEER_LIMIT_S
from diffopt.measure.memory import give_back
from diffopt.measure.teacher_forced import Certificate, UNetCall
from diffopt.measure.timing import Samples, Spread, paired_ratio
from diffopt.unet import fused, graphs
from diffopt.unet.capturers import Capturer, CudaCapturer


@dataclasses.dataclass(frozen=True)
class Way:
    """How a peer is made.

    Attributes:
        prepare: changes a twin of the stock pipeline in place.
        reasons: why it can't be had on a device; empty when it can.
        problem: what of a pipeline that has run is not as the peer's name says; empty when all is.
    """

    prepare: Callable[[Any], None]
    reasons: Callable[[torch.device], list[str]]
    problem: Callable[[Any], str] = lambda pipe: ""


def captured_way(capturer: Callable[[], Capturer] = CudaCapturer) -> Way:
    """Stock modules and processors with channels-last convolution weights, each UNet call captured as one graph."""

    def prepare(pipe: Any) -> None:
        fused.put_channels_last(pipe.unet)
        kept = graphs.put_on(pipe.unet, graphs.CapturedCalls(capturer()))
        if kept:
            raise RuntimeError(kept)

    def problem(pipe: Any) -> str:
        uncaptured = getattr(pipe.unet, graphs.ATTRIBUTE).summary()["uncaptured"]
        return f"UNet calls were not captured: {uncaptured[0]['reason']}" if uncaptured else ""

    return Way(prepare, _needs_cuda, problem)


def compiled_way(reasons: Callable[[torch.device], list[str]], **options: Any) -> Way:
    """`torch.compile` of the UNet as diffusers' documentation advises: fused projections, channels-last.

    Args:
        reasons: as `Way.reasons`. options: of `torch.compile`.
    """

    def prepare(pipe: Any) -> None:
        pipe.unet.fuse_qkv_projections()
        pipe.unet.to(memory_format=torch.channels_last)
        if "autotune" in options.get("mode", ""):
            _quiet_autotuner()
        pipe.unet.compile(fullgraph=True, **options)

    return Way(prepare, reasons)


def _needs_cuda(device: torch.device) -> list[str]:
    return [] if device.type == "cuda" else ["needs a CUDA GPU"]


PEERS: dict[str, Way] = {
    "cuda-graph": captured_way(),
    **{name: compiled_way(_needs_cuda, mode=name.removeprefix("compile-")) for name in COMPILE_PEERS},
}
"""Every peer by name."""


@dataclasses.dataclass
class Peer:
    """A peer from its making to its record; fields as in `StepPeer`.

    Attributes:
        pipe: what is timed; None once there is nothing to time.
    """

    name: str
    state: str = "timed"
    why: str = ""
    pipe: Any = None
    first_call_s: float | None = None
    distances: list[float] = dataclasses.field(default_factory=list)
    nonfinite: int = 0
    bitwise_stock: bool = False

    def sample(self, measure: Callable[[Any], Any]) -> Any:
        """What `measure` says of the pipeline; None when there is none, or from the first failure on."""
        if self.pipe is None:
            return None
        try:
            return measure(self.pipe)
        except Exception as error:  # one contender's failure is no reason to lose the others' samples
            self.drop("failed", _words(error))
            return None

    def drop(self, state: str, why: str) -> None:
        """Time it no longer."""
        self.state, self.why, self.pipe = state, why, None


@dataclasses.dataclass(frozen=True)
class Judge:
    """What peers are checked by: stock's UNet calls and outputs, the reference's outputs by step, our certificate."""

    calls: Sequence[UNetCall]
    outputs: Sequence[torch.Tensor]
    exact: Mapping[int, torch.Tensor]
    certificate: Certificate


def prepare_peer(
    name: str, stock: Any, arguments: Callable[[], dict[str, Any]], judge: Judge, limit_s: float = PEER_LIMIT_S
) -> Peer:
    """Make a peer of the stock pipeline, call it for the first time and check its steps; failures are its state.

    Args:
        limit_s: a first call that takes longer is given up; compilers may search for hours.
    """
    way, device = PEERS[name], stock.unet.device
    peer = Peer(name)
    reasons = way.reasons(device)
    if reasons:
        peer.drop("absent", "; ".join(reasons))
        return peer
    skips = _graph_skips()
    try:
        peer.pipe = twin(stock)
        with alarm(limit_s):
            way.prepare(peer.pipe)
            peer.first_call_s = time_loop(peer.pipe, arguments()).call_s
        peer.distances, peer.nonfinite, peer.bitwise_stock = distances_of(
            lambda call: call.run(peer.pipe.unet), judge.calls, judge.outputs, judge.exact
        )
        problem = way.problem(peer.pipe)
        if problem:
            peer.drop("failed", problem)
    except OutOfTime:
        peer.drop("failed", f"its first call takes longer than {limit_s:g} s (--peer-limit)")
    except Exception as error:  # a compiler may raise anything
        peer.drop("failed", _words(error))
    if peer.state == "timed":
        certificate = certificate_with(judge.certificate, peer.distances, peer.nonfinite, peer.bitwise_stock)
        if not certificate.passed:
            peer.drop("inexact", certificate.verdict())
        elif _graph_skips() > skips:
            peer.why = f"the compiler left out CUDA graphs {_graph_skips() - skips} times"
    if peer.pipe is None:
        give_back(device)
    return peer


def forget(peers: Sequence[Peer]) -> None:
    """Let go of the pipelines and of what the compiler keeps of them, which the next case's would be counted with."""
    for peer in peers:
        peer.pipe = None
    if any(peer.name in COMPILE_PEERS and peer.first_call_s is not None for peer in peers):
        torch.compiler.reset()


def peer_record(peer: Peer, loops: Samples, unet: Samples, *, ours: str, steps: int) -> StepPeer:
    """A peer's record.

    Args:
        loops: `LoopTime` samples by contender. unet: seconds by contender.
        ours: the contender that is compared with it.
        steps: of a loop.
    """
    fields: dict[str, Any] = {
        field.name: getattr(peer, field.name) for field in dataclasses.fields(peer) if field.name != "pipe"
    }
    if peer.state == "timed":
        times: dict[str, list[float]] = {name: _loop_s(loops.by_name[name]) for name in (peer.name, ours)}
        loop_s, unet_s = times[peer.name], unet.by_name[peer.name]
        loop, forward = Spread.of(loop_s), Spread.of(unet_s)
        fields |= {
            "loop_s": loop_s,
            "unet_s": unet_s,
            "loop": loop,
            "unet": forward,
            "loop_its": steps / loop.median,
            "unet_its": 1 / forward.median,
            "loop_ratio": paired_ratio(loop_s, times[ours]),
            "unet_ratio": paired_ratio(unet_s, unet.by_name[ours]),
        }
    return StepPeer(**fields)


def _loop_s(times: Sequence[LoopTime]) -> list[float]:
    return [time.loop_s for time in times]


def _graph_skips() -> int:
    """How often inductor has declined to use CUDA graphs in this process, which it says in a warning only."""
    with contextlib.suppress(ImportError, AttributeError, KeyError):
        from torch._dynamo.utils import counters

        return counters["inductor"]["cudagraph_skips"]
    return 0


def _quiet_autotuner() -> None:
    """Inductor prints a table per product and convolution it tries, hundreds of lines for a UNet."""
    with contextlib.suppress(ImportError):
        from torch._inductor import select_algorithm

        select_algorithm.PRINT_AUTOTUNE = False


def _words(error: Exception) -> str:
    """An error as one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__
