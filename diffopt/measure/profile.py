"""Where the time of a UNet forward goes, by kind of work: the profiler's kernels, sorted by their names."""

import dataclasses
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.utils.flop_counter import FlopCounterMode

from diffopt.gpus import find_gpu
from diffopt.measure.environment import STRICT
from diffopt.measure.teacher_forced import UNetCall
from diffopt.measure.timing import synchronize

FORWARDS = 3

KINDS = ("attention", "convolution", "matmul", "norm", "elementwise", "copies", "other")
"""Kinds of work, as reports list them."""

Kernel = tuple[str, float]
"""Name and microseconds of one kernel, copy or fill on the device."""

# The first that matches counts. Implicit-GEMM convolutions name themselves both, and so do copies by elementwise
# kernels; kernels of matrix products carry layout words that look like copies.
_NAMES = (
    ("attention", re.compile(r"attention|flash|fmha|sdpa")),
    ("copies", re.compile(r"memcpy|memset|nchwtonhwc|nhwctonchw|catarray|direct_copy|copy_kernel|fillfunctor")),
    ("convolution", re.compile(r"conv(?!ert)|fprop|dgrad|wgrad|winograd")),
    ("norm", re.compile(r"norm|rowwisemoments|welford")),
    ("matmul", re.compile(r"gemm|gemv|nvjet|splitk|cutlass|cublas|matmul|geglu_product")),
    ("copies", re.compile(r"copy|transpose")),
    ("elementwise", re.compile(r"elementwise|functor|geglu|bias_add|silu|gelu|upsample|summed_weights|triton_poi")),
)


@dataclasses.dataclass(frozen=True)
class ForwardProfile:
    """What the profiler saw of a UNet's forward.

    Attributes:
        forwards: how many were profiled; what follows is per forward.
        microseconds: of GPU time by kind of work (`KINDS`); gaps between kernels are in none.
        launches: kernels, copies and fills that ran.
        flops: floating-point operations of a stock forward as `torch.utils.flop_counter` counts them (a
            multiply-add is two); None where that failed.
        why: what went wrong; empty otherwise.
    """

    forwards: int = 0
    microseconds: dict[str, float] = dataclasses.field(default_factory=dict)
    launches: float | None = None
    flops: int | None = None
    why: str = ""
    __pydantic_config__ = STRICT

    @property
    def total_us(self) -> float:
        """Microseconds of GPU time per forward."""
        return sum(self.microseconds.values())

    def floor_us(self, gpu: str | None, dtype: str) -> float | None:
        """Microseconds the operations take at a GPU's peak; None where one of them isn't known.

        Args:
            gpu: as the driver calls it. dtype: of the UNet, "float16" for one.
        """
        known = find_gpu(gpu) if gpu else None
        if self.flops is None or known is None or known.peaks is None:
            return None
        half = dtype in ("float16", "bfloat16")
        return self.flops / (known.peaks.fp16_tflops if half else known.peaks.fp32_tflops) / 1e6

    def data(self, floor_us: float | None) -> dict[str, Any]:
        """As plain data, with the sum ("total_us") and the least that a forward can take ("floor_us")."""
        return {**dataclasses.asdict(self), "total_us": self.total_us, "floor_us": floor_us}

    def words(self, floor_us: float | None) -> str:
        """Where the time goes, beside the floor, in one line."""
        if self.why:
            return f"no profile of a UNet forward: {self.why}"
        spent = [(kind, self.microseconds.get(kind, 0.0)) for kind in KINDS]
        shares = ", ".join(f"{kind} {took:.0f} ({took / self.total_us:.0%})" for kind, took in spent if took)
        least = f"{floor_us:.0f} µs" if floor_us is not None else "—"
        work = f"{self.flops / 1e12:.2f} TFLOP" if self.flops is not None else "—"
        return (
            f"a UNet forward's {self.total_us:.0f} µs of GPU time: {shares}; {round(self.launches or 0)} launches; "
            f"floor {least} ({work} at the datasheet's peak)"
        )


def kind_of(kernel: str) -> str:
    """The kind of work (`KINDS`) a kernel's name stands for."""
    lower = kernel.lower()
    return next((kind for kind, pattern in _NAMES if pattern.search(lower)), "other")


def profile_forward(
    call: UNetCall,
    unet: Any,
    stock: Callable[[], object],
    kernels: "Callable[[Callable[[], object], torch.device], Iterable[Kernel]] | None" = None,
) -> ForwardProfile | None:
    """Profile a UNet on one call, after everything was timed: the profiler slows what runs beside it.

    Whatever goes wrong is words in the result.

    Args:
        call: the UNet call.
        stock: makes a stock forward, whose operations are counted (`on_meta` for one).
        kernels: what runs `FORWARDS` times on a device; by default PyTorch's profiler, on CUDA only.

    Returns:
        None on a CPU, which has no kernels to sort.
    """
    device = unet.device
    if kernels is None:
        if device.type != "cuda":
            return None
        kernels = cuda_kernels
    try:
        found = list(kernels(lambda: call.run(unet), device))
        if not found:
            return ForwardProfile(why="the profiler saw no kernels")
    except Exception as error:  # a profile is worth less than what it stands beside
        return ForwardProfile(why=f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0][:160]}")
    microseconds: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    for name, took in found:
        microseconds[kind_of(name)] += took / FORWARDS
    return ForwardProfile(FORWARDS, microseconds, len(found) / FORWARDS, _flops(stock))


def on_meta(unet: Any, call: UNetCall) -> Callable[[], object]:
    """A stock UNet of the same configuration on the same call, without values: for counting operations."""

    def forward() -> object:
        with torch.device("meta"):
            stock = type(unet).from_config(unet.config)
        torch.nn.Module.to(stock, unet.dtype)  # diffusers' own warns
        return call.to("meta").run(stock)

    return forward


def cuda_kernels(run: Callable[[], object], device: torch.device) -> list[Kernel]:
    """Everything the device did while `run` ran `FORWARDS` times, playbacks of CUDA graphs kernel by kernel."""
    run()
    synchronize(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(FORWARDS):
            run()
        synchronize(device)
    return [
        (event.name, event.time_range.elapsed_us())
        for event in profiler.events() or ()
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]


def _flops(run: Callable[[], object]) -> int | None:
    try:
        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops() or None
    except Exception:  # an operation it can't count
        return None
