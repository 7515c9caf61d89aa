"""Step 7: does the model draw what it is asked for? A sheet of pictures for the eyes, and a number.

The number: of simple prompts, how many have a training picture of what they ask for among the five training
pictures nearest to what was drawn (mean squared error of RGB at 32x32). `python -m training.evaluate` measures
the bundled model on a CPU.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from training import dataset, export, fetch, render
from training.pace import say

if TYPE_CHECKING:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
    from PIL.Image import Image

# What is asked for, and the titles of training pictures that show it.
PROMPTS: dict[str, tuple[str, ...]] = {
    "blue heart": ("blue heart",),
    "red heart": ("red heart", "heart suit", "beating heart"),
    "yellow star": ("star", "yellow star"),
    "cat face": ("cat face",),
    "dog face": ("dog face",),
    "a red apple": ("red apple",),
    "a red apple, noto style": ("red apple",),
    "green apple": ("green apple",),
    "blue apple": ("blue apple",),
    "banana": ("banana",),
    "a penguin": ("penguin",),
    "frog": ("frog", "frog face"),
    "a lemon": ("lemon",),
    "pizza, twemoji style": ("pizza",),
    "hot air balloon": ("balloon", "hot air balloon"),
    "grinning face": ("grinning face",),
    "crescent moon": ("crescent moon",),
    "a purple umbrella": ("purple umbrella", "umbrella", "umbrella with rain drops", "closed umbrella"),
    "sunflower": ("sunflower",),
    "green circle": ("green circle",),
}
SEEDS = (7, 11)
STEPS = 20
GUIDANCE = 4.0
NEAREST = 5


def draw(
    pipeline: "StableDiffusionPipeline", seeds: tuple[int, ...] = SEEDS, steps: int = STEPS, batch: int = 20
) -> torch.Tensor:
    """Draw every prompt with every seed: uint8 [len(seeds), len(PROMPTS), 3, H, W] on the CPU."""
    pipeline.set_progress_bar_config(disable=True)
    prompts = list(PROMPTS)
    rows = []
    for seed in seeds:
        row = []
        for start in range(0, len(prompts), batch):
            asked = prompts[start : start + batch]
            generators = [torch.Generator("cpu").manual_seed(seed) for _ in asked]
            images = pipeline(
                asked,
                num_inference_steps=steps,
                guidance_scale=GUIDANCE,
                generator=generators,
                output_type="np",
            ).images  # pyright: ignore[reportAttributeAccessIssue]
            row.append(torch.from_numpy(np.asarray(images)).permute(0, 3, 1, 2))
        rows.append(torch.cat(row))
    return (torch.stack(rows) * 255).round().to(torch.uint8)


def recognised(drawn: torch.Tensor, pictures: torch.Tensor, titles: list[str]) -> list[list[bool]]:
    """For each seed and prompt, whether a picture of what was asked for is among the nearest.

    `drawn` is uint8 [seeds, prompts, 3, H, W] in the order of PROMPTS; `pictures` is uint8 [P, 3, H, W] with a
    title each.
    """
    near = small(pictures)
    answers = []
    for row in drawn:
        distance = torch.cdist(small(row.to(pictures.device)), near)
        nearest = distance.topk(min(NEAREST, len(titles)), dim=1, largest=False).indices.tolist()
        wanted = PROMPTS.values()
        answers.append([any(titles[n] in names for n in five) for five, names in zip(nearest, wanted, strict=True)])
    return answers


def small(pictures: torch.Tensor) -> torch.Tensor:
    """Pictures, uint8 [P, 3, H, W], as float rows of 32x32 RGB in 0..1."""
    parts = [F.interpolate(part.float() / 255, (32, 32), mode="area").flatten(1) for part in pictures.split(1024)]
    return torch.cat(parts)


def sheet(drawn: torch.Tensor, answers: list[list[bool]]) -> "Image":
    """A picture of all pictures: five prompts a row, every seed, the prompt below; a dot marks the recognised."""
    from PIL import Image, ImageDraw

    seeds, count, _, height, width = drawn.shape
    across, line = 5, 16
    rows = -(-count // across)
    page = Image.new("RGB", (across * (width * seeds + 8), rows * (height + line)), "white")
    pen = ImageDraw.Draw(page)
    for place, prompt in enumerate(PROMPTS):
        x, y = place % across * (width * seeds + 8), place // across * (height + line)
        for seed in range(seeds):
            page.paste(Image.fromarray(drawn[seed, place].permute(1, 2, 0).numpy()), (x + seed * width, y))
        marks = "".join("+" if answers[seed][place] else "-" for seed in range(seeds))
        pen.text((x + 4, y + height + 2), f"{marks} {prompt}", fill="black")
    return page


def measure(
    pipeline: "StableDiffusionPipeline", data: dataset.Dataset, picture: Path, *, steps: int = STEPS, batch: int = 20
) -> dict[str, object]:
    """Draw, count, write the sheet; returns metrics."""
    drawn = draw(pipeline, steps=steps, batch=batch)
    answers = recognised(drawn, data.rgb, data.titles)
    sheet(drawn, answers).save(picture)
    hits = [any(column) for column in zip(*answers, strict=True)]
    missed = [prompt for prompt, hit in zip(PROMPTS, hits, strict=True) if not hit]
    counts = [sum(row) for row in answers]
    say(f"recognised by seed: {counts} of {len(PROMPTS)}; missed by all seeds: {', '.join(missed) or 'none'}")
    return {"prompts": len(PROMPTS), "seeds": list(SEEDS), "recognised_by_seed": counts, "missed_by_all": missed}


def main(arguments: list[str] | None = None) -> int:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=export.ASSETS / "emoji")
    parser.add_argument("--data", type=Path, default=fetch.CACHE / "data")
    parser.add_argument("--picture", type=Path, default=Path("out") / "emoji-sheet.png")
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args(arguments)
    pipeline = StableDiffusionPipeline.from_pretrained(options.model)
    data = dataset.load(options.data / render.PACK, pipeline.tokenizer, torch.device("cpu"))
    options.picture.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    print(json.dumps(measure(pipeline, data, options.picture, steps=options.steps, batch=4), indent=2))
    print(f"{options.picture}: {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
