"""`diffopt report render`: the page, its plots and the index; what isn't in the records isn't drawn."""

import argparse
import dataclasses
import html.parser
import re
import sys
from pathlib import Path

import pytest
from chromium import headless_chromium
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sample_records import (
    a_certificate,
    a_selfcheck_record,
    a_step_record,
    an_attention_record,
    an_environment,
    some_free_running,
    some_pictures,
)

from diffopt.bench.record import append_record, read_records
from diffopt.bench.report.extras import MissingExtraError
from diffopt.bench.report.figures import svg
from diffopt.bench.report.plots import plots_of
from diffopt.bench.report.published import published
from diffopt.bench.report.render import RenderError, index, page, render
from diffopt.bench.report.rows import row_notes, rows_of
from diffopt.bench.report.scaling import AXES, scaling
from diffopt.bench.workloads import StepWorkload, read_workload, scaling_cases
from diffopt.commands import report as command
from diffopt.config import ConfigError

PICTURES = some_pictures([2.4, 2.5, 2.6]), some_pictures([1.2, 1.3, 1.4])


@pytest.fixture
def _matplotlib():
    pytest.importorskip("matplotlib", reason='needs matplotlib: pip install "diffopt[report]"')


def a_report():
    """Two machines, a failed case, a series of sizes, the attention suite and a self-check."""
    h200, cpu = an_environment(gpu="NVIDIA H200"), an_environment(gpu=None)
    return [
        a_step_record(environment=h200, pictures=PICTURES, free_running=some_free_running()),
        a_step_record(environment=h200, case="sd15-768", pictures=PICTURES, work={"width": 768, "height": 768}),
        a_step_record(environment=h200, case="wrong", certificate=a_certificate(ours=0.5)),
        a_step_record(environment=cpu, pictures=PICTURES, work={"dtype": "float32"}),
        an_attention_record(environment=h200),
        a_selfcheck_record(environment=h200),
    ]


def names(records):
    return [plot.name for plot in plots_of(records)]


def test_only_what_the_records_hold_is_drawn():
    everything = names(a_report())
    assert [name for name in everything if name != "gain"] == ["speed", "exactness", "stages", "scaling", "attention"]
    assert "scaling" not in names([a_step_record()])
    assert "stages" not in names([a_step_record()])
    assert names([a_step_record(certificate=a_certificate(ours=0.5))]) == ["exactness"]
    assert names([a_selfcheck_record()]) == []


def test_cases_for_scaling_are_in_no_other_plot_unless_they_are_alone():
    assert {"emoji-64", "sd15-1024", "sd15-512 batch 8"} <= scaling_cases()
    assert not {"emoji-128", "sd15-512", "sdxl-1024"} & scaling_cases()
    usual = a_step_record(pictures=PICTURES)
    extra, asked = (
        a_step_record(case="sd15-768", pictures=PICTURES, work={"name": name}) for name in ("full", "sizes")
    )

    def height(records):
        return next(plot.size[1] for plot in plots_of(records) if plot.name == "speed")

    assert height([usual, extra]) == height([usual]) == height([extra])
    assert height([usual, asked]) > height([usual])  # the same case of a workload that is about it


@pytest.mark.usefixtures("_matplotlib")
def test_plots_have_the_order_of_the_rows():
    """One case on two machines side by side, whatever was measured in between."""
    first, second = an_environment(gpu="NVIDIA A"), an_environment(gpu="NVIDIA B")
    records = [
        a_step_record(environment=environment, case=case, pictures=PICTURES)
        for environment in (second, first)
        for case in ("one", "two")
    ]
    order = [("one", "NVIDIA A"), ("one", "NVIDIA B"), ("two", "NVIDIA A"), ("two", "NVIDIA B")]
    assert [(row.case, row.machine) for row in rows_of(records)] == order
    for plot in plots_of(records):
        labels = re.findall(r">\s*(one|two|NVIDIA A|NVIDIA B)\b[^<]*<", svg(plot))
        assert list(dict.fromkeys(zip(labels[::2], labels[1::2], strict=True))) == order, plot.name


