"""What the last passing `diffopt verify` found, remembered in the user's cache folder for the pictures made after it.

An entry counts for one GPU or CPU, one set of versions, one source of diffopt and its kernels, one model, dtype and
request. A verify that fails removes the entry of an earlier one. Nothing here imports torch before it is asked for.
"""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import platformdirs

from diffopt.config import ConfigError, build, parse_json
from diffopt.whole_file import write_whole

if TYPE_CHECKING:
    import torch


@dataclasses.dataclass(frozen=True)
class Verified:
    """The numbers of a check that passed.

    Attributes:
        id: of the certificate. time_utc: when it was made (ISO 8601).
        layer_share, step_share: the largest error of a layer shape, and distance of a step, as a share of what is
            allowed; 1 or less.
        pictures: how many were compared with stock's. identical: how many of them were bit for bit the same.
        psnr_db, ssim, max_difference: of the worst one, the last of 255; None: infinite, or not measured.
    """

    id: str
    time_utc: str
    layer_share: float
    step_share: float
    pictures: int
    identical: int
    psnr_db: float | None
    ssim: float | None
    max_difference: int


@dataclasses.dataclass(frozen=True)
class Entry:
    """A check that passed, and the layer shapes it covered: shape in words to the backend that ran it."""

    verified: Verified
    choices: dict[str, str]


KEPT = 50
"""Entries, the newest ones: those of earlier code would pile up."""


def verified_file() -> Path:
    """One JSON object: what was verified (`verified_key`) to its `Entry`."""
    return platformdirs.user_cache_path("diffopt") / "verified.json"


def verified_key(device: "torch.device", *, model_hash: str, dtype: str, attention: str) -> str:
    """What a check is valid for, in one line."""
    from diffopt.attention.machine import machine
    from diffopt.measure.environment import cpu_name, installed_version, source_hash

    here: dict[str, Any] = {**machine(device), "source": source_hash()[:16]}
    if device.type != "cuda":
        here["device"] = cpu_name()
    here |= {name: installed_version(name) for name in ("diffusers", "transformers")}
    here |= {"model": model_hash, "dtype": dtype, "attention": attention}
    return " | ".join(f"{name} {value}" for name, value in here.items())


def find_verified(key: str) -> Entry | None:
    """The last passing check, or None; a damaged file counts as none."""
    try:
        return build(Entry, _read()[key], where="verified.json")
    except (KeyError, TypeError, ConfigError):
        return None


def remember_verified(key: str, entry: Entry | None) -> None:
    """Keep a check that passed; None forgets the one before, because the last check did not pass.

    Raises:
        OSError: the cache folder can't be written.
    """
    entries = _read()
    entries.pop(key, None)
    if entry is not None:
        entries[key] = dataclasses.asdict(entry)
    entries = dict(list(entries.items())[-KEPT:])
    write_whole(verified_file(), json.dumps(entries, indent=2, ensure_ascii=False) + "\n")


def _read() -> dict[str, Any]:
    try:
        entries = parse_json(verified_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return entries if isinstance(entries, dict) else {}
