"""`diffopt report merge` and `compare`: like beside like, and what differs is named."""

import argparse
import csv
import dataclasses
import io
import json

import pytest
from sample_records import (
    a_certificate,
    a_selfcheck_record,
    a_step_record,
    an_attention_record,
    an_environment,
    some_pictures,
)

from diffopt.bench.record import append_record
from diffopt.bench.report.compare import compare
from diffopt.bench.report.merge import MergeError, merged_rows
from diffopt.bench.report.rows import cells
from diffopt.commands import report as command
from diffopt.errors import DiffoptError
from diffopt.measure.memory import PeakMemory

H100, H200, CPU = (an_environment(gpu=name) for name in ("NVIDIA H100", "NVIDIA H200", None))


@pytest.fixture
def _scipy():
    pytest.importorskip("scipy", reason='needs scipy: pip install "diffopt[report]"')


def _run(*arguments):
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers(required=True))
    parsed = parser.parse_args(["report", *map(str, arguments)])
    return parsed.run(parsed)


def _write(path, *records):
    for record in records:
        append_record(path, record)
    return path


def test_every_machine_has_a_row_of_its_own():
    pictures = some_pictures([2.0, 2.0, 2.0]), some_pictures([1.0, 1.0, 1.0], energy_per_image_j=90.0)
    files = {
        "a": [a_step_record(environment=H200, pictures=pictures), a_selfcheck_record()],
        "b": [a_step_record(environment=H100), an_attention_record()],
        "c": [a_step_record(environment=CPU, work={"dtype": "float32"})],
    }
    rows = merged_rows(files)
    assert [(row.machine, row.dtype) for row in rows] == [
        ("NVIDIA H100", "float16"),
        ("NVIDIA H200", "float16"),
        ("Test CPU (2 threads)", "float32"),
    ]
    h100, h200, _ = rows
    assert (h200.stock_its, h200.optimized_its) == (15, 30)
    assert (h200.stock_memory, h200.optimized_memory) == (1000, 900)
    assert (h200.stock_images_per_s, h200.images_per_s) == (0.5, 1.0)
    assert h200.usd_per_hour is not None  # from configs/gpus
    assert h200.cost_per_1000 == pytest.approx(h200.usd_per_hour / 3.6)
    assert h200.stock_cost_per_1000 == pytest.approx(h200.usd_per_hour / 1.8)
    assert h200.energy_per_image_j == 90.0
    assert h100.images_per_s is h100.cost_per_1000 is None
    assert cells(h200)[6] == "0.500 → 1.00"


@pytest.mark.parametrize(
    ("work", "words"),
    [
        ({"steps": 20}, "steps: 30 and 20"),
        ({"width": 768, "height": 768}, "width: 512 and 768; height: 512 and 768"),
        ({"batch": 4}, "batch: 1 and 4"),
        ({"guidance": 5.0}, "guidance: 7.5 and 5.0"),
        ({"seed": 1}, "seed: 0 and 1"),
        ({"scheduler": "DDIMScheduler"}, "scheduler: 'PNDMScheduler' and 'DDIMScheduler'"),
        ({"dtype": "bfloat16"}, "dtype: 'float16' and 'bfloat16'"),
        ({"model": {"name": "random:sd15", "hash": "1" * 64, "seed": 0, "parameters": 10}}, "model.hash: '000"),
    ],
)
def test_unlike_workloads_are_refused_and_the_field_is_named(work, words):
    files = {"a": [a_step_record(environment=H100)], "b": [a_step_record(environment=H200, work=work)]}
    with pytest.raises(MergeError, match="sd15-512: not the same work on NVIDIA H100 and NVIDIA H200: ") as error:
        merged_rows(files)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_the_file_that_a_case_stands_in_is_no_part_of_the_work():
    quick, full = (
        [a_step_record(environment=gpu, work={"name": name})] for gpu, name in ((H100, "quick"), (H200, "full"))
    )
    assert len(merged_rows({"a": quick, "b": full})) == 2


def test_what_random_weights_were_scaled_to_may_differ_in_its_last_digits():
    model = {"name": "random:sd15", "hash": "0" * 64, "seed": 0, "parameters": 10, "score_std": (2.9, 3.2)}
    files = {"a": [a_step_record(environment=H100)], "b": [a_step_record(environment=H200, work={"model": model})]}
    assert len(merged_rows(files)) == 2


