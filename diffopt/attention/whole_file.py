"""Writes a file whole or not at all, so that neither Ctrl-C nor a full disk leaves half of one."""

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Replace or create `path` with `text` in UTF-8; its folder is made if it is missing.

    Raises:
        OSError: it can't be written; what was there is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
