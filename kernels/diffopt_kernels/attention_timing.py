"""Time per call of launches and of PyTorch's attention backends, captured in CUDA graphs. Verify first, then time."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from diffopt_kernels.attention import launch_attention
from diffopt_kernels.attention_cases import MODEL_CASES, AttentionCase, make_inputs
from diffopt_kernels.launch import SHORT_KEYS, AttentionLaunch

CALLS_PER_GRAPH = 20
REPLAYS = 7
PEERS = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
}


@dataclass(frozen=True)
class Timing:
    """Microseconds per call, median over replays of one captured graph; inputs hot (one buffer, mostly in L2)."""

    case: str
    keys: str
    what: str
    microseconds: float

    def as_record(self) -> dict:
        return asdict(self)


def microseconds_per_call(call: Callable[[], object]) -> float:
    """Median over `REPLAYS` replays of a CUDA graph of `CALLS_PER_GRAPH` calls."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS_PER_GRAPH):
            call()
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / CALLS_PER_GRAPH)
    return statistics.median(times)


def time_launches(head_dim: int, launches: Sequence[AttentionLaunch], dtype: torch.dtype) -> list[Timing]:
    """Every launch and every SDPA backend that serves, on the model shapes of one head dim."""
    device = torch.device("cuda")
    timings = []
    for case in MODEL_CASES[head_dim]:
        q, k, v = make_inputs(case, head_dim, dtype, device, seed=1)
        out = torch.empty_like(q)
        heads_first = [x.transpose(1, 2) for x in (q, k, v)]
        for name, backend in PEERS.items():
            timings += _timed(case, name, lambda b=backend, x=heads_first: _sdpa(b, x))
        for launch in launches:
            scale = head_dim**-0.5
            timings += _timed(
                case, launch.label, lambda launch=launch, x=(q, k, v, out, scale): launch_attention(*x, launch)
            )
    return timings


def _sdpa(backend: SDPBackend, heads_first: list[torch.Tensor]) -> torch.Tensor:
    q, k, v = heads_first
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(q, k, v)


def _timed(case: AttentionCase, what: str, call: Callable[[], object]) -> list[Timing]:
    """One timing, or none where a backend refuses the shape."""
    try:
        call()
    except RuntimeError as error:
        if "No available kernel" in str(error) or "No viable backend" in str(error):
            return []
        raise
    keys = "short" if case.n_k <= SHORT_KEYS else "long"
    return [Timing(case.why, keys, what, microseconds_per_call(call))]


def fastest(timings: Sequence[Timing], keys: str, labels: Sequence[str]) -> list[tuple[float, str]]:
    """(mean, label), best first: the geometric mean of time over the best label's, over the cases of one key class."""
    cases = {t.case for t in timings if t.keys == keys}
    time = {(t.case, t.what): t.microseconds for t in timings}
    best = {case: min(time[case, label] for label in labels) for case in cases}
    if not cases:
        return []
    return sorted((statistics.geometric_mean(time[c, label] / best[c] for c in cases), label) for label in labels)
