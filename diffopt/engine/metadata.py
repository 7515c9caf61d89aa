"""What a picture carries: everything needed to make it again, and nothing that differs when it is made again.

No times and no counts: the same picture made twice is the same file, byte for byte.
"""

import dataclasses
import json
from typing import Any

from diffopt.config import ConfigError, build
from diffopt.errors import DiffoptError
from diffopt.models.digest import SHORT
from diffopt.models.schedulers import scheduler_label

SCHEMA = 1
"""Version of `PictureMetadata`; grows by one with every change to its fields."""


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
        table = json.loads(text)
    except ValueError as error:
        raise MetadataError(f"{where}: its diffopt block is not JSON: {error}") from error
    if not isinstance(table, dict) or table.get("schema") != SCHEMA:
        schema = table.get("schema") if isinstance(table, dict) else None
        raise MetadataError(f"{where}: its diffopt block has schema {schema!r}; this version reads {SCHEMA}")
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
