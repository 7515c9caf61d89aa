"""The rendered report: one self-contained HTML page, its plots as PNG files, and a Markdown index."""

import dataclasses
import importlib.resources
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffopt.bench.attention.record import AttentionRecord
from diffopt.bench.attention.selfcheck_record import SelfcheckRecord
from diffopt.bench.record import AnyRecord
from diffopt.bench.report.attention_grids import attention_entries, attention_grids
from diffopt.bench.report.audit import audit_lines
from diffopt.bench.report.claims import METHOD, claims_of
from diffopt.bench.report.data import by_machine, latest_steps, report_data
from diffopt.bench.report.extras import require
from diffopt.bench.report.figures import DARK, LIGHT, Plot, png, svg
from diffopt.bench.report.grids import grids_of
from diffopt.bench.report.plots import plots_of
from diffopt.bench.report.published import MARK, published
from diffopt.bench.report.rows import HEADINGS, cells, claim_words, row_notes, rows_markdown, rows_of
from diffopt.bench.report.tables import attention_note
from diffopt.bench.step.free_running_words import difference_rows, free_running_lines
from diffopt.bench.step.words import peers_words, profile_words, warm_start_words
from diffopt.errors import DiffoptError
from diffopt.gpus import Price

PAGE, INDEX = "index.html", "README.md"


class RenderError(DiffoptError):
    """A report that can't be written."""


def render(records: Sequence[AnyRecord], folder: Path, prices: Mapping[str, Price] | None = None) -> list[Path]:
    """Write index.html, README.md and two PNG files per plot (NAME.png light, NAME-dark.png) into a folder.

    Returns:
        What was written.

    Raises:
        MissingExtraError: no matplotlib or jinja2.
        RenderError: no records, or the folder can't be written.
    """
    if not records:
        raise RenderError("no records to render")
    plots = plots_of(records)
    files: dict[str, bytes] = {PAGE: page(records, plots, prices).encode()}
    for plot in plots:
        files[f"{plot.name}.png"] = png(plot, LIGHT)
        files[f"{plot.name}-dark.png"] = png(plot, DARK)
    files[INDEX] = index(records, plots, prices).encode()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / name).write_bytes(content)
    except OSError as error:
        raise RenderError(f"{folder}: can't be written: {error.strerror}") from error
    return [folder / name for name in files]


def page(records: Sequence[AnyRecord], plots: Sequence[Plot], prices: Mapping[str, Price] | None = None) -> str:
    """The page: styles, numbers and plots in one file that loads nothing."""
    jinja2 = require("jinja2", "the page")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    source = importlib.resources.files("diffopt.bench.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    rows = rows_of(records, prices)
    data = report_data(records, prices)
    return environment.from_string(source).render(
        light=dataclasses.asdict(LIGHT),
        dark=dataclasses.asdict(DARK),
        records=len(records),
        latest=max(record.environment.time_utc for record in records).replace("T", " ").replace("+00:00", " UTC"),
        headings=HEADINGS,
        rows=[(row, cells(row)) for row in rows],
        notes=row_notes(rows, beside=False),
        grids=grids_of(records),
        plots=[(plot, jinja2.utils.markupsafe.Markup(svg(plot))) for plot in plots],
        attention=[attention_grids(name, entry) for name, entry in attention_entries(data).items()],
        machines=[_machine(name, group, data["gpus"][name]) for name, group in by_machine(records).items()],
        published=published(),
        mark=MARK,
        claim_method=f"Claims: {METHOD}",
    )


def index(records: Sequence[AnyRecord], plots: Sequence[Plot], prices: Mapping[str, Price] | None = None) -> str:
    """The Markdown index, with plots that follow the reader's light or dark theme."""
    rows = rows_of(records, prices)
    parts = ["# What was measured", "", "Made from the records beside it by `diffopt report render`; don't edit.", ""]
    if rows:
        parts += [rows_markdown(rows), "", "Before → after: stock → diffopt.", ""]
        parts += [*(f"- {note}" for note in row_notes(rows, beside=False)), ""]
    for grid in grids_of(records):
        parts += grid.markdown()
    for plot in plots:
        parts += [
            f"## {plot.title}",
            "",
            "<picture>",
            f'  <source media="(prefers-color-scheme: dark)" srcset="{plot.name}-dark.png">',
            f'  <img alt="{plot.title}" src="{plot.name}.png">',
            "</picture>",
            "",
            plot.caption,
            "",
        ]
    for name, entry in attention_entries(report_data(records)).items():
        for grid in attention_grids(name, entry):
            parts += grid.markdown()
    for publication in published():
        parts += [f"## {publication.title}", "", f"**{MARK}.** {publication.conditions}.", ""]
        parts += ["| GPU | it/s before | it/s after | after / before | |", "|---|---:|---:|---:|---|"]
        parts += [
            f"| {row.gpu} | {row.before_its:.2f} | {row.after_its:.2f} | × {row.gain:.2f} | {MARK} |"
            for row in publication.rows
        ]
        parts += ["", f"Source: {publication.source}.", ""]
    return "\n".join(parts)


def _machine(name: str, records: Sequence[AnyRecord], entry: dict[str, Any]) -> dict[str, Any]:
    """What the page says of one machine; software and driver are those of its latest record."""
    latest = records[-1].environment
    machine, software = latest.machine, latest.software
    facts: list[tuple[str, str]] = []
    if machine.gpu is not None:
        memory = f"{(machine.gpu_memory or 0) / 2**30:.0f} GiB, compute capability {machine.compute_capability}"
        limit = f", power limit {machine.power_limit_w:.0f} W" if machine.power_limit_w else ""
        facts.append(("GPU", f"{machine.gpu}, {memory}{limit}"))
        facts.append(("driver", f"{machine.driver or 'not readable'}, CUDA {machine.cuda}, cuDNN {machine.cudnn}"))
    facts.append(("CPU", f"{machine.cpu}, {machine.cores} cores, {machine.threads} threads used"))
    packages = ", ".join(f"{package} {version}" for package, version in software.packages.items() if version)
    facts.append(("software", f"Python {software.python}, {packages}"))
    dirty = " with changes" if software.dirty else ""
    commit = f"{software.commit}{dirty}, " if software.commit else ""
    facts.append(("source", f"{commit}hash {software.source_hash[:16]}"))
    cases = [
        {
            "name": case,
            "passed": record.exact,
            "exactness": record.verdict(),
            "compared": difference_rows(record.free_running) if record.free_running else [],
            "pictures": free_running_lines(record.free_running)[:1],
            "ran": audit_lines(record.plan),
            "peers": peers_words(record).removeprefix("peers: "),
            "profile": profile_words(record),
            "warm_start": warm_start_words(record).removeprefix("warm start "),
            "claims": [(what, claim_words(claim)) for what, claim in claims_of(record).items()],
            "record": record.id,
            "time": record.environment.time_utc.replace("+00:00", "").replace("T", " "),
            "commit": record.environment.software.commit or "",
        }
        for case, record in latest_steps(records).items()
    ]
    notes = [
        f"{case}: disturbed: {'; '.join(found['flags'])}" for case, found in entry["step"].items() if found["flags"]
    ]
    if any(isinstance(record, SelfcheckRecord) for record in records):
        notes.append(attention_note(entry["attention"]))
    if any(isinstance(record, AttentionRecord) for record in records):
        mean = entry["attention"]["geomean_ratio"]
        void = f"void: {entry['attention']['void_ratio']}"
        notes.append(f"attention suite, geometric mean over the best exact peers: {f'{mean:.3f}' if mean else void}")
    return {"name": name, "facts": facts, "cases": cases, "notes": notes}
