"""The training set on the device: the pictures of a plan (examples.py), captions as tokens, how often each is seen."""

import hashlib
import json
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from training import captions, compose, examples, pairs, recolour, render
from training.examples import Example

if TYPE_CHECKING:
    from transformers import CLIPTokenizer


@dataclass
class Dataset:
    """Pictures with captions, all on one device.

    Attributes:
        rgb: uint8 [P, 3, H, W].
        tokens: int64 [P, CAPTIONS_PER_PICTURE, 77].
        weight: float32 [P], how often a picture is seen; sums to 1.
        examples: what each picture is made of and shows.
        empty: int64 [77], the empty caption.
    """

    rgb: torch.Tensor
    tokens: torch.Tensor
    weight: torch.Tensor
    examples: list[Example]
    empty: torch.Tensor


def read_manifest(file: Path) -> list[captions.Picture]:
    """The descriptions of all pictures that render.py wrote."""
    with zipfile.ZipFile(file) as archive:
        return [captions.Picture(**entry) for entry in json.loads(archive.read("manifest.json"))]


def pack_hash(file: Path) -> str:
    """SHA-256 over the names and contents of a pack's files: the same for the same data, whatever zlib wrote it."""
    digest = hashlib.sha256()
    with zipfile.ZipFile(file) as archive:
        for name in sorted(archive.namelist()):
            digest.update(name.encode() + b"\0" + hashlib.sha256(archive.read(name)).digest())
    return digest.hexdigest()


def read_pack(file: Path, limit: int | None = None) -> tuple[list[captions.Picture], np.ndarray]:
    """Read what render.py wrote: descriptions, and pictures as uint8 [P, H, W, 3]; at most `limit`, evenly spread."""
    pictures = read_manifest(file)
    with zipfile.ZipFile(file) as archive:
        numbers = list(range(len(pictures)))
        if limit is not None:
            numbers = numbers[:: max(1, len(numbers) // limit)][:limit]
        images = [archive.read(f"{number:05d}.webp") for number in numbers]
    with ThreadPoolExecutor() as pool:  # decoding happens in C, outside the interpreter's lock
        return [pictures[number] for number in numbers], np.stack(list(pool.map(render.decode, images)))


def paint(rgb: torch.Tensor, wanted: set[tuple[int, str]], chunk: int = 128) -> dict[tuple[int, str], torch.Tensor]:
    """Pictures of `rgb`, uint8 [P, 3, H, W], each in a colour; no colour leaves one as it is. By number and colour."""
    done = {(number, word): rgb[number] for number, word in wanted if not word}
    colours: dict[int, list[str]] = {}
    for number, word in sorted(wanted):
        if word:
            colours.setdefault(number, []).append(word)
    numbers = sorted(colours)
    for part in (numbers[start : start + chunk] for start in range(0, len(numbers), chunk)):
        pictures = rgb[part].float() / 255
        inks = recolour.take_apart(pictures)
        for word in recolour.PAINTS:
            rows = [row for row, number in enumerate(part) if word in colours[number]]
            painted = (recolour.repaint(pictures[rows], word, inks.of(rows)) * 255).round().to(torch.uint8)
            done |= {(part[row], word): picture for row, picture in zip(rows, painted, strict=True)}
    return done


def make_pictures(plan: list[Example], rgb: torch.Tensor) -> torch.Tensor:
    """The pictures of a plan, uint8 [len(plan), 3, H, W], from the artwork, uint8 [P, 3, H, W], on its device."""
    painted = paint(rgb, {part for example in plan for part in zip(example.sources, example.colours, strict=True)})
    pictures = torch.empty((len(plan), *rgb.shape[1:]), dtype=torch.uint8, device=rgb.device)
    for layout in dict.fromkeys(example.layout for example in plan):
        numbers = [number for number, example in enumerate(plan) if example.layout == layout]
        for start in range(0, len(numbers), 256):
            part = numbers[start : start + 256]
            made = [list(zip(plan[n].sources, plan[n].colours, strict=True)) for n in part]
            objects = [torch.stack([painted[things[o]] for things in made]) for o in range(len(made[0]))]
            pictures[part] = objects[0] if layout in ("artwork", "repaint") else compose.compose(layout, objects)
    return pictures


def tokenize(texts: list[str], words: "CLIPTokenizer") -> torch.Tensor:
    """Captions as int64 ids [len(texts), 77], padded and cut as the pipeline does it."""
    different = sorted(set(texts))
    ids = words(different, padding="max_length", truncation=True, max_length=words.model_max_length)["input_ids"]
    place = {text: number for number, text in enumerate(different)}
    return torch.tensor(ids)[[place[text] for text in texts]]


def load(
    file: Path,
    words: "CLIPTokenizer",
    device: torch.device,
    limit: int | None = None,
    repaints: bool = True,
    held: pairs.Pairs | None = None,
) -> Dataset:
    """Read the pack, plan the examples, make them on the device, tokenize the captions.

    What `held` holds out (by default pairs.toml) is in no picture and no caption.
    """
    artwork, images = read_pack(file, limit)
    plan = examples.plan(artwork, pairs.read_pairs() if held is None else held, repaints=repaints)
    rgb = torch.from_numpy(images).to(device).permute(0, 3, 1, 2).contiguous()
    texts = [caption for example in plan for caption in example.captions]
    tokens = tokenize(texts, words).view(len(plan), captions.CAPTIONS_PER_PICTURE, -1)
    weight = torch.tensor([example.weight for example in plan])
    return Dataset(
        rgb=make_pictures(plan, rgb),
        tokens=tokens.to(device),
        weight=(weight / weight.sum()).to(device),
        examples=plan,
        empty=tokenize([""], words)[0].to(device),
    )
