"""The record of the measures, the command that writes it, and the model card that tells it."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from diffopt.bench.schema import RecordError
from training import card, measure, measure_record, pairs
from training.measure_record import BundledModelRecord, Judged, Measure


def result(name: str = "concepts", value: float = 0.9, **changed: Any) -> Measure:
    fields: dict[str, Any] = {"what": "a measure", "unit": "share", "goal": 0.8, "at_least": True, "count": 10}
    return Measure(**({"name": name, "value": value, "seconds": 1.0, **fields} | changed))


def record_of(*results: Measure) -> BundledModelRecord:
    return BundledModelRecord(
        environment=measure_record.where("cpu"),
        model="emoji",
        model_sha256="0" * 64,
        steps=20,
        guidance=3.0,
        scheduler="DPMSolverMultistepScheduler",
        data_sha256="1" * 64,
        pairs_sha256="2" * 64,
        judge=Judged(weights_sha256="3" * 64, classes=3, kept_back=1, top1=0.5, top5=0.8),
        measures=results,
        seconds=1.0,
    )


@pytest.mark.parametrize(
    ("value", "goal", "at_least", "void", "holds"),
    [
        (0.8, 0.8, True, None, True),
        (0.79, 0.8, True, None, False),
        (0.25, 0.25, False, None, True),
        (0.26, 0.25, False, None, False),
        (float("nan"), 0.8, True, None, False),
        (0.9, 0.8, True, "seen", False),
    ],
)
def test_when_a_goal_holds(value: float, goal: float, at_least: bool, void: str | None, holds: bool):
    assert result(value=value, goal=goal, at_least=at_least, void=void).holds is holds


def test_a_record_comes_back_and_an_unknown_field_is_refused_in_one_line(tmp_path: Path):
    file = tmp_path / "record.json"
    measure_record.write_record(record_of(result()), file)
    assert measure_record.read_record(file).measures == (result(),)
    table = json.loads(file.read_text())
    assert (table["schema_version"], table["kind"]) == (1, "bundled-model")
    file.write_text(json.dumps({**table, "colour": 1}))
    with pytest.raises(RecordError, match="colour") as caught:
        measure_record.read_record(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("value", "code"), [(0.9, 0), (0.5, 1)])
def test_the_exit_code_tells_whether_all_goals_hold(
    value: float, code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    results = [result(name, value if name == "pairs" else 0.9) for name in measure.NAMES]
    monkeypatch.setattr(measure, "run", lambda options: record_of(*results))
    file = tmp_path / "record.json"
    assert measure.main(["--record", str(file)]) == code
    assert file.exists()
    assert f"| {'yes' if code == 0 else 'no'} |" in capsys.readouterr().out


def test_a_part_of_the_measures_leaves_the_record_as_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(measure, "run", lambda options: record_of(result("pairs")))
    monkeypatch.setattr(measure, "DEFAULT_RECORD", tmp_path / "record.json")
    assert measure.main(["--only", "pairs"]) == 0
    assert not (tmp_path / "record.json").exists()


def test_a_limit_below_one_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]):
    assert measure.main(["--limit", "0"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_model_has_not_seen_the_pairs_only_when_its_record_names_them(tmp_path: Path):
    assert measure.why_untrained_is_unknown(tmp_path)
    file = tmp_path / measure.TRAINING_RECORD
    file.write_text(json.dumps({"pairs_sha256": hashlib.sha256(b"other").hexdigest()}))
    assert measure.why_untrained_is_unknown(tmp_path)
    file.write_text(json.dumps({"pairs_sha256": pairs.pairs_hash()}))
    assert measure.why_untrained_is_unknown(tmp_path) is None


# the card


def test_the_card_takes_figures_only_of_the_weights_it_describes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from diffopt.models import digest

    file = tmp_path / "record.json"
    measure_record.write_record(record_of(result(value=0.876)), file)
    monkeypatch.setattr(digest, "model_hash", lambda model: "0" * 64)
    text = card.model_card({"denoiser_steps": 5}, card.measured_of(tmp_path, file))
    assert "87.6%" in text
    assert '"denoiser_steps": 5' in text
    monkeypatch.setattr(digest, "model_hash", lambda model: "f" * 64)
    assert card.measured_of(tmp_path, file) == card.NOT_MEASURED
