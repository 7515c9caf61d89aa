"""A small classifier that says what a picture shows: the judge of pictures of pairs that were never trained.

`python -m training.judge` trains it on a CPU in some minutes and writes judge.safetensors (float16, at most 2 MB) and
judge.json: its classes and its accuracy on pictures that were kept from it. It learns from the artwork in all styles,
the held-out pairs' own pictures among them: it has to know what it is asked to find. Kept from it are others, drawn
by a seed, each of a concept that it sees in two other styles.
"""

import argparse
import dataclasses
import hashlib
import json
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from diffopt.errors import DiffoptError
from training import dataset, fetch, pairs, render
from training.captions import STYLES, Picture
from training.pace import say

SIDE = 32
STORED_SIDE = 40  # views are cut from pictures of this size
WIDTHS, STRIDES = (24, 64, 96, 128, 192), (1, 2, 2, 2, 1)
EPOCHS, BATCH, PEAK_RATE, SEED = 32, 128, 4e-3, 11
KEPT_BACK = 300
TOP = 5
WEIGHTS, RECORD = Path(__file__).parent / "judge.safetensors", Path(__file__).parent / "judge.json"


class JudgeError(DiffoptError):
    """A judge whose files do not belong together."""


class Judge(nn.Module):
    """Pictures, float [B, 3, 32, 32] in 0..1, to scores [B, classes]: five convolutions and a cosine head."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for width, stride in zip(WIDTHS, STRIDES, strict=True):
            layers += [nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            before = width
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.embed = nn.Linear(4 * before, before)
        self.prototypes = nn.Parameter(torch.randn(classes, before) * before**-0.5)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        embedded = F.normalize(self.embed(F.dropout(self.features(pictures), 0.2, self.training)), dim=1)
        return 20 * embedded @ F.normalize(self.prototypes, dim=1).T


@dataclass(frozen=True)
class JudgeRecord:
    """What the judge is: its classes (each the concepts it stands for) and how good it is on pictures kept from it."""

    classes: list[list[str]]
    kept_back: int
    top1: float
    top5: float
    parameters: int
    pictures: int
    epochs: int
    seed: int
    data_sha256: str
    weights_sha256: str
    torch: str


def group_concepts(pictures: list[Picture]) -> tuple[list[list[str]], list[int]]:
    """Classes, each a list of concepts that some picture has together, and the class of each picture."""
    root: dict[str, str] = {}

    def find(name: str) -> str:
        while root.setdefault(name, name) != name:
            name = root[name]
        return name

    for picture in pictures:
        first, *others = sorted(picture.concepts)
        for other in others:
            root[find(other)] = find(first)
        find(first)
    members: dict[str, list[str]] = {}
    for name in sorted(root):
        members.setdefault(find(name), []).append(name)
    place = {name: number for number, names in enumerate(members.values()) for name in names}
    return list(members.values()), [place[min(picture.concepts)] for picture in pictures]


def keep_back(pictures: list[Picture], labels: list[int], held: pairs.Pairs, count: int, seed: int) -> list[int]:
    """Numbers of pictures the judge does not see: of concepts drawn in all styles, one of each, no held-out pair."""
    styles: dict[int, set[str]] = {}
    for picture, label in zip(pictures, labels, strict=True):
        styles.setdefault(label, set()).add(picture.style)
    by_class: dict[int, list[int]] = {}
    for number, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        if len(styles[label]) == len(STYLES) and not held.holds_out(picture.concepts, picture.style, ""):
            by_class.setdefault(label, []).append(number)
    rng = random.Random(seed)
    chosen = rng.sample(sorted(by_class), min(count, len(by_class)))
    return sorted(rng.choice(by_class[label]) for label in chosen)


def prepare(rgb: torch.Tensor, side: int = SIDE) -> torch.Tensor:
    """Pictures, uint8 [B, 3, H, W], as the judge sees them: float [B, 3, side, side] in 0..1."""
    return F.interpolate(rgb.float() / 255, (side, side), mode="area")


def vary(stored: torch.Tensor) -> torch.Tensor:
    """Random views of pictures [B, 3, 40, 40]: turned, scaled, shifted, blurred, in slightly other colours."""
    count = len(stored)
    angle, scale = 0.25 * torch.randn(count), 1.05 + 0.3 * (torch.rand(count) - 0.5)
    rows = torch.stack([angle.cos() * scale, -angle.sin() * scale, 0.2 * (torch.rand(count) - 0.5)], 1)
    columns = torch.stack([angle.sin() * scale, angle.cos() * scale, 0.2 * (torch.rand(count) - 0.5)], 1)
    flip = torch.where(torch.rand(count) < 0.3, -1.0, 1.0)
    rows = rows * torch.stack([flip, torch.ones(count), torch.ones(count)], 1)
    grid = F.affine_grid(torch.stack([rows, columns], 1), [count, 3, SIDE, SIDE], align_corners=False)
    ink = F.grid_sample(1 - stored, grid, align_corners=False)
    mix = torch.eye(3) + 0.2 * torch.randn(count, 3, 3)
    ink = torch.einsum("bij,bjhw->bihw", mix, ink)
    blurred = F.avg_pool2d(ink, 3, 1, 1)
    ink = torch.where(torch.rand(count, 1, 1, 1) < 0.3, blurred, ink)
    return (1 - ink + 0.03 * torch.randn_like(ink)).clamp(0, 1)


def train(rgb: torch.Tensor, labels: list[int], classes: int, epochs: int = EPOCHS, seed: int = SEED) -> Judge:
    """Train on pictures, uint8 [P, 3, H, W], with a class each; the same weights for the same seed and threads."""
    torch.manual_seed(seed)
    model = Judge(classes).train()
    torch.nn.Module.to(model, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, weight_decay=0.05)
    stored, target = prepare(rgb, STORED_SIDE), torch.tensor(labels)
    batches = -(-len(stored) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, epochs * batches, pct_start=0.15)
    started = time.monotonic()
    for epoch in range(epochs):
        total = 0.0
        for chosen in torch.randperm(len(stored)).split(BATCH):
            views = vary(stored[chosen]).contiguous(memory_format=torch.channels_last)
            loss = F.cross_entropy(model(views), target[chosen], label_smoothing=0.1)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        say(f"judge: epoch {epoch + 1} of {epochs}, loss {total / batches:.3f}, {time.monotonic() - started:.0f} s")
    return model.eval()


@torch.no_grad()
def top_classes(model: Judge, rgb: torch.Tensor, count: int = TOP) -> list[list[int]]:
    """The `count` likeliest classes, best first, of each picture, uint8 [P, 3, H, W]."""
    scores = torch.cat([model(prepare(part)) for part in rgb.split(256)])
    return scores.topk(min(count, scores.shape[1]), dim=1).indices.tolist()


def accuracy(answers: list[list[int]], labels: list[int], top: int) -> float:
    """The share of pictures whose class is among the first `top` answers."""
    return sum(label in answer[:top] for answer, label in zip(answers, labels, strict=True)) / len(labels)


def save(model: Judge, record: dict[str, Any], weights: Path = WEIGHTS, file: Path = RECORD) -> JudgeRecord:
    """Write the weights (float16) and the record that names their hash."""
    import safetensors.torch

    half = {name: v.half() if v.is_floating_point() else v for name, v in model.state_dict().items()}
    data = safetensors.torch.save({name: value.contiguous() for name, value in half.items()})
    done = JudgeRecord(**record, weights_sha256=hashlib.sha256(data).hexdigest())
    weights.write_bytes(data)
    file.write_text(json.dumps(dataclasses.asdict(done), ensure_ascii=False) + "\n", encoding="utf-8")
    return done


def load(weights: Path = WEIGHTS, file: Path = RECORD) -> tuple[Judge, JudgeRecord]:
    """The committed judge and its record; raises JudgeError when they do not belong together."""
    import safetensors.torch

    record = JudgeRecord(**json.loads(file.read_text(encoding="utf-8")))
    data = weights.read_bytes()
    if hashlib.sha256(data).hexdigest() != record.weights_sha256:
        raise JudgeError(f"{weights.name} is not the judge that {file.name} describes: train it again")
    model = Judge(len(record.classes))
    state = {name: v.float() if v.is_floating_point() else v for name, v in safetensors.torch.load(data).items()}
    model.load_state_dict(state)
    return model.eval(), record


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=fetch.CACHE / "data")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--to", type=Path, default=WEIGHTS.parent, help="the folder for judge.safetensors, judge.json")
    options = parser.parse_args(arguments)
    pictures, images = dataset.read_pack(options.data / render.PACK)
    rgb = torch.from_numpy(images).permute(0, 3, 1, 2)
    classes, labels = group_concepts(pictures)
    kept = keep_back(pictures, labels, pairs.read_pairs(), KEPT_BACK, SEED)
    hidden = set(kept)
    seen = [number for number in range(len(pictures)) if number not in hidden]
    model = train(rgb[seen], [labels[number] for number in seen], len(classes), options.epochs)
    for parameter in model.state_dict().values():  # measured as it is stored
        if parameter.is_floating_point():
            parameter.copy_(parameter.half().float())
    answers, right = top_classes(model, rgb[kept]), [labels[number] for number in kept]
    record = save(
        model,
        {
            "classes": classes,
            "kept_back": len(kept),
            "top1": round(accuracy(answers, right, 1), 4),
            "top5": round(accuracy(answers, right, TOP), 4),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "pictures": len(seen),
            "epochs": options.epochs,
            "seed": SEED,
            "data_sha256": dataset.pack_hash(options.data / render.PACK),
            "torch": torch.__version__,
        },
        options.to / WEIGHTS.name,
        options.to / RECORD.name,
    )
    say(f"judge: top 1 {record.top1:.1%}, top {TOP} {record.top5:.1%} of {record.kept_back} pictures kept from it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
