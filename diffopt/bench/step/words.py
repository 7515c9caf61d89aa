"""What a report says of a case's peers, of where its time goes and of its warm start: numbers, or why not, one line."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from diffopt.bench.step.peer_record import StepPeer
from diffopt.bench.step.record import StepRecord
from diffopt.bench.workloads import COMPILE_PEERS
from diffopt.measure.timing import PairedRatio


@dataclasses.dataclass(frozen=True)
class OverBest:
    """Ours over the fastest of several peers, by loops paired in one run.

    Attributes:
        name: of that peer. ratio: its time over ours, above 1 ours is faster; both None where there is none.
        why: the reason that there is none, or which of the case's peers were left out, any of which might be faster.
    """

    name: str | None
    ratio: PairedRatio | None
    why: str = ""


def over_best(record: StepRecord, names: Sequence[str] | None = None) -> OverBest:
    """Ours over the fastest exact peer of these names, of all by default.

    Void when one of them that was asked for failed or is absent: nobody knows whether it would have been the fastest.
    One that is not exact has no speed to be compared with.
    """
    asked = [peer for peer in record.peers if names is None or peer.name in names]
    missing = [peer for peer in asked if peer.state in ("failed", "absent")]
    timed = [(peer.loop.median, peer) for peer in asked if peer.loop is not None]
    if not record.exact:
        return OverBest(None, None, f"the exactness check did not pass: {record.verdict()}")
    left_out = [name for name in record.peers_left_out if names is None or name in names]
    left_out_words = f"left out: {', '.join(left_out)}" if left_out else ""
    if not asked:
        return OverBest(None, None, left_out_words or "none was run")
    if missing:
        return OverBest(None, None, "void: " + "; ".join(f"{peer.name} {state_words(peer)}" for peer in missing))
    if not timed:
        return OverBest(None, None, "none was exact")
    best = min(timed, key=lambda entry: entry[0])[1]
    return OverBest(best.name, best.loop_ratio, left_out_words)


def peers_data(record: StepRecord) -> dict[str, Any]:
    """The keys that a case's peers add to its JSON: "peers" by name, and ours over the best `torch.compile` mode."""
    best = over_best(record, COMPILE_PEERS)
    return {
        "ratio_vs_torch_compile": best.ratio.ratio if best.ratio else None,
        "ratio_vs_torch_compile_interval": [best.ratio.low, best.ratio.high] if best.ratio else None,
        "ratio_vs_torch_compile_mode": best.name,
        "ratio_vs_torch_compile_why": best.why,
        "peers": {peer.name: _peer_data(record, peer) for peer in record.peers},
        "peers_left_out": list(record.peers_left_out),
    }


def _peer_data(record: StepRecord, peer: StepPeer) -> dict[str, Any]:
    certificate = peer.certificate(record.exactness)
    return {
        "state": peer.state,
        "why": peer.why,
        "exactness": certificate.verdict() if certificate else None,
        "first_call_s": peer.first_call_s,
        "loop_its": peer.loop_its,
        "unet_its": peer.unet_its,
        "ratio": peer.loop_ratio.ratio if peer.loop_ratio else None,
        "ratio_interval": [peer.loop_ratio.low, peer.loop_ratio.high] if peer.loop_ratio else None,
        "unet_ratio": peer.unet_ratio.ratio if peer.unet_ratio else None,
    }


def peers_words(record: StepRecord) -> str:
    """The peers' it/s and ours over the best in one line; empty where none was asked for, or none can be on a CPU."""
    absent = all(peer.state == "absent" for peer in record.peers)
    if absent and (not record.peers or record.environment.machine.gpu is None):
        return ""
    words = "peers: " + "; ".join(_peer_words(peer) for peer in record.peers)
    if absent:
        return words
    best = over_best(record)
    if best.ratio is None:
        words += f"; ours over the best: {best.why}"
    else:
        interval = f"({best.ratio.low:.3f} to {best.ratio.high:.3f})"
        words += f"; ours × {best.ratio.ratio:.3f} {interval} over the best, {best.name}"
    return words + (f"; left out: {', '.join(record.peers_left_out)}" if record.peers_left_out else "")


def _peer_words(peer: StepPeer) -> str:
    if peer.loop_its is None:
        return f"{peer.name} {state_words(peer)}"
    first = f", first call {peer.first_call_s:.1f} s" if peer.first_call_s is not None else ""
    note = f", {peer.why}" if peer.why else ""
    return f"{peer.name} {peer.loop_its:.2f} it/s (UNet alone {peer.unet_its:.2f}{first}{note})"


def state_words(peer: StepPeer) -> str:
    """What became of a peer that has no speed."""
    if peer.state == "inexact":  # the verdict names the state itself
        return f"not exact ({peer.why})"
    return f"{peer.state} ({peer.why})" if peer.why else peer.state


def profile_data(record: StepRecord) -> dict[str, Any] | None:
    """The profile as plain data, with the least a forward can take: `floor_us`, null for a GPU of unknown peaks."""
    return record.profile.data(floor_us(record)) if record.profile else None


def profile_words(record: StepRecord) -> str:
    """Where a UNet forward's time goes, beside the floor, in one line; empty where nobody looked."""
    return record.profile.words(floor_us(record)) if record.profile else ""


def floor_us(record: StepRecord) -> float | None:
    """Microseconds a forward's operations take at the GPU's peak of its dtype; None where one of them isn't known."""
    gpu, dtype = record.environment.machine.gpu, record.workload.dtype
    return record.profile.floor_us(gpu, dtype) if record.profile else None


def warm_start_words(record: StepRecord) -> str:
    """The warm start and its stages in one line; empty where nobody looked."""
    found = record.warm_start
    if found is None:
        return ""
    if found.warm_start_s is None:
        return f"no warm start: {found.why}"
    return (
        f"warm start {found.warm_start_s:.1f} s: process {found.process_s:.1f}, device {found.device_s:.1f}, "
        f"optimize {found.optimize_s:.1f}, first picture of {found.steps} steps {found.picture_s:.1f} "
        f"(the next one {found.second_picture_s:.1f}); imports {found.imports_s:.1f} and weights "
        f"{found.weights_s:.1f} not counted"
    )
