"""The pictures for README: a grid of 6x8 prompts, one seed each in order, nothing picked; and one prompt, six seeds.

`python -m training.sheet` draws both with the bundled model on a CPU (some minutes) into reports/. The n-th prompt
has the n-th seed: a picture that came out badly stays.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from training.draw import draw, load_pipeline
from training.export import ASSETS

COLUMNS, ROWS = 8, 6
FIRST_SEED = 100
GRID = (
    "a red apple", "a cat face", "a yellow star", "a penguin", "a blue heart", "pizza", "a sunflower", "a rocket",
    "a dog face", "an owl", "a green apple", "a house", "a purple heart", "a lemon", "a fox", "a bicycle",
    "grinning face", "a turtle", "a strawberry", "a mountain", "a blue car", "a cake", "a dolphin", "a crescent moon",
    "a tulip", "a banana, fluent style", "a bear", "an umbrella", "two red hearts", "a carrot", "a whale", "a guitar",
    "a frog", "a cactus", "a green circle", "a lion", "an orange heart", "a mushroom", "a butterfly", "an airplane",
    "a panda", "a cherry blossom", "a pink flower", "a crab", "a pineapple", "a snowman", "a small yellow star",
    "a red heart and a blue star",
)  # fmt: skip
SEEDS_PROMPT = "a red apple, noto style"
SEEDS = 6
_LINE = 16  # pixels of a caption


def compose_sheet(pictures: torch.Tensor, texts: Sequence[str], columns: int) -> Image.Image:
    """Pictures, uint8 [P, 3, H, W], in rows of `columns`, each with its text below; empty texts take no room."""
    count, _, height, width = pictures.shape
    line = _LINE if any(texts) else 0
    page = Image.new("RGB", (columns * width, -(-count // columns) * (height + line)), "white")
    pen = ImageDraw.Draw(page)
    for place, (picture, text) in enumerate(zip(pictures, texts, strict=True)):
        x, y = place % columns * width, place // columns * (height + line)
        page.paste(Image.fromarray(picture.permute(1, 2, 0).numpy()), (x, y))
        pen.text((x + width / 2, y + height), text, fill="#444444", anchor="ma", font_size=10)
    return page


def main(arguments: list[str] | None = None) -> int:
    from diffopt.models.catalogue import model_config_for

    defaults = model_config_for("emoji").defaults
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ASSETS / "emoji")
    parser.add_argument("--to", type=Path, default=Path("reports"), help="the folder for both pictures")
    parser.add_argument("--only", choices=("grid", "seeds"), help="one of the two pictures")
    parser.add_argument("--prompt", default=SEEDS_PROMPT, help="what the six seeds show")
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--guidance", type=float, default=defaults.guidance)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    pipeline = load_pipeline(options.model, torch.device(options.device))
    options.to.mkdir(parents=True, exist_ok=True)
    wanted = {
        "grid": (list(GRID), COLUMNS, list(GRID)),
        "seeds": ([options.prompt] * SEEDS, SEEDS, [f"seed {FIRST_SEED + n}" for n in range(SEEDS)]),
    }
    for name, (prompts, columns, texts) in wanted.items():
        if options.only not in (None, name):
            continue
        seeds = [FIRST_SEED + n for n in range(len(prompts))]
        drawn = draw(pipeline, prompts, seeds, steps=options.steps, guidance=options.guidance, title=name)
        file = options.to / f"bundled-model-{name}.png"
        compose_sheet(drawn, texts, columns).quantize(256, dither=Image.Dither.NONE).save(file, optimize=True)
        print(f"{file}: {len(prompts)} pictures, seeds {seeds[0]} to {seeds[-1]}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
