"""The record of a warm start: from a process's start to its first picture, stage by stage."""

import math

import pydantic

from diffopt.bench.schema import Model

STAGES = ("process_s", "imports_s", "device_s", "weights_s", "optimize_s", "picture_s")
"""One after another, without gaps: from the start of the process to the first picture."""

NOT_COUNTED = ("imports_s", "weights_s")


class WarmStart(Model):
    """A fresh process that makes two pictures, after an earlier one has filled the caches on disk; in seconds.

    Attributes:
        steps: denoising steps of a picture.
        process_s: from the parent's call that starts it to the first line of diffopt's.
        imports_s: torch, diffusers, diffopt.
        device_s: until the GPU answers (its context); nothing on a CPU.
        weights_s: reading the model from files and moving it to the device; random weights were written to files
            before, so that nothing is computed here that would warm up anything.
        optimize_s: `diffopt.optimize`.
        picture_s: the first picture, prompt to pixels in host memory.
        second_picture_s: the next one, which is what a picture takes without the start.
        warm_start_s: from start to first picture without imports and weights: all `STAGES` but `NOT_COUNTED`.
        why: why there are no times; empty where there are.
    """

    steps: int
    process_s: float | None = None
    imports_s: float | None = None
    device_s: float | None = None
    weights_s: float | None = None
    optimize_s: float | None = None
    picture_s: float | None = None
    second_picture_s: float | None = None
    warm_start_s: float | None = None
    why: str = ""

    @pydantic.model_validator(mode="after")
    def _all_times_or_a_reason(self) -> "WarmStart":
        counted = [getattr(self, stage) for stage in STAGES if stage not in NOT_COUNTED]
        times = [*(getattr(self, stage) for stage in STAGES), self.second_picture_s, self.warm_start_s]
        missing = [time is None for time in times]
        if any(missing) and not (all(missing) and self.why):
            raise ValueError("a warm start has all of its times, or none and the reason")
        if not any(missing) and (self.why or not math.isclose(self.warm_start_s or 0, sum(counted), rel_tol=1e-6)):
            raise ValueError("the warm start is not the sum of its stages")
        return self