def test_rows_have_the_order_of_sizes_and_say_which_code_they_are_of():
    """Whatever was measured anew last; what ran on CPUs alone comes at the end."""
    large, small = {"width": 1024, "height": 1024}, {"width": 512, "height": 512}
    records = [
        a_step_record(case="cpu", work={"width": 64, "height": 64}, environment=an_environment(gpu=None)),
        a_step_record(case="large", work=large, environment=an_environment(time_utc="2026-01-01T00:00:00+00:00")),
        a_step_record(case="small", work=small, environment=an_environment(time_utc="2026-01-02T00:00:00+00:00")),
    ]
    assert [row.case for row in rows_of(records)] == ["small", "large", "cpu"]
    rows = rows_of(records)
    assert not any("different code" in note for note in row_notes(rows))
    anew = [dataclasses.replace(row, commit="1234567890" if row.case == "small" else "abcdefghij") for row in rows]
    (note,) = [note for note in row_notes(anew) if "different code" in note]
    assert "1234567: small on NVIDIA Test" in note
    assert "large on NVIDIA Test" in note.partition("abcdefg: ")[2]
    changed = [dataclasses.replace(row, commit="1234567890", dirty=row.case == "small") for row in rows]
    (note,) = [note for note in row_notes(changed) if "different code" in note]
    assert "1234567 with changes: small on NVIDIA Test" in note


@pytest.mark.usefixtures("_matplotlib")
def test_rates_far_apart_share_a_logarithmic_axis():
    slow = a_step_record(environment=an_environment(gpu=None), loops=([60.0, 61.0], [50.0, 51.0]))
    for records, scale in (([a_step_record()], False), ([a_step_record(), slow], True)):
        (plot,) = [plot for plot in plots_of(records) if plot.name == "speed"]
        assert ("logarithmic" in svg(plot)) is scale


def test_scaling_takes_records_that_differ_in_one_thing_only():
    base = a_step_record(pictures=PICTURES)
    wide = a_step_record(case="wide", pictures=PICTURES, work={"width": 1024})
    four = a_step_record(case="four", pictures=PICTURES, work={"batch": 4})
    both = a_step_record(case="both", work={"steps": 5, "guidance": 3.0})
    wrong = a_step_record(case="wrong", work={"steps": 9}, certificate=a_certificate(ours=0.5))
    found = {series.axis: series for series in scaling([base, wide, four, both, wrong])}
    assert set(found) == {"pixels", "batch"}
    assert found["pixels"].points == ((512 * 512, 2.5, 1.3), (1024 * 512, 2.5, 1.3))
    assert found["batch"].points == ((1, 2.5, 1.3), (4, 2.5 / 4, 1.3 / 4))
    assert found["batch"].what == "whole pictures"
    assert found["batch"].fixed == "512×512, 30 steps"


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"name": "another", "hash": "0" * 64, "seed": 0, "parameters": 10}},
        {"model": {"name": "random:sd15", "hash": "1" * 64, "seed": 0, "parameters": 10}},
        *({"dtype": "bfloat16"}, {"scheduler": "DDIMScheduler"}, {"guidance": 3.0}),
        *({"batch": 4}, {"steps": 5}, {"width": 512}),
    ],
)
def test_sizes_of_other_work_make_no_series(change):
    """Nor do two cases of one size."""
    assert scaling([a_step_record(), a_step_record(case="other", work={"width": 1024, **change})]) == []


def test_without_pictures_of_all_sizes_loops_are_compared():
    records = [a_step_record(pictures=PICTURES), a_step_record(case="wide", work={"width": 1024})]
    (series,) = scaling(records)
    assert series.what == "denoising loops"
    assert series.points == ((512 * 512, 2.0, 1.0), (1024 * 512, 2.0, 1.0))


