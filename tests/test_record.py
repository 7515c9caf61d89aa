"""Run records: what is written is read back, and what is damaged, newer or contradictory is refused by line."""

import json
import math
import os
from pathlib import Path

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sample_records import (
    a_certificate,
    a_contender,
    a_decode_certificate,
    a_peer,
    a_selfcheck,
    a_selfcheck_case,
    a_selfcheck_record,
    a_step_record,
    a_warm_start,
    an_environment,
    some_free_running,
    some_pictures,
)

from diffopt.bench.attention.selfcheck_record import SelfcheckRecord
from diffopt.bench.record import append_record, check_writable, read_records
from diffopt.bench.schema import RecordError
from diffopt.bench.step.record import Pictures, StepRecord
from diffopt.gpus import Price
from diffopt.measure.profile import ForwardProfile


@pytest.mark.parametrize(
    "record",
    [
        a_step_record(),
        a_step_record(certificate=a_certificate(ours=0.5)),
        a_step_record(certificate=a_certificate(ours=math.inf, nonfinite=3)),
        a_selfcheck_record(),
    ],
    ids=["timed", "not exact", "infinite", "selfcheck"],
)
def test_round_trip(tmp_path, record):
    path = tmp_path / "new folder" / "records.jsonl"
    append_record(path, record)
    append_record(path, a_step_record())
    first, second = read_records(path)
    assert first == record
    assert isinstance(second, StepRecord)
    assert len(path.read_text().splitlines()) == 2


def test_a_nan_survives_and_stays_a_failure(tmp_path):
    append_record(tmp_path / "r.jsonl", a_step_record(certificate=a_certificate(ours=math.nan)))
    (record,) = read_records(tmp_path / "r.jsonl")
    assert isinstance(record, StepRecord)
    assert math.isnan(record.exactness.steps[0].ours)
    assert not record.exactness.passed


def test_every_record_has_an_id_of_its_own():
    assert a_step_record().id != a_step_record().id


@pytest.mark.parametrize("certificate", [a_certificate(ours=0.5), a_certificate(fault=1e-3)], ids=["failed", "void"])
def test_a_speed_beside_a_failed_check_is_no_record(certificate):
    timed = a_step_record()
    speeds = {name: getattr(timed, name) for name in ("stock", "optimized", "comparison", "method")}
    with pytest.raises(pydantic.ValidationError, match="exactness check that did not pass"):
        a_step_record(certificate=certificate, **speeds)
    with pytest.raises(pydantic.ValidationError, match="exactness check that did not pass"):
        a_step_record(certificate=certificate, stock=a_contender([1.0], 1))


@pytest.mark.parametrize("missing", ["stock", "optimized", "comparison", "method"])
def test_half_of_a_comparison_is_no_record(missing):
    with pytest.raises(pydantic.ValidationError, match="a speed stands beside"):
        a_step_record(**{missing: None})


def test_a_peers_speed_alone_is_no_record():
    nothing = dict.fromkeys(("stock", "optimized", "comparison", "method"))
    assert a_step_record(**nothing).exact
    with pytest.raises(pydantic.ValidationError, match="a speed of cuda-graph stands beside"):
        a_step_record(**nothing, peers=[a_peer("cuda-graph")])


def test_a_cut_off_line_is_named(tmp_path):
    path = tmp_path / "r.jsonl"
    append_record(path, a_step_record())
    append_record(path, a_step_record())
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(RecordError, match=r"r\.jsonl: line 2 is not a record: cut off or damaged") as error:
        read_records(path)
    assert "\n" not in str(error.value)


