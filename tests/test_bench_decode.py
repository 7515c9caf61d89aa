"""Step workloads with `decode = "float16"`: no speed without its certificate, in records and in reports."""

import argparse
import json
import math
import re
import types
import typing
import unittest.mock
from typing import Any

import pydantic
import pytest
import torch
from rich.console import Console
from sample_records import a_certificate, a_decode_certificate, a_peer, a_step_record, a_warm_start, an_environment
from tiny_case import tiny_case
from tiny_model import one_thread  # noqa: F401

from diffopt.bench.random_models import random_pipeline, write_weights
from diffopt.bench.record import append_record, read_records
from diffopt.bench.report.audit import audit_lines
from diffopt.bench.report.claims import claims_of
from diffopt.bench.report.compare import compare
from diffopt.bench.report.data import report_data
from diffopt.bench.report.merge import MergeError, differences
from diffopt.bench.report.readme import _cells
from diffopt.bench.report.rows import cells, rows_of
from diffopt.bench.report.scaling import scaling
from diffopt.bench.report.tables import report_tables
from diffopt.bench.schema import RecordError
from diffopt.bench.step import case as step_module
from diffopt.bench.step import warm_start_process
from diffopt.bench.step.case import run_case
from diffopt.bench.step.record import StepRecord
from diffopt.bench.step.words import over_best
from diffopt.bench.verify import decode_check
from diffopt.bench.workloads import Case, StepWorkload, read_workload
from diffopt.commands import bench as command
from diffopt.config import config_names
from diffopt.handle import optimize
from diffopt.unet import float16_decode

CPU = torch.device("cpu")
FAILED = a_decode_certificate(ours=0.02)
VOID = a_decode_certificate(fault=1e-3)
STOCKS = "its VAE decodes as stock does: nothing proves that conv_out stays below 65504"

pytestmark = pytest.mark.filterwarnings("ignore:`upcast_vae` is deprecated:FutureWarning")


@pytest.fixture
def _float16(monkeypatch):
    """As on a GPU: a VAE in float32 is decoded so by stock, too."""
    monkeypatch.setattr("diffopt.bench.step.contenders.dtype_on", lambda device: torch.float16)


def _case(**changes) -> Case:
    values = {"exactness_steps": 1, "repetitions": 1, "warmup": 0, "unet_repetitions": 1, "unet_warmup": 0}
    return tiny_case("random:tiny-xl", **{**values, "decode": "float16", **changes})


def _run_case(case: Case | None = None, **options) -> StepRecord:
    return run_case("test", case or _case(), device=CPU, attention="sdpa", **options)


def _has_no_speeds(record: StepRecord) -> bool:
    parts = (record.method, record.stock, record.optimized, record.comparison, record.warm_start, record.free_running)
    return all(part is None for part in parts) and record.peers == []


# --- a case ---------------------------------------------------------------------------------------------------------


def test_cases_take_what_optimize_takes():
    assert typing.get_args(typing.get_type_hints(Case)["decode"]) == float16_decode.MODES


@pytest.mark.usefixtures("_float16")
def test_a_case_with_its_certificate_has_speeds(monkeypatch, tmp_path):
    stages, given = [], []

    def seen(pipe, latents):
        given.append(latents)
        return decode_check.check_decode(pipe, latents)

    monkeypatch.setattr(step_module, "check_decode", seen)
    case = _case(batch=3, picture_repetitions=1, picture_warmup=0)
    record = _run_case(case, progress=lambda stage, *_: stages.append(stage))
    assert record.decode is not None
    assert record.exact, record.verdict()
    assert record.verdict().startswith("passed: worst step")
    assert "; decoded in float16: passed: " in record.verdict()
    assert record.decode.pictures == 2  # of three
    assert [tuple(latents.shape) for latents in given] == [(2, 4, 8, 8)]
    assert list(dict.fromkeys(stages)) == [
        "load the model",
        "first calls and peak memory",
        "exactness",
        "exactness of the decode",
        "UNet forwards",
        "denoising loops",
        "whole pictures",
    ]
    assert record.workload.decode == "float16"
    assert record.comparison is not None
    assert record.comparison.pictures is not None
    (vae,) = record.plan["vae"]
    assert vae["decode"]["decodes"] >= 2  # the first call and a timed one
    assert vae["decode"]["stock"] == {}
    assert f"VAE: decoded in float16: {vae['decode']['decodes']} calls" in audit_lines(record.plan)
    append_record(tmp_path / "r.jsonl", record)
    assert read_records(tmp_path / "r.jsonl") == [record]


