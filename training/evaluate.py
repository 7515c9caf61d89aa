"""Step 7: does the model draw what it is asked for? A sheet of pictures for the eyes, and a number, in a minute.

The number: of simple prompts, how many have a training picture of the concept they ask for among the five training
pictures nearest to what was drawn. `python -m training.evaluate` draws the sheet of the bundled model on a CPU;
`python -m training.measure` is the real measure.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from training import dataset, export, fetch, render, score
from training.draw import draw, load_pipeline
from training.duplicates import small
from training.pace import say

if TYPE_CHECKING:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
    from PIL.Image import Image

# What is asked for, and the concept that training pictures of it show.
PROMPTS: dict[str, str] = {
    "blue heart": "heart",
    "red heart": "heart",
    "yellow star": "star",
    "cat face": "cat face",
    "dog face": "dog face",
    "a red apple": "apple",
    "a red apple, noto style": "apple",
    "green apple": "apple",
    "blue apple": "apple",
    "banana": "banana",
    "a penguin": "penguin",
    "frog": "frog",
    "a lemon": "lemon",
    "pizza, twemoji style": "pizza",
    "two red hearts": "heart",
    "grinning face": "grinning face",
    "crescent moon": "crescent moon",
    "a purple umbrella": "umbrella",
    "sunflower": "sunflower",
    "a green circle and a yellow star": "star",
}
SEEDS = (7, 11)
STEPS = 20
GUIDANCE = 4.0


def recognised(drawn: torch.Tensor, data: dataset.Dataset) -> list[bool]:
    """For each picture, uint8 [prompts, 3, H, W] in the order of PROMPTS, whether its concept is among the nearest."""
    asked = [frozenset({concept}) for concept in PROMPTS.values()]
    return score.concept_is_near(drawn.to(data.rgb.device), asked, small(data.rgb), [e.concepts for e in data.examples])


def sheet(drawn: torch.Tensor, answers: list[list[bool]]) -> "Image":
    """A picture of all pictures: five prompts a row, every seed, below + or - for recognised or not, and the prompt."""
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
    pipeline.set_progress_bar_config(disable=True)
    rows = [
        draw(pipeline, list(PROMPTS), [seed] * len(PROMPTS), steps=steps, guidance=GUIDANCE, batch=batch)
        for seed in SEEDS
    ]
    answers = [recognised(row, data) for row in rows]
    sheet(torch.stack(rows), answers).save(picture)
    hits = [any(column) for column in zip(*answers, strict=True)]
    missed = [prompt for prompt, hit in zip(PROMPTS, hits, strict=True) if not hit]
    counts = [sum(row) for row in answers]
    say(f"recognised by seed: {counts} of {len(PROMPTS)}; missed by all seeds: {', '.join(missed) or 'none'}")
    return {"prompts": len(PROMPTS), "seeds": list(SEEDS), "recognised_by_seed": counts, "missed_by_all": missed}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=export.ASSETS / "emoji")
    parser.add_argument("--data", type=Path, default=fetch.CACHE / "data")
    parser.add_argument("--picture", type=Path, default=Path("out") / "emoji-sheet.png")
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args(arguments)
    pipeline = load_pipeline(options.model, torch.device("cpu"))
    data = dataset.load(options.data / render.PACK, pipeline.tokenizer, torch.device("cpu"))
    options.picture.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    print(json.dumps(measure(pipeline, data, options.picture, steps=options.steps, batch=4), indent=2))
    print(f"{options.picture}: {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