def test_appending_after_a_cut_off_line_does_not_join_it(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"schema_version": 1, "ki')
    record = a_step_record()
    append_record(path, record)
    with pytest.raises(RecordError, match="line 1"):
        read_records(path)
    path.write_text("\n".join(path.read_text().splitlines()[1:]))
    assert read_records(path) == [record]


@pytest.mark.parametrize(
    ("version", "words"),
    [(7, "update diffopt"), (0, "reads versions 1, 2, 3, 4, 5, 6"), (None, "reads versions 1, 2, 3, 4, 5, 6")],
)
def test_other_schema_versions_are_refused(tmp_path, version, words):
    path = tmp_path / "r.jsonl"
    append_record(path, a_step_record())
    table = json.loads(path.read_text()) | {"schema_version": version, "something": "new"}
    path.write_text(json.dumps(table) + "\n")
    with pytest.raises(RecordError, match=f"line 1 has schema version {version}; .*{words}"):
        read_records(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"surprise": 1}, "surprise: Extra inputs"),
        ({"kind": "step-2"}, "step-2"),
        ({"workload": {}}, "workload"),
        ({"environment": {"machine": {}}}, "environment"),
    ],
)
def test_what_is_not_in_the_schema_is_refused(tmp_path, change, words):
    path = tmp_path / "r.jsonl"
    append_record(path, a_step_record())
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(RecordError, match=f"line 1 is not a valid record: .*{words}"):
        read_records(path)


def test_an_unknown_field_deep_inside_is_refused(tmp_path):
    path = tmp_path / "r.jsonl"
    append_record(path, a_step_record())
    table = json.loads(path.read_text())
    table["exactness"]["passed"] = True  # a verdict is made from numbers, not read
    path.write_text(json.dumps(table))
    with pytest.raises(RecordError, match=r"exactness\.passed"):
        read_records(path)


def test_unreadable_and_unwritable_files_are_one_line(tmp_path):
    with pytest.raises(RecordError, match="can't be read: No such file"):
        read_records(tmp_path / "none.jsonl")
    (tmp_path / "file").write_text("")
    for attempt in (check_writable, lambda path: append_record(path, a_step_record())):
        with pytest.raises(RecordError, match="can't be written"):
            attempt(tmp_path / "file" / "r.jsonl")
    check_writable(tmp_path / "r.jsonl")
    assert not (tmp_path / "r.jsonl").exists()


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "r.jsonl"
    append_record(path, a_step_record())
    before = path.read_bytes()
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:100]))
    with pytest.raises(RecordError, match="can't be written"):
        append_record(path, a_step_record())
    assert path.read_bytes() == before


def test_a_selfcheck_becomes_a_record(tmp_path):
    path = tmp_path / "check.json"
    path.write_text(json.dumps(a_selfcheck()))
    record = SelfcheckRecord.from_selfcheck(path, an_environment())
    assert [launch.right for launch in record.launches] == [True, False]
    assert record.launches[1].failure == "process ended with -6"
    assert record.timings[0].microseconds == 12.5


def test_a_selfchecks_infinity_is_read(tmp_path):
    table = a_selfcheck()
    table["launches"][0] |= {"right": False, "cases": [a_selfcheck_case(math.inf)]}
    path = tmp_path / "check.json"
    path.write_text(json.dumps(table))
    record = SelfcheckRecord.from_selfcheck(path, an_environment())
    append_record(tmp_path / "r.jsonl", record)
    assert read_records(tmp_path / "r.jsonl") == [record]


@pytest.mark.parametrize(
    "change",
    [
        {"cases": [a_selfcheck_case(1.0)]},
        {"cases": [a_selfcheck_case(overrun=True)]},
        {"cases": [a_selfcheck_case(math.nan)]},
        {"cases": []},
        {"faults": []},
        {"faults": [a_selfcheck_case(1e-4)]},
        {"void": "a scale wrong by 1% passes"},
    ],
)
def test_a_launch_called_right_against_its_numbers_is_refused(tmp_path, change):
    table = a_selfcheck()
    table["launches"][0] |= change
    path = tmp_path / "check.json"
    path.write_text(json.dumps(table))
    with pytest.raises(RecordError, match="called right, and its numbers say it is not"):
        SelfcheckRecord.from_selfcheck(path, an_environment())


@pytest.mark.parametrize("text", ["", "[1]", "{}", '{"launches": 3, "device": "NVIDIA Test"}', "not json"])
def test_what_is_no_selfcheck_is_one_line(tmp_path, text):
    path = tmp_path / "check.json"
    path.write_text(text)
    with pytest.raises(RecordError, match="not a self-check's result") as error:
        SelfcheckRecord.from_selfcheck(path, an_environment())
    assert "\n" not in str(error.value)


