"""`diffopt report`: the keys of its JSON, which record counts, and no speed beside a failed check."""

import argparse
import dataclasses
import json
import re

import pytest
from rich.console import Console
from sample_records import (
    a_certificate,
    a_contender,
    a_selfcheck,
    a_selfcheck_record,
    a_step_record,
    an_environment,
    some_pictures,
)

from diffopt.bench.record import append_record, read_records
from diffopt.bench.report.cost import known_price
from diffopt.bench.report.data import backend_calls, report_data
from diffopt.bench.report.rows import HEADINGS, cells, rows_of
from diffopt.bench.report.tables import report_tables
from diffopt.bench.schema import RecordError
from diffopt.bench.step.record import Comparison
from diffopt.commands import report as command
from diffopt.errors import InputError
from diffopt.gpus import Price
from diffopt.measure.timing import paired_ratio


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


def test_a_given_price_goes_before_the_records_and_that_before_a_known_one():
    pictures, name = (some_pictures([2.0, 2.0]), some_pictures([1.0, 1.0])), "NVIDIA H100 80GB HBM3"
    plain = a_step_record(pictures=pictures, environment=an_environment(gpu=name))
    own, given, known = Price(7.2, "2026-11-23", "a test"), Price(3.6, "2026-11-24", "given"), known_price(name)
    assert known is not None
    priced = plain.model_copy(update={"price": own})
    for record, prices, price in ((priced, {name: given}, given), (priced, {}, own), (plain, {}, known)):
        gpu = report_data([record], prices)["gpus"][name]
        assert gpu["price"]["sd15-512"] == dataclasses.asdict(price)
        assert gpu["cost_per_1000"]["sd15-512"] == pytest.approx(price.usd_per_hour / 3.6)
        (row,) = rows_of([record], prices)
        assert (row.usd_per_hour, row.price_source) == (price.usd_per_hour, price.source)
        assert row.stock_cost_per_1000 == pytest.approx(2 * gpu["cost_per_1000"]["sd15-512"])


def test_every_number_of_a_case_is_its_own():
    """Stock's is not ours, the loop's not the UNet's, and the pictures' neither."""
    two, one = [2.0, 2.0, 2.0], [1.0, 1.0, 1.0]
    pictures = some_pictures([5.0, 5.0]), some_pictures([4.0, 4.0], text_encoder_s=None, energy_per_image_j=70.0)
    stock, ours = (
        a_contender(loop_s, size, made) for loop_s, size, made in zip((two, one), (8, 6), pictures, strict=True)
    )
    unet = paired_ratio([0.06, 0.06, 0.06], [0.02, 0.02, 0.02])
    record = a_step_record(
        stock=stock.model_copy(update={"unet_its": 16.0}),
        optimized=ours.model_copy(update={"unet_its": 48.0}),
        comparison=Comparison(loop=paired_ratio(two, one), unet=unet, peak_memory=0.75),
    )
    entry = report_data([record])["gpus"]["NVIDIA Test"]["step"]["sd15-512"]
    assert (entry["loop_its_eager"], entry["loop_its"], entry["ratio_vs_eager"]) == (15, 30, 2)
    assert (entry["unet_its_eager"], entry["unet_its"], entry["unet_ratio_vs_eager"]) == (16, 48, 3)
    assert (entry["peak_memory"], entry["peak_memory_ratio"]) == (6, 0.75)
    assert (entry["images_per_s_eager"], entry["images_per_s"]) == (0.2, 0.25)
    stages = {"text_encoder": 0.5, "unet": 3.5, "vae": 0.75, "other": 0.25, "whole": 5.0}
    assert entry["stages"]["stock"] == pytest.approx(stages)
    stages = {"text_encoder": None, "unet": 2.8, "vae": 0.6, "other": 0.6, "whole": 4.0}
    assert entry["stages"]["optimized"] == pytest.approx(stages)
    (row,) = rows_of([record])
    assert (row.stock_its, row.optimized_its, row.stock_memory, row.optimized_memory) == (15, 30, 8, 6)
    assert (row.stock_images_per_s, row.images_per_s, row.energy_per_image_j) == (0.2, 0.25, 70.0)


def test_memory_is_shown_in_gib():
    contenders = {name: a_contender([1.0, 1.0], size << 30) for name, size in (("stock", 3), ("optimized", 2))}
    (row,) = rows_of([a_step_record(**contenders)])
    assert cells(row)[HEADINGS.index("memory")] == "3.00 → 2.00 GiB"


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


def test_each_machine_has_rows_and_notes_of_its_own_records():
    flags = ("clocks throttled (power cap) at 7 of 38 looks",)
    method = a_step_record().method
    assert method is not None
    records = [
        a_step_record(case="here", interrupted=True, method=method.model_copy(update={"flags": flags})),
        a_step_record(case="there", environment=an_environment(gpu="NVIDIA Other")),
    ]
    here, there = re.split("(?=NVIDIA Test)", _printed(records[1:] + records[:1]), maxsplit=1)[::-1]
    assert "3 interleaved rounds (interrupted)" in here
    assert "disturbed on NVIDIA Test, clocks throttled (power cap): here (7 of 38 looks)" in here
    assert "there" not in here
    assert "interrupted" not in there
    assert "here (" not in there


def test_the_last_selfcheck_counts_and_names_what_is_wrong_and_void():
    right, crashed = a_selfcheck()["launches"]
    void = {**crashed, "label": "d40 void", "failure": "", "void": "a scale wrong by 1% passes"}
    times = [f"2026-11-2{day}T10:00:00+00:00" for day in (3, 4)]
    launches = [[right], [right, crashed, void]]
    records = [
        a_selfcheck_record(launches=found, environment=an_environment(time_utc=time))
        for found, time in zip(launches, times, strict=True)
    ]
    entry = report_data(records)["gpus"]["NVIDIA Test"]["attention"]
    assert (entry["exact"], entry["launches"], entry["right"], entry["record"]) == (False, 3, 1, records[1].id)
    assert (entry["wrong"], entry["void"]) == (["d40 32+16 64x64", "d40 void"], ["d40 void"])
    assert "1 of 3 launches right, 1 checks; WRONG: d40 32+16 64x64, d40 void" in _printed(records)
    assert report_data(records[:1])["gpus"]["NVIDIA Test"]["attention"]["exact"] is True
    nothing = a_selfcheck_record(launches=[])
    assert report_data([nothing])["gpus"]["NVIDIA Test"]["attention"]["exact"] is False


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


@pytest.mark.parametrize("form", ["table", "json"])
def test_a_file_without_records_is_refused(tmp_path, form):
    (tmp_path / "empty.jsonl").touch()
    arguments = _parse("show", tmp_path / "empty.jsonl", "--format", form)
    with pytest.raises(InputError, match=r"empty\.jsonl' is not possible; no records in it; `diffopt bench quick`"):
        arguments.run(arguments)


def test_a_selfcheck_that_is_nested_without_end_is_refused(tmp_path):
    (tmp_path / "deep.json").write_text("[" * 100_000)
    arguments = _parse("add-selfcheck", tmp_path / "deep.json", "--device", "cpu", "--output", tmp_path / "out.jsonl")
    with pytest.raises(RecordError, match="nested too deeply"):
        arguments.run(arguments)
    assert not (tmp_path / "out.jsonl").exists()