@given(steps=st.lists(st.integers(1, 50), min_size=1, max_size=5))
def test_scaling_is_sorted_and_has_two_points_at_least(steps):
    records = [a_step_record(case=f"case {number}", work={"steps": value}) for number, value in enumerate(steps)]
    found = scaling(records)
    assert len(found) == (len(set(steps)) > 1)
    for series in found:
        assert [value for value, _, _ in series.points] == sorted(set(steps))
        assert series.what == "denoising loops"


def test_the_full_workload_feeds_every_axis_for_the_bundled_model_and_on_a_gpu_for_sd15():
    """Records as `diffopt bench full` would make them, of a time that grows with pixels, batch and steps."""
    workload = read_workload("full")
    assert isinstance(workload, StepWorkload)
    records = []
    for case in workload.cases:
        work = {name: getattr(case, name) for name in ("width", "height", "batch", "steps", "guidance")}
        work["model"] = {"name": case.model, "hash": case.model, "parameters": 1}
        seconds = case.width * case.height * case.batch * case.steps / 1e6
        pictures = tuple(some_pictures([seconds * factor] * 2) for factor in (1.0, 0.5))
        records.append(a_step_record(case=case.name, work=work, pictures=pictures))
    found = {(series.model, series.axis): series for series in scaling(records)}
    assert set(found) == {(model, axis) for model in ("emoji", "random:sd15") for axis in AXES}
    assert all(len(series.points) >= 3 for series in found.values())
    assert all(series.what == "whole pictures" for series in found.values())
    sizes = found["emoji", "pixels"].points
    assert [value for value, _, _ in sizes] == [64 * 64, 128 * 128, 192 * 192, 256 * 256]
    assert [stock for _, stock, _ in sizes] == [pytest.approx(value * 10 / 1e6) for value, _, _ in sizes]
    assert [ours for _, _, ours in sizes] == [pytest.approx(value * 5 / 1e6) for value, _, _ in sizes]
    assert "scaling" in names(records)


def test_the_index_holds_the_numbers_and_marks_what_was_published():
    records = a_report()
    text = index(records, plots_of(records))
    assert "| sd15-512 | NVIDIA H200 | float16 | 15.00 → 30.00 |" in text
    assert "| sd15-512 | Test CPU (2 threads) | float32 | 15.00 → 30.00 |" in text
    assert 'srcset="speed-dark.png"' in text
    for publication in published():
        for row in publication.rows:
            assert re.search(rf"\| {row.gpu} \| .* \| published, not measured here \|", text)
    assert "| wrong | NVIDIA H200 | float16 | — |" in text


def test_the_index_has_every_contender_of_the_attention_suite_below_its_plot():
    records = a_report()
    text = index(records, plots_of(records)).partition("## Attention alone\n")[2]
    assert (
        "## Attention on NVIDIA H200\n\n| shape | best peer | ratio (95%) | diffopt | diffopt-bf16 | fast | slow |"
        in text
    )
    assert re.search(r"\| sd15-512 self 32x32 \* \| fast-bf16 \| 0\.900 .* \| 8\.0 ±1% \| .* \| 30\.0 ±1% \|", text)
    cold = text.partition("## Attention on NVIDIA H200, inputs cold\n")[2]
    assert "| sd15-512 self 32x32 * | 0.900 | 16.0 ±1% | 18.0 ±1% | 20.0 ±1% | 60.0 ±1% |" in cold
    assert "| sd15-512 self 32x32 * | 2, 1024, 1024, 8, 40 |" in cold
    assert "Attention on" not in index(records[:4], [])


def test_the_page_has_every_contender_of_the_attention_suite_below_the_plots():
    text = page(a_report(), []).partition('<section id="attention-nvidia-h200"')[2]
    assert text.index("inputs cold") < text.index('<section id="machines">')
    for cell in ("8.0 ±1%", "30.0 ±1%", "60.0 ±1%", "2, 1024, 1024, 8, 40"):
        assert f">{cell}</td>" in text, cell
    assert "Attention on" not in page([a_step_record()], [])


