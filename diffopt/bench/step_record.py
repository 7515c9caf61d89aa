"""The record of one case of a step workload: stock against optimized denoising steps."""

from typing import Any, Literal

import pydantic

from diffopt.bench.schema import BaseRecord, Model
from diffopt.measure.environment import Clocks
from diffopt.measure.memory import PeakMemory
from diffopt.measure.teacher_forced import Certificate
from diffopt.measure.timing import PairedRatio, Spread


class ModelIdentity(Model):
    """What was run.

    Attributes:
        name: as the workload names it.
        hash: SHA-256 of all weight files of a folder; for random weights of their configuration.
        seed: of random weights; None for real ones.
        score_std: smallest and largest standard deviation of attention scores that random weights were scaled to.
        parameters: of the UNet.
    """

    name: str
    hash: str
    seed: int | None = None
    score_std: tuple[float, float] | None = None
    parameters: int


class Workload(Model):
    """One case of a workload file: everything that must agree for two records to be compared. Sizes in pixels."""

    name: str
    case: str
    model: ModelIdentity
    dtype: str
    width: int
    height: int
    batch: int
    steps: int
    unet_calls: int
    scheduler: str
    guidance: float
    seed: int


class Method(Model):
    """How it was measured.

    Attributes:
        clock: what the samples are, in words.
        order: of the contenders.
        warmup: unmeasured rounds. repetitions: measured rounds asked for (the samples say how many there are).
        unet_warmup, unet_repetitions: the same for single UNet forwards.
        first_call_s: seconds of each contender's very first pipeline call, compilation included.
        clocks_before, clocks_after: around the timed part.
    """

    clock: str
    order: str = "interleaved A B A B"
    warmup: int
    repetitions: int
    unet_warmup: int
    unet_repetitions: int
    first_call_s: dict[str, float]
    clocks_before: Clocks | None
    clocks_after: Clocks | None


class Contender(Model):
    """One contender's raw samples in seconds, oldest first, their summaries and the rates made from the medians.

    Attributes:
        loop_s: from the start of the first step to the last latent.
        call_s: the whole pipeline call around it, prompt given as embeddings, latents out.
        unet_s: one UNet forward with the guidance batch, inputs ready.
        loop_its: steps / median loop_s. unet_its: 1 / median unet_s.
        memory: at the peak of one pipeline call.
    """

    loop_s: list[float]
    call_s: list[float]
    unet_s: list[float]
    loop: Spread
    call: Spread
    unet: Spread
    loop_its: float
    unet_its: float
    memory: PeakMemory


class Comparison(Model):
    """Optimized against stock: speed as stock's time over ours (above 1 is faster), memory as ours over stock's."""

    loop: PairedRatio
    unet: PairedRatio
    peak_memory: float | None


class StepRecord(BaseRecord):
    """One case: stock against optimized denoising steps.

    Attributes:
        attention: what `optimize` was asked for.
        exactness: checked before anything was timed.
        plan: the handle's summary after the run: what each layer ran, how often and why.
        stock, optimized, comparison: None when the exactness check failed or is void: no speed beside a failed check.
        interrupted: the user stopped the run; the samples are the complete rounds until then.
    """

    kind: Literal["step"] = "step"
    workload: Workload
    attention: str
    exactness: Certificate
    plan: dict[str, Any]
    method: Method | None = None
    stock: Contender | None = None
    optimized: Contender | None = None
    comparison: Comparison | None = None
    interrupted: bool = False

    @pydantic.model_validator(mode="after")
    def _no_speed_beside_a_failed_check(self) -> "StepRecord":
        timed = [part is not None for part in (self.method, self.stock, self.optimized, self.comparison)]
        if any(timed) and not (all(timed) and self.exactness.passed):
            raise ValueError("a speed stands beside an exactness check that did not pass")
        return self
