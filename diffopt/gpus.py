"""What is known of a GPU model beforehand (configs/gpus/<name>.toml): peaks, what was checked and tuned on it."""

import dataclasses
import logging
import re
from pathlib import Path
from typing import Literal

from diffopt.config import ConfigError, config_folder, config_names, read_file
from diffopt_kernels.launch import AttentionLaunch, LaunchKey

logger = logging.getLogger(__name__)

OWN = "diffopt"
"""What diffopt's own kernels are called among the backends."""


@dataclasses.dataclass(frozen=True)
class Peaks:
    """Datasheet rates: dense TFLOP/s of the tensor cores in fp16 and of plain fp32."""

    fp16_tflops: float
    fp32_tflops: float
    source: str


@dataclasses.dataclass(frozen=True)
class Price:
    """What an hour of this GPU costs; prices change, so they are dated and sourced."""

    usd_per_hour: float
    date: str
    source: str
    __pydantic_config__ = {"extra": "forbid"}  # for pydantic, which keeps this class in records  # noqa: RUF012


@dataclasses.dataclass(frozen=True)
class TunedShape:
    """What `diffopt tune` found for one attention call on q [batch, query_tokens, heads, head_dim].

    Attributes:
        case: the shape's name in its workload.
        microseconds: backend to the median time of one call in a CUDA graph, inputs hot; only backends that were exact.
        launch: how diffopt's kernel is launched to take `microseconds["diffopt"]`; None if no launch was right.
        date: UTC, ISO 8601; None if it is the table's.
        triton: the version it was measured with, and serves; None if it is the table's.
    """

    case: str
    batch: int
    query_tokens: int
    key_tokens: int
    heads: int
    head_dim: int
    dtype: Literal["float16", "bfloat16", "float32"]
    microseconds: dict[str, float]
    launch: AttentionLaunch | None = None
    date: str | None = None
    triton: str | None = None

    @property
    def key(self) -> LaunchKey:
        """The shape as the kernels look it up."""
        return LaunchKey(self.batch, self.query_tokens, self.key_tokens, self.heads, self.head_dim)

    @property
    def ranking(self) -> tuple[str, ...]:
        """Backends by time, fastest first."""
        return tuple(sorted(self.microseconds, key=lambda name: self.microseconds[name]))


@dataclasses.dataclass(frozen=True)
class TunedAttention:
    """The attention table of a GPU: what was measured when and with what. Rows may be of more than one Triton.

    Attributes:
        date: UTC, ISO 8601, of the last shape, or of all shapes that have none of their own.
        commit: of diffopt; its version where there is no checkout.
        torch, triton, cudnn, driver: versions; Triton's of rows that name none of their own.
        kernels: hash of the kernels' source (`diffopt.attention.machine.kernels_hash`).
        fp16_tflops, copy_tb_s: measured ceilings (`diffopt.measure.ceilings`).
    """

    date: str
    commit: str
    torch: str
    triton: str
    cudnn: str
    driver: str
    kernels: str
    fp16_tflops: float
    copy_tb_s: float
    shapes: tuple[TunedShape, ...] = ()

    @property
    def tritons(self) -> tuple[str, ...]:
        """The versions of Triton that it is about, its own first."""
        return tuple(dict.fromkeys((self.triton, *(shape.triton for shape in self.shapes if shape.triton))))

    def shapes_with(self, triton: str | None) -> tuple[TunedShape, ...]:
        """The rows that were measured with a version of Triton."""
        return tuple(shape for shape in self.shapes if (shape.triton or self.triton) == triton)


@dataclasses.dataclass(frozen=True)
class Checked:
    """A version of Triton and the kernels' source that was checked with it; empty what was not.

    Attributes:
        kernels: of attention (`diffopt.attention.machine.kernels_hash`).
        step: of the step's kernels (`diffopt.attention.machine.step_kernels_hash`).
    """

    triton: str
    kernels: str = ""
    step: str = ""


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU model.

    Attributes:
        name: as the driver calls it.
        compute_capability: as "9.0"; None in a file that `diffopt tune` began.
        peaks: datasheet rates; None in a file that `diffopt tune` began.
        checked: what diffopt's kernels were found right with on this GPU.
        price: per hour, if known.
        attention: tuned launches and the times of all exact backends.
    """

    name: str
    compute_capability: str | None = None
    peaks: Peaks | None = None
    checked: tuple[Checked, ...] = ()
    price: Price | None = None
    attention: TunedAttention | None = None


def read_gpu(path: Path) -> Gpu:
    """Read a GPU's file.

    Raises:
        ConfigError: it can't be read, isn't what it should be, or has a price, launch or time that can't exist.
    """
    gpu = read_file(path, Gpu)
    if gpu.price is not None and not 0 < gpu.price.usd_per_hour < float("inf"):
        raise ConfigError(f"{path.name}: price: usd_per_hour: {gpu.price.usd_per_hour}; above 0")
    for shape in gpu.attention.shapes if gpu.attention else ():
        problem = _problem(shape)
        if problem:
            raise ConfigError(f"{path.name}: attention: {shape.case}: {problem}")
    return gpu


def find_gpu(name: str) -> Gpu | None:
    """The GPU model the driver calls `name`, or None for one this project knows nothing of.

    A shipped file that can't be read is left out with a warning: one GPU's file is no reason to fail on another.
    """
    return next((gpu for _, gpu in _shipped() if gpu.name == name), None)


def shipped_file(name: str) -> Path | None:
    """The readable file in configs/gpus of the GPU that the driver calls `name`."""
    return next((path for path, gpu in _shipped() if gpu.name == name), None)


def shipped_kin(name: str, compute_capability: str) -> list[tuple[Path, Gpu]]:
    """The readable files in configs/gpus of other GPUs that have this compute capability."""
    if not compute_capability:
        return []
    kin = ((path, gpu) for path, gpu in _shipped() if gpu.compute_capability == compute_capability)
    return [(path, gpu) for path, gpu in kin if gpu.name != name]


def slug(name: str) -> str:
    """A name, of a GPU or a case, as part of a file's: lower-case letters, digits and single dashes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _shipped() -> list[tuple[Path, Gpu]]:
    known = []
    for file in config_names("gpus"):
        path = config_folder() / "gpus" / f"{file}.toml"
        try:
            known.append((path, read_gpu(path)))
        except ConfigError as error:
            logger.warning("%s; the file is not used", error)
    return known


def _problem(shape: TunedShape) -> str:
    """What can't be in a row, whatever GPU it is about; empty if all can."""
    sizes = dataclasses.astuple(shape.key)
    if min(sizes) < 1:
        return f"a size is {min(sizes)}; at least 1"
    if not shape.microseconds:
        return "no times"
    for name, microseconds in shape.microseconds.items():
        if not 0 < microseconds < float("inf"):
            return f"{name} takes {microseconds} µs; above 0"
    if (shape.launch is None) != (OWN not in shape.microseconds):
        return f"a launch and the time of {OWN!r} belong together"
    if shape.launch and (shape.launch.head_dim, shape.launch.float32) != (shape.head_dim, shape.dtype == "float32"):
        return f"launch {shape.launch.label!r} is for another head dim or dtype"
    return ""
