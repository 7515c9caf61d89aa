"""The record of one shape of an attention workload: ours and every peer, checked, then timed side by side."""

from typing import Literal

import pydantic

from diffopt.bench.schema import BaseRecord, Model
from diffopt.bench.workloads import AttentionShape
from diffopt.measure.ceilings import Ceilings
from diffopt.measure.environment import Clocks

State = Literal["timed", "right", "wrong", "void", "refused", "out of memory", "failed", "absent"]
"""How it went: timed; checked and right, but not timed; checked and wrong; checked by a rule that proves nothing;
refused by the contender itself; out of memory; crashed, hung or raised; not installed here. `why` says more."""


class AttentionErrors(Model):
    """Distance to float64 over all elements; a NaN counts as infinite."""

    relative_l2: float
    maximum: float

    def within(self, limit: "AttentionErrors") -> bool:
        """Whether neither is larger; NaN never is."""
        return self.relative_l2 <= limit.relative_l2 and self.maximum <= limit.maximum


class AttentionRule(Model):
    """What is allowed for one dtype and kind of input (`diffopt_kernels.attention_check`).

    Attributes:
        content: of the inputs: "normal" as they are timed, "spread 3" with scores of that standard deviation.
        math, fused: errors of PyTorch's math attention and of its best fused one, which the limit is made from.
        limit: the largest errors that pass.
        fault: errors of a planted fault (the scale times 1.01), which must not pass; None where none was planted.
    """

    dtype: str
    content: str
    math: AttentionErrors
    fused: AttentionErrors | None
    limit: AttentionErrors
    fault: AttentionErrors | None = None

    @property
    def void(self) -> bool:
        """A check that lets the planted fault pass proves nothing."""
        return self.fault is not None and self.fault.within(self.limit)


class AttentionFigure(Model):
    """What one contender did on one shape.

    Attributes:
        required: without its time there is no ratio.
        version: of the package it comes from.
        install: how to get it, where it is absent.
        errors: by content of the inputs.
        peak_memory: bytes at the peak of one call beyond its inputs, the output included.
        hot_us, cold_us: microseconds per call, one sample per round; inputs mostly in L2, or rotated beyond it.
        calls: captured in the graph with hot inputs. input_sets: rotated for cold ones; 1 where one set exceeds twice
            L2, and hot and cold are the same samples.
    """

    name: str
    dtype: str
    required: bool
    state: State
    why: str = ""
    version: str | None = None
    install: str = ""
    errors: dict[str, AttentionErrors] = pydantic.Field(default_factory=dict)
    peak_memory: int | None = None
    hot_us: list[float] = pydantic.Field(default_factory=list)
    cold_us: list[float] = pydantic.Field(default_factory=list)
    calls: int | None = None
    input_sets: int | None = None

    @pydantic.model_validator(mode="after")
    def _times_belong_to_the_timed(self) -> "AttentionFigure":
        if (self.state == "timed") != bool(self.hot_us) or len(self.hot_us) != len(self.cold_us):
            raise ValueError(f"{self.name} is {self.state} with {len(self.hot_us)} and {len(self.cold_us)} times")
        return self


class AttentionMethod(Model):
    """How it was measured.

    Attributes:
        clock: what a sample is, in words.
        order: of the contenders.
        rounds: samples of each contender.
        seed: of the inputs.
        clocks_before, clocks_after: around the rounds.
    """

    clock: str
    order: str
    rounds: int
    seed: int
    clocks_before: Clocks | None
    clocks_after: Clocks | None


class AttentionRecord(BaseRecord):
    """One shape of one run.

    Attributes:
        workload: its name.
        run: the same for all shapes of one run, and for no other.
        headline: names of the shapes that the run's geometric mean is over.
        ceilings: measured in this run.
        rules: one for each dtype and content.
        figures: ours first, then the peers.
    """

    kind: Literal["attention"] = "attention"
    workload: str
    run: str
    headline: tuple[str, ...]
    shape: AttentionShape
    ceilings: Ceilings | None
    rules: list[AttentionRule]
    figures: list[AttentionFigure]
    method: AttentionMethod

    @pydantic.model_validator(mode="after")
    def _no_speed_beside_a_failed_check(self) -> "AttentionRecord":
        for figure in self.figures:
            if figure.state == "timed" and not exact(figure, self.rules):
                raise ValueError(f"{figure.name}: a speed stands beside an exactness check that did not pass")
        return self


def exact(figure: AttentionFigure, rules: list[AttentionRule]) -> bool:
    """By the numbers: every rule of its dtype holds and is not void, and a fault was planted in one of them."""
    mine = [rule for rule in rules if rule.dtype == figure.dtype]
    if not any(rule.fault is not None for rule in mine) or any(rule.void for rule in mine):
        return False
    return all(rule.content in figure.errors and figure.errors[rule.content].within(rule.limit) for rule in mine)
