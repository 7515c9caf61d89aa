"""What one contender's process does: compile, compute outputs for the judge, and be timed, a shape at a time."""

import dataclasses
import gc
from collections.abc import Callable
from typing import Any

import torch

from diffopt.bench.attention.clock import CapturedCalls, calls_per_graph, input_sets
from diffopt.bench.attention.inputs import CONTENTS, SEED, TIMED, Inputs, output_file, shape_inputs
from diffopt.bench.attention.peers import PEERS, Peer
from diffopt.bench.attention.worker_process import Commands, RefusedError
from diffopt.bench.workloads import AttentionShape
from diffopt.measure.timing import device_seconds, synchronize


def contender_process(name: str, device: str) -> tuple[Commands, Callable[[], bool]]:
    """The commands of the process of one contender (a `worker_process.Factory`)."""
    place = settle(device)
    return ContenderCommands(PEERS[name], place).commands(), lambda: is_sound(place)


def settle(device: str) -> torch.device:
    """Make a device this process's own, for libraries that run on the current one; no gradients from here on."""
    place = torch.device(device)
    torch.set_grad_enabled(False)
    if place.type == "cuda" and place.index is not None:
        torch.cuda.set_device(place)
    return place


def is_sound(device: torch.device) -> bool:
    """Whether the device still answers this process: after an illegal access nothing in it works any more."""
    try:
        synchronize(device)
    except Exception:
        return False
    return True


@dataclasses.dataclass(frozen=True)
class _Timed:
    """One shape, captured."""

    shape: AttentionShape
    hot: CapturedCalls
    cold: CapturedCalls | None
    sets: int


class ContenderCommands:
    """The commands, on one device. Shapes are `AttentionShape`; a call that the contender refuses is a RefusedError."""

    def __init__(self, peer: Peer, device: torch.device) -> None:
        self._peer, self._device = peer, device
        self._timed: _Timed | None = None

    def commands(self) -> Commands:
        return {name: getattr(self, name) for name in ("hello", "warm_up", "outputs", "time", "release")}

    def hello(self) -> dict[str, Any]:
        """Why the contender can't run here (empty: it can), and its version."""
        reasons = self._peer.absent_reasons(self._device)
        if not reasons:
            self._peer.prepare(self._device)
        return {"reasons": reasons, "version": self._peer.version()}

    def warm_up(self, shape: AttentionShape) -> None:
        """One call, so that what has to be compiled is."""
        try:
            self._run(shape_inputs(shape, self._peer.dtype, self._device))
            synchronize(self._device)
        finally:
            self.release()

    def outputs(self, shape: AttentionShape, folder: str) -> dict[str, int | None]:
        """Leave the outputs for every content in `folder`; returns the peak memory of a call beyond its inputs."""
        try:
            for content in CONTENTS:
                inputs = shape_inputs(shape, self._peer.dtype, self._device, content)
                self._run(inputs)  # what only a first call allocates is neither poisoned nor counted
                _poison(inputs[0])
                torch.save(self._run(inputs).cpu(), output_file(folder, self._peer.name, content))
            return {"peak_memory": self._peak_memory(shape_inputs(shape, self._peer.dtype, self._device))}
        finally:
            self.release()

    def time(self, shape: AttentionShape) -> dict[str, Any]:
        """One sample with hot and one with cold inputs, in microseconds per call; the first captures the graphs."""
        if self._timed is None or self._timed.shape != shape:
            self.release()
            try:
                self._timed = self._capture(shape)
            except BaseException:  # out of memory, say: the others need what was taken
                self.release()
                raise
        hot_us = self._timed.hot.sample_us()
        cold_us = self._timed.cold.sample_us() if self._timed.cold else hot_us
        return {"hot_us": hot_us, "cold_us": cold_us, "calls": self._timed.hot.calls, "input_sets": self._timed.sets}

    def release(self) -> None:
        """Give back what the last shape holds."""
        self._timed = None
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _run(self, inputs: Inputs) -> torch.Tensor:
        reasons = self._peer.refusals(*inputs)
        if reasons:
            raise RefusedError("; ".join(reasons))
        return self._peer.run(*inputs)

    def _peak_memory(self, inputs: Inputs) -> int | None:
        if self._device.type != "cuda":
            return None
        synchronize(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        self._peer.run(*inputs)
        synchronize(self._device)
        return torch.cuda.max_memory_allocated(self._device) - before

    def _capture(self, shape: AttentionShape) -> _Timed:
        run, dtype, device = self._peer.run, self._peer.dtype, self._device
        inputs = shape_inputs(shape, dtype, device, TIMED)
        self._run(inputs)
        calls = calls_per_graph(device_seconds(lambda: run(*inputs), device))
        hot = CapturedCalls([lambda: run(*inputs)] * calls, device)
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        sets = input_sets(sum(x.nbytes for x in inputs), cache)
        if sets == 1:
            return _Timed(shape, hot, None, sets)
        others = [inputs] + [shape_inputs(shape, dtype, device, TIMED, SEED + i) for i in range(1, sets)]
        rounds = max(1, calls // sets)
        cold = CapturedCalls([lambda x=x: run(*x) for _ in range(rounds) for x in others], device, beside=hot)
        return _Timed(shape, hot, cold, sets)


def _poison(like: torch.Tensor) -> None:
    """Leave NaN in the memory that the allocator hands out next for an output of this size: what is not written shows.

    Everything else it keeps is returned first, so that no other block fits.
    """
    if like.device.type == "cuda":
        torch.cuda.empty_cache()
    torch.full_like(like, torch.nan)
