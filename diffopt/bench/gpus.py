"""What is known of a GPU model beforehand (configs/gpus/<name>.toml): its peaks, with their source."""

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
    """A GPU model. `name` is what the driver calls it; memory in GB as sold."""

    name: str
    memory_gb: float
    peaks: Peaks
    price: Price | None = None


def find_gpu(name: str) -> Gpu | None:
    """The GPU model the driver calls `name`, or None for one this project knows nothing of."""
    known = (read_config("gpus", file, Gpu) for file in config_names("gpus"))
    return next((gpu for gpu in known if gpu.name == name), None)