@pytest.mark.usefixtures("_float16")
def test_a_fault_that_is_not_caught_leaves_no_speed(monkeypatch):
    monkeypatch.setattr(decode_check, "_faulty", lambda vae: vae)
    record = _run_case(_case(warm_start=True, free_running_prompts=1))
    assert record.exactness.passed
    assert record.decode is not None
    assert record.decode.void
    assert not record.exact
    assert record.verdict().startswith("void: decoded in float16: the planted fault")
    assert _has_no_speeds(record)


@pytest.mark.usefixtures("_float16")
def test_a_wrong_decode_leaves_no_speed(monkeypatch):
    def wrong(pipe, **options):
        handle = optimize(pipe, **options)
        getattr(pipe.vae, float16_decode.ATTRIBUTE).proven.decoder.up_blocks[0].resnets[0].conv2.weight.mul_(8)
        return handle

    monkeypatch.setattr(step_module, "optimize", wrong)
    record = _run_case()
    assert record.exactness.passed
    assert record.decode is not None
    assert not record.decode.passed
    assert _has_no_speeds(record)


@pytest.mark.parametrize("changes", [{}, {"model": "random:tiny"}], ids=["float32", "another VAE"])
def test_what_decodes_as_stock_leaves_no_speed_and_the_reason(changes, monkeypatch, tmp_path, capsys):
    """On a CPU weights are float32, and stock decodes them so, too."""
    case = tiny_case(**{"model": "random:tiny-xl", "decode": "float16", **changes})
    monkeypatch.setattr("diffopt.bench.workloads.read_workload", lambda name: StepWorkload("tiny", "any", (case,)))
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers(required=True))
    arguments = parser.parse_args(["bench", "small", "--device", "cpu", "--output", str(tmp_path / "r.jsonl")])
    assert arguments.run(arguments) == 1
    (record,) = read_records(tmp_path / "r.jsonl")
    assert isinstance(record, StepRecord)
    reason = "its VAE decodes as stock does: stock decodes it in float32, its own dtype"
    assert (record.decode, record.decode_why) == (None, reason)
    assert _has_no_speeds(record)
    assert f"void: decoded in float16: {reason}" in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.usefixtures("_float16")
def test_latents_beyond_the_limit_leave_no_speed_and_the_reason(monkeypatch):
    monkeypatch.setattr(float16_decode, "LATENTS", 0.1)
    record = _run_case()
    assert record.decode_why == "these latents are decoded as stock does: its latents exceed 1"
    assert _has_no_speeds(record)
    assert any(line.startswith("VAE: decoded as stock does: ") for line in audit_lines(record.plan))


def test_the_largest_latents_of_a_batch_are_checked(monkeypatch):
    """One picture whose latents exceed the limit has the whole batch decoded as stock does."""
    latents = torch.tensor([1.0, -3.0, 2.0, -40.0, 4.0])[:, None, None, None].expand(5, 4, 8, 8)
    pipe = unittest.mock.MagicMock(return_value=types.SimpleNamespace(images=latents))
    subject = types.SimpleNamespace(pipe=pipe, arguments=dict)
    given = []
    monkeypatch.setattr(step_module, "check_decode", lambda _, latents: given.append(latents))
    run: Any = types.SimpleNamespace(case=_case(), subject=subject, optimized=None, progress=lambda *_: None)
    step_module._check_decode(run)
    assert [latents[:, 0, 0, 0].tolist() for latents in given] == [[-40.0, 4.0]]


def test_by_default_nothing_is_decoded_in_another_way(monkeypatch):
    monkeypatch.setattr(step_module, "check_decode", lambda *_: pytest.fail("asked"))
    record = _run_case(_case(decode="stock"))
    assert record.exact
    assert (record.workload.decode, record.decode, record.decode_why) == ("stock", None, "")
    assert "decode" not in record.plan["vae"][0]


