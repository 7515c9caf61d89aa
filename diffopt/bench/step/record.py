"""The record of one case of a step workload: stock, optimized and peers' denoising steps."""

from typing import Any, Literal

import pydantic

from diffopt.bench.schema import BaseRecord, Model
from diffopt.bench.step.free_running_record import FreeRunning
from diffopt.bench.step.peer_record import StepPeer
from diffopt.bench.step.warm_start_record import WarmStart
from diffopt.gpus import Price
from diffopt.measure.decoding import DecodeCertificate
from diffopt.measure.environment import Clocks
from diffopt.measure.memory import PeakMemory
from diffopt.measure.profile import ForwardProfile
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
    """One case of a workload file: everything that must agree for two records to be compared. Sizes in pixels.

    `decode` is how our pictures are decoded, as `optimize` takes it.
    """

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
    decode: str = "stock"


class Method(Model):
    """How it was measured.

    Attributes:
        clock: what the samples are, in words.
        order: of the contenders.
        warmup: unmeasured rounds. repetitions: measured rounds asked for (the samples say how many there are).
        unet_warmup, unet_repetitions: the same for single UNet forwards.
        first_call_s: seconds of each contender's very first pipeline call, compilation included.
        clocks_before, clocks_after: around the timed part.
        pictures: how `Contender.pictures` was measured, in words; None where it wasn't.
        flags: what disturbed the timed part, in words: throttled clocks, another process on the GPU.
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
    pictures: str | None = None
    flags: tuple[str, ...] = ()


class Pictures(Model):
    """Whole pictures, prompt to decoded pixels in host memory: raw samples in seconds, oldest first.

    Attributes:
        whole_s: the pipeline call.
        text_encoder_s: encoding the prompts; None where they were given as embeddings (random weights have no text
            encoder).
        unet_s: the denoising loop. vae_s: decoding the latents.
        png_s: encoding the batch as PNG files afterwards, which is not part of `whole_s`.
        images_per_s: batch / median whole_s.
        energy_j: of each call, as the driver counts it for the whole GPU; None where it doesn't.
        energy_per_image_j, power_w: all energy over all pictures, and over all seconds.
    """

    whole_s: list[float]
    text_encoder_s: list[float] | None
    unet_s: list[float]
    vae_s: list[float]
    png_s: list[float]
    images_per_s: float
    energy_j: list[float] | None = None
    energy_per_image_j: float | None = None
    power_w: float | None = None

    @pydantic.model_validator(mode="after")
    def _samples_belong_together(self) -> "Pictures":
        given = (self.text_encoder_s, self.unet_s, self.vae_s, self.png_s, self.energy_j)
        if any(samples is not None and len(samples) != len(self.whole_s) for samples in given):
            raise ValueError("the stages of the pictures have unequal numbers of samples")
        return self


class Contender(Model):
    """One contender's raw samples in seconds, oldest first, their summaries and the rates made from the medians.

    Attributes:
        loop_s: from the start of the first step to the last latent.
        call_s: the whole pipeline call around it, prompt given as embeddings, latents out.
        unet_s: one UNet forward with the guidance batch, inputs ready.
        loop_its: steps / median loop_s. unet_its: 1 / median unet_s.
        memory: at the peak of one pipeline call, prompt to pixels, that captures nothing new (of records before
            2026-11-26 05:25 UTC: prompt to latents, and the call that captured).
        pictures: whole pictures; None in records of version 1.
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
    pictures: Pictures | None = None


class Comparison(Model):
    """Optimized against stock: speed as stock's time over ours (above 1 is faster), memory as ours over stock's."""

    loop: PairedRatio
    unet: PairedRatio
    peak_memory: float | None
    pictures: PairedRatio | None = None


class StepRecord(BaseRecord):
    """One case: stock against optimized denoising steps.

    Attributes:
        attention: what `optimize` was asked for.
        exactness: checked before anything was timed.
        plan: the handle's summary after the run: what each layer ran, how often and why.
        decode: the certificate of pictures that are decoded in another way than stock's, checked before anything was
            timed, too; None where the workload asks for none, and in records of before version 6.
        decode_why: why there is no such certificate though the workload asks for it.
        stock, optimized, comparison: None when a check failed or is void: no speed beside a failed check.
        interrupted: the user stopped the run; the samples are the complete rounds until then.
        price: of an hour on this machine, as it was given or known when the record was made.
        free_running: pictures of several prompts against stock's; None where the workload asks for none, and in records
            of before version 3.
        peers: what else ran in turn, in the order asked for; none in records of before version 4.
        peers_left_out: peers that the workload names and the user left out.
        profile: where the time of the optimized UNet's forward goes; None on a CPU and in records of before version 4.
        warm_start: from a process's start to its first picture; None where the workload doesn't ask for it, and in
            records of before version 5.
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
    price: Price | None = None
    free_running: FreeRunning | None = None
    peers: list[StepPeer] = pydantic.Field(default_factory=list)
    peers_left_out: tuple[str, ...] = ()
    profile: ForwardProfile | None = None
    warm_start: WarmStart | None = None
    decode: DecodeCertificate | None = None
    decode_why: str = ""

    @property
    def exact(self) -> bool:
        """Whether the step rule passed and, where pictures are decoded in another way than stock's, that check, too."""
        decoded = self.decode.passed if self.decode else self.workload.decode == "stock"
        return self.exactness.passed and decoded

    def verdict(self) -> str:
        """What the checks found in one line. Its first word is passed, FAILED or void, of all of them together."""
        steps = self.exactness.verdict()
        found = self.decode.verdict() if self.decode else f"void: {self.decode_why or 'not checked'}"
        if self.exactness.passed and not self.exact:
            outcome, _, words = found.partition(": ")
            return f"{outcome}: decoded in {self.workload.decode}: {words}; steps: {steps}"
        return f"{steps}; decoded in {self.workload.decode}: {found}" if self.decode else steps

    @pydantic.model_validator(mode="after")
    def _no_speed_beside_a_failed_check(self) -> "StepRecord":
        timed = [part is not None for part in (self.method, self.stock, self.optimized, self.comparison)]
        if any(timed) and not (all(timed) and self.exact):
            raise ValueError("a speed stands beside an exactness check that did not pass")
        if self.warm_start and self.warm_start.warm_start_s is not None and not self.exact:
            raise ValueError("a warm start stands beside an exactness check that did not pass")
        for peer in self.peers:
            certificate = peer.certificate(self.exactness)
            if peer.state == "timed" and not (all(timed) and certificate and certificate.passed):
                raise ValueError(f"a speed of {peer.name} stands beside an exactness check that did not pass")
        return self

    @pydantic.model_validator(mode="after")
    def _older_versions_are_as_they_were(self) -> "StepRecord":
        new = self.price or (self.method and (self.method.flags or self.method.pictures))
        new = new or any(side is not None and side.pictures is not None for side in (self.stock, self.optimized))
        if self.schema_version < 2 and new:
            raise ValueError("a record of version 1 holds fields of version 2")
        if self.schema_version < 3 and self.free_running:
            raise ValueError(f"a record of version {self.schema_version} holds fields of version 3")
        if self.schema_version < 4 and (self.peers or self.peers_left_out or self.profile):
            raise ValueError(f"a record of version {self.schema_version} holds fields of version 4")
        if self.schema_version < 5 and self.warm_start:
            raise ValueError(f"a record of version {self.schema_version} holds fields of version 5")
        if self.schema_version < 6 and (self.decode or self.decode_why or self.workload.decode != "stock"):
            raise ValueError(f"a record of version {self.schema_version} holds fields of version 6")
        return self
