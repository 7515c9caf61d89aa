"""Which guidance scale is best: the concept and colour measures at several scales, on fewer pictures.

`python -m training.guidance --model FOLDER --device cuda` prints a table; the choice goes into
configs/models/emoji.toml.
"""

import argparse
import dataclasses
import functools
import sys
from pathlib import Path

from diffopt.errors import DiffoptError
from training import fetch, measure, measures, render
from training.export import ASSETS
from training.measure_record import told

SCALES = (1.5, 2.0, 3.0, 4.0, 5.0, 7.0)


def sweep(subject: measures.Subject, scales: tuple[float, ...]) -> list[tuple[float, float, float]]:
    """For each scale: the scale, the concept measure, the colour measure; both with the same seeds throughout."""
    kept = dataclasses.replace(subject, gallery=functools.cache(subject.gallery))
    rows = []
    for scale in scales:
        at_scale = dataclasses.replace(kept, guidance=scale)
        rows.append((scale, measures.measure_concepts(at_scale).value, measures.measure_colours(at_scale).value))
        concepts, colours = (told(value, "share") for value in rows[-1][1:])
        print(f"guidance {scale:g}: concepts {concepts}, colours {colours}", flush=True)
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ASSETS / "emoji")
    parser.add_argument("--data", type=Path, default=fetch.CACHE / "data")
    parser.add_argument("--scales", type=float, nargs="+", default=SCALES)
    parser.add_argument("--limit", type=int, default=40, help="pictures a measure")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    options.guidance, options.steps, options.batch = None, None, 8
    try:
        render.ensure(options.data)
        subject = measure.load_subject(options)
        best = max(sweep(subject, tuple(options.scales)), key=lambda row: row[1] + row[2])
    except DiffoptError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"best sum at guidance {best[0]:g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
