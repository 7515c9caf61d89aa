"""The weights as a run leaves them: float16 safetensors in shards of at most 16 MiB, so that each file travels.

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

PARTS = ("unet", "text_encoder", "autoencoder")
SHARD = 16 * 2**20  # bytes
RECORD = "run.json"


class WeightsError(DiffoptError):
    """A run's files that are missing, or not the ones that its record names."""


def _shards(part: str, data: bytes) -> dict[str, bytes]:
    """One file cut into shards: `unet.safetensors.0`, `unet.safetensors.1` and so on."""
    return {
        f"{part}.safetensors.{number}": data[start : start + SHARD]
        for number, start in enumerate(range(0, len(data), SHARD))
    }


def _half(module: "nn.Module") -> dict[str, torch.Tensor]:
    state = module.state_dict()
    return {name: value.detach().to("cpu", torch.float16).contiguous() for name, value in state.items()}


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
    modules = {"unet": unet, "text_encoder": text_encoder, "autoencoder": autoencoder}
    files: dict[str, bytes] = {}
    for part, module in modules.items():
        if module is not None:
            files |= _shards(part, safetensors.torch.save(_half(module)))
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
    for part in PARTS:
        shards = sorted(
            (name for name in data if name.startswith(f"{part}.")), key=lambda name: int(name.split(".")[-1])
        )
        if shards:
            parts[part] = safetensors.torch.load(b"".join(data[name] for name in shards))
    return parts, record
