"""The warm start: a fresh process times its own stages; what goes wrong there is words and never costs the record."""

import dataclasses
import json
import os
import time
from pathlib import Path

import pydantic
import pytest
import torch
from rich.console import Console
from sample_records import a_certificate, a_step_record, a_warm_start
from tiny_case import tiny_case

from diffopt.attention.backends import BACKENDS, with_scale_fault
from diffopt.bench.random_models import random_pipeline, write_weights
from diffopt.bench.record import append_record, read_records
from diffopt.bench.report.data import report_data
from diffopt.bench.report.render import index, page
from diffopt.bench.report.rows import rows_csv, rows_of
from diffopt.bench.report.tables import report_tables
from diffopt.bench.step import case as step_module
from diffopt.bench.step import warm_start
from diffopt.bench.step.case import run_case
from diffopt.bench.step.record import StepRecord
from diffopt.bench.step.warm_start import WarmStartError, ask, measure_warm_start
from diffopt.bench.step.warm_start_process import Request, run
from diffopt.bench.step.warm_start_record import NOT_COUNTED, STAGES, WarmStart
from diffopt.bench.step.words import warm_start_words
from diffopt.bench.workloads import StepWorkload, read_workload
from diffopt.handle import optimize

CPU = torch.device("cpu")
SUMMARY = {"layers": [{"runs": [{"backend": "sdpa"}]}, {"runs": []}]}
SECONDS = {**dict.fromkeys(STAGES, 1.0), "second_picture_s": 0.5}
WORDS = (
    "warm start 3.4 s: process 0.1, device 0.3, optimize 0.5, first picture of 20 steps 2.5 (the next one 0.6); "
    "imports 6.1 and weights 4.2 not counted"
)


def _request(case=None, weights=None) -> Request:
    case = json.loads(json.dumps(dataclasses.asdict(case or tiny_case("emoji"))))  # as it travels
    return Request(case, weights, "cpu", "auto", time.monotonic())


def _measure(case=None, pipe=None) -> WarmStart:
    return measure_warm_start(case or tiny_case("emoji"), pipe, device=CPU, attention="auto", summary=SUMMARY)


def _run_case(**changes) -> StepRecord:
    values = {"exactness_steps": 1, "repetitions": 1, "warmup": 0, "warm_start": True, **changes}
    return run_case("test", tiny_case(**values), device=CPU)


def test_a_fresh_process_makes_pictures_of_the_bundled_model(monkeypatch, tmp_path):
    monkeypatch.setattr(warm_start, "RUNS", 1)
    monkeypatch.setattr(warm_start, "STEPS", 2)
    began = time.monotonic()
    record = _run_case(model="emoji")
    took = time.monotonic() - began
    found = record.warm_start
    assert found is not None
    assert found.why == ""
    times = {stage: getattr(found, stage) for stage in STAGES}
    assert all(seconds >= 0 for seconds in times.values())
    assert times["imports_s"] > 0.1  # torch alone
    assert times["picture_s"] > 0.01
    assert sum(times.values()) + (found.second_picture_s or 0) < took
    assert found.warm_start_s == pytest.approx(sum(times.values()) - times["imports_s"] - times["weights_s"])
    append_record(tmp_path / "r.jsonl", record)
    assert read_records(tmp_path / "r.jsonl") == [record]


@pytest.mark.parametrize("kind", ["tiny", "tiny-xl"])
def test_random_weights_are_read_from_files_in_the_process(kind, tmp_path):
    write_weights(random_pipeline(kind, device=CPU, dtype=torch.float32), tmp_path)
    answer = json.loads(json.dumps(run(_request(tiny_case(f"random:{kind}"), str(tmp_path)))))
    assert set(answer["seconds"]) == {*STAGES, "second_picture_s"}
    assert answer["backends"] == ["sdpa"]


