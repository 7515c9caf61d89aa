"""What is known of a GPU model beforehand (configs/gpus/<name>.toml): its peaks, and what was checked on it."""

import dataclasses

from diffopt.config import config_names, read_config


@dataclasses.dataclass(frozen=True)
class Peaks:
    """Datasheet rates: dense TFLOP/s of the tensor cores in fp16 and of plain fp32, TB/s of device memory."""

    fp16_tflops: float
    fp32_tflops: float
    bandwidth_tb_s: float
    source: str


@dataclasses.dataclass(frozen=True)
class Price:
    """What an hour of this GPU costs; prices change, so they are dated and sourced."""

    usd_per_hour: float
    date: str
    source: str


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU model.

    Attributes:
        name: as the driver calls it.
        memory_gb: as sold.
        peaks: datasheet rates.
        checked_triton: Triton versions with which all of diffopt's launches were found right on this GPU (reports/).
        price: per hour, if known.
    """

    name: str
    memory_gb: float
    peaks: Peaks
    checked_triton: tuple[str, ...] = ()
    price: Price | None = None


def find_gpu(name: str) -> Gpu | None:
    """The GPU model the driver calls `name`, or None for one this project knows nothing of."""
    known = (read_config("gpus", file, Gpu) for file in config_names("gpus"))
    return next((gpu for gpu in known if gpu.name == name), None)
