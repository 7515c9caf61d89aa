"""How work is recorded and played back: CUDA graphs, behind a protocol that tests can stand in for."""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch

from diffopt_kernels.rehearsal import rehearsed

Result = TypeVar("Result")


class Capturer(Protocol):
    """Records what a function does on tensors at fixed addresses, to be played back."""

    def reasons(self, device: torch.device) -> list[str]:
        """Why nothing can be recorded on a device now; empty when it can."""
        ...

    def ready(self, device: torch.device) -> None:
        """Make the current stream wait for what was played back last, wherever that was."""
        ...

    def warm_up(self, work: Callable[[], Result], device: torch.device) -> Result:
        """The work's result, run unrecorded where recording will run it, twice if kernels have to be compiled first."""
        ...

    def capture(self, work: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
        """Record the work: a function that plays it back, and the result, which each playback writes anew."""
        ...

    def forget(self) -> None:
        """What was recorded is no longer used, or recording failed: share nothing with it from now on."""
        ...


class CudaCapturer:
    """CUDA graphs of one pipeline: one memory pool and one stream to record on per device serve all of them.

    Sharing the pool is sound because playbacks of one capturer never overlap (`ready` orders streams) and because
    nothing a graph wrote into it is read after the next one began: inputs live outside the pool, and so do a prologue's
    results; outputs are cloned.

    PyTorch keeps a workspace of cuBLAS for each stream. One that was made before recording lies outside the pool, and
    whoever drops PyTorch's workspaces, as `torch.compile` does before it records graphs of its own, takes that memory
    from under the graph. So they are dropped before each recording, which then makes its own in the pool, and after it,
    so that nothing else uses that one. Streams are no help: PyTorch hands out 32 in turn, used ones, too.
    """

    def __init__(self) -> None:
        self._recorders: dict[torch.device, tuple[Any, torch.cuda.Stream]] = {}
        self._sides: dict[torch.device, torch.cuda.Stream] = {}
        self._last: dict[torch.device, torch.cuda.Stream] = {}

    def reasons(self, device: torch.device) -> list[str]:
        if device.type != "cuda":
            return [f"graphs need a CUDA GPU, the call is on {device.type}"]
        if torch.cuda.is_current_stream_capturing():
            return ["another capture is running"]
        return []

    def ready(self, device: torch.device) -> None:
        current, last = torch.cuda.current_stream(device), self._last.get(device)
        if last is not None and last != current:
            current.wait_stream(last)
        self._last[device] = current

    def warm_up(self, work: Callable[[], Result], device: torch.device) -> Result:
        with torch.cuda.device(device):
            side, current = self._side(device), torch.cuda.current_stream()
            side.wait_stream(current)
            with torch.cuda.stream(side):
                result = rehearsed(work)
            current.wait_stream(side)
        return result

    def capture(self, work: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device):
            before = torch.cuda.current_stream()
            if device not in self._recorders:
                self._recorders[device] = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
            pool, stream = self._recorders[device]
            _drop_workspaces()
            try:
                # Other threads may allocate meanwhile: only this one's calls must be fit for a graph.
                with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                    output = work()
            finally:
                torch.cuda.set_stream(before)  # a capture that fails to end leaves its own stream current
                _drop_workspaces()

        def play_back() -> None:
            with torch.cuda.device(device):
                graph.replay()

        return play_back, output

    def forget(self) -> None:
        self._recorders.clear()  # graphs keep the pool they were made in; a pool without graphs can't be used again

    def _side(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._sides:
            self._sides[device] = torch.cuda.Stream(device)
        return self._sides[device]


def _drop_workspaces() -> None:
    """Give cuBLAS's workspaces back to where they lie; it makes new ones where it needs them."""
    drop = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if drop is not None:
        drop()