@pytest.mark.usefixtures("_float16")
def test_the_process_of_a_warm_start_decodes_so(monkeypatch, tmp_path):
    pipe = random_pipeline("tiny-xl", device=CPU, dtype=torch.float16)
    write_weights(pipe, tmp_path)
    kept = []

    def seen(pipe, **options):
        kept.append(pipe)
        return optimize(pipe, **options)

    monkeypatch.setattr("diffopt.handle.optimize", seen)
    case = json.loads(json.dumps(vars(_case())))  # as it travels
    warm_start_process.run(warm_start_process.Request(case, str(tmp_path), "cpu", "sdpa", 0.0))
    assert float16_decode.summary(kept)[0]["decodes"] == 2


# --- its record -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "decode",
    [
        a_decode_certificate(),
        FAILED,
        VOID,
        a_decode_certificate(ours=math.inf, fault=math.inf, bfloat16=math.inf, nonfinite=3),
        STOCKS,
    ],
    ids=["passed", "failed", "void", "infinite", "stock's"],
)
def test_round_trip(tmp_path, decode):
    record = a_step_record(decode=decode)
    append_record(tmp_path / "r.jsonl", record)
    assert read_records(tmp_path / "r.jsonl") == [record]


def test_a_nan_survives_and_stays_a_failure(tmp_path):
    append_record(tmp_path / "r.jsonl", a_step_record(decode=a_decode_certificate(ours=math.nan, allowed=math.nan)))
    (record,) = read_records(tmp_path / "r.jsonl")
    assert isinstance(record, StepRecord)
    assert record.decode is not None
    assert math.isnan(record.decode.ours)
    assert math.isnan(record.decode.allowed)
    assert record.decode.float16 == math.inf
    assert not record.exact


def test_a_verdict_in_a_file_is_not_read(tmp_path):
    append_record(tmp_path / "r.jsonl", a_step_record(decode=FAILED))
    table = json.loads((tmp_path / "r.jsonl").read_text())
    table["decode"]["passed"] = True
    (tmp_path / "r.jsonl").write_text(json.dumps(table))
    with pytest.raises(RecordError, match=r"decode\.passed"):
        read_records(tmp_path / "r.jsonl")


@pytest.mark.parametrize(
    "changes",
    [{"decode": FAILED}, {"decode": VOID}, {"decode": STOCKS}, {"work": {"decode": "float16"}}],
    ids=["failed", "void", "stock's", "none"],
)
def test_a_speed_without_a_passed_certificate_is_no_record(changes):
    timed = a_step_record()
    speeds = {name: getattr(timed, name) for name in ("stock", "optimized", "comparison", "method")}
    with pytest.raises(pydantic.ValidationError, match="a speed stands beside an exactness check that did not pass"):
        a_step_record(**changes, **speeds)


def test_no_other_speed_stands_beside_a_failed_certificate():
    with pytest.raises(pydantic.ValidationError, match="a warm start stands beside"):
        a_step_record(decode=FAILED, warm_start=a_warm_start())
    with pytest.raises(pydantic.ValidationError, match="a speed of cuda-graph stands beside"):
        a_step_record(decode=FAILED, peers=[a_peer("cuda-graph")])


@pytest.mark.parametrize("version", [1, 2, 3, 4, 5])
def test_older_versions_stay_as_they_were(tmp_path, version):
    append_record(tmp_path / "r.jsonl", a_step_record(schema_version=version))
    table = json.loads((tmp_path / "r.jsonl").read_text())
    for part, key in ((table, "decode"), (table, "decode_why"), (table["workload"], "decode")):
        part.pop(key)  # as that version wrote it
    (tmp_path / "r.jsonl").write_text(json.dumps(table))
    (record,) = read_records(tmp_path / "r.jsonl")
    assert isinstance(record, StepRecord)
    assert record.schema_version == version
    assert record.exact
    assert record.workload.decode == "stock"
    words = f"version {version} holds fields of version 6"
    for changes in ({"decode": a_decode_certificate()}, {"decode": STOCKS}):
        with pytest.raises(pydantic.ValidationError, match=words):
            a_step_record(schema_version=version, **changes)
    with pytest.raises(pydantic.ValidationError, match=words):
        a_step_record(schema_version=version, certificate=a_certificate(ours=0.5), work={"decode": "float16"})