def test_the_last_of_two_runs_counts_and_both_read_the_same_files(monkeypatch):
    asked, told = [], []

    def answers(request, seconds):
        weights = Path(request.weights)
        assert {path.name for path in weights.iterdir()} == {"unet", "vae"}
        asked.append((request.case["steps"], weights))
        return {"seconds": {**SECONDS, "picture_s": 9.0 / len(asked)}, "backends": ["sdpa"]}

    monkeypatch.setattr(warm_start, "ask", answers)
    case = tiny_case(steps=30)
    found = measure_warm_start(
        case,
        random_pipeline("tiny", device=CPU, dtype=torch.float32),
        device=CPU,
        attention="auto",
        summary=SUMMARY,
        on_run=told.append,
    )
    assert (found.why, found.steps) == ("", 20)
    assert found.warm_start_s == 4.5 + len(STAGES) - 1 - len(NOT_COUNTED)
    assert told == [0, 1, 2]
    (first, again) = asked
    assert first == again
    assert first[0] == 20
    assert not first[1].exists()


@pytest.mark.parametrize(
    ("outcome", "why"),
    [
        (WarmStartError("no picture within 300 s"), "no picture within 300 s"),
        (OSError("no such file"), "OSError: no such file"),
        ({"seconds": SECONDS, "backends": ["sdpa-math", "sdpa"]}, "sdpa-math served, not sdpa as in the loops"),
        ({"seconds": {"process_s": 1.0}, "backends": []}, "KeyError: 'device_s'"),
    ],
)
def test_what_goes_wrong_is_words(outcome, why, monkeypatch):
    def answers(request, seconds):
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(warm_start, "ask", answers)
    found = _measure()
    assert (found.why, found.warm_start_s, found.picture_s) == (why, None, None)


