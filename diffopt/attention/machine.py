"""What a choice of kernels is valid for: the GPU and the versions that decide which machine code runs."""

import importlib.metadata

import torch


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine(device: torch.device) -> dict[str, str | None]:
    """What a plan is valid for: the device's name and the versions that decide which kernels exist."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"device": name, "torch": torch.__version__, "triton": _version("triton")}
