"""The measured part of README.md: between two comments, made from the records and never typed."""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from diffopt.bench.attention.record import AttentionRecord
from diffopt.bench.attention.tables import headline_markdown, summary
from diffopt.bench.record import AnyRecord
from diffopt.bench.report.attention_grids import attention_entries
from diffopt.bench.report.data import by_machine, latest_steps, report_data
from diffopt.bench.report.extras import require
from diffopt.bench.report.rows import DASH, Row, cells, claim_notes, code_notes, disturbed_notes, host_notes, rows_of
from diffopt.bench.step.record import StepRecord
from diffopt.bench.step.words import over_best
from diffopt.bench.workloads import StepWorkload, read_workload
from diffopt.errors import DiffoptError

BEGIN = "<!-- measured: made by `diffopt report readme` from the records in reports/; edits here are lost -->"
END = "<!-- measured: end -->"
HEADLINE = "standard"
"""The workload whose cases README shows; everything else is in the report."""

PLOT = "speed"

_WIDTH = 120
_ABOUT = (
    "Before → after: stock → diffopt, in turn in one run, at the same seeds. it/s is of the denoising loop, memory the "
    "peak of a call; best peer: ours over the fastest exact one of the same run, stock's UNet captured and "
    "channels-last (cuda-graph) or `torch.compile`; exact says how far the worst step is from a reference of higher "
    "precision, of what is allowed."
)
_ATTENTION = (
    "Headline shapes, µs a call, inputs hot, in the dtype of the best exact peer; ratio: ours over "
    "its. From the attention records of {files}; [all shapes, peers and spreads]({folder}/README.md#attention-alone)."
)
_MORE = "peers one by one, warm starts, where the time goes and prices: [the whole report]({folder}/README.md)"


class ReadmeError(DiffoptError):
    """A README that can't be read, written or has no place for what was measured."""


def measured_section(files: Mapping[str, Sequence[AnyRecord]], *, folder: str, plot: bool) -> str:
    """The Markdown between the two comments.

    Args:
        files: the records by the name of their file in `folder`, which lies beside the README.
        plot: whether `folder` has the plot of speeds.

    Raises:
        MissingExtraError: no scipy, which intervals are made with.
    """
    require("scipy.stats", "the measured part of README")
    records = [record for group in files.values() for record in group]
    workload = read_workload(HEADLINE)
    shown = [case.name for case in workload.cases] if isinstance(workload, StepWorkload) else []
    rows = [row for row in rows_of(records) if row.case in shown]
    steps = {name: latest_steps(group) for name, group in by_machine(records).items()}
    lines = ["| pipeline | machine | it/s | gain (95%) | best peer | memory | images/s | $ per 1000 | exact |"]
    lines += ["|---|---|---:|---:|---|---:|---:|---:|---|"]
    lines += [f"| {' | '.join(_cells(row, steps[row.machine][row.case]))} |" for row in rows]
    words = _ABOUT
    if any(steps[row.machine][row.case].workload.model.seed is not None for row in rows):
        words += " The SD models have random weights at their true size."
    lines += ["", *textwrap.wrap(words, _WIDTH, break_long_words=False, break_on_hyphens=False)]
    notes = claim_notes(rows)
    notes += host_notes(rows) + disturbed_notes(rows)
    notes += _left_out([(row, steps[row.machine][row.case]) for row in rows])
    lines += ["", *(f"- {note}" for note in (*notes, *code_notes(rows)))]
    lines.append(f"- {_MORE.format(folder=folder)}")
    if plot:
        lines += ["", "<picture>"]
        lines += [f'  <source media="(prefers-color-scheme: dark)" srcset="{folder}/{PLOT}-dark.png">']
        lines += [f'  <img alt="Iterations per second, stock and diffopt" src="{folder}/{PLOT}.png">', "</picture>"]
    lines += _attention(files, folder)
    lines += ["", f"Records: {_links(files, folder)}. The report as a [page]({folder}/index.html)."]
    return "\n".join(lines)


def _attention(files: Mapping[str, Sequence[AnyRecord]], folder: str) -> list[str]:
    """The means and, folded, the headline shapes, a row each; nothing where no attention was measured."""
    entries = attention_entries(report_data([record for group in files.values() for record in group]))
    if not entries:
        return []
    holding = [file for file, group in files.items() if any(isinstance(record, AttentionRecord) for record in group)]
    words = _ATTENTION.format(files=_links(holding, folder), folder=folder)
    means = [f"- attention alone, {name}: {summary(entry)}" for name, entry in entries.items()]
    return [
        *("", *means, ""),
        *("<details>", "<summary>Attention alone, shape by shape</summary>", ""),
        *textwrap.wrap(words, _WIDTH, break_long_words=False, break_on_hyphens=False),
        *("", *headline_markdown(entries), "", "</details>"),
    ]


def _links(files: Iterable[str], folder: str) -> str:
    return ", ".join(f"[{Path(file).stem}]({folder}/{file})" for file in files)


def with_section(text: str, section: str, *, where: str) -> str:
    """A README's text with its measured part replaced.

    Raises:
        ReadmeError: the two comments are not there once each, in order.
    """
    for mark in (BEGIN, END):
        if text.count(mark) != 1:
            raise ReadmeError(f"{where}: {mark!r} is there {text.count(mark)} times; once is needed")
    before, rest = text.split(BEGIN)
    if END not in rest:
        raise ReadmeError(f"{where}: {END!r} comes before {BEGIN!r}")
    return f"{before}{BEGIN}\n\n{section}\n\n{END}{rest.split(END)[1]}"


def _cells(row: Row, record: StepRecord) -> tuple[str, ...]:
    case, machine, _dtype, its, gain, memory, images, cost, verdict = cells(row)
    worst = record.exactness.worst
    exact = f"{verdict}: {worst.ours:.1e} of {worst.allowed:.1e}" if worst else verdict
    if record.decode:
        exact += f", decoded in {record.workload.decode}: {record.decode.ours:.1e} of {record.decode.allowed:.1e}"
    work = record.workload
    pipeline = f"{case}: {work.width}×{work.height}, {work.steps} steps, {work.dtype}"
    return pipeline, machine, its, gain, _best_peer(record), memory, images, cost, exact


def _left_out(pairs: Sequence[tuple[Row, StepRecord]]) -> list[str]:
    """Which peers nobody knows to be slower than the best, because they did not run beside these rows.

    Those that were left out, and those that `bench step` has for a case by now.
    """
    places: dict[tuple[str, ...], list[str]] = {}
    step = read_workload("step")
    known = {case.name: case.peers for case in step.cases} if isinstance(step, StepWorkload) else {}
    for row, record in pairs:
        ran = {peer.name for peer in record.peers}
        wanted = dict.fromkeys((*known.get(row.case, ()), *record.peers_left_out))
        if missing := tuple(name for name in wanted if name not in ran):
            places.setdefault(missing, []).append(f"{row.case} on {row.machine}")
    texts = [f"{' and '.join(where)}: {', '.join(names)}" for names, where in places.items()]
    return [f"peers that did not run: {'; '.join(texts)}"] if texts else []


def _best_peer(record: StepRecord) -> str:
    best = over_best(record)
    return f"× {best.ratio.ratio:.2f} {best.name}" if best.ratio else DASH
