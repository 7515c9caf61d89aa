"""Writes a file whole or not at all, so that neither Ctrl-C nor a full disk leaves half of one."""

import errno
import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Replace or create `path` with `text` in UTF-8; its folder is made if it is missing.

    A link stays one: what it leads to is replaced. A device or pipe stays one, too, and gets the text as it comes.

    Raises:
        OSError: it can't be written; what was there is untouched.
    """
    if _is_special(path):
        path.write_text(text, encoding="utf-8")
        return
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = _unfinished(path)
    try:
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def check_whole(path: Path) -> None:
    """Find out before the work that `write_whole` will be able to write.

    Raises:
        OSError: it won't.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if _is_special(path):
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = _unfinished(path)
    try:
        unfinished.touch()
    finally:
        unfinished.unlink(missing_ok=True)


def _is_special(path: Path) -> bool:
    """Whether something is there that is no ordinary file: nothing may take the place of a device."""
    return path.exists() and not path.is_file()


def _unfinished(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")
