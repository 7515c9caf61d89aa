"""The model card: its template filled in with how the model was trained and what was measured of it.

`python -m training.card` writes it anew after a measurement: figures of another model's record are not taken.
"""

import argparse
import json
import string
import sys
from pathlib import Path

from diffopt.errors import DiffoptError
from training import fetch
from training.measure_record import DEFAULT_RECORD, read_record, table

TEMPLATE = Path(__file__).parent / "model_card.md"
NOT_MEASURED = "Not measured yet: `python -m training.measure`."


def model_card(training: dict[str, object], measured: str = NOT_MEASURED) -> str:
    """The text of the card, from the record of the training and the measures as a table."""
    lines = []
    for source in fetch.read_sources():
        lines.append(
            f"| `{source.package}` {source.version} | {source.author} | {source.license} | `{source.integrity}` |"
        )
    template = string.Template(TEMPLATE.read_text(encoding="utf-8"))
    return template.substitute(sources="\n".join(lines), record=json.dumps(training, indent=2), measures=measured)


def measured_of(model: Path, file: Path) -> str:
    """The measures of a model as a table, or that there are none: a record of other weights is not its record."""
    from diffopt.models.digest import model_hash

    if not file.exists():
        return NOT_MEASURED
    record = read_record(file)
    if record.model_sha256 != model_hash(model):
        return NOT_MEASURED
    judge = record.judge
    return (
        f"`python -m training.measure` on {record.environment.time_utc[:10]}, {record.steps} steps of "
        f"{record.scheduler}, guidance {record.guidance:g}, weights {record.model_sha256[:10]} "
        f"(reports/{file.name}):\n\n{table(record.measures)}\n\n"
        f"The judge's own accuracy, on {judge.kept_back} pictures that were kept from it: top 1 {judge.top1:.1%}, "
        f"top 5 {judge.top5:.1%} of {judge.classes} classes."
    )


def main(arguments: list[str] | None = None) -> int:
    from training.export import ASSETS, TRAINING_RECORD

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=ASSETS / "emoji")
    parser.add_argument("--record", type=Path, default=DEFAULT_RECORD)
    options = parser.parse_args(arguments)
    try:
        measured = measured_of(options.model, options.record)
    except DiffoptError as error:
        print(error, file=sys.stderr)
        return 2
    training = json.loads((options.model / TRAINING_RECORD).read_text(encoding="utf-8"))
    (options.model / "README.md").write_text(model_card(training, measured), encoding="utf-8")
    print(f"{options.model / 'README.md'}: {'not measured' if measured == NOT_MEASURED else 'with its measures'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
