"""Two pictures of one seed side by side, and how far apart they are."""

from pathlib import Path

import numpy as np
from PIL import Image

from diffopt.bench.schema import RecordError

_GAP = 8


def largest_difference(left: Image.Image, right: Image.Image) -> int:
    """Over all pixels and channels, of 255. Both RGB and of one size."""
    return int(np.abs(np.asarray(left, np.int16) - np.asarray(right, np.int16)).max())


def write_pair(path: Path, left: Image.Image, right: Image.Image) -> None:
    """Write a PNG file with both pictures beside each other; the folder is made when it is missing.

    Raises:
        RecordError: it can't be written.
    """
    both = Image.new("RGB", (left.width + _GAP + right.width, max(left.height, right.height)), "white")
    both.paste(left, (0, 0))
    both.paste(right, (left.width + _GAP, 0))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        both.save(path, format="PNG")
    except OSError as error:
        raise RecordError(f"{path}: can't be written: {error.strerror}") from error
