"""What an eager call of attention costs the host, beside PyTorch's: `python -m diffopt_kernels.host_cost`.

A UNet in eager mode waits for the host at these sizes, not for the GPU, so the time until a call returns decides its
speed. Small tensors keep the GPU's queue short; the median over many rounds leaves out whatever else the machine does.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

from diffopt_kernels.attention import attention, launch_attention
from diffopt_kernels.candidates import attention_candidates
from diffopt_kernels.launch import LaunchKey, attention_launch

SHAPE = LaunchKey(batch=2, n_q=64, n_k=64, heads=8, head_dim=40)
CALLS = 50  # between two waits for the GPU
ROUNDS = 40


def main(argv: Sequence[str] | None = None) -> int:
    """Print microseconds per call, and with --json write them. Exit code 1 without a CUDA GPU."""
    parser = argparse.ArgumentParser(prog="python -m diffopt_kernels.host_cost", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("no CUDA GPU is visible")
        return 1
    costs = host_costs(torch.device("cuda", torch.cuda.current_device()))
    for what, microseconds in costs.items():
        print(f"{microseconds:8.1f} µs  {what}")
    if arguments.json:
        record = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "microseconds": costs}
        arguments.json.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    return 0


def host_costs(device: torch.device) -> dict[str, float]:
    """Microseconds of host time per eager call, by what is called; float16, a launch of each of our kernels."""
    shape = (SHAPE.batch, SHAPE.n_q, SHAPE.heads, SHAPE.head_dim)
    q, k, v = (torch.randn(shape, device=device, dtype=torch.float16) for _ in range(3))
    q_first, k_first, v_first = (x.transpose(1, 2) for x in (q, k, v))
    out = torch.empty_like(q)
    calls: dict[str, Callable[[], object]] = {
        "scaled_dot_product_attention": lambda: scaled_dot_product_attention(q_first, k_first, v_first),
        "diffopt_kernels.attention": lambda: attention(q, k, v),
        "torch.empty_like": lambda: torch.empty_like(q),
    }
    for launch in _one_of_each_kernel(torch.cuda.get_device_capability(device)):
        calls[f"{launch.kernel} alone"] = lambda launch=launch: launch_attention(q, k, v, out, 0.1, launch)
    with torch.no_grad():
        return {what: microseconds_per_call(call) for what, call in calls.items()}


def _one_of_each_kernel(capability: tuple[int, int]):
    chosen = {}
    for launch in (
        attention_launch(SHAPE, float32=False, aligned=False, capability=capability),
        attention_launch(SHAPE, float32=False, aligned=True, capability=capability),
        *(attention_candidates([SHAPE.head_dim]) if capability[0] == 9 else []),
    ):
        if not launch.float32 and launch.takes(SHAPE.n_k):
            chosen.setdefault(launch.kernel, launch)
    return chosen.values()


def microseconds_per_call(call: Callable[[], object]) -> float:
    """Median host time of one call; the GPU is waited for between rounds and its time is not counted."""
    times = []
    for _ in range(ROUNDS + 2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        times.append((time.perf_counter() - start) / CALLS)
    return statistics.median(times[2:]) * 1e6


if __name__ == "__main__":
    sys.exit(main())
