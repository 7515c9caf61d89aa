"""`diffopt report`: what the records say."""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffopt.commands.output import print_whole
from diffopt.errors import InputError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from diffopt.bench.record import AnyRecord
    from diffopt.bench.schema import RecordError
    from diffopt.gpus import Price

_WIDTH = 180
"""Of a line where the terminal doesn't say."""

REGRESSION = OUT_OF_DATE = 1


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `report` and what it can do."""
    parser = commands.add_parser("report", help="show what was measured", description="Show what was measured.")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    show = actions.add_parser("show", help="a table per machine", description="Show the latest record of every case.")
    show.add_argument("files", nargs="*", type=Path, metavar="FILE", help="records (default: reports/*.jsonl)")
    show.add_argument("--format", choices=("table", "json", "csv", "markdown"), default="table", help=_FORMAT)
    show.set_defaults(run=show_report)
    merge = actions.add_parser(
        "merge",
        help="several machines in one table",
        description="One row per machine and case: before, after, gain, memory, images/s, cost. Like beside like only.",
    )
    merge.add_argument("files", nargs="+", type=Path, metavar="FILE", help="records, a file per machine")
    merge.add_argument("--format", choices=("table", "json", "csv", "markdown"), default="table", help=_FORMAT)
    merge.add_argument("--workload", metavar="NAME", help="only cases of this workload")
    merge.add_argument("--case", action="append", metavar="CASE", help="only this case; may be repeated")
    merge.set_defaults(run=merge_reports)
    compare = actions.add_parser(
        "compare",
        help="two sets of records of one machine: what became slower",
        description="Compare ours in OLD and NEW. Exit code 1 if a case became slower, larger or inexact.",
    )
    compare.add_argument("old", type=Path, metavar="OLD", help="records from before")
    compare.add_argument("new", type=Path, metavar="NEW", help="records from after")
    compare.set_defaults(run=compare_reports)
    page = actions.add_parser(
        "render",
        help="a page, plots and an index in Markdown",
        description='Write index.html (one file, no network), PNG plots and README.md. Needs the extra "report".',
    )
    page.add_argument("files", nargs="*", type=Path, metavar="FILE", help="records (default: reports/*.jsonl)")
    page.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="where to write")
    page.set_defaults(run=render_report)
    readme = actions.add_parser(
        "readme",
        help="README's table, made from the records",
        description="Rewrite the measured part of a README from the records in its folder reports/. Needs scipy.",
    )
    readme.add_argument("file", nargs="?", type=Path, metavar="README", help="default: the checkout's README.md")
    readme.add_argument("--check", action="store_true", help="change nothing; exit code 1 if it is out of date")
    readme.set_defaults(run=write_readme)
    for action in (show, merge, page):
        action.add_argument("--price", action="append", default=[], metavar="[MACHINE=]USD", help="dollars per hour")
    for action in (show, merge, page, compare):
        action.add_argument("--lenient", action="store_true", help="skip damaged lines, naming them")
    _add_selfcheck_parser(actions)


_FORMAT = "default: %(default)s"


def _add_selfcheck_parser(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    add = actions.add_parser(
        "add-selfcheck",
        help="keep a kernel self-check as a record",
        description="Keep the result of `python -m diffopt_kernels.selfcheck --json FILE` as a record of this machine.",
    )
    add.add_argument("file", type=Path, metavar="FILE", help="what the self-check wrote")
    add.add_argument("--output", type=Path, metavar="FILE", help="records (default: out/bench/<machine>.jsonl)")
    add.add_argument("--device", help="cpu, cuda or cuda:N (default: the first GPU, or the CPU without one)")
    add.set_defaults(run=add_selfcheck)


def show_report(arguments: argparse.Namespace) -> int:
    """Print the tables, or the data as JSON, CSV or Markdown, on stdout."""
    from diffopt.bench.report.data import report_data
    from diffopt.bench.report.rows import rows_csv, rows_of
    from diffopt.bench.report.tables import report_markdown

    files = arguments.files or default_files()
    records = [record for group in read_files(files, arguments.lenient).values() for record in group]
    if not records:
        raise InputError("FILE", ", ".join(map(str, files)), "no records in it; `diffopt bench quick` makes some")
    prices = prices_of(arguments.price, records)
    if arguments.format == "json":
        _print_json(report_data(records, prices))
    elif arguments.format == "csv":
        print(rows_csv(rows_of(records, prices)), end="")
    elif arguments.format == "markdown":
        print(report_markdown(report_data(records, prices), rows_of(records, prices)))
    else:
        print_report(records, prices)
    return 0


def merge_reports(arguments: argparse.Namespace) -> int:
    """Print one table of several machines on stdout."""
    from diffopt.bench.report.merge import merged_rows
    from diffopt.bench.report.rows import row_notes, rows_csv, rows_markdown, rows_table

    files = {name: _chosen(group, arguments) for name, group in read_files(arguments.files, arguments.lenient).items()}
    prices = prices_of(arguments.price, [record for group in files.values() for record in group])
    rows = merged_rows(files, prices)
    if arguments.format == "json":
        import dataclasses

        _print_json({"rows": [dataclasses.asdict(row) for row in rows], "notes": row_notes(rows)})
    elif arguments.format == "csv":
        print(rows_csv(rows), end="")
    elif arguments.format == "markdown":
        print("\n".join([rows_markdown(rows), "", *(f"- {note}" for note in row_notes(rows))]))
    else:
        print_parts([rows_table(rows), "\n".join(row_notes(rows))])
    return 0


def compare_reports(arguments: argparse.Namespace) -> int:
    """Print what changed; exit code 1 for a regression."""
    from diffopt.bench.report.compare import changes_table, compare, on_one_side

    old, new = (
        [record for group in read_files([path], arguments.lenient).values() for record in group]
        for path in (arguments.old, arguments.new)
    )
    changes = compare(old, new)
    print_parts([changes_table(changes), *on_one_side(old, new)])
    regressions = sum(change.state == "regression" for change in changes)
    print(f"{regressions} of {len(changes)} cases regressed")
    return REGRESSION if regressions else 0


def render_report(arguments: argparse.Namespace) -> int:
    """Write the page, its plots and the index."""
    from diffopt.bench.report.render import render

    groups = read_files(arguments.files or default_files(), arguments.lenient)
    records = [record for group in groups.values() for record in group]
    written = render(records, arguments.output, prices_of(arguments.price, records))
    print(f"{len(written)} files in {arguments.output}; open {written[0]}")
    return 0


def write_readme(arguments: argparse.Namespace) -> int:
    """Bring a README's measured part up to date; with `--check` say whether it and the report's index are."""
    from diffopt.bench.report.plots import plots_of
    from diffopt.bench.report.readme import PLOT, ReadmeError, measured_section, with_section
    from diffopt.bench.report.render import INDEX, index
    from diffopt.config import config_folder
    from diffopt.whole_file import write_whole

    path = arguments.file or config_folder().parent / "README.md"
    folder = path.parent / "reports"
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise InputError("README", str(path), f"no records in {folder}/: {path.name} is made from them")
    by_file = {Path(name).name: group for name, group in read_files(files).items()}
    records = [record for group in by_file.values() for record in group]
    section = measured_section(by_file, folder=folder.name, plot=(folder / f"{PLOT}.png").exists())
    try:
        old = path.read_text(encoding="utf-8")
        new = with_section(old, section, where=str(path))
        if not arguments.check and new != old:
            write_whole(path, new)
    except OSError as error:
        raise ReadmeError(f"{path}: can't be read or written: {error.strerror}") from error
    if not arguments.check:
        print(f"{path}: {'as it was' if new == old else 'brought up to date'}")
        return 0
    stale = [] if new == old else [f"{path} is not made from the records in {folder}/: run diffopt report readme"]
    listing = folder / INDEX
    if listing.exists() and listing.read_text(encoding="utf-8") != index(records, plots_of(records)):
        stale.append(f"{listing} is not made from its records: run diffopt report render --output {folder}")
    for line in stale:
        print(f"diffopt: {line}", file=sys.stderr)
    return OUT_OF_DATE if stale else 0


def _chosen(records: "Sequence[AnyRecord]", arguments: argparse.Namespace) -> "list[AnyRecord]":
    """The records of denoising steps that `--workload` and `--case` ask for.

    Raises:
        InputError: nothing is left.
    """
    from diffopt.bench.step.record import StepRecord

    def wanted(record: StepRecord) -> bool:
        work = record.workload
        return arguments.workload in (None, work.name) and (not arguments.case or work.case in arguments.case)

    steps = [record for record in records if isinstance(record, StepRecord)]
    chosen: list[AnyRecord] = [record for record in steps if wanted(record)]
    if steps and not chosen:
        here = ", ".join(dict.fromkeys(f"{record.workload.case} of {record.workload.name}" for record in steps))
        asked = ", ".join(filter(None, [arguments.workload, *(arguments.case or [])]))
        raise InputError("--case or --workload", asked, f"a file has only: {here}")
    return chosen


def read_files(paths: Iterable[Path], lenient: bool = False) -> "dict[str, list[AnyRecord]]":
    """The records of each file; with `lenient`, lines that can't be used are named on stderr and left out."""
    from diffopt.bench.record import read_records

    def skip(error: "RecordError") -> None:
        print(f"skipped: {error}", file=sys.stderr)

    return {str(path): read_records(path, skip=skip if lenient else None) for path in paths}


