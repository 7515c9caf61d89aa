"""Constructed artwork for the tests of training/: discs whose colour, size and name are known."""

import io
from pathlib import Path

import torch

from training import captions, render


def picture(name: str = "red apple", **fields: object) -> captions.Picture:
    values: dict[str, object] = {"style": "noto", "icon": name.replace(" ", "-"), "name": name, "group": 4}
    return captions.Picture(**{**values, **fields})  # type: ignore[arg-type]


def disc(rgb: tuple[float, float, float], side: int = 32) -> torch.Tensor:
    """A disc of one colour on white, [1, 3, side, side] in 0..1."""
    line = torch.arange(side) - side / 2 + 0.5
    inside = (line[:, None] ** 2 + line[None] ** 2) < (side / 3) ** 2
    return torch.where(inside, torch.tensor(rgb)[:, None, None], 1.0)[None]


def as_bytes(rgb: torch.Tensor) -> torch.Tensor:
    """Pictures in 0..1 as uint8."""
    return (rgb * 255).round().to(torch.uint8)


def write_pack(folder: Path) -> Path:
    """Three discs as render.py packs them."""
    from PIL import Image

    pictures, images = [], []
    for name, rgb in {"red apple": (0.9, 0.1, 0.1), "star": (1.0, 0.85, 0.2), "cloud": (0.6, 0.6, 0.6)}.items():
        pixels = as_bytes(disc(rgb))[0].permute(1, 2, 0).numpy()
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, "WEBP", lossless=True)
        pictures.append(picture(name))
        images.append(out.getvalue())
    render.name_colours(pictures, images)
    render.pack(pictures, images, folder / render.PACK)
    return folder / render.PACK
