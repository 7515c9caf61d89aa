"""`diffopt report`: the keys of its JSON, which record counts, and no speed beside a failed check."""

import argparse
import json

import pytest
from rich.console import Console
from sample_records import (
    a_certificate,
    a_selfcheck,
    a_selfcheck_record,
    a_step_record,
    an_environment,
    some_pictures,
)

from diffopt.bench.record import RecordError, append_record, read_records
from diffopt.bench.report.data import backend_calls, report_data
from diffopt.bench.report.rows import rows_of
from diffopt.bench.report.tables import report_tables
from diffopt.commands import report as command
from diffopt.errors import InputError


def _parse(*arguments):
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers(required=True))
    return parser.parse_args(["report", *map(str, arguments)])


def _printed(records):
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for part in report_tables(report_data(records), rows_of(records)):
        console.print(part)
    return console.export_text()


def test_json_has_the_promised_keys(tmp_path, capsys):
    append_record(tmp_path / "a.jsonl", a_step_record())
    append_record(tmp_path / "b.jsonl", a_selfcheck_record())
    arguments = _parse("show", "--format", "json", tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    assert arguments.run(arguments) == 0
    gpu = json.loads(capsys.readouterr().out)["gpus"]["NVIDIA Test"]
    step = gpu["step"]["sd15-512"]
    assert step["loop_its"] == 30
    assert step["loop_its_eager"] == 15
    assert step["ratio_vs_eager"] == 2
    assert step["ratio_interval"][0] <= 2 <= step["ratio_interval"][1]
    assert step["peak_memory_ratio"] == 0.9
    assert step["exact"] is True
    assert step["backends"] == {"diffopt": 7, "kept": 1}
    assert gpu["attention"]["launches"] == 2
    assert gpu["attention"]["exact"] is False
    assert gpu["attention"]["wrong"] == ["d40 32+16 64x64"]


def test_json_holds_claims_cost_and_energy(tmp_path, capsys):
    pictures = some_pictures([2.0, 2.0]), some_pictures([1.0, 1.0], energy_per_image_j=250.0)
    append_record(tmp_path / "a.jsonl", a_step_record(pictures=pictures))
    append_record(tmp_path / "a.jsonl", a_step_record(case="failed", certificate=a_certificate(ours=0.5)))
    for price, cost in ((["--price", "3.6"], pytest.approx(1.0)), ([], None)):
        arguments = _parse("show", "--format", "json", *price, tmp_path / "a.jsonl")
        assert arguments.run(arguments) == 0
        gpu = json.loads(capsys.readouterr().out)["gpus"]["NVIDIA Test"]
        assert gpu["cost_per_1000"] == {"sd15-512": cost, "failed": None}
    assert gpu["energy_per_image_j"] == {"sd15-512": 250.0, "failed": None}
    assert gpu["images_per_second"] == {"sd15-512": 1.0, "failed": None}
    assert gpu["step"]["sd15-512"]["stages"]["stock"]["unet"] == pytest.approx(1.4)
    assert set(gpu["claims"]["sd15-512"]) == {"loop", "unet", "pictures"}
    failed = gpu["claims"]["failed"]["loop"]
    assert failed["claimed"] is failed["exact"] is False
    assert failed["interval"] is None
    assert failed["why"].startswith("the exactness check did not pass")


def test_a_failed_check_has_no_speed():
    records = [a_step_record(certificate=a_certificate(ours=0.5))]
    data = report_data(records)
    step = data["gpus"]["NVIDIA Test"]["step"]["sd15-512"]
    assert step["exact"] is False
    for key in ("loop_its", "loop_its_eager", "ratio_vs_eager", "ratio_interval", "unet_its", "peak_memory_ratio"):
        assert step[key] is None, key
    text = _printed(records)
    assert "FAILED" in text
    assert "→" not in text
    assert "no claim on NVIDIA Test for sd15-512: the exactness check did not pass: FAILED" in text


def test_the_latest_record_of_a_case_counts():
    times = ["2026-11-23T10:00:00+00:00", "2026-11-24T10:00:00+00:00", "2026-11-22T10:00:00+00:00"]
    old, new, oldest = (a_step_record(environment=an_environment(time_utc=time)) for time in times)
    other = a_step_record(case="sdxl-1024", environment=an_environment(time_utc=times[2]))
    step = report_data([old, new, oldest, other])["gpus"]["NVIDIA Test"]["step"]
    assert step["sd15-512"]["record"] == new.id
    assert step["sdxl-1024"]["record"] == other.id


def test_machines_are_kept_apart_and_a_cpu_has_its_own_name():
    data = report_data([a_step_record(), a_step_record(environment=an_environment(gpu=None))])
    assert set(data["gpus"]) == {"NVIDIA Test", "Test CPU (2 threads)"}


def test_the_table_shows_speeds_ratio_and_verdict():
    text = _printed([a_step_record(), a_selfcheck_record()])
    recorded = "ratio of medians 2.000, bootstrap"
    for words in ("NVIDIA Test", "sd15-512", "15.00 → 30.00", recorded, "0.00 → 0.00 GiB", "passed", "1 of 2 launches"):
        assert words in text, words


def test_backends_are_counted_over_layers():
    runs = [{"backend": "diffopt", "calls": 2}, {"backend": "sdpa", "calls": 3}]
    plan = {"layers": [{"optimized": True, "runs": runs}, {"optimized": True, "runs": runs[:1]}]}
    assert backend_calls(plan) == {"diffopt": 4, "sdpa": 3}


def test_show_reads_the_checkouts_records_by_default(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("diffopt.config.config_folder", lambda: tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    arguments = _parse("show")
    with pytest.raises(InputError, match="no records in reports/"):
        arguments.run(arguments)
    append_record(tmp_path / "reports" / "machine.jsonl", a_step_record())
    arguments.run(arguments)
    assert "sd15-512" in capsys.readouterr().out


def test_a_selfcheck_is_added_for_the_machine_it_ran_on(tmp_path, capsys):
    (tmp_path / "check.json").write_text(json.dumps(a_selfcheck(device="cpu")))
    output = tmp_path / "records.jsonl"
    arguments = _parse("add-selfcheck", tmp_path / "check.json", "--device", "cpu", "--output", output)
    assert arguments.run(arguments) == 0
    assert "1 of 2 launches right" in capsys.readouterr().out
    (record,) = read_records(output)
    assert record.kind == "attention-selfcheck"
    assert record.environment.machine.gpu is None


def test_a_selfcheck_that_is_nested_without_end_is_refused(tmp_path):
    (tmp_path / "deep.json").write_text("[" * 100_000)
    arguments = _parse("add-selfcheck", tmp_path / "deep.json", "--device", "cpu", "--output", tmp_path / "out.jsonl")
    with pytest.raises(RecordError, match="nested too deeply"):
        arguments.run(arguments)
    assert not (tmp_path / "out.jsonl").exists()
