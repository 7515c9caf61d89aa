"""What a choice of kernels is valid for: the GPU and the versions that decide which machine code runs."""

import functools
import hashlib
import importlib.metadata
from pathlib import Path

import torch

import diffopt_kernels


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine(device: torch.device) -> dict[str, str | None]:
    """What a plan is valid for: the device's name and the versions that decide which kernels exist."""
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "kernels": kernels_hash(),
    }


def device_name(device: torch.device) -> str:
    """As the driver calls the GPU; "cpu" for a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@functools.cache
def kernels_hash() -> str:
    """The kernels' own source in 16 hexadecimal digits: a verdict or a time of other kernels is none of these."""
    digest = hashlib.sha256()
    for path in sorted(Path(diffopt_kernels.__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
