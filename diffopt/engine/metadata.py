"""What a picture carries: everything needed to make it again, and nothing that differs when it is made again.

No times and no counts of its own: the same picture made twice is the same file, byte for byte. Only a `diffopt verify`
between the two changes the certificate of pictures that are not stock's bit for bit anyway.
"""

import dataclasses
import json
from typing import Any, Literal

from diffopt.attention.verified import Verified
from diffopt.config import ConfigError, build, parse_json
from diffopt.errors import DiffoptError
from diffopt.models.digest import SHORT
from diffopt.models.schedulers import scheduler_label

SCHEMA = 2
"""Version of `PictureMetadata`; grows by one with every change to its fields. 1 had no certificate."""

READABLE = (1, 2)


class MetadataError(DiffoptError):
    """A picture that doesn't say how it was made, or says it in a form this version doesn't know."""


@dataclasses.dataclass(frozen=True)
class DeviceUsed:
    """Where a picture was made: "cpu" or "cuda", its name, and for a CPU the threads, which decide the last bits."""

    kind: str
    name: str
    threads: int | None = None


@dataclasses.dataclass(frozen=True)
class AttentionUsed:
    """What computed attention.

    Attributes:
        requested: as `attention=`; "stock" when diffopt did not touch the pipeline.
        ran: backend to the number of layers it served for this picture.
        kept: layers whose own processor was kept.
    """

    requested: str
    ran: dict[str, int] = dataclasses.field(default_factory=dict)
    kept: int = 0


@dataclasses.dataclass(frozen=True)
class PictureCertificate:
    """What is known of how exact a picture is. What makes a picture again ignores it.

    Attributes:
        state: "stock": diffopt had no part in it; "bitwise stock": attention made stock's own calls on a CPU;
            "verified": the last `diffopt verify` here passed, with the numbers of `verified`; "not verified here".
        plan: digest of what ran in each layer at each shape.
        verified: of the same machine, versions, source, model, dtype and request.
        unchecked: how many of this picture's layer shapes were not among those it checked.
        command: that would verify it.
    """

    state: Literal["stock", "bitwise stock", "verified", "not verified here"]
    plan: str
    verified: Verified | None = None
    unchecked: int = 0
    command: str | None = None

    def __str__(self) -> str:
        """In words."""
        found = self.verified
        if self.state == "stock":
            return "diffopt was off"
        if self.state == "bitwise stock":
            return "bit for bit stock's: on this CPU attention made the very calls that stock makes"
        if found is None:
            return f"not verified here: {self.command}"
        psnr = "∞" if found.psnr_db is None else f"{found.psnr_db:.1f} dB"
        ssim = "" if found.ssim is None else f", SSIM {found.ssim:.4f}"
        words = (
            f"verified {found.time_utc[:16].replace('T', ' ')} UTC ({found.id[:8]}): layer shapes at "
            f"{found.layer_share:.2f} and steps at {found.step_share:.2f} of what is allowed; of {found.pictures} "
            f"pictures {found.identical} bit for bit stock's, the worst PSNR {psnr}{ssim}, "
            f"largest difference {found.max_difference} of 255"
        )
        return f"{words}; {self.unchecked} of this picture's layer shapes not checked" if self.unchecked else words


@dataclasses.dataclass(frozen=True)
class PictureMetadata:
    """The JSON block of a picture.

    Attributes:
        schema: `SCHEMA` of the version that wrote it.
        seed: of this picture alone; with it, it is made again as a request of one.
        scheduler: as `scheduler=`, None for the model's own; `scheduler_class` is what that was.
        model: its name; for a local model the name of its folder or file.
        model_hash: SHA-256 over the weights (`diffopt.models.model_hash`).
        dtype: of the UNet, such as "float16".
        versions: of diffopt, torch, diffusers, transformers and triton (None: not installed).
        certificate: None in pictures of before schema 2.
    """

    schema: int
    prompt: str
    negative_prompt: str
    seed: int
    steps: int
    guidance: float
    scheduler: str | None
    scheduler_class: str
    width: int
    height: int
    model: str
    model_hash: str
    dtype: str
    device: DeviceUsed
    attention: AttentionUsed
    versions: dict[str, str | None]
    certificate: PictureCertificate | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain data, ready for JSON."""
        return dataclasses.asdict(self)


def parse_metadata(text: str, *, where: str) -> PictureMetadata:
    """Read a picture's JSON block.

    Args:
        where: the picture, for messages.

    Raises:
        MetadataError: no JSON, another schema, missing or unknown fields.
    """
    try:
        table = parse_json(text)
    except ValueError as error:
        raise MetadataError(f"{where}: its diffopt block is not JSON: {error}") from error
    if not isinstance(table, dict) or table.get("schema") not in READABLE:
        schema = table.get("schema") if isinstance(table, dict) else None
        known = " and ".join(map(str, READABLE))
        raise MetadataError(f"{where}: its diffopt block has schema {schema!r}; this version reads {known}")
    try:
        return build(PictureMetadata, table, where=where)
    except ConfigError as error:
        raise MetadataError(str(error)) from error


def parameters_text(metadata: PictureMetadata) -> str:
    """The `parameters` text that AUTOMATIC1111 and its successors write and read."""
    lines = [metadata.prompt]
    if metadata.negative_prompt:
        lines.append(f"Negative prompt: {metadata.negative_prompt}")
    settings = {
        "Steps": metadata.steps,
        "Sampler": scheduler_label(metadata.scheduler, metadata.scheduler_class),
        "CFG scale": f"{metadata.guidance:g}",
        "Seed": metadata.seed,
        "Size": f"{metadata.width}x{metadata.height}",
        "Model hash": metadata.model_hash[:SHORT],
        "Model": metadata.model,
        "Version": f"diffopt {metadata.versions.get('diffopt')}",
    }
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in settings.items()))
    return "\n".join(lines)


def _quoted(value: object) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ',:\n"') else text
