"""The certificate in a picture: what ran, and what is known on this machine of how exact that is."""

import hashlib
import shlex
from collections.abc import Collection

import torch

from diffopt.attention.verified import find_verified, verified_key
from diffopt.engine.metadata import PictureCertificate

STOCK_CALL = "sdpa"
"""The backend that makes the same call of PyTorch's as stock diffusers does."""

LayerRun = tuple[str, str, str]
"""A layer, a shape and the backend that served it."""


def picture_certificate(
    ran: Collection[LayerRun], device: torch.device, *, model: str, model_hash: str, dtype: str, attention: str
) -> PictureCertificate:
    """The certificate of a picture that diffopt's handle served.

    On a CPU the same calls as stock's give the same bits (the tests prove it). Anything else is as exact as the last
    `diffopt verify` here says of this model, where the shapes of this picture were among those it checked.

    Args:
        model: its name, for the command that verifies it.
        attention: as it was asked for.
    """
    plan = plan_digest(ran)
    if device.type == "cpu" and all(backend == STOCK_CALL for _, _, backend in ran):
        return PictureCertificate("bitwise stock", plan)
    entry = find_verified(verified_key(device, model_hash=model_hash, dtype=dtype, attention=attention))
    if entry is None:
        command = ["diffopt", "verify", "--model", model]
        command += [] if attention == "auto" else ["--attention", attention]
        return PictureCertificate("not verified here", plan, command=shlex.join(command))
    unchecked = {(shape, backend) for _, shape, backend in ran if entry.choices.get(shape) != backend}
    return PictureCertificate("verified", plan, verified=entry.verified, unchecked=len(unchecked))


def stock_certificate() -> PictureCertificate:
    """Of a picture that diffopt had no part in."""
    return PictureCertificate("stock", plan_digest(()))


def plan_digest(ran: Collection[LayerRun]) -> str:
    """SHA-256 over what ran in each layer at each shape, its first 16 hexadecimal digits."""
    lines = "\n".join("\0".join(row) for row in sorted(ran))
    return hashlib.sha256(lines.encode()).hexdigest()[:16]