def test_files_without_a_case_in_common_or_without_steps_are_refused():
    files = {"a": [a_step_record(environment=H100)], "b": [a_step_record(environment=H200, case="sdxl-1024")]}
    with pytest.raises(MergeError, match="a: unlike workloads: its cases are sd15-512; the others have sdxl-1024"):
        merged_rows(files)
    with pytest.raises(MergeError, match="b: no records of denoising steps"):
        merged_rows({"a": files["a"], "b": [a_selfcheck_record()]})


def test_the_latest_record_of_a_machine_counts():
    late = dataclasses.replace(H100, time_utc="2026-11-24T10:00:00+00:00")
    new = a_step_record(environment=late, loops=([2.0, 2.0], [0.5, 0.5]))
    (row,) = merged_rows({"a": [new, a_step_record(environment=H100)]})
    assert row.record == new.id


def test_the_command_merges_in_every_format(tmp_path, capsys):
    pictures = some_pictures([2.0, 2.0]), some_pictures([1.0, 1.0])
    a = _write(tmp_path / "a.jsonl", a_step_record(environment=H100, pictures=pictures))
    b = _write(tmp_path / "b.jsonl", a_step_record(environment=CPU, pictures=pictures, work={"dtype": "float32"}))
    price = ["--price", "NVIDIA H100=3.60", "--price", "Test CPU (2 threads)=0.36"]
    assert _run("merge", a, b, *price, "--format", "csv") == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["machine"] for row in rows] == ["NVIDIA H100", "Test CPU (2 threads)"]
    assert [float(row["cost_per_1000"]) for row in rows] == pytest.approx([1.0, 0.1])
    assert rows[0]["energy_per_image_j"] == ""
    _run("merge", a, b, *price, "--format", "json")
    assert [row["stock_its"] for row in json.loads(capsys.readouterr().out)["rows"]] == [15, 15]
    _run("merge", a, b, *price, "--format", "markdown")
    markdown = capsys.readouterr().out
    assert "| sd15-512 | NVIDIA H100 | float16 | 15.00 → 30.00 |" in markdown
    assert "cost of 1000 images = price per hour / (images per second × 3600) × 1000" in markdown
    _run("merge", a, b, *price)
    table = capsys.readouterr().out
    assert "2.00 → 1.00" in table
    assert "NVIDIA H100: $3.6 per hour" in table


def test_cases_can_be_chosen(tmp_path, capsys):
    a = _write(tmp_path / "a.jsonl", a_step_record(environment=H100), a_step_record(environment=H100, case="other"))
    other = a_step_record(environment=H200, case="other", work={"steps": 3})
    b = _write(tmp_path / "b.jsonl", a_step_record(environment=H200), other)
    with pytest.raises(MergeError, match="other: not the same work"):
        _run("merge", a, b)
    assert _run("merge", a, b, "--case", "sd15-512", "--workload", "step") == 0
    assert "other" not in capsys.readouterr().out
    with pytest.raises(DiffoptError, match="'quick' is not possible; a file has only: sd15-512 of step"):
        _run("merge", a, b, "--workload", "quick")


def test_damaged_lines_are_skipped_only_when_asked(tmp_path, capsys):
    path = _write(tmp_path / "a.jsonl", a_step_record())
    path.write_text('{"cut\n' + path.read_text())
    for action in ("show", "merge"):
        with pytest.raises(DiffoptError, match=r"a\.jsonl: line 1 is not a record"):
            _run(action, path)
        assert _run(action, path, "--lenient") == 0
        printed = capsys.readouterr()
        assert "sd15-512" in printed.out
        assert "skipped: " in printed.err
        assert "line 1" in printed.err


