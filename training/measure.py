"""Is the bundled model good? All five measures with their goals, on a CPU in at most half an hour on two cores.

`python -m training.measure` fetches and renders the data if need be, draws with fixed seeds, prints each measure
beside its goal and writes the record to reports/bundled-model.json (training/measure_record.py is its schema).
`--only concepts pairs` runs some of them; each is added to the record of the same model and settings as soon as it is
done, so that an interrupted run loses nothing. A record of another model is replaced only by a complete one, or with
--record; with --limit nothing is written without it. The exit code is 0 when all five goals hold (with --only: those
asked for), 1 when one does not, 2 for input that is wrong.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import torch

from diffopt.errors import DiffoptError, InputError
from training import dataset, examples, fetch, judge, measures, pairs, render
from training.draw import load_pipeline
from training.export import ASSETS, TRAINING_RECORD
from training.measure_record import (
    DEFAULT_RECORD,
    BundledModelRecord,
    Judged,
    Measure,
    read_record,
    table,
    told,
    where,
    write_record,
)
from training.pace import say

NAMES: tuple[str, ...] = get_args(Measure.model_fields["name"].annotation)


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ASSETS / "emoji", help="the folder of the model")
    parser.add_argument("--data", type=Path, default=fetch.CACHE / "data")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES), help="these measures")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--guidance", type=float, help="guidance scale (default: the model's, configs/models/emoji.toml)"
    )
    parser.add_argument("--steps", type=int, help="steps of the default scheduler (default: the model's)")
    parser.add_argument("--batch", type=int, default=8, help="pictures drawn at once")
    parser.add_argument("--limit", type=int, help="at most so many pictures a measure, to try things out")
    parser.add_argument("--record", type=Path, help="write the record to this file, whatever was measured")
    return parser.parse_args(arguments)


def why_untrained_is_unknown(model: Path) -> str | None:
    """Why the held-out pairs may not be unseen by a model: its training record does not name these lists. Or None."""
    file = model / TRAINING_RECORD
    if not file.exists():
        return "the model names no training record"
    if json.loads(file.read_text(encoding="utf-8")).get("pairs_sha256") != pairs.pairs_hash():
        return "the model was not trained without these pairs"
    return None


def load_subject(options: argparse.Namespace) -> measures.Subject:
    """The model, the plan of the training set and the artwork, as the command line asks."""
    from diffopt.models.catalogue import model_config_for

    defaults = model_config_for("emoji").defaults
    artwork, images = dataset.read_pack(options.data / render.PACK)
    held = pairs.read_pairs()
    plan = examples.plan(artwork, held)
    rgb = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    say(f"{len(artwork)} pieces of artwork, {len(plan)} training pictures")
    return measures.Subject(
        pipeline=load_pipeline(options.model, torch.device(options.device)),
        steps=options.steps or defaults.steps,
        guidance=defaults.guidance if options.guidance is None else options.guidance,
        examples=plan,
        gallery=lambda: dataset.make_pictures(plan, rgb),
        artwork=rgb,
        pairs=held,
        batch=options.batch,
        limit=options.limit,
        untrained=why_untrained_is_unknown(options.model),
    )


def run(options: argparse.Namespace, keep: Callable[[BundledModelRecord], None]) -> BundledModelRecord:
    """Measure what was asked for and return the record; `keep` is called with the record so far after each measure."""
    from diffopt.models.digest import model_hash

    render.ensure(options.data)
    subject = load_subject(options)
    model, about = judge.load()
    record = BundledModelRecord(
        environment=where(options.device),
        model=options.model.name,
        model_sha256=model_hash(options.model),
        steps=subject.steps,
        guidance=subject.guidance,
        scheduler=type(subject.pipeline.scheduler).__name__,
        data_sha256=dataset.pack_hash(options.data / render.PACK),
        pairs_sha256=pairs.pairs_hash(),
        judge=Judged(
            weights_sha256=about.weights_sha256,
            classes=len(about.classes),
            kept_back=about.kept_back,
            top1=about.top1,
            top5=about.top5,
        ),
        measures=(),
    )
    steps: dict[str, Callable[[], Measure]] = {
        "autoencoder": lambda: measures.measure_autoencoder(subject),
        "colours": lambda: measures.measure_colours(subject),
        "pairs": lambda: measures.measure_pairs(subject, model, about),
        "steps": lambda: measures.measure_steps(subject),
        "concepts": lambda: measures.measure_concepts(subject),
    }
    for name, measure in steps.items():
        if name in options.only:
            record = record.with_measures((measure(),))
            say(_line(record.measures[-1]))
            keep(record)
    return record


def keep_record(record: BundledModelRecord, file: Path, replace: bool) -> bool:
    """Add the measures to the record in a file, or start one there; says whether it did.

    A record of another model or of other settings is replaced by one with all measures, or where `replace` is set.
    """
    if file.exists():
        earlier = read_record(file)
        if earlier.same_subject(record):
            record = record.model_copy(update={"measures": earlier.with_measures(record.measures).measures})
        elif not replace and {measure.name for measure in record.measures} != set(NAMES):
            return False
    write_record(record, file)
    return True


def _line(measure: Measure) -> str:
    goal = f"{'at least' if measure.at_least else 'at most'} {told(measure.goal, measure.unit)}"
    verdict = f"void: {measure.void}" if measure.void else ("holds" if measure.holds else "MISSED")
    return f"{measure.name}: {told(measure.value, measure.unit)}, goal {goal}: {verdict}; {measure.seconds:.0f} s"


def main(arguments: list[str] | None = None) -> int:
    options = options_of(arguments)
    file: Path | None = options.record or (DEFAULT_RECORD if options.limit is None else None)
    kept = False

    def keep(record: BundledModelRecord) -> None:
        nonlocal kept
        kept = file is not None and keep_record(record, file, replace=options.record is not None)

    try:
        if options.limit is not None and options.limit < 1:
            raise InputError("--limit", options.limit, "at least 1")
        record = run(options, keep)
    except DiffoptError as error:
        print(error, file=sys.stderr)
        return 2
    print(table(record.measures))
    print(file if kept else "no record written")
    return 0 if all(measure.holds for measure in record.measures) else 1


if __name__ == "__main__":
    sys.exit(main())
