"""`diffopt bench NAME`: measure a workload, stock against optimized, and keep a record of each case."""

import argparse
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from diffopt.errors import InputError

if TYPE_CHECKING:
    import torch

    from diffopt.bench.record import StepRecord
    from diffopt.bench.workloads import Case


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `bench`."""
    parser = commands.add_parser(
        "bench",
        help="measure stock against optimized",
        description="Measure a workload (configs/workloads): exactness first, then speed. Each case is kept when done.",
    )
    parser.add_argument("name", metavar="NAME", help="workload, e.g. small or step")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: the first GPU, or the CPU without one)")
    parser.add_argument("--attention", default="auto", metavar="BACKEND", help="auto or a backend (default: auto)")
    parser.add_argument("--case", action="append", metavar="CASE", help="only this case; may be repeated")
    parser.add_argument("--output", type=Path, metavar="FILE", help="records (default: out/bench/<machine>.jsonl)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure every case; exit code 0 if all were exact, 1 if one was not, 130 when interrupted."""
    from diffopt.bench.workloads import read_workload
    from diffopt.commands.quiet import quiet_libraries, quiet_progress_bars

    workload = read_workload(arguments.name)
    known = [case.name for case in workload.cases]
    for name in arguments.case or []:
        if name not in known:
            raise InputError("--case", name, f"known: {', '.join(known)}")
    quiet_libraries()
    from diffopt.models import resolve_device

    device = resolve_device(arguments.device)
    if workload.needs == "cuda" and device.type != "cuda":
        raise InputError("--device", str(device), f"the workload {arguments.name} needs a CUDA GPU; try: small")

    from diffopt.attention.backends import AUTO, forced
    from diffopt.bench.record import check_writable
    from diffopt.measure.environment import environment

    if arguments.attention != AUTO:
        forced(arguments.attention, device)
    output = arguments.output or default_output(environment(device).machine.name)
    check_writable(output)
    quiet_progress_bars()
    cases = [case for case in workload.cases if not arguments.case or case.name in arguments.case]
    records, interrupted = _measure(arguments, cases, device, output)
    _print(records)
    print(f"{'interrupted; ' if interrupted else ''}{len(records)} of {len(cases)} records in {output}")
    if interrupted:
        return 130
    return 0 if all(record.exactness.passed for record in records) else 1


def _measure(
    arguments: argparse.Namespace, cases: "list[Case]", device: "torch.device", output: Path
) -> "tuple[list[StepRecord], bool]":
    """Each case's record, written as soon as it is there; and whether the user stopped the run."""
    from diffopt.bench.record import append_record
    from diffopt.bench.step import run_case

    records = []
    try:
        for case in cases:
            progress = _Lines(case.name)
            record = run_case(arguments.name, case, device=device, attention=arguments.attention, progress=progress)
            append_record(output, record)
            records.append(record)
            if record.interrupted:
                return records, True
    except KeyboardInterrupt:
        return records, True
    finally:
        if sys.stderr.isatty():
            print(file=sys.stderr)
    return records, False


def _print(records: "list[StepRecord]") -> None:
    from rich.console import Console

    from diffopt.bench.report import report_data, report_tables

    console = Console()
    for part in report_tables(report_data(records)):
        console.print(part)


def default_output(machine: str) -> Path:
    """out/bench/<machine>.jsonl under the current folder: never inside an install."""
    return Path("out") / "bench" / f"{machine_slug(machine)}.jsonl"


def machine_slug(machine: str) -> str:
    """A machine's name as a file name: lower-case letters, digits and single dashes."""
    return re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-")


class _Lines:
    """Progress on stderr: a line per stage, its count redrawn in place on a terminal."""

    def __init__(self, case: str) -> None:
        self._case = case
        self._start = time.monotonic()
        self._stage = ""

    def __call__(self, stage: str, done: int, total: int) -> None:
        terminal = sys.stderr.isatty()
        text = f"{time.monotonic() - self._start:6.1f} s  {self._case}: {stage}"
        if terminal:
            if self._stage and stage != self._stage:
                print(file=sys.stderr)
            print(f"\r{text} {done} of {total}\033[K", end="", file=sys.stderr, flush=True)
        elif stage != self._stage:
            print(text, file=sys.stderr, flush=True)
        self._stage = stage