def test_cases_stand_together_and_machines_apart():
    rows = [(row.case, row.machine) for row in rows_of(a_report())]
    assert rows[-2:] == [("sd15-512", "NVIDIA H200"), ("sd15-512", "Test CPU (2 threads)")], "what a CPU can do is last"


def test_the_published_rows_are_photorooms():
    (photoroom,) = published()
    rows = {row.gpu: (row.before_its, row.after_its) for row in photoroom.rows}
    assert rows["NVIDIA A100-SXM4-40GB"] == (18.6, 29.0)
    assert rows["NVIDIA T4"] == (3.5, 5.5)
    assert next(row.gain for row in photoroom.rows if row.gpu == "NVIDIA T4") == pytest.approx(5.5 / 3.5)
    assert len(rows) == 7
    assert photoroom.date
    assert photoroom.source


@pytest.mark.parametrize("speeds", [(0, 1), (1, 0), (-1, 1)])
def test_a_published_row_without_speed_is_refused(tmp_path, monkeypatch, speeds):
    (tmp_path / "published").mkdir()
    head = 'title = "t"\nsource = "s"\ndate = "d"\nconditions = "c"\n'
    row = '[[rows]]\ngpu = "g"\nbefore_its = {}\nafter_its = {}\n'.format(*speeds)
    (tmp_path / "published" / "bad.toml").write_text(head + row)
    monkeypatch.setattr("diffopt.config.config_folder", lambda: tmp_path)
    with pytest.raises(ConfigError, match=r"bad\.toml: g: iterations per second above 0"):
        published()


def test_without_matplotlib_one_line_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r'a plot needs matplotlib, .*: pip install "diffopt\[report\]"'):
        render(a_report(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_without_records_there_is_no_page(tmp_path):
    with pytest.raises(RenderError, match="no records"):
        render([], tmp_path)


@pytest.mark.usefixtures("_matplotlib")
def test_the_command_writes_page_plots_and_index(tmp_path, capsys):
    for record in a_report():
        append_record(tmp_path / "r.jsonl", record)
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers(required=True))
    folder = tmp_path / "new" / "folder"
    arguments = ["report", "render", str(tmp_path / "r.jsonl"), "--output", str(folder)]
    parsed = parser.parse_args([*arguments, "--price", "NVIDIA H200=7.2"])
    assert parsed.run(parsed) == 0
    assert "index.html" in capsys.readouterr().out
    written = {path.name for path in folder.iterdir()}
    wanted = {f"{name}{theme}.png" for name in names(a_report()) for theme in ("", "-dark")}
    assert written == {"index.html", "README.md", *wanted}
    assert Image.open(folder / "speed.png").mode == "P", "a palette: a third of the bytes"
    light, dark = (Image.open(folder / f"speed{theme}.png").convert("L").getpixel((2, 2)) for theme in ("", "-dark"))
    assert light == 255
    assert dark < 40
    assert "NVIDIA H200: $7.2 per hour" in (folder / "README.md").read_text()
    first = {name: (folder / name).read_bytes() for name in written}
    assert parsed.run(parsed) == 0
    assert {name: (folder / name).read_bytes() for name in written} == first  # the same records, the same bytes


def test_the_committed_index_is_made_from_the_committed_records():
    pytest.importorskip("scipy", reason='needs scipy: pip install "diffopt[report]"')
    folder = Path(__file__).parent.parent / "reports"
    records = [record for file in sorted(folder.glob("*.jsonl")) for record in read_records(file)]
    again = index(records, plots_of(records))
    assert (folder / "README.md").read_text() == again, "run: diffopt report render --output reports"


@pytest.mark.usefixtures("_matplotlib")
def test_a_folder_that_can_not_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RenderError, match="can't be written"):
        render(a_report(), tmp_path / "file")


