"""Workload files (configs/workloads/<name>.toml): what a benchmark run is."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

from diffopt.config import ConfigError, build, read_config
from diffopt.errors import InputError

COMPILE_PEERS = ("compile-reduce-overhead", "compile-max-autotune-no-cudagraphs", "compile-max-autotune")
"""`torch.compile` in the mode that follows the dash."""

STEP_PEERS = ("cuda-graph", *COMPILE_PEERS)
"""What denoising steps can be compared with besides stock."""

PEER_LIMIT_S = 1800.0
"""Seconds that a peer's first call may take: `torch.compile`'s max-autotune takes longer than 12 minutes for SD1.5."""


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
        picture_warmup, picture_repetitions: rounds of whole calls, prompt to pixels; 0 repetitions leave them out.
        needs: `cuda` for a case that is left out on a CPU.
        free_running_prompts: how many prompts whole pictures are made of and compared, beside two stock backends'; 0
            leaves them out. Up to 100 are different prompts, all have different seeds.
        exactness_steps: how many of the steps the exactness check replays, evenly spaced; 0 is every one.
        seed: of latents, prompt and random weights.
        peers: what else runs in turn with stock and optimized, of `STEP_PEERS`.
        warm_start: whether the way from a process's start to its first picture is timed besides.
        decode: what `optimize` is asked for; pictures decoded in another way than stock's have a check of their own.
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
    picture_repetitions: int = 0
    picture_warmup: int = 1
    exactness_steps: int = 0
    free_running_prompts: int = 0
    seed: int = 0
    needs: Literal["cuda", "any"] = "any"
    peers: tuple[str, ...] = ()
    warm_start: bool = False
    decode: Literal["stock", "float16"] = "stock"


@dataclasses.dataclass(frozen=True)
class StepWorkload:
    """A workload of denoising steps (kind "step"): its cases run one after another.

    Attributes:
        description: one line for people.
        needs: `cuda` for what only makes sense on a GPU; `any` otherwise.
        cases: run in this order.
    """

    description: str
    needs: Literal["cuda", "any"]
    cases: tuple[Case, ...]
    kind: Literal["step"] = "step"


@dataclasses.dataclass(frozen=True)
class AttentionShape:
    """One attention call: q [batch, n_q, heads, head_dim], k and v [batch, n_k, heads, head_dim].

    Attributes:
        name: as reports call it; the same name must mean the same shape.
        batch: rows of the call; with guidance two per picture.
        headline: whether the geometric mean is over this shape.
    """

    name: str
    batch: int
    n_q: int
    n_k: int
    heads: int
    head_dim: int
    headline: bool = False
    __pydantic_config__ = {"extra": "forbid"}  # for pydantic, which keeps this class in records  # noqa: RUF012

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """batch, n_q, n_k, heads, head_dim: the arguments of diffopt_kernels.cost's functions."""
        return self.batch, self.n_q, self.n_k, self.heads, self.head_dim


@dataclasses.dataclass(frozen=True)
class AttentionWorkload:
    """A workload of attention calls (kind "attention"): ours and the peers on every shape.

    Attributes:
        rounds: how often each contender is timed on a shape, all in turn.
        cases: the shapes, run in this order.
    """

    description: str
    needs: Literal["cuda", "any"]
    rounds: int
    cases: tuple[AttentionShape, ...]
    kind: Literal["attention"] = "attention"

    @property
    def headline(self) -> tuple[str, ...]:
        """Names of the shapes that the geometric mean is over."""
        return tuple(case.name for case in self.cases if case.headline)


C = TypeVar("C", bound=Case | AttentionShape)


@dataclasses.dataclass(frozen=True)
class _AnyWorkload:
    """What a file may hold before its kind is looked at."""

    description: str
    needs: Literal["cuda", "any"]
    cases: tuple[Any, ...]
    kind: Literal["step", "attention"] = "step"
    rounds: int | None = None


def read_workload(name: str) -> StepWorkload | AttentionWorkload:
    """Read configs/workloads/<name>.toml.

    Raises:
        InputError: unknown name; the nearest ones are offered.
        ConfigError: a key or value that makes no sense.
    """
    table = read_config("workloads", name, _AnyWorkload)
    given = {key: value for key, value in dataclasses.asdict(table).items() if value is not None}
    kind = StepWorkload if table.kind == "step" else AttentionWorkload
    given["cases"] = list(table.cases)
    workload = build(kind, given, where=f"{name}.toml")
    if not workload.cases:
        raise ConfigError(f"{name}.toml: cases: at least one is needed")
    if isinstance(workload, AttentionWorkload):
        _check_shapes(workload, where=f"{name}.toml")
    else:
        for case in workload.cases:
            check_case(case, where=f"{name}.toml: {case.name}")
    return workload


def chosen_cases(cases: Sequence[C], names: Sequence[str] | None, *, headline: Sequence[str] | None = None) -> list[C]:
    """The cases asked for with `--case` (all where none was) and, with `--headline`, only those of these names.

    Raises:
        InputError: an unknown name, or none of the headline.
    """
    known = [case.name for case in cases]
    for name in names or ():
        if name not in known:
            raise InputError("--case", name, f"known: {', '.join(known)}")
    asked = set(names or known)
    if headline is not None:
        asked &= set(headline)
        if not asked:
            raise InputError("--case", ", ".join(names or ()), f"with --headline: {', '.join(headline)}")
    return [case for case in cases if case.name in asked]


def scaling_cases() -> frozenset[str]:
    """Names of the cases that are there for the cost of scaling only: the full workload's beyond the standard one's."""
    full, standard = (read_workload(name) for name in ("full", "standard"))
    return frozenset(case.name for case in full.cases) - {case.name for case in standard.cases}


def _check_shapes(workload: AttentionWorkload, *, where: str) -> None:
    if workload.rounds < 1:
        raise ConfigError(f"{where}: rounds: {workload.rounds}; at least 1")
    names = [case.name for case in workload.cases]
    for case in workload.cases:
        if names.count(case.name) > 1:
            raise ConfigError(f"{where}: name: {case.name!r} is there twice; each name once")
        for key, value in zip(("batch", "n_q", "n_k", "heads", "head_dim"), case.sizes, strict=True):
            if value < 1:
                raise ConfigError(f"{where}: {case.name}: {key}: {value}; at least 1")


def check_case(case: Case, *, where: str) -> None:
    """Refuse numbers that can't be run.

    Raises:
        ConfigError: which key, what it holds and what is allowed.
    """
    for key in ("steps", "repetitions", "unet_repetitions", "batch"):
        if getattr(case, key) < 1:
            raise ConfigError(f"{where}: {key}: {getattr(case, key)}; at least 1")
    counts = ("warmup", "unet_warmup", "picture_warmup", "picture_repetitions", "exactness_steps")
    for key in (*counts, "free_running_prompts", "seed"):
        if getattr(case, key) < 0:
            raise ConfigError(f"{where}: {key}: {getattr(case, key)}; 0 or more")
    for key in ("width", "height"):
        if getattr(case, key) < 8 or getattr(case, key) % 8:
            raise ConfigError(f"{where}: {key}: {getattr(case, key)}; a multiple of 8")
    if case.guidance <= 1:
        raise ConfigError(f"{where}: guidance: {case.guidance}; above 1, so that a step is a guidance batch")
    for peer in case.peers:
        if peer not in STEP_PEERS:
            raise ConfigError(f"{where}: peers: {peer!r}; known: {', '.join(STEP_PEERS)}")
        if case.peers.count(peer) > 1:
            raise ConfigError(f"{where}: peers: {peer!r} is there twice; each name once")
