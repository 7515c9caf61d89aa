"""The weights as a run leaves them: float16 safetensors, the UNet's split in two so that each file is small.

Written whole or not at all, every minute or two: a run that was killed leaves the last complete set. `run.json`
is written last and holds the hash of every file.
"""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch

from diffopt.errors import DiffoptError

if TYPE_CHECKING:
    from torch import nn

UNET_PARTS = ("unet.safetensors.0", "unet.safetensors.1")
OTHERS = "others.safetensors"  # autoencoder and text encoder
RECORD = "run.json"


class WeightsError(DiffoptError):
    """A run's files that are missing, or not the ones that its record names."""


def _half(module: "nn.Module", prefix: str = "") -> dict[str, torch.Tensor]:
    state = module.state_dict()
    return {prefix + name: value.detach().to("cpu", torch.float16).contiguous() for name, value in state.items()}


def write(
    folder: Path,
    *,
    unet: "nn.Module | None",
    text_encoder: "nn.Module | None",
    autoencoder: "nn.Module",
    record: dict[str, Any],
) -> None:
    """Write what is trained so far to a folder, and the record with each file's SHA-256."""
    folder.mkdir(parents=True, exist_ok=True)
    others = _half(autoencoder, "autoencoder.")
    files: dict[str, bytes] = {}
    if unet is not None and text_encoder is not None:
        others |= _half(text_encoder, "text_encoder.")
        whole = safetensors.torch.save(_half(unet))
        middle = len(whole) // 2
        files = {UNET_PARTS[0]: whole[:middle], UNET_PARTS[1]: whole[middle:]}
    files[OTHERS] = safetensors.torch.save(others)
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    files[RECORD] = (json.dumps({**record, "sha256": hashes}, indent=2) + "\n").encode()
    for name, data in files.items():
        (folder / f"{name}.new").write_bytes(data)
    for name in files:
        (folder / f"{name}.new").replace(folder / name)


def read_record(folder: Path) -> dict[str, Any]:
    """Read the record of a run, or raise WeightsError."""
    try:
        return json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WeightsError(f"{folder} holds no {RECORD}: no run has written there") from None


def read(folder: Path) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
    """Read a run: state dicts (float16) by part, `autoencoder` and where trained `unet`, `text_encoder`; the record."""
    record = read_record(folder)
    data: dict[str, bytes] = {}
    for name, expected in record["sha256"].items():
        file = folder / name
        if not file.exists():
            raise WeightsError(f"{file} is missing: {RECORD} names it")
        data[name] = file.read_bytes()
        if hashlib.sha256(data[name]).hexdigest() != expected:
            raise WeightsError(f"{file} is not the file that {RECORD} names: its hash differs")
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in safetensors.torch.load(data[OTHERS]).items():
        part, key = name.split(".", 1)
        parts.setdefault(part, {})[key] = value
    if UNET_PARTS[0] in data:
        parts["unet"] = safetensors.torch.load(b"".join(data[name] for name in UNET_PARTS))
    return parts, record
