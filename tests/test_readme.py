"""README's measured part: made from the records, and found out when it isn't."""

import argparse
import re
import sys
from pathlib import Path

import pytest
from sample_records import a_certificate, a_step_record, an_attention_record, an_environment, some_pictures

from diffopt.bench.record import append_record, read_records
from diffopt.bench.report.extras import MissingExtraError
from diffopt.bench.report.plots import plots_of
from diffopt.bench.report.readme import BEGIN, END, ReadmeError, measured_section, with_section
from diffopt.bench.report.render import index
from diffopt.cli import main
from diffopt.commands import report as command
from diffopt.errors import InputError

ROOT = Path(__file__).parent.parent
AROUND = f"# A project\n\n{BEGIN}\nold\n{END}\n\nThe rest.\n"


@pytest.fixture
def _scipy():
    pytest.importorskip("scipy", reason='needs scipy: pip install "diffopt[report]"')


@pytest.fixture
def project(tmp_path):
    """A README and a record beside it."""
    (tmp_path / "README.md").write_text(AROUND, encoding="utf-8")
    append_record(tmp_path / "reports" / "nvidia-test.jsonl", a_step_record())
    return tmp_path


def _run(*arguments):
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers(required=True))
    parsed = parser.parse_args(["report", "readme", *map(str, arguments)])
    return parsed.run(parsed)


def test_only_what_is_between_the_comments_is_replaced():
    once = with_section(AROUND, "| new |", where="README.md")
    assert once == f"# A project\n\n{BEGIN}\n\n| new |\n\n{END}\n\nThe rest.\n"
    assert with_section(once, "| new |", where="README.md") == once


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nothing", "is there 0 times; once is needed"),
        (f"{BEGIN}{BEGIN}{END}", "is there 2 times"),
        (f"{END}\n{BEGIN}", "comes before"),
    ],
)
def test_a_readme_without_its_comments_is_refused(text, words):
    with pytest.raises(ReadmeError, match=f"README.md: .*{words}"):
        with_section(text, "", where="README.md")


@pytest.mark.usefixtures("_scipy")
def test_both_directions(project, capsys):
    readme = project / "README.md"
    assert _run(readme, "--check") == 1
    assert "is not made from the records" in capsys.readouterr().err
    assert readme.read_text() == AROUND  # a check changes nothing
    assert _run(readme) == 0
    assert "15.00 → 30.00" in readme.read_text()
    assert readme.read_text().endswith("The rest.\n")
    assert _run(readme, "--check") == 0
    assert _run(readme) == 0
    assert "as it was" in capsys.readouterr().out
    readme.write_text(readme.read_text().replace("30.00", "31.00"))
    assert _run(readme, "--check") == 1
    append_record(project / "reports" / "nvidia-test.jsonl", a_step_record(case="sdxl-1024"))
    assert _run(readme) == 0
    assert "sdxl-1024" in readme.read_text()
    assert [path.name for path in project.iterdir() if path.is_file()] == ["README.md"]


@pytest.mark.usefixtures("_scipy")
def test_the_check_looks_at_the_reports_index_too(project, capsys):
    _run(project / "README.md")
    records = read_records(project / "reports" / "nvidia-test.jsonl")
    listing = project / "reports" / "README.md"
    listing.write_text(index(records, plots_of(records)), encoding="utf-8")
    assert _run(project / "README.md", "--check") == 0
    listing.write_text("old")
    assert _run(project / "README.md", "--check") == 1
    assert "diffopt report render --output" in capsys.readouterr().err


@pytest.mark.usefixtures("_scipy")
def test_the_section_shows_headline_cases_prices_failures_and_files():
    pictures = some_pictures([2.0, 2.1]), some_pictures([1.0, 1.1])
    records = [
        a_step_record(pictures=pictures),
        a_step_record(case="sd15-512 50 steps"),
        a_step_record(case="sd21-768", environment=an_environment(gpu="NVIDIA Other"), certificate=a_certificate(0.5)),
        an_attention_record(),
    ]
    text = measured_section({"a.jsonl": records[:3], "b.jsonl": records[3:]}, folder="reports", plot=True)
    assert "| sd15-512: 512×512, 30 steps, float16 | NVIDIA Test | 15.00 → 30.00 |" in text
    assert "sd15-512 50 steps" not in text  # not of the headline workload
    assert "| NVIDIA Other | — | — |" in text
    assert "FAILED: 5.0e-01 of 2.0e-03" in text
    assert "- attention alone, NVIDIA Test: geometric mean of 1 shapes: 0.900" in text
    assert "| sd15-512 self 32x32 `2, 1024, 1024, 8, 40` | 9.0 (bf16) | fast-bf16 (bf16) 10.0 | 0.900 (" in text
    assert re.search(r"attention\s+records\s+of\s+\[b\]\(reports/b.jsonl\);", text)  # and not of a, which has none
    assert "(reports/README.md#attention-alone)" in text
    assert "[the whole report](reports/README.md)" in text
    assert "[a](reports/a.jsonl)" in text
    assert "reports/speed-dark.png" in text
    assert max(len(line) for line in text.splitlines() if not line.startswith(("|", "-"))) <= 140
    steps_alone = measured_section({"a.jsonl": records[:3]}, folder="reports", plot=False)
    assert "<picture>" not in steps_alone
    assert "ttention alone" not in steps_alone


@pytest.mark.usefixtures("_scipy")
def test_the_section_says_what_disturbed_and_which_weights_are_random():
    method = a_step_record().method
    assert method is not None
    disturbed = method.model_copy(update={"flags": ("clocks throttled (power cap) at 7 of 38 looks",)})
    text = measured_section({"a.jsonl": [a_step_record(method=disturbed)]}, folder="reports", plot=False)
    assert "- disturbed on NVIDIA Test, clocks throttled (power cap): sd15-512 (7 of 38 looks)\n" in text
    assert "random weights at their true size" in " ".join(text.split())
    real = {"model": {"name": "emoji", "hash": "0" * 64, "parameters": 10}}
    text = measured_section({"a.jsonl": [a_step_record(work=real)]}, folder="reports", plot=False)
    assert "random weights" not in " ".join(text.split())
    assert "disturbed" not in text


def test_without_scipy_one_line_says_so(project, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(MissingExtraError, match=r"the measured part of README needs scipy"):
        _run(project / "README.md", "--check")


def test_without_records_or_readme_one_line_says_so(tmp_path, capsys):
    with pytest.raises(InputError, match="no records in"):
        _run(tmp_path / "README.md")
    assert main(["report", "readme", str(tmp_path / "README.md")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.usefixtures("_scipy")
def test_a_readme_that_is_not_there_is_one_line(project):
    (project / "README.md").unlink()
    with pytest.raises(ReadmeError, match="can't be read or written: No such file"):
        _run(project / "README.md")


@pytest.mark.usefixtures("_scipy")
def test_the_committed_readme_is_made_from_the_committed_records():
    assert _run(ROOT / "README.md", "--check") == 0