def prices_of(texts: Sequence[str], records: "Sequence[AnyRecord]") -> "dict[str, Price]":
    """The prices that `--price` gives, by machine."""
    from diffopt.bench.report.cost import given_prices
    from diffopt.bench.report.data import by_machine

    return given_prices(texts, by_machine(records))


def print_report(records: "Sequence[AnyRecord]", prices: "dict[str, Price] | None" = None) -> None:
    """The report's tables on stdout."""
    from diffopt.bench.report.data import report_data
    from diffopt.bench.report.rows import rows_of
    from diffopt.bench.report.tables import report_tables

    print_parts(report_tables(report_data(records, prices), rows_of(records, prices)))


def print_parts(parts: "Iterable[RenderableType]") -> None:
    """On stdout; into a file or a pipe as wide as they need to be."""
    from rich.console import Console

    console = Console() if sys.stdout.isatty() else Console(width=_WIDTH)
    with console.capture() as captured:  # rich ends the process where its reader left; `print` raises
        for part in parts:
            console.print(part, markup=False, highlight=False)
    print_whole(captured.get().removesuffix("\n"))


def _print_json(data: Any) -> None:
    json.dump(data, sys.stdout, indent=2, ensure_ascii=False, allow_nan=False)
    print()


def add_selfcheck(arguments: argparse.Namespace) -> int:
    """Append a self-check's result to a file of records."""
    from diffopt.bench.attention.selfcheck_record import SelfcheckRecord
    from diffopt.bench.record import append_record, check_writable, default_output
    from diffopt.measure.environment import environment
    from diffopt.models import resolve_device

    here = environment(resolve_device(arguments.device))
    output = arguments.output or default_output(here.machine.name)
    check_writable(output)
    record = SelfcheckRecord.from_selfcheck(arguments.file, here)
    append_record(output, record)
    right = sum(launch.right for launch in record.launches)
    print(f"{right} of {len(record.launches)} launches right; record: {output}")
    return 0


def default_files() -> list[Path]:
    """The checkout's records, or those in the current folder's reports/."""
    from diffopt.config import config_folder

    folders = (config_folder().parent / "reports", Path("reports"))
    files = next((found for folder in folders if (found := sorted(folder.glob("*.jsonl")))), [])
    if not files:
        raise InputError("FILE", "none", "no records in reports/; name files, or make some with `diffopt bench quick`")
    return files
