"""`diffopt report`: what the records say."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from diffopt.errors import InputError

_WIDTH = 180
"""Of a line where the terminal doesn't say."""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `report` and what it can do."""
    parser = commands.add_parser("report", help="show what was measured", description="Show what was measured.")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    show = actions.add_parser("show", help="a table per machine", description="Show the latest record of every case.")
    show.add_argument("files", nargs="*", type=Path, metavar="FILE", help="records (default: reports/*.jsonl)")
    show.add_argument("--format", choices=("table", "json", "markdown"), default="table", help="default: %(default)s")
    show.set_defaults(run=show_report)
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
    """Print the tables, the data as JSON, or the README's tables, on stdout."""
    from diffopt.bench.record import read_records
    from diffopt.bench.report import report_data, report_markdown

    records = [record for path in arguments.files or _default_files() for record in read_records(path)]
    data = report_data(records)
    if arguments.format == "json":
        json.dump(data, sys.stdout, indent=2, ensure_ascii=False, allow_nan=False)
        print()
        return 0
    if arguments.format == "markdown":
        print(report_markdown(data))
        return 0
    print_tables(data)
    return 0


def print_tables(data: dict[str, Any]) -> None:
    """The report's tables on stdout; into a file or a pipe as wide as they need to be."""
    from rich.console import Console

    from diffopt.bench.report import report_tables

    console = Console() if sys.stdout.isatty() else Console(width=_WIDTH)
    for part in report_tables(data):
        console.print(part)


def add_selfcheck(arguments: argparse.Namespace) -> int:
    """Append a self-check's result to a file of records."""
    from diffopt.bench.record import SelfcheckRecord, append_record, check_writable
    from diffopt.commands.bench import default_output
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


def _default_files() -> list[Path]:
    from diffopt.config import config_folder

    folders = (config_folder().parent / "reports", Path("reports"))
    files = next((found for folder in folders if (found := sorted(folder.glob("*.jsonl")))), [])
    if not files:
        raise InputError("FILE", "none", "no records in reports/; name files, or make some with `diffopt bench small`")
    return files
