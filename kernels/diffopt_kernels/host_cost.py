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
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from diffopt_kernels.attention import attention
from diffopt_kernels.attention_prepared import prepared_attention
from diffopt_kernels.candidates import attention_candidates
from diffopt_kernels.launch import AttentionLaunch, LaunchKey, attention_launch

SHAPE = LaunchKey(batch=2, n_q=64, n_k=64, heads=8, head_dim=40)
CALLS = 50  # between two waits for the GPU
ROUNDS = 40
PEERS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Print microseconds per call, and with --json write them. Exit code 1 without a CUDA GPU."""
    parser = argparse.ArgumentParser(prog="python -m diffopt_kernels.host_cost", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("no CUDA GPU is visible")
        return 1
    costs, refusals = host_costs(torch.device("cuda", torch.cuda.current_device()))
    for what, microseconds in costs.items():
        print(f"{microseconds:8.1f} µs  {what}")
    for kernel, refusal in refusals.items():
        print(f"The {kernel} kernel takes Triton's public way: {refusal}")
    if arguments.json:
        record = {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "triton": version("triton"),
            "shape": vars(SHAPE),
            "microseconds": costs,
            "refusals": refusals,
        }
        arguments.json.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    return 0


def host_costs(device: torch.device) -> tuple[dict[str, float], dict[str, str]]:
    """Microseconds of host time per eager call, float16; and which of our kernels can't be launched directly, and why.

    SDPA by its own choice, as stock calls it, and with each backend forced; our call, the op below it and the
    allocation in it; each of our kernels alone, prepared, and through Triton's public launch for comparison.
    """
    shape = (SHAPE.batch, SHAPE.n_q, SHAPE.heads, SHAPE.head_dim)
    q, k, v = (torch.randn(shape, device=device, dtype=torch.float16) for _ in range(3))
    out = torch.empty_like(q)
    with torch.no_grad():
        costs = _costs_of_pytorch(q, k, v)
        op = torch.ops.diffopt_kernels.attention.default
        costs["diffopt_kernels.attention"] = microseconds_per_call(lambda: attention(q, k, v))
        costs["diffopt_kernels.attention, the op"] = microseconds_per_call(lambda: op(q, k, v))
        costs["torch.empty_like"] = microseconds_per_call(lambda: torch.empty_like(q))
        refusals = {}
        for launch in _one_of_each_kernel(torch.cuda.get_device_capability(device)):
            prepared = prepared_attention(q, k, v, 0.1, launch, None)
            costs[f"{launch.kernel} alone"] = microseconds_per_call(lambda run=prepared: run(q, k, v, out))
            publicly = prepared.launch_publicly
            costs[f"{launch.kernel} alone, by Triton"] = microseconds_per_call(lambda run=publicly: run(q, k, v, out))
            if prepared.refusal is not None:
                refusals[launch.kernel] = prepared.refusal
    return costs, refusals


def _costs_of_pytorch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, float]:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    forced = {f"scaled_dot_product_attention, {name} forced": sdpa_kernel(backend) for name, backend in PEERS.items()}
    costs = {}
    for what, choice in {"scaled_dot_product_attention": nullcontext(), **forced}.items():
        with choice:  # entered once: what the setting costs is not the call's
            try:
                costs[what] = microseconds_per_call(lambda: scaled_dot_product_attention(q, k, v))
            except RuntimeError as error:  # it doesn't take this GPU or these inputs
                if "No available kernel" not in str(error) and "No viable backend" not in str(error):
                    raise
    return costs


def _one_of_each_kernel(capability: tuple[int, int]) -> list[AttentionLaunch]:
    chosen: dict[str, AttentionLaunch] = {}
    for launch in (
        attention_launch(SHAPE, float32=False, aligned=False, capability=capability),
        attention_launch(SHAPE, float32=False, aligned=True, capability=capability),
        *(attention_candidates([SHAPE.head_dim]) if capability[0] == 9 else []),
    ):
        if not launch.float32 and launch.takes(SHAPE.n_k):
            chosen.setdefault(launch.kernel, launch)
    return list(chosen.values())


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
