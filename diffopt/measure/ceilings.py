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
    """Medians on a CUDA device nobody else uses; takes a second and 3 GiB."""
    generator = torch.Generator(device=device).manual_seed(0)
    a, b = (
        torch.randn((_SIDE, _SIDE), generator=generator, device=device, dtype=torch.float16) for _ in range(2)
    )  # zeros would draw less power and run faster than any real product
    product = torch.empty_like(a)
    tflops = 2 * _SIDE**3 / _median_seconds(lambda: torch.mm(a, b, out=product), device) / 1e12
    del a, b, product
    source = torch.empty(_COPY_BYTES, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    tb_s = 2 * _COPY_BYTES / _median_seconds(lambda: target.copy_(source), device) / 1e12
    return Ceilings(round(tflops, 1), round(tb_s, 3))


def _median_seconds(run: Callable[[], object], device: torch.device) -> float:
    for _ in range(3):
        run()
    return statistics.median(device_seconds(run, device) for _ in range(_REPETITIONS))
