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
from diffopt.bench.attention.tables import SPREAD, headline_markdown, ratios_block, summary, times_block
from diffopt.bench.record import append_record, read_records
from diffopt.bench.report.attention_grids import attention_entries, attention_grids
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


def test_a_terminal_shows_medians_with_their_spread_hot_and_cold():
    slow = an_attention_figure("fa3-fwd", 2000.0, "bfloat16", hot_us=[1900.0, 2000.0, 2041.0])
    ours = [an_attention_figure("diffopt", 8.0), an_attention_figure("diffopt-bf16", 8.0, "bfloat16")]
    text = _printed(report_data([an_attention_record("shape", [*ours, slow], headline=("shape",))]))
    hot, cold = (text.partition(f"inputs {heat}")[2] for heat in ("hot", "cold"))
    (row,) = [line.split() for line in hot.partition("inputs cold")[0].splitlines() if line.startswith(" shape *")]
    assert row == ["shape", "*", "8.0", "±1%", "8.0", "±1%", "2000", "±4%"]  # 70.5 of 2000 are 3.5%
    (row,) = [line.split() for line in cold.partition("ours against")[0].splitlines() if line.startswith(" shape *")]
    assert row == ["shape", "*", "16.0", "±1%", "16.0", "±1%", "4000", "±1%"]
    assert f"times: {SPREAD}" in text


def test_what_has_no_time_keeps_its_state_in_both_blocks():
    records = a_run()
    crash = an_attention_figure("sdpa-math", None, required=False)
    records[0] = records[0].model_copy(update={"figures": [*records[0].figures, crash]})
    entry = attention_entry(records)
    for block in (times_block(entry, "hot_us"), times_block(entry, "cold_us")):
        assert block.headings[-1] == "math"
        assert block.rows[0][-1] == "failed"
        assert block.rows[1][-1] == "—"  # nobody asked for it there


def test_a_block_of_few_columns_and_two_side_by_side():
    entry = attention_entry(a_run())
    times, ratios = times_block(entry, "hot_us"), ratios_block(entry)
    few = ratios.only("shape", "best peer")
    assert few.rows[0] == ("shape 0 *", "sdpa-cudnn")
    assert few.beside(times).headings == ("shape", "best peer", *times.headings[1:])
    assert few.beside(times).rows[3] == (*few.rows[3], *times.rows[3][1:])


def test_the_report_holds_every_shape_and_contender_per_machine():
    other = an_environment(gpu="NVIDIA Other")
    records = [*a_run(names=(*TWELVE, "more")), an_attention_record(environment=other)]
    entries = attention_entries(report_data(records))
    assert list(entries) == ["NVIDIA Other", "NVIDIA Test"]
    hot, cold, rates = attention_grids("NVIDIA Test", entries["NVIDIA Test"])
    assert hot.headings == ("shape", "best peer", "ratio (95%)", "diffopt", "diffopt-bf16", "cudnn", "fa3-fwd")
    assert hot.rows[0][:2] == ("shape 0 *", "sdpa-cudnn")
    assert hot.rows[0][2].startswith("0.800 (0.")
    assert hot.rows[0][3:] == ("8.0 ±1%", "8.1 ±1%", "10.0 ±1%", "20.0 ±1%")
    assert cold.rows[0] == ("shape 0 *", "0.800", "16.0 ±1%", "16.2 ±1%", "20.0 ±1%", "40.0 ±1%")
    assert rates.rows[0] == ("shape 0 *", "2, 1024, 1024, 8, 40", "336", "42%", "1.012", "+0 B")
    for grid in (hot, cold, rates):
        assert [row[0] for row in grid.rows] == [*(f"{name} *" for name in TWELVE), "more"]
    assert any(note.startswith("geometric mean of 12 shapes: 0.8") for note in hot.notes)


def test_markdown_has_the_attention_below_the_steps():
    text = report_markdown(report_data(a_run()), [])
    assert text.startswith("**NVIDIA Test**\n\n## Attention on NVIDIA Test\n\n| shape | best peer | ratio (95%) |")
    records = [*a_run(), a_step_record()]
    both = report_markdown(report_data(records), rows_of(records))
    assert both.startswith("**NVIDIA Test**\n\n| case | machine |")
    assert "| sd15-512 | NVIDIA Test | float16 | 15.00 → 30.00 |" in both
    assert "| shape 11 * | sdpa-cudnn | 0.910" in both


def test_the_readmes_table_has_a_row_a_shape_and_the_machines_side_by_side():
    lines = headline_markdown({"A": attention_entry(a_run()), "B": attention_entry(a_run(us=5.0))})
    assert lines[0].startswith("| shape `B, N_q, N_k, H, D` | A: diffopt, µs | best exact peer, µs | ratio (95%) | B: ")
    assert lines[1] == "|---|---:|---:|---:|---:|---:|---:|"
    assert len(lines) == 14
    assert lines[2].startswith("| shape 0 `2, 1024, 1024, 8, 40` | 8.0 | sdpa-cudnn 10.0 | 0.800 (0.")
    assert "| 5.0 | sdpa-cudnn 10.0 | 0.500 (0." in lines[2]


def test_the_readmes_table_shows_our_time_in_the_peers_dtype():
    entry = attention_entry([an_attention_record("shape", headline=("shape", "gone"))])
    lines = headline_markdown({"A": entry})
    assert "| 9.0 (bf16) | fast-bf16 (bf16) 10.0 | 0.900" in lines[2]
    assert lines[3] == "| gone | — | not measured | — |"
    assert summary(entry) == "geometric mean: void: not measured in one run: gone"


def test_the_readmes_table_says_what_is_void():
    figures = [an_attention_figure("diffopt", 8.0), an_attention_figure("fast", None)]
    entry = attention_entry([an_attention_record("shape", figures)])
    assert headline_markdown({"A": entry})[2].endswith("| 8.0 | void: fast: failed | — |")


def test_a_machine_without_the_suite_has_no_table():
    assert report_markdown(report_data([a_selfcheck_record()]), []) == ""
