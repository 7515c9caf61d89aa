"""The attention report: ratios against the best exact peer, which run counts, what voids it, and its tables."""

import argparse
import dataclasses
import json

import pydantic
import pytest
from rich.console import Console
from sample_records import (
    a_selfcheck_record,
    a_step_record,
    an_attention_figure,
    an_attention_record,
    an_environment,
    attention_errors,
    attention_rules,
)

from diffopt.bench.attention.report import NOT_MEASURED, attention_entry, compared, shape_entry
from diffopt.bench.attention.tables import attention_markdown
from diffopt.bench.record import append_record, read_records
from diffopt.bench.report.data import report_data
from diffopt.bench.report.rows import rows_of
from diffopt.bench.report.tables import report_markdown, report_tables
from diffopt.commands import report as command

TWELVE = tuple(f"shape {i}" for i in range(12))


def a_run(run="run 1", time="2026-11-23T10:00:00+00:00", names=TWELVE, headline=TWELVE, us=8.0, commit="abc"):
    """One record per name; ours takes `us` plus its number, the best fp16 peer 10 µs and the bf16 one 20."""
    environment = an_environment(time_utc=time)
    software = dataclasses.replace(environment.software, commit=commit)
    records = []
    for i, name in enumerate(names):
        figures = [
            an_attention_figure("diffopt", us + i / 10),
            an_attention_figure("diffopt-bf16", us + i / 10 + 0.1, "bfloat16"),
            an_attention_figure("sdpa-cudnn", 10.0),
            an_attention_figure("fa3-fwd", 20.0, "bfloat16"),
        ]
        here = dataclasses.replace(environment, software=software)
        records.append(an_attention_record(name, figures, run=run, headline=headline, environment=here))
    return records


def _printed(data):
    console = Console(width=180, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for part in report_tables(data, []):
        console.print(part)
    return console.export_text()


def test_round_trip(tmp_path):
    record = an_attention_record(figures=[an_attention_figure("diffopt", 8.0), an_attention_figure("fast", None)])
    append_record(tmp_path / "r.jsonl", record)
    assert read_records(tmp_path / "r.jsonl") == [record]


@pytest.mark.parametrize(
    "change",
    [
        {"errors": {}},
        {"errors": {"normal": attention_errors(1e-3)}},
        {"errors": {"normal": attention_errors(1e-3), "spread 3": attention_errors(1.0)}},
        {"errors": {"normal": attention_errors(float("nan")), "spread 3": attention_errors(1e-3)}},
    ],
)
def test_a_speed_beside_a_failed_check_is_no_record(change):
    with pytest.raises(pydantic.ValidationError, match="exactness check that did not pass"):
        an_attention_record(figures=[an_attention_figure("diffopt", 8.0, **change)])


@pytest.mark.parametrize("rules", [[], attention_rules("float16", fault=1e-3), attention_rules("float16")[:1]])
def test_a_speed_beside_a_void_check_is_no_record(rules):
    with pytest.raises(pydantic.ValidationError, match="exactness check that did not pass"):
        an_attention_record(figures=[an_attention_figure("diffopt", 8.0)], rules=rules)


@pytest.mark.parametrize("state", ["wrong", "failed", "absent", "right"])
def test_times_without_the_state_timed_are_no_figure(state):
    with pytest.raises(pydantic.ValidationError, match="3 and 3 times"):
        an_attention_figure("diffopt", 8.0, state=state)


def test_the_best_peer_is_the_hardest_to_beat_in_its_own_dtype():
    best = compared(an_attention_record())
    assert best.peer == "fast-bf16"
    assert best.ratio is not None
    assert best.ratio.ratio == pytest.approx(0.9)
    assert best.ratio.low <= 0.9 <= best.ratio.high
    entry = shape_entry(an_attention_record())
    assert entry["microseconds"] == 8.0
    assert entry["bf16_ratio"] == pytest.approx(9 / 8)
    flops = 4 * 2 * 8 * 1024 * 1024 * 40
    assert entry["tflops"] == pytest.approx(flops / 8e-6 / 1e12)
    assert entry["share_of_ceiling"] == pytest.approx(flops / 8e-6 / 800e12)
    assert entry["memory_beyond_output"] == 0
    assert entry["contenders"]["slow"]["cold_microseconds"] == 60.0


def test_a_shape_limited_by_memory_is_measured_against_the_copy():
    shape = dataclasses.replace(an_attention_record().shape, n_k=8)
    entry = shape_entry(an_attention_record(shape=shape))
    assert entry["share_of_ceiling"] == pytest.approx(2 * 2 * 8 * 40 * 2 * (1024 + 8) / 8e-6 / 4e12)


def test_an_optional_peer_counts_where_it_is_and_voids_nothing_where_it_is_not():
    ours = [an_attention_figure("diffopt", 8.0), an_attention_figure("sdpa-cudnn", 10.0)]
    fast = an_attention_figure("xformers", 5.0, required=False)
    assert compared(an_attention_record(figures=[*ours, fast])).peer == "xformers"
    gone = an_attention_figure("xformers", None, required=False)
    assert compared(an_attention_record(figures=[*ours, gone])).peer == "sdpa-cudnn"


def test_the_promised_keys(tmp_path, capsys):
    for record in [*a_run(), a_selfcheck_record(), a_step_record()]:
        append_record(tmp_path / "r.jsonl", record)
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers(required=True))
    arguments = parser.parse_args(["report", "show", "--format", "json", str(tmp_path / "r.jsonl")])
    assert arguments.run(arguments) == 0
    entry = json.loads(capsys.readouterr().out)["gpus"]["NVIDIA Test"]["attention"]
    ratios = [(8 + i / 10) / 10 for i in range(12)]
    product = 1.0
    for ratio in ratios:
        product *= ratio
    assert entry["geomean_ratio"] == pytest.approx(product ** (1 / 12))
    assert entry["geomean_ratio_cold"] == pytest.approx(entry["geomean_ratio"])
    assert entry["worst_ratio"] == pytest.approx(0.91)
    assert entry["worst_ratio_interval"][0] <= 0.91 <= entry["worst_ratio_interval"][1]
    assert entry["worst_shape"] == "shape 11"
    assert set(entry["peers"]) == {"sdpa-cudnn", "fa3-fwd"}
    assert entry["peers"]["fa3-fwd"]["shapes"] == {"timed": 12}
    assert entry["launches"] == 2  # the self-check's keys stay
    assert entry["exact"] is False


