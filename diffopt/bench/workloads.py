"""Workload files (configs/workloads/<name>.toml): what a benchmark run is."""

import dataclasses
from typing import Literal

from diffopt.config import ConfigError, read_config


@dataclasses.dataclass(frozen=True)
class Case:
    """One model at one size.

    Attributes:
        name: as reports call it; the same name must mean the same work.
        model: `random:<kind>` for random weights (`diffopt.bench.random_configs.KINDS`), else what `--model` takes.
        width, height: in pixels.
        steps: denoising steps of a pipeline call, with the model's default scheduler.
        batch: pictures per call; guidance doubles the rows of a UNet forward.
        warmup, repetitions: rounds of whole loops, stock and optimized in turn.
        unet_warmup, unet_repetitions: rounds of single UNet forwards.
        exactness_steps: how many of the steps the exactness check replays, evenly spaced; 0 is every one.
        seed: of latents, prompt and random weights.
    """

    name: str
    model: str
    width: int
    height: int
    steps: int
    repetitions: int
    warmup: int
    unet_repetitions: int
    unet_warmup: int
    batch: int = 1
    guidance: float = 7.5
    exactness_steps: int = 0
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class WorkloadFile:
    """A workload: its cases run one after another.

    Attributes:
        description: one line for people.
        needs: `cuda` for what only makes sense on a GPU; `any` otherwise.
        cases: run in this order.
    """

    description: str
    needs: str
    cases: tuple[Case, ...]


def read_workload(name: str) -> WorkloadFile:
    """Read configs/workloads/<name>.toml.

    Raises:
        InputError: unknown name; the nearest ones are offered.
        ConfigError: a key or value that makes no sense.
    """
    workload = read_config("workloads", name, WorkloadFile)
    allowed: tuple[Literal["cuda", "any"], ...] = ("cuda", "any")
    if workload.needs not in allowed:
        raise ConfigError(f"{name}.toml: needs: {workload.needs!r}; allowed: {', '.join(allowed)}")
    if not workload.cases:
        raise ConfigError(f"{name}.toml: cases: at least one is needed")
    for case in workload.cases:
        check_case(case, where=f"{name}.toml: {case.name}")
    return workload


def check_case(case: Case, *, where: str) -> None:
    """Refuse numbers that can't be run.

    Raises:
        ConfigError: which key, what it holds and what is allowed.
    """
    for key in ("steps", "repetitions", "unet_repetitions", "batch"):
        if getattr(case, key) < 1:
            raise ConfigError(f"{where}: {key}: {getattr(case, key)}; at least 1")
    for key in ("warmup", "unet_warmup", "exactness_steps", "seed"):
        if getattr(case, key) < 0:
            raise ConfigError(f"{where}: {key}: {getattr(case, key)}; 0 or more")
    for key in ("width", "height"):
        if getattr(case, key) < 8 or getattr(case, key) % 8:
            raise ConfigError(f"{where}: {key}: {getattr(case, key)}; a multiple of 8")
    if case.guidance <= 1:
        raise ConfigError(f"{where}: guidance: {case.guidance}; above 1, so that a step is a guidance batch")
