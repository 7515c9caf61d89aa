"""The record of a peer of denoising steps: another way to a faster UNet, in turn with stock and ours."""

import dataclasses
from typing import Literal

import pydantic

from diffopt.bench.schema import Model
from diffopt.measure.teacher_forced import Certificate
from diffopt.measure.timing import PairedRatio, Spread


class StepPeer(Model):
    """One peer of a case; times in seconds, oldest first, the n-th taken in the same round as stock's and ours.

    Attributes:
        name: of `diffopt.bench.workloads.STEP_PEERS`.
        state: `timed`; `inexact`, which has distances but no speeds; `failed` (on its way, or while it was timed);
            `absent` where it can't run at all.
        why: what stands against it; of a timed one what should be known of it, mostly nothing.
        distances: relative L2 distances to the reference at the steps of the record's certificate, in its order;
            empty where it was not checked.
        nonfinite: NaN and infinite elements in its outputs at these steps. bitwise_stock: they are stock's bits.
        first_call_s: of its first pipeline call, compilation included (faster where the compiler's own cache on disk
            is warm).
        loop_s, unet_s: as in `Contender`. loop_its, unet_its: the rates made from the medians.
        loop_ratio, unet_ratio: its time over ours, paired by round; above 1 ours is faster.
    """

    name: str
    state: Literal["timed", "inexact", "failed", "absent"]
    why: str = ""
    distances: list[float] = pydantic.Field(default_factory=list)
    nonfinite: int = 0
    bitwise_stock: bool = False
    first_call_s: float | None = None
    loop_s: list[float] = pydantic.Field(default_factory=list)
    unet_s: list[float] = pydantic.Field(default_factory=list)
    loop: Spread | None = None
    unet: Spread | None = None
    loop_its: float | None = None
    unet_its: float | None = None
    loop_ratio: PairedRatio | None = None
    unet_ratio: PairedRatio | None = None

    def certificate(self, ours: Certificate) -> Certificate | None:
        """The step rule on this peer: `ours` with its distances; limits and planted fault are the same ones."""
        return certificate_with(ours, self.distances, self.nonfinite, self.bitwise_stock) if self.distances else None

    @pydantic.model_validator(mode="after")
    def _times_belong_to_the_timed(self) -> "StepPeer":
        parts = (self.loop, self.unet, self.loop_its, self.unet_its, self.loop_ratio, self.unet_ratio)
        given = [bool(self.loop_s), bool(self.unet_s), *(part is not None for part in parts)]
        if (self.state == "timed" and not all(given)) or (self.state != "timed" and any(given)):
            raise ValueError(f"peer {self.name} is {self.state}: speeds belong to timed ones, all of them")
        return self


def certificate_with(ours: Certificate, distances: list[float], nonfinite: int, bitwise_stock: bool) -> Certificate:
    """A certificate of other distances at the same steps.

    Raises:
        ValueError: not one distance per step.
    """
    steps = [dataclasses.replace(step, ours=other) for step, other in zip(ours.steps, distances, strict=True)]
    return dataclasses.replace(ours, steps=tuple(steps), nonfinite=nonfinite, bitwise_stock=bitwise_stock)