def test_without_a_record_of_the_suite_its_keys_are_null():
    entry = report_data([a_selfcheck_record()])["gpus"]["NVIDIA Test"]["attention"]
    assert entry["geomean_ratio"] is entry["worst_ratio"] is entry["worst_shape"] is None
    assert entry["launches"] == 2
    assert set(entry) == set(report_data([*a_run()])["gpus"]["NVIDIA Test"]["attention"])
    assert set(attention_entry(a_run())) == set(NOT_MEASURED)


def test_a_missing_shape_voids_the_mean():
    entry = attention_entry(a_run(names=TWELVE[:-1]))
    assert entry["geomean_ratio"] is entry["worst_ratio"] is entry["worst_shape"] is None
    assert entry["void_ratio"] == "not measured in one run: shape 11"
    assert entry["shapes"]["shape 3"]["ratio"] == pytest.approx(0.83)


def test_two_runs_do_not_make_one():
    entry = attention_entry([*a_run("one", names=TWELVE[:6]), *a_run("two", names=TWELVE[6:])])
    assert entry["geomean_ratio"] is None


def test_one_void_shape_voids_the_mean():
    records = a_run()
    figures = [figure for figure in records[3].figures if figure.name != "fa3-fwd"]
    absent = an_attention_figure("fa3-fwd", None, "bfloat16", state="absent", why="gone", install="pip install fa3-fwd")
    records[3] = records[3].model_copy(update={"figures": [*figures, absent]})
    entry = attention_entry(records)
    assert entry["geomean_ratio"] is entry["geomean_ratio_cold"] is entry["worst_ratio"] is None
    assert entry["void_ratio"] == "shape 3 (fa3-fwd: absent)"
    text = _printed(report_data(records))
    assert "geometric mean: void: shape 3 (fa3-fwd: absent)" in text
    assert "fa3-fwd is absent, and required (gone); to install it: pip install fa3-fwd" in text


def test_the_latest_whole_run_counts():
    early, late = "2026-11-23T10:00:00+00:00", "2026-11-24T10:00:00+00:00"
    whole, part = a_run("whole", early), a_run("part", late, names=TWELVE[:2], us=5.0)
    entry = attention_entry([*part, *whole])
    assert entry["run"] == "whole"
    assert entry["shapes"]["shape 0"]["ratio"] == pytest.approx(0.8)
    newer = a_run("newer", late, us=5.0)
    assert attention_entry([*newer, *whole])["geomean_ratio"] < 0.6


def test_of_other_shapes_the_latest_record_counts():
    early, late = "2026-11-23T10:00:00+00:00", "2026-11-24T10:00:00+00:00"
    old = a_run("whole", early, names=(*TWELVE, "other"))
    new = a_run("again", late, names=("other",), us=5.0)
    entry = attention_entry([*old, *new])
    assert entry["run"] == "whole"
    assert entry["shapes"]["other"]["microseconds"] == 5.0
    assert entry["headline"] == list(TWELVE)


def test_the_tables_show_every_contender_ratio_and_failure():
    records = a_run()
    crash = an_attention_figure("sdpa-math", None, required=False, why="the process ended with -11")
    records[0] = records[0].model_copy(update={"figures": [*records[0].figures, crash]})
    text = _printed(report_data(records))
    for words in ("shape 11 *", "cudnn", "fa3-fwd", "0.800 (", "geometric mean of 12 shapes: 0.8", "800 TFLOP/s fp16"):
        assert words in text, words
    assert "shape 0: sdpa-math: failed: the process ended with -11" in text


def test_the_readmes_table_is_made_from_the_records():
    lines = attention_markdown(attention_entry(a_run()))
    assert len([line for line in lines if line.startswith("| shape ")]) == 13
    assert lines[2].startswith("| shape 0 `2, 1024, 1024, 8, 40` | sdpa-cudnn | 10.0 | 8.0 | 0.800 (0.")
    assert lines[-1].startswith("geometric mean of 12 shapes: 0.8")
    assert report_markdown(report_data(a_run()), []).startswith("**NVIDIA Test**\n\n| shape")
    records = [*a_run(), a_step_record()]
    both = report_markdown(report_data(records), rows_of(records))
    assert both.startswith("**NVIDIA Test**\n\n| case | machine |")
    assert "| sd15-512 | NVIDIA Test | float16 | 15.00 → 30.00 |" in both
    assert "| shape 11 `2," in both


def test_the_readmes_table_shows_our_time_in_the_peers_dtype():
    records = [an_attention_record("shape", headline=("shape", "gone"))]
    lines = attention_markdown(attention_entry(records))
    assert "| fast-bf16 (bf16) | 10.0 | 9.0 | 0.900" in lines[2]
    assert lines[2].endswith("| 298 |")  # of the bf16 call too
    assert lines[3].startswith("| gone | not measured |")
    assert lines[-1] == "geometric mean: void: not measured in one run: gone"


def test_a_machine_without_the_suite_has_no_table():
    assert report_markdown(report_data([a_selfcheck_record()]), []) == ""