@pytest.mark.usefixtures("_scipy")
@pytest.mark.parametrize(
    ("changes", "state", "words"),
    [
        ({"loops": ([2.0, 2.1, 1.9], [2.0, 2.1, 1.9])}, "regression", "slower"),
        ({"loops": ([2.0, 2.1, 1.9], [0.5, 0.52, 0.51])}, "faster", "above 1"),
        ({}, "no change", "includes 1"),
        ({"loops": ([2.0, 2.1, 1.9], [1.0, 1.1, 1.0])}, "no change", "includes 1"),
        ({"loops": ([2.0, 2.1, 1.9], [1.0, 1.0, 0.9])}, "no change", "includes 1"),
        ({"loops": ([2.0], [0.5])}, "not comparable", "fewer than two timed rounds"),
        ({"certificate": a_certificate(ours=0.5)}, "regression", "no longer exact: FAILED"),
    ],
)
def test_compare_finds_what_changed(changes, state, words, tmp_path, capsys):
    (change,) = compare([a_step_record()], [a_step_record(**changes)])
    assert change.state == state
    assert words in change.why
    old = _write(tmp_path / "old.jsonl", a_step_record())
    new = _write(tmp_path / "new.jsonl", a_step_record(**changes))
    assert _run("compare", old, new) == (1 if state == "regression" else 0)
    assert state in capsys.readouterr().out


def _with_ours(**changes):
    """A record whose optimized side has other values."""
    record = a_step_record()
    assert record.optimized is not None
    return record.model_copy(update={"optimized": record.optimized.model_copy(update=changes)})


@pytest.mark.usefixtures("_scipy")
def test_memory_that_grew_is_a_regression():
    (change,) = compare([a_step_record()], [_with_ours(memory=PeakMemory(None, None, 990, 990))])
    assert (change.state, change.why) == ("regression", "peak memory grew by 10.0%")


@pytest.mark.usefixtures("_scipy")
def test_memory_that_grew_as_allocators_round_is_none():
    (change,) = compare([a_step_record()], [_with_ours(memory=PeakMemory(None, None, 915, 915))])
    assert change.state == "no change"
    assert change.memory == pytest.approx(915 / 900)


@pytest.mark.usefixtures("_scipy")
@pytest.mark.parametrize("certificate", [None, a_certificate(ours=0.5)], ids=["exact again", "as inexact as before"])
def test_what_was_not_exact_before_is_no_regression(certificate):
    (change,) = compare([a_step_record(certificate=a_certificate(ours=0.5))], [a_step_record(certificate=certificate)])
    assert (change.state, change.speed, change.memory) == ("not comparable", None, None)


@pytest.mark.usefixtures("_scipy")
def test_loops_are_compared_and_not_what_a_call_takes_around_them():
    (change,) = compare([_with_ours(call_s=[5.0, 5.1, 4.9])], [_with_ours(call_s=[2.0, 2.1, 1.9])])
    assert change.state == "no change"


@pytest.mark.usefixtures("_scipy")
def test_every_case_of_every_machine_is_compared_that_both_have():
    both = [a_step_record(environment=gpu, case=case) for gpu in (H100, H200) for case in ("one", "two")]
    found = compare([*both, a_step_record(environment=CPU)], [*both, a_step_record(environment=H200, case="new")])
    places = {(change.machine, change.case) for change in found}
    assert places == {(gpu, case) for gpu in ("NVIDIA H100", "NVIDIA H200") for case in ("one", "two")}
    assert len(found) == 4


@pytest.mark.usefixtures("_scipy")
def test_what_one_side_alone_measured_is_named(tmp_path, capsys):
    """A case that is missing in the newer records must not look like one that did not regress."""
    old, new = (
        _write(tmp_path / f"{name}.jsonl", *(a_step_record(environment=H100, case=case) for case in cases))
        for name, cases in (("old", ("both", "lost")), ("new", ("both", "found")))
    )
    assert _run("compare", old, new) == 0
    out = capsys.readouterr().out
    assert "old only: lost on NVIDIA H100\nnew only: found on NVIDIA H100\n0 of 1 cases regressed" in out


@pytest.mark.usefixtures("_scipy")
def test_compare_says_which_software_changed():
    software = dataclasses.replace(H100.software, packages={"torch": "3", "triton": "1"}, source_hash="0123456789")
    new = a_step_record(environment=dataclasses.replace(H100, software=software))
    old = a_step_record(environment=H100)
    (change,) = compare([old], [new])
    assert change.software == "torch 2 → 3, triton None → 1, source def → 01234567"
    assert compare([old], [old])[0].software == ""


def test_compare_refuses_other_machines_and_other_work():
    with pytest.raises(MergeError, match=r"nothing in common: NVIDIA H100 \(sd15-512\) against NVIDIA H200"):
        compare([a_step_record(environment=H100)], [a_step_record(environment=H200)])
    with pytest.raises(MergeError, match="not the same work: steps: 30 and 3"):
        compare([a_step_record()], [a_step_record(work={"steps": 3})])
