"""The record of the measures, the command that writes it, and the model card that tells it."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from diffopt.bench.schema import RecordError
from training import card, measure, measure_record, measures, pairs
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


def test_the_committed_record_has_every_measure_with_its_goal_and_all_pictures():
    if not measure_record.DEFAULT_RECORD.exists():
        pytest.skip("the bundled model has no record here: python -m training.measure")
    record = measure_record.read_record(measure_record.DEFAULT_RECORD)
    assert {entry.name: entry.goal for entry in record.measures} == measures.GOALS
    counts = {entry.name: entry.count for entry in record.measures}
    assert (counts["concepts"], counts["colours"], counts["pairs"]) == (200, 40, 40)
    for entry in record.measures:
        if entry.answers:
            assert len(entry.answers) == entry.count
            assert sum(answer.right for answer in entry.answers) / entry.count == pytest.approx(entry.value, abs=1e-3)


def measuring(monkeypatch: pytest.MonkeyPatch, *results: Measure, **changed: Any) -> None:
    """The command's measures give these results, one after the other."""

    def run(options: Any, keep: Any) -> BundledModelRecord:
        record = record_of().model_copy(update=changed)
        for entry in results:
            record = record.with_measures((entry,))
            keep(record)
        return record

    monkeypatch.setattr(measure, "run", run)


@pytest.mark.parametrize(("value", "code"), [(0.9, 0), (0.5, 1)])
def test_the_exit_code_tells_whether_all_goals_hold(
    value: float, code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    measuring(monkeypatch, *(result(name, value if name == "pairs" else 0.9) for name in measure.NAMES))
    file = tmp_path / "record.json"
    assert measure.main(["--record", str(file)]) == code
    assert file.exists()
    assert f"| {'yes' if code == 0 else 'no'} |" in capsys.readouterr().out


@pytest.fixture
def default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The default record, of two measures."""
    file = tmp_path / "record.json"
    monkeypatch.setattr(measure, "DEFAULT_RECORD", file)
    measure_record.write_record(record_of(result("pairs"), result("steps")), file)
    return file


def values(file: Path) -> dict[str, float]:
    return {entry.name: entry.value for entry in measure_record.read_record(file).measures}


def test_a_measure_is_added_to_the_record_of_the_same_model(monkeypatch: pytest.MonkeyPatch, default: Path):
    measuring(monkeypatch, result("pairs", 0.95), result("colours", 0.85))
    assert measure.main(["--only", "pairs", "colours"]) == 0
    assert values(default) == {"pairs": 0.95, "colours": 0.85, "steps": 0.9}


def test_an_interrupted_run_has_kept_what_was_measured(monkeypatch: pytest.MonkeyPatch, default: Path):
    def run(options: Any, keep: Any) -> BundledModelRecord:
        keep(record_of(result("colours", 0.85)))
        raise KeyboardInterrupt

    monkeypatch.setattr(measure, "run", run)
    with pytest.raises(KeyboardInterrupt):
        measure.main([])
    assert values(default)["colours"] == 0.85


def test_a_record_of_another_model_is_replaced_only_by_a_complete_one(monkeypatch: pytest.MonkeyPatch, default: Path):
    measuring(monkeypatch, result("pairs", 0.95), model_sha256="f" * 64)
    measure.main([])
    assert values(default) == {"pairs": 0.9, "steps": 0.9}
    measuring(monkeypatch, *(result(name, 0.95) for name in measure.NAMES), model_sha256="f" * 64)
    measure.main([])
    assert values(default) == dict.fromkeys(measure.NAMES, 0.95)


def test_a_try_over_few_pictures_writes_nothing(monkeypatch: pytest.MonkeyPatch, default: Path):
    measuring(monkeypatch, result("colours", 0.85))
    measure.main(["--limit", "3"])
    assert values(default) == {"pairs": 0.9, "steps": 0.9}


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