def test_a_full_disk_is_words(monkeypatch):
    def full(pipe, folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(warm_start, "write_weights", full)
    assert "No space left" in _measure(tiny_case()).why


def test_a_failure_leaves_the_rest_of_the_record(monkeypatch):
    def fails(request, seconds):
        raise WarmStartError("the process ended with -9: no output")

    monkeypatch.setattr(warm_start, "ask", fails)
    record = _run_case()
    assert record.comparison is not None
    assert record.warm_start is not None
    assert record.warm_start.why == "the process ended with -9: no output"
    assert warm_start_words(record) == "no warm start: the process ended with -9: no output"


def test_an_interrupt_leaves_the_rest_of_the_record(monkeypatch):
    def interrupted(request, seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(warm_start, "ask", interrupted)
    record = _run_case()
    assert record.interrupted
    assert record.comparison is not None
    assert record.warm_start is None


def test_it_is_not_begun_after_an_interrupt(monkeypatch):
    def stop_in_round_two(stage, done, total):
        if stage == "denoising loops" and done == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(warm_start, "ask", lambda request, seconds: pytest.fail("asked"))
    case = tiny_case(exactness_steps=1, repetitions=3, warmup=0, warm_start=True)
    record = run_case("test", case, device=CPU, progress=stop_in_round_two)
    assert record.interrupted
    assert record.comparison is not None
    assert record.warm_start is None


@pytest.mark.parametrize("changes", [{"warm_start": False}, {"wrong": True}])
def test_it_is_timed_only_where_it_is_asked_for_and_exact(changes, monkeypatch):
    changes = dict(changes)
    if changes.pop("wrong", False):
        wrong = with_scale_fault(BACKENDS["sdpa"])
        monkeypatch.setattr(step_module, "optimize", lambda pipe, **_: optimize(pipe, attention=wrong))
    monkeypatch.setattr(warm_start, "ask", lambda request, seconds: pytest.fail("asked"))
    assert _run_case(**changes).warm_start is None


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Puts a program in the place of the process."""

    def put(code: str) -> None:
        (tmp_path / "stand_in.py").write_text(code)
        paths = [str(tmp_path), os.environ.get("PYTHONPATH", "")]
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
        monkeypatch.setattr(warm_start, "_MODULE", "stand_in")

    return put


def test_a_process_may_say_more_than_its_answer(stand_in):
    stand_in("import json, sys\nprint('hello')\nprint(json.dumps({'given': json.loads(sys.argv[1])}))\nprint()")
    request = _request()
    given = ask(request, 60)["given"]
    assert given["case"]["name"] == "tiny-64"
    assert request.started <= given["started"] <= time.monotonic()


def test_a_process_that_fails_leaves_its_last_words(stand_in):
    stand_in("raise RuntimeError('out of memory')")
    with pytest.raises(WarmStartError, match="the process ended with 1: RuntimeError: out of memory"):
        ask(_request(), 60)


def test_a_process_that_hangs_is_ended_with_its_children(stand_in, tmp_path):
    stand_in(
        "import pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"pathlib.Path({str(tmp_path / 'child')!r}).write_text(str(child.pid))\n"
        "time.sleep(600)"
    )
    with pytest.raises(WarmStartError, match="no picture within 3 s"):
        ask(_request(), 3)
    child = Path("/proc") / (tmp_path / "child").read_text()
    deadline = time.monotonic() + 30
    while _runs(child):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _runs(process: Path) -> bool:
    """Whether a process (a folder of /proc) runs; one that has ended and that nobody has waited for doesn't."""
    try:
        return (process / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_record_refuses_what_can_not_be():
    with pytest.raises(pydantic.ValidationError, match="not the sum of its stages"):
        a_warm_start(warm_start_s=1.0)
    with pytest.raises(pydantic.ValidationError, match="all of its times, or none and the reason"):
        a_warm_start(picture_s=None)
    with pytest.raises(pydantic.ValidationError, match="all of its times, or none and the reason"):
        WarmStart(steps=20)
    with pytest.raises(pydantic.ValidationError, match="a warm start stands beside an exactness check"):
        a_step_record(certificate=a_certificate(ours=0.5), warm_start=a_warm_start())
    with pytest.raises(pydantic.ValidationError, match="version 4 holds fields of version 5"):
        a_step_record(warm_start=a_warm_start(), schema_version=4)


def test_reports_tell_it_by_case(tmp_path):
    failed = WarmStart(steps=20, why="no picture within 300 s")
    records = [
        a_step_record(warm_start=a_warm_start()),
        a_step_record(case="sdxl-1024", warm_start=failed),
        a_step_record(case="sd21-768"),
    ]
    data = report_data(records)
    gpu = json.loads(json.dumps(data, allow_nan=False))["gpus"]["NVIDIA Test"]
    assert gpu["warm_start_s"] == {"sd15-512": 3.4, "sdxl-1024": None, "sd21-768": None}
    assert gpu["step"]["sd15-512"]["warm_start"]["words"] == WORDS
    assert gpu["step"]["sd15-512"]["warm_start"]["optimize_s"] == 0.5
    assert gpu["step"]["sdxl-1024"]["warm_start"]["why"] == "no picture within 300 s"
    assert gpu["step"]["sd21-768"]["warm_start"] is None
    rows = rows_of(records)
    assert [row.warm_start_s for row in rows] == [3.4, None, None]
    assert WORDS in rows_csv(rows)
    console = Console(width=400, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for part in report_tables(data, rows):
        console.print(part, markup=False)
    terminal, text = console.export_text(), index(records, [])
    assert f"sd15-512 on NVIDIA Test: {WORDS}" in terminal
    for words in (terminal, text):
        assert "sdxl-1024 on NVIDIA Test: no warm start: no picture within 300 s" in words
        assert "sd21-768 on NVIDIA Test: no warm" not in words
    assert "| sd15-512 | NVIDIA Test | 3.4 | 0.1 | 0.3 | 0.5 | 2.5 | 0.6 |" in text
    assert "| sdxl-1024 | NVIDIA Test | — | — |" in text


def test_the_page_tells_it_too():
    pytest.importorskip("jinja2", reason='needs jinja2: pip install "diffopt[report]"')
    text = page([a_step_record(warm_start=a_warm_start())], [])
    assert f"<dt>warm start</dt><dd>{WORDS.removeprefix('warm start ')}</dd>" in text
    assert "warm start" not in page([a_step_record()], [])


@pytest.mark.parametrize("name", ["step", "standard", "full"])
def test_the_workloads_with_true_sizes_time_it(name):
    workload = read_workload(name)
    assert isinstance(workload, StepWorkload)
    assert [case.name for case in workload.cases if case.warm_start] == ["sd15-512", "sd21-768", "sdxl-1024"]


@pytest.mark.gpu
def test_a_warm_start_on_a_gpu():
    record = run_case("test", tiny_case(warm_start=True, exactness_steps=0), device=torch.device("cuda"))
    assert record.exactness.passed, record.exactness.verdict()
    assert record.warm_start is not None
    assert record.warm_start.why == ""
    assert (record.warm_start.device_s or 0) > 0
