"""Step 2: render the artwork at 128x128 on white, and pack pictures and captions into one file.

`python -m training.render` writes training/cache/data/pictures.zip: a manifest and one lossless WebP a picture.
"""

import argparse
import io
import json
import multiprocessing
import os
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from diffopt.errors import DiffoptError
from training import captions, fetch

PACK = "pictures.zip"
MARGIN = 1 / 16  # of the picture on each side: white, so that pictures can be shifted


def svg_of(body: str, left: float, top: float, width: float, height: float) -> str:
    """A whole SVG file from an icon's body and its view box, with the margin around it."""
    side = max(width, height) / (1 - 2 * MARGIN)
    x, y = left + width / 2 - side / 2, top + height / 2 - side / 2
    space = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {space} viewBox="{x} {y} {side} {side}">{body}</svg>'


def render(svg: str, side: int) -> bytes:
    """Render an SVG file on white and return it as lossless WebP."""
    import resvg_py
    from PIL import Image

    png = resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side, background="#ffffff", skip_system_fonts=True)
    with Image.open(io.BytesIO(bytes(png))) as picture:
        out = io.BytesIO()
        picture.convert("RGB").save(out, "WEBP", lossless=True, quality=60, method=4)
    return out.getvalue()


def decode(data: bytes) -> np.ndarray:
    """One packed picture as uint8 [H, W, 3]."""
    from PIL import Image

    with Image.open(io.BytesIO(data)) as picture:
        return np.asarray(picture.convert("RGB"))


def _render_icon(task: tuple[str, int]) -> bytes:
    return render(*task)


def choose_pictures(cache: Path) -> tuple[list[captions.Picture], list[str]]:
    """The chosen artwork of all styles and the SVG file of each."""
    sources = {source.name: fetch.fetch(source, cache) for source in fetch.read_sources()}
    emojibase = fetch.read_json(sources["emojibase"], "en/data.json")
    pictures, files = [], []
    for style in captions.STYLES:
        icons: dict[str, Any] = fetch.read_json(sources[style], "icons.json")
        chars = fetch.read_json(sources[style], "chars.json")
        for picture in captions.choose(style, list(icons["icons"]), chars, emojibase):
            icon = icons["icons"][picture.icon]
            box = [icon.get(key, icons.get(key, 0)) for key in ("left", "top", "width", "height")]
            pictures.append(picture)
            files.append(svg_of(icon["body"], *box))
    return pictures, files


def drop_duplicates(
    pictures: list[captions.Picture], images: list[bytes]
) -> tuple[list[captions.Picture], list[bytes]]:
    """Keep each of the pictures of one style that look the same once, under all its names."""
    import torch

    from training import duplicates

    rgb = torch.stack([torch.from_numpy(decode(image).copy()).permute(2, 0, 1) for image in images])
    kept = duplicates.merge(pictures, rgb)
    return [pictures[number] for number in kept], [images[number] for number in kept]


def name_colours(pictures: list[captions.Picture], images: list[bytes]) -> None:
    """Set each picture's colour word from its pixels."""
    import torch

    from training import recolour

    for start in range(0, len(pictures), 64):
        batch = np.stack([decode(image) for image in images[start : start + 64]])
        rgb = torch.from_numpy(batch).permute(0, 3, 1, 2).float() / 255
        for picture, word in zip(pictures[start : start + 64], recolour.colour_words(rgb), strict=True):
            picture.colour = word


def pack(pictures: list[captions.Picture], images: list[bytes], file: Path) -> None:
    """Write pictures and their descriptions to one file, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_suffix(".new")
    with zipfile.ZipFile(new, "w") as archive:
        manifest = json.dumps([picture.as_dict() for picture in pictures], ensure_ascii=False)
        archive.writestr(_entry("manifest.json"), manifest, zipfile.ZIP_DEFLATED)
        for number, image in enumerate(images):
            archive.writestr(_entry(f"{number:05d}.webp"), image, zipfile.ZIP_STORED)
    new.replace(file)


def _entry(name: str) -> zipfile.ZipInfo:
    """A member without the time of day: the same data gives the same file."""
    return zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))


def ensure(data: Path, cache: Path = fetch.CACHE) -> Path:
    """The pack in a folder, fetched and rendered where it is not there yet; raises FetchError."""
    if not (data / PACK).exists():
        make(cache, data)
    return data / PACK


def make(cache: Path, data: Path, side: int = 128) -> int:
    """Fetch, render and pack everything; returns the number of pictures."""
    pictures, files = choose_pictures(cache)
    with multiprocessing.Pool(os.cpu_count()) as pool:
        images = pool.map(_render_icon, [(file, side) for file in files], chunksize=16)
    pictures, images = drop_duplicates(pictures, images)
    name_colours(pictures, images)
    pack(pictures, images, data / PACK)
    return len(pictures)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=fetch.CACHE)
    parser.add_argument("--data", type=Path, default=fetch.CACHE / "data")
    parser.add_argument("--side", type=int, default=128, help="pixels a side")
    options = parser.parse_args(arguments)
    try:
        count = make(options.cache, options.data, options.side)
    except DiffoptError as error:
        print(error, file=sys.stderr)
        return 2
    size = (options.data / PACK).stat().st_size / 1e6
    print(f"{options.data / PACK}: {count} pictures, {size:.1f} MB", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
