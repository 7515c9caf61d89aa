"""Microseconds per attention call: captured in a CUDA graph, inputs hot or rotated beyond the cache."""

import itertools
import math
import statistics
from collections.abc import Callable, Sequence

import torch

from diffopt.measure.timing import device_seconds

CALLS = 20
CLOCK = (
    f"device events around replays of a CUDA graph of {CALLS} calls (fewer where they take more than 20 ms together), "
    "per call; a sample is the median of up to five replays after unmeasured ones"
)

_GRAPH_S = 0.020  # a graph needn't last longer
_WARM_S = 0.003  # of replays before the measured ones: clocks, caches and instruction caches
_MEASURED_S = 0.010
_REPLAYS = 5


def calls_per_graph(call_s: float) -> int:
    """How many calls of this many seconds go into a graph."""
    return max(1, min(CALLS, round(_GRAPH_S / call_s)))


def input_sets(set_bytes: int, cache_bytes: int) -> int:
    """Sets of inputs to rotate, so that a set comes back only after more than twice the cache has been read."""
    return 1 if set_bytes > 2 * cache_bytes else 2 * cache_bytes // set_bytes + 2


def replays(graph_s: float) -> tuple[int, int]:
    """Unmeasured and measured replays of a graph that takes this many seconds."""
    if graph_s > _MEASURED_S * 3:  # long enough to be its own warm-up: nine tenths run on settled clocks
        return 0, 1
    return max(1, math.ceil(_WARM_S / graph_s)), max(3, min(_REPLAYS, math.ceil(_MEASURED_S / graph_s)))


class CapturedCalls:
    """Calls captured in one graph, replayed and timed.

    Args:
        runs: captured one after another; kept, because the graph reads their inputs again and again.
        device: a CUDA device that is idle.
        beside: other calls, never replayed at the same time, whose temporary memory these may use too.
    """

    def __init__(
        self, runs: Sequence[Callable[[], object]], device: torch.device, beside: "CapturedCalls | None" = None
    ) -> None:
        self.calls = len(runs)
        self._runs, self._device = runs, device
        self._graph = torch.cuda.CUDAGraph()
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):  # what a first call allocates or compiles must not be captured
            runs[0]()
        torch.cuda.current_stream(device).wait_stream(side)
        with torch.cuda.graph(self._graph, pool=beside._graph.pool() if beside else None):
            for run in runs:
                run()
        self._graph.replay()
        self._graph_s = device_seconds(self._graph.replay, device)

    def sample_us(self) -> float:
        """Microseconds per call: the median over some replays after unmeasured ones.

        All replays are queued without waiting, so that the device never waits for the host between two of them.
        """
        warm, measured = replays(self._graph_s)
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(measured + 1)]
        with torch.cuda.device(self._device):
            for _ in range(warm):
                self._graph.replay()
            marks[0].record()
            for mark in marks[1:]:
                self._graph.replay()
                mark.record()
        marks[-1].synchronize()
        times_ms = [before.elapsed_time(after) for before, after in itertools.pairwise(marks)]
        return round(statistics.median(times_ms) * 1e3 / self.calls, 4)
