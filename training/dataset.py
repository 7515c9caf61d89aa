"""The training set on the device: pictures, some in other colours too, captions as tokens, how often each is seen."""

import json
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from training import captions, recolour, render

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

REPAINTED_SHARE = 0.2  # of the batches: enough to learn that a colour word paints whatever it stands before


@dataclass
class Dataset:
    """Pictures with captions, all on one device.

    Attributes:
        rgb: uint8 [P, 3, H, W].
        tokens: int64 [P, CAPTIONS_PER_PICTURE, 77].
        weight: float32 [P], how often a picture is seen; sums to 1.
        titles: what each picture shows, as it would be asked for: its name, a repainted one with its colour.
        empty: int64 [77], the empty caption.
    """

    rgb: torch.Tensor
    tokens: torch.Tensor
    weight: torch.Tensor
    titles: list[str]
    empty: torch.Tensor


def read_pack(file: Path, limit: int | None = None) -> tuple[list[captions.Picture], np.ndarray]:
    """Read what render.py wrote: descriptions, and pictures as uint8 [P, H, W, 3]; at most `limit`, evenly spread."""
    with zipfile.ZipFile(file) as archive:
        pictures = [captions.Picture(**entry) for entry in json.loads(archive.read("manifest.json"))]
        numbers = list(range(len(pictures)))
        if limit is not None:
            numbers = numbers[:: max(1, len(numbers) // limit)][:limit]
        images = [archive.read(f"{number:05d}.webp") for number in numbers]
    with ThreadPoolExecutor() as pool:  # decoding happens in C, outside the interpreter's lock
        return [pictures[number] for number in numbers], np.stack(list(pool.map(render.decode, images)))


def plan_repaints(pictures: list[captions.Picture]) -> dict[str, list[int]]:
    """Which pictures are painted in which colour: objects of one colour, in all colours the artwork lacks."""
    present = {(picture.style, picture.name) for picture in pictures}
    plan: dict[str, list[int]] = {word: [] for word in recolour.PAINTS}
    for number, picture in enumerate(pictures):
        if not captions.recolourable(picture):
            continue
        for word, numbers in plan.items():
            title = f"{word} {captions.colourless(picture.name)}"
            if word != picture.colour and word not in picture.name.split() and (picture.style, title) not in present:
                numbers.append(number)
    return plan


def _repaint(rgb: torch.Tensor, word: str, chunk: int = 128) -> torch.Tensor:
    painted = [recolour.repaint(part.float() / 255, word) for part in rgb.split(chunk)]
    return (torch.cat(painted) * 255).round().to(torch.uint8)


def tokenize(texts: list[str], words: "CLIPTokenizer") -> torch.Tensor:
    """Captions as int64 ids [len(texts), 77], padded and cut as the pipeline does it."""
    different = sorted(set(texts))
    ids = words(different, padding="max_length", truncation=True, max_length=words.model_max_length)["input_ids"]
    place = {text: number for number, text in enumerate(different)}
    return torch.tensor(ids)[[place[text] for text in texts]]


def load(
    file: Path, words: "CLIPTokenizer", device: torch.device, limit: int | None = None, repaints: bool = True
) -> Dataset:
    """Read the pack, paint the repaints on the device, tokenize the captions, move everything to the device."""
    pictures, images = read_pack(file, limit)
    rgb = torch.from_numpy(images).to(device).permute(0, 3, 1, 2).contiguous()
    titles = [picture.name for picture in pictures]
    texts = [caption for picture in pictures for caption in captions.captions_of(picture)]
    weights = [picture.weight for picture in pictures]
    own = sum(weights)
    parts = [rgb]
    for word, numbers in (plan_repaints(pictures) if repaints else {}).items():
        if numbers:
            parts.append(_repaint(rgb[numbers], word))
        for number in numbers:
            titles.append(f"{word} {captions.colourless(pictures[number].name)}")
            texts += captions.captions_of(pictures[number], word)
            weights.append(pictures[number].weight)
    weight = torch.tensor(weights)
    added = weight[len(pictures) :].sum().clamp_min(1e-9)
    weight[len(pictures) :] *= own * REPAINTED_SHARE / (1 - REPAINTED_SHARE) / added
    tokens = tokenize(texts, words).view(len(titles), captions.CAPTIONS_PER_PICTURE, -1)
    return Dataset(
        rgb=torch.cat(parts),
        tokens=tokens.to(device),
        weight=(weight / weight.sum()).to(device),
        titles=titles,
        empty=tokenize([""], words)[0].to(device),
    )
