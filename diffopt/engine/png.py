"""Pictures on disk: PNG files that say how they were made, whole or not there at all."""

import errno
import io
import json
import os
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffopt.engine.metadata import MetadataError, PictureMetadata, parameters_text, parse_metadata
from diffopt.errors import DiffoptError, InputError

if TYPE_CHECKING:
    from diffopt.engine.worker import GeneratedPicture

BLOCK = "diffopt"
"""Keyword of the iTXt chunk that holds `PictureMetadata` as JSON."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_folder(folder: Path | str) -> Path:
    """Make sure that a folder exists and can be written to, before hours of work for it.

    Raises:
        InputError: it can't be made or written to.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".diffopt-"):
            pass
    except OSError as error:
        raise InputError(
            "output", str(folder), f"a folder that can be written to is needed: {error.strerror}"
        ) from error
    return folder


def write_png(picture: "GeneratedPicture", folder: Path | str) -> Path:
    """Write a picture under a new name, such as 00007-42-a-red-apple.png: number in the folder, seed, prompt.

    The file is written under a temporary name, flushed to the disk and then linked to its own, so that it is never seen
    half-written and never replaces another one, whoever else writes to the folder.

    Raises:
        DiffoptError: the disk is full, or the folder can't be written to.
    """
    folder = Path(folder)
    data = png_bytes(picture)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".diffopt-", suffix=".tmp", delete=False) as file:
            temporary = Path(file.name)
            try:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                os.fchmod(file.fileno(), 0o666 & ~_umask())
                return _link_to_free_name(temporary, folder, f"{picture.seed}{_slug(picture.metadata['prompt'])}")
            finally:
                temporary.unlink(missing_ok=True)
    except OSError as error:
        if error.errno in _FULL:
            raise DiffoptError(f"output {folder}: the disk is full; seed {picture.seed} was not written") from error
        raise DiffoptError(f"output {folder}: can't be written: {error.strerror or error}") from error


def png_bytes(picture: "GeneratedPicture") -> bytes:
    """The PNG file of a picture: the `parameters` text and the JSON block included."""
    from PIL.PngImagePlugin import PngInfo

    metadata = picture.metadata
    info = PngInfo()
    text = parameters_text(parse_metadata(json.dumps(metadata), where="the picture"))
    info.add_text("parameters", text)  # becomes iTXt where Latin-1 isn't enough, as other tools do
    info.add_itxt(BLOCK, json.dumps(metadata, ensure_ascii=False))
    buffer = io.BytesIO()
    picture.image.save(buffer, format="PNG", pnginfo=info)
    return buffer.getvalue()


def read_png(path: Path | str) -> dict[str, Any]:
    """How a picture was made, as plain data: the fields of `PictureMetadata`.

    Raises:
        MetadataError: no such file, not a PNG, damaged, or without a block that this version knows.
    """
    return read_metadata(path).to_dict()


def read_metadata(path: Path | str) -> PictureMetadata:
    """As `read_png`, typed."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            if image.format != "PNG":
                raise MetadataError(
                    f"{path}: a {image.format} file; only the PNG files that diffopt wrote say how they were made"
                )
            image.load()
            block = getattr(image, "text", {}).get(BLOCK)
    except UnidentifiedImageError:
        raise MetadataError(f"{path}: not a PNG file") from None
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises all three for damaged files
        reason = getattr(error, "strerror", None) or f"damaged: {error}"
        raise MetadataError(f"{path}: can't be read: {reason}") from error
    if block is None:
        raise MetadataError(
            f"{path}: a PNG without diffopt's block; it was not made by diffopt, or the block was removed"
        )
    return parse_metadata(block, where=str(path))


def _link_to_free_name(temporary: Path, folder: Path, rest: str) -> Path:
    number = 1 + max((int(name.group(1)) for name in map(_NUMBER.match, os.listdir(folder)) if name), default=0)
    while True:
        path = folder / f"{number:05d}-{rest}.png"
        try:
            _rename_if_free(temporary, path)
            return path
        except FileExistsError:
            number += 1


_NUMBER = re.compile(r"(\d{5,9})-")


def _rename_if_free(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)
    except OSError as error:
        if isinstance(error, FileExistsError) or error.errno in _FULL:
            raise
        # a file system without hard links: reserve the name, then replace the empty file
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
        os.replace(temporary, path)


def _slug(prompt: str) -> str:
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")
    words = words if len(words) <= 40 else words[:40].rpartition("-")[0] or words[:40]
    return f"-{words}" if words else ""


def _umask() -> int:
    """The process's umask: tempfile makes files that only their owner can read."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
