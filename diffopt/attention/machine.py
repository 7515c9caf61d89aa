"""What a choice of kernels is valid for: the GPU and the versions that decide which machine code runs."""

import functools
import hashlib
from pathlib import Path

import torch

import diffopt_kernels
from diffopt.measure.environment import installed_version


def machine(device: torch.device) -> dict[str, str | None]:
    """What a plan is valid for: the device's name and the versions that decide which kernels exist."""
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "triton": installed_version("triton"),
        "kernels": kernels_hash(),
    }


def compute_capability(device: torch.device) -> str:
    """Of a GPU, as "9.0"; empty for a CPU."""
    return "{}.{}".format(*torch.cuda.get_device_capability(device)) if device.type == "cuda" else ""


def device_name(device: torch.device) -> str:
    """As the driver calls the GPU; "cpu" for a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


ATTENTION_SOURCES = (
    *("_attention_*.py", "_gluon_tiles.py", "attention.py", "attention_gluon.py", "attention_prepared.py"),
    *("launch.py", "launcher.py", "parts.py", "registers.py", "triton_entry.py"),
)
"""What decides how attention runs; other kernels, checks and references beside it don't."""


STEP_SOURCES = (
    *("_group_norm.py", "_rows.py", "group_norm.py", "layer_norm.py", "geglu.py", "sums.py", "support.py"),
    *("tiles.py", "upsample.py", "_summed_weights.py", "summed_weights.py", "upsampled_convolution.py"),
    *("_thin_convolution.py", "thin_convolution.py"),
    *("_products.py", "products.py", "../_gluon_tiles.py", "../launcher.py", "../registers.py", "../triton_entry.py"),
)
"""What decides how the step's kernels run, from their folder."""


@functools.cache
def kernels_hash() -> str:
    """The attention kernels' own source in 16 hexadecimal digits: a verdict or a time of other kernels is none."""
    return _hash(Path(diffopt_kernels.__file__).parent, ATTENTION_SOURCES)


@functools.cache
def step_kernels_hash() -> str:
    """The step kernels' own source in 16 hexadecimal digits; independent of attention's, but for the launcher."""
    return _hash(Path(diffopt_kernels.__file__).parent / "step", STEP_SOURCES)


def _hash(folder: Path, patterns: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for path in sorted({path.resolve() for pattern in patterns for path in folder.glob(pattern)}):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