class _Links(html.parser.HTMLParser):
    """Everything an element would load."""

    def __init__(self, text):
        super().__init__()
        self.loaded = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        wanted = ("src", "srcset", "data", "xlink:href") if tag != "link" else ("href",)
        self.loaded += [value for name, value in attrs if name in wanted]


def test_the_page_escapes_what_records_say():
    work = {"model": {"name": "<script>alert(1)</script>", "hash": "0" * 64, "seed": 0, "parameters": 1}}
    text = page([a_step_record(case="<b>bold</b>", work=work)], [])
    assert "<b>bold" not in text
    assert "&lt;b&gt;bold" in text
    assert "<script" not in text


def test_the_page_says_what_ran_and_why():
    sdpa = {"backend": "sdpa", "calls": 3, "reason": "diffopt: masked", "fallback": True}
    ours = {"backend": "diffopt", "calls": 4, "reason": "fastest"}
    layers = [{"optimized": True, "kind": "self", "runs": [ours, sdpa]}]
    layers += [{"optimized": True, "kind": "self", "runs": [ours]}]
    layers += [{"optimized": False, "reasons": ["a custom processor"], "runs": []}]
    plan = {"layers": layers, "notes": ["diffusers' attention backend is set to 'flash', which has no effect"]}
    text = page([a_step_record(plan=plan)], [])
    for words in (
        "self-attention: diffopt in 2 layers, 8 calls (fastest)",
        "self-attention: sdpa in 1 layer, 3 calls, fallbacks: 3 (diffopt: masked)",
        "kept as they were: 1 layers (a custom processor)",
        "has no effect",
    ):
        assert words in text, words


@pytest.mark.browser
@pytest.mark.parametrize("plotted", [False, True], ids=["tables", "plots"])
def test_the_page_opens_in_light_dark_and_print(plotted, tmp_path):
    if plotted:
        pytest.importorskip("matplotlib", reason='needs matplotlib: pip install "diffopt[report]"')
    records = a_report()
    text = page(records, plots_of(records) if plotted else [])
    assert all(value.startswith(("data:", "#")) for value in _Links(text).loaded)
    file = tmp_path / "index.html"
    file.write_text(text, encoding="utf-8")
    with headless_chromium() as browser:
        backgrounds = {}
        for look in ("light", "dark", "print"):
            tab = browser.new_page(
                color_scheme="light" if look == "light" else "dark", viewport={"width": 1100, "height": 800}
            )
            asked, complaints = [], []
            tab.on("request", lambda request, asked=asked: asked.append(request.url))
            tab.on("console", lambda message, complaints=complaints: complaints.append(message.text))
            if look == "print":
                tab.emulate_media(media="print")
            tab.goto(file.as_uri())
            assert asked == [file.as_uri()]
            assert complaints == []
            backgrounds[look] = tab.evaluate("getComputedStyle(document.body).backgroundColor")
            assert tab.evaluate("document.documentElement.scrollWidth") <= 1100
            assert tab.locator("#results tbody tr").count() == 4
            assert tab.locator("#attention-nvidia-h200 tbody tr").count() == 3  # hot, cold, rates
            assert tab.locator("#published .mark").inner_text() == "published, not measured here"
            assert tab.locator("figure svg").count() == (len(plots_of(records)) if plotted else 0)
            if plotted:
                colour = "getComputedStyle(document.querySelector('#plot-speed svg text')).fill"
                assert tab.evaluate(colour) != backgrounds[look]
                assert tab.locator("#plot-exactness svg").bounding_box()["width"] > 500
        narrow = browser.new_page(viewport={"width": 390, "height": 800})
        narrow.goto(file.as_uri())
        assert narrow.evaluate("document.documentElement.scrollWidth") <= 390
    assert backgrounds["light"] == backgrounds["print"] == "rgb(255, 255, 255)"
    assert backgrounds["dark"] == "rgb(18, 22, 28)"