def test_a_selfcheck_of_another_device_is_refused(tmp_path):
    path = tmp_path / "check.json"
    path.write_text(json.dumps(a_selfcheck(device="NVIDIA Other")))
    with pytest.raises(RecordError, match="made on 'NVIDIA Other'"):
        SelfcheckRecord.from_selfcheck(path, an_environment())


def test_version_1_stays_readable_and_stays_version_1(tmp_path):
    path = tmp_path / "r.jsonl"
    record = a_step_record(schema_version=1)
    append_record(path, record)
    table = json.loads(path.read_text())
    for part in ("stock", "optimized", "comparison"):
        table[part].pop("pictures")  # as version 1 wrote it
    for key in ("pictures", "flags"):
        table["method"].pop(key)
    table.pop("price")
    table.pop("free_running")
    path.write_text(json.dumps(table) + "\n")
    (again,) = read_records(path)
    assert again == record
    assert again.schema_version == 1
    path.write_text(json.dumps(table | {"price": {"usd_per_hour": 1.0, "date": "d", "source": "s"}}))
    with pytest.raises(RecordError, match="version 1 holds fields of version 2"):
        read_records(path)


def _method(**changes):
    method = a_step_record().method
    assert method is not None
    return method.model_copy(update=changes)


@pytest.mark.parametrize(
    ("version", "changes"),
    [
        (2, {"price": Price(1.0, "d", "s")}),
        (2, {"method": _method(flags=("clocks throttled (power cap) at 1 of 2 looks",))}),
        (2, {"method": _method(pictures="a clock")}),
        (2, {"pictures": (some_pictures([1.0]), None)}),
        (2, {"pictures": (None, some_pictures([1.0]))}),
        (3, {"free_running": some_free_running()}),
        (4, {"peers": [a_peer("cuda-graph")]}),
        (4, {"peers_left_out": ("cuda-graph",)}),
        (4, {"profile": ForwardProfile(why="no profiler")}),
        (5, {"warm_start": a_warm_start()}),
        (6, {"decode": a_decode_certificate()}),
    ],
)
def test_fields_of_a_version_are_in_no_older_one(version, changes):
    assert a_step_record(schema_version=version, **changes).schema_version == version
    with pytest.raises(pydantic.ValidationError, match=f"version {version - 1} holds fields of version {version}"):
        a_step_record(schema_version=version - 1, **changes)


def test_the_committed_records_are_valid():
    files = sorted((Path(__file__).parent.parent / "reports").glob("*.jsonl"))
    assert files
    for file in files:
        assert read_records(file), file


def test_lenient_reading_skips_what_it_names(tmp_path):
    path = tmp_path / "r.jsonl"
    record = a_step_record()
    append_record(path, record)
    path.write_bytes(b'{"cut\n\xff\xfe\n' + path.read_bytes() + b'{"schema_version": 9}\n')
    with pytest.raises(RecordError, match="line 1"):
        read_records(path)
    told = []
    assert read_records(path, skip=lambda error: told.append(str(error))) == [record]
    assert [f"line {number}" in words for number, words in zip((1, 2, 4), told, strict=True)] == [True] * 3


@given(samples=st.lists(st.floats(0.001, 10), min_size=1, max_size=4), energy=st.booleans(), text=st.booleans())
def test_pictures_survive_a_round_trip(samples, energy, text):
    pictures = Pictures(
        whole_s=samples,
        text_encoder_s=samples if text else None,
        unet_s=samples,
        vae_s=samples,
        png_s=samples,
        images_per_s=1 / samples[0],
        energy_j=samples if energy else None,
    )
    assert Pictures.model_validate_json(pictures.model_dump_json()) == pictures
    with pytest.raises(pydantic.ValidationError, match="unequal numbers"):
        Pictures.model_validate({**pictures.model_dump(), "vae_s": [*samples, 1.0]})
