"""Where the time of a UNet forward goes, by kind of work: the profiler's kernels, sorted by their names."""

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.utils.flop_counter import FlopCounterMode

from diffopt.bench.step.profile_record import KINDS, StepProfile
from diffopt.measure.teacher_forced import UNetCall
from diffopt.measure.timing import synchronize

FORWARDS = 3

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


def kind_of(kernel: str) -> str:
    """The kind of work (`KINDS`) a kernel's name stands for."""
    lower = kernel.lower()
    return next((kind for kind, pattern in _NAMES if pattern.search(lower)), "other")


def profile_forward(
    call: UNetCall,
    optimized: Any,
    stock: Any,
    kernels: "Callable[[Callable[[], object], torch.device], Iterable[Kernel]] | None" = None,
) -> StepProfile | None:
    """Profile the optimized UNet on one call, after everything was timed: the profiler slows what runs beside it.

    Whatever goes wrong is words in the result.

    Args:
        call: the UNet call. optimized, stock: UNets; operations are counted on stock's.
        kernels: what runs `FORWARDS` times on a device; by default PyTorch's profiler, on CUDA only.

    Returns:
        None on a CPU, which has no kernels to sort.
    """
    device = optimized.device
    if kernels is None:
        if device.type != "cuda":
            return None
        kernels = cuda_kernels
    try:
        found = list(kernels(lambda: call.run(optimized), device))
        if not found:
            return StepProfile(why="the profiler saw no kernels")
    except Exception as error:  # a profile is worth less than the record it stands in
        return StepProfile(why=f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0][:160]}")
    microseconds: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    for name, took in found:
        microseconds[kind_of(name)] += took / FORWARDS
    flops = _flops(lambda: call.run(stock))
    return StepProfile(forwards=FORWARDS, microseconds=microseconds, launches=len(found) / FORWARDS, flops=flops)


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
