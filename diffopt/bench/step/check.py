"""The step rule applied to two pipelines of equal weights, with our own attention made wrong as the planted fault."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from diffopt.attention.backends import AUTO, BACKENDS, Backend, auto_order, guesses, with_scale_fault
from diffopt.bench.step.contenders import twin
from diffopt.handle import optimize
from diffopt.measure.exactness import nonfinite_count, relative_l2
from diffopt.measure.teacher_forced import (
    Certificate,
    Forward,
    UNetCall,
    reference_forward,
    stock_forwards,
    teacher_forced,
)
from diffopt.unet import schedules

FAULT = 1.01


def check_steps(
    stock: Any,
    optimized: Any,
    calls: Sequence[UNetCall],
    outputs: Sequence[torch.Tensor],
    *,
    attention: str,
    steps: Sequence[int],
    on_step: Callable[[int], None],
    exact: dict[int, torch.Tensor] | None = None,
) -> Certificate:
    """Replay the stock pipeline's UNet calls (`record_unet_calls`) on the optimized one and on all it is judged by.

    The optimized UNet is told timesteps where its own loop has them: those on a GPU would each be embedded alone.

    Args:
        attention: what the optimized pipeline was optimized with.
        steps: which calls to replay.
        on_step: told the number of replayed steps so far.
        exact: gets the reference's output at each replayed step, for `distances_of`.
    """
    faulty = twin(stock)
    optimize(faulty, attention=_faulty(attention, stock.unet.device))
    reference = reference_forward(stock.unet)
    numbers = iter(steps)

    def remembered(call: UNetCall) -> torch.Tensor:
        output = reference(call)
        if exact is not None:
            exact[next(numbers)] = output
        return output

    return teacher_forced(
        calls,
        ours=_forward_as_in_loops(optimized),
        fault=_forward_as_in_loops(faulty),
        fault_name=f"softmax scale × {FAULT:g} in every optimized layer",
        stock=stock_forwards(stock.unet),
        reference=remembered,
        dtype=stock.unet.dtype,
        steps=steps,
        stock_outputs=outputs,
        on_step=on_step,
    )


def distances_of(
    forward: Forward,
    calls: Sequence[UNetCall],
    outputs: Sequence[torch.Tensor],
    exact: Mapping[int, torch.Tensor],
) -> tuple[list[float], int, bool]:
    """The step rule's numbers of one more UNet, at the steps that were replayed before.

    Args:
        calls, outputs: of the stock run. exact: the reference's outputs by step (`check_steps`).

    Returns:
        Relative L2 distances to the reference in the order of `exact`; the number of NaN and infinite elements of all
        outputs; whether they are bit for bit stock's.
    """
    distances, nonfinite, bitwise = [], 0, True
    for number, reference in exact.items():
        output = forward(calls[number])
        distances.append(relative_l2(output, reference))
        nonfinite += nonfinite_count(output)
        bitwise = bitwise and torch.equal(output, outputs[number])
    return distances, nonfinite, bitwise


def _forward_as_in_loops(pipe: Any) -> Forward:
    """A forward of a pipeline's UNet that is told timesteps on the CPU if the pipeline's scheduler keeps them there."""
    on_cpu = schedules.is_on(pipe.scheduler)
    return lambda call: (call.with_timestep_on_cpu() if on_cpu else call).run(pipe.unet)


def _faulty(attention: str, device: torch.device) -> Backend:
    """What `attention` would run on each call, its softmax scale wrong."""
    candidates = auto_order(device) if attention == AUTO else (BACKENDS[attention],)

    def run(q: Any, k: Any, v: Any, mask: Any, scale: float | None) -> torch.Tensor:
        able = candidates if attention != AUTO else guesses(candidates, q.dtype)
        backend = next(backend for backend in able if not backend.call_reasons(q, k, v, mask))
        return with_scale_fault(backend, FAULT).run(q, k, v, mask, scale)

    return Backend(f"{attention} with a planted fault", run, lambda _: [], lambda *_: [])
