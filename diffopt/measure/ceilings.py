"""What a GPU reaches at its two plainest jobs: a large matrix product, and copying memory. No kernel does better."""

import dataclasses
import statistics
from collections.abc import Callable

import torch

from diffopt.measure.timing import device_seconds

_SIDE = 8192  # 1.1 TFLOP per product: long enough for full clocks to be what is measured
_COPY_BYTES = 2**30  # many times any cache
_REPETITIONS = 15


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """Measured rates: fp16 matrix product in TFLOP/s, memory copy in TB/s (bytes read and bytes written)."""

    fp16_tflops: float
    copy_tb_s: float


def measure_ceilings(device: torch.device) -> Ceilings:
    """Medians on a CUDA device nobody else uses; takes a second and 2 GiB."""
    return Ceilings(round(_product_tflops(device), 1), round(_copy_tb_s(device), 3))


def _product_tflops(device: torch.device) -> float:
    generator = torch.Generator(device=device).manual_seed(0)
    shape = (2, _SIDE, _SIDE)  # random: zeros draw less power and run faster than any real product
    a, b = torch.randn(shape, generator=generator, device=device, dtype=torch.float16)
    product = torch.empty_like(a)
    return 2 * _SIDE**3 / _median_seconds(lambda: torch.mm(a, b, out=product), device) / 1e12


def _copy_tb_s(device: torch.device) -> float:
    source = torch.ones(_COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * _COPY_BYTES / _median_seconds(lambda: target.copy_(source), device) / 1e12


def _median_seconds(run: Callable[[], object], device: torch.device) -> float:
    for _ in range(3):
        run()
    return statistics.median(device_seconds(run, device) for _ in range(_REPETITIONS))