# --- what is told of it ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("certificate", "decode", "words"),
    [
        (None, a_decode_certificate(), "passed: worst step 0: .*; decoded in float16: passed: 1.00e-03 of 2.00e-03"),
        (None, FAILED, "FAILED: decoded in float16: 2.00e-02 of 2.00e-03 allowed; .*; steps: passed: worst step"),
        (None, VOID, "void: decoded in float16: the planted fault .a scale wrong by 2. was not caught"),
        (None, STOCKS, f"void: decoded in float16: {STOCKS}; steps: passed"),
        (a_certificate(ours=0.5), None, "FAILED: worst step 0: 5.00e-01 of 2.00e-03 allowed; planted fault [^;]*$"),
        (a_certificate(ours=0.5), a_decode_certificate(), "FAILED: worst step 0: .*; decoded in float16: passed"),
    ],
)
def test_the_verdict_begins_with_that_of_the_whole(certificate, decode, words):
    record = a_step_record(certificate=certificate, decode=decode)
    assert re.match(words, record.verdict()), record.verdict()


@pytest.mark.parametrize(("decode", "outcome"), [(FAILED, "FAILED"), (VOID, "void"), (STOCKS, "void")])
def test_nothing_is_claimed_without_a_passed_certificate(decode, outcome):
    record = a_step_record(decode=decode)
    claim = claims_of(record)["loop"]
    assert (claim.claimed, claim.exact) == (False, False)
    assert claim.why == f"the exactness check did not pass: {record.verdict()}"
    assert over_best(record).why == f"the exactness check did not pass: {record.verdict()}"
    (row,) = rows_of([record])
    assert cells(row)[-1] == outcome
    assert not row.exact
    entry = report_data([record])["gpus"]["NVIDIA Test"]["step"]["sd15-512"]
    assert (entry["exact"], entry["exactness"]) == (False, record.verdict())
    console = Console(width=400, record=True)
    for part in report_tables(report_data([record]), rows_of([record])):
        console.print(part)
    assert record.verdict() in console.export_text()


def test_the_table_of_the_readme_tells_both_distances():
    record = a_step_record(decode=a_decode_certificate())
    (row,) = rows_of([record])
    assert _cells(row, record)[-1] == "passed: 1.0e-03 of 2.0e-03, decoded in float16: 1.0e-03 of 2.0e-03"


def test_a_decode_that_is_no_longer_exact_is_a_regression():
    (change,) = compare([a_step_record(decode=a_decode_certificate())], [a_step_record(decode=FAILED)])
    assert (change.state, change.why.split(":")[0]) == ("regression", "no longer exact")


def test_records_of_other_decodes_are_not_compared():
    stock, other = a_step_record(), a_step_record(decode=a_decode_certificate())
    assert differences(stock, other) == ["decode: 'stock' and 'float16'"]
    with pytest.raises(MergeError, match="not the same work: decode: 'stock' and 'float16'"):
        compare([stock], [other])


def test_the_cost_of_scaling_is_told_by_decode():
    decoded = a_decode_certificate()
    records = [
        a_step_record(environment=an_environment(), case=f"{batch} {decode}", decode=decode, work={"batch": batch})
        for batch, decode in ((1, None), (2, decoded), (4, None), (8, decoded))
    ]
    found = {series.fixed: [point[0] for point in series.points] for series in scaling(records)}
    assert found == {"512×512, 30 steps": [1, 4], "512×512, 30 steps, decoded in float16": [2, 8]}


# --- workload files -------------------------------------------------------------------------------------------------


def test_the_sizes_are_measured_in_float16_too():
    workload = read_workload("sizes")
    assert isinstance(workload, StepWorkload)
    cases = {case.name: case for case in workload.cases}
    for name in ("sdxl-1024 20 steps", "sdxl-1024 20 steps batch 8"):
        stock, other = vars(cases[name]), vars(cases[f"{name} float16 decode"])
        assert {key for key in stock if stock[key] != other[key]} == {"name", "model", "decode"}
        assert (stock["decode"], other["decode"]) == ("stock", "float16")


def test_the_help_names_every_workload(capsys):
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers(required=True))
    with pytest.raises(SystemExit):
        parser.parse_args(["bench", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "workload: quick (start here), " in printed
    listed = printed.partition("workload: ")[2].partition(" options:")[0].replace(" (start here)", "").split(", ")
    assert sorted(listed) == config_names("workloads")
