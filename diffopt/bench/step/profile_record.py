"""The record of where the time of a UNet forward goes on a GPU."""

import pydantic

from diffopt.bench.schema import Model

KINDS = ("attention", "convolution", "matmul", "norm", "elementwise", "copies", "other")
"""Kinds of work, as reports list them."""


class StepProfile(Model):
    """The optimized UNet's forward with the guidance batch, as the profiler sees it after the timing.

    Attributes:
        forwards: how many were profiled; what follows is per forward.
        microseconds: of GPU time by kind of work (`KINDS`); gaps between kernels are in none.
        launches: kernels, copies and fills that ran.
        flops: floating-point operations of a stock forward as `torch.utils.flop_counter` counts them (a
            multiply-add is two); None where that failed.
        why: what went wrong; empty otherwise.
    """

    forwards: int = 0
    microseconds: dict[str, float] = pydantic.Field(default_factory=dict)
    launches: float | None = None
    flops: int | None = None
    why: str = ""

    @property
    def total_us(self) -> float:
        """Microseconds of GPU time per forward."""
        return sum(self.microseconds.values())
