"""`diffopt tune [WORKLOAD]`: find the fastest right launch per attention shape on this GPU, and rank all backends."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from diffopt.commands.start import INTERRUPTED
from diffopt.errors import InputError

if TYPE_CHECKING:
    import torch

    from diffopt.attention.tuner import Search, ShapeToTune
    from diffopt.attention.tuning_file import TuningFile
    from diffopt.gpus import TunedAttention, TunedShape


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `tune`."""
    parser = commands.add_parser(
        "tune",
        help="find the fastest right kernels for this GPU",
        description="For each attention shape of a workload: check all launches of diffopt's kernels, discard the "
        "wrong ones, time the right ones beside all other exact backends, and keep the fastest. Each shape is kept "
        "when it is done; the same command continues where it was stopped. Needs the GPU for itself.",
    )
    parser.add_argument(
        "workload", metavar="WORKLOAD", nargs="?", default="attention", help="of attention shapes (default: attention)"
    )
    parser.add_argument("--case", action="append", metavar="CASE", help="only this shape; may be repeated")
    parser.add_argument(
        "--headline", action="store_true", help="only the shapes that the workload marks as its headline"
    )
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16", help="(default: float16)")
    parser.add_argument("--minutes", type=_minutes, metavar="N", help="begin no further step after N minutes")
    parser.add_argument("--device", help="cuda or cuda:N (default: the first GPU)")
    parser.add_argument("--workers", type=_workers, metavar="N", help="checks at once (default: one per CPU core)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="a GPU's TOML file (default: in the cache folder)")
    parser.add_argument(
        "--again", action="store_true", help="tune shapes again; start over where the file does not fit"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Tune; exit code 0 if every shape asked for is tuned, 1 if not, 130 when interrupted."""
    from diffopt.commands.quiet import quiet_libraries

    shapes = _shapes(arguments)
    quiet_libraries()
    from diffopt.attention.machine import device_name
    from diffopt.attention.tuning import short_path, user_file
    from diffopt.attention.tuning_file import TuningFile
    from diffopt.models import resolve_device

    device = resolve_device(arguments.device)
    if device.type != "cuda":
        raise InputError("--device", str(device), "tuning needs a CUDA GPU; nothing is tuned for a CPU")
    gpu = device_name(device)
    file = TuningFile.open(arguments.output or user_file(gpu), gpu, _header(device), again=arguments.again)
    file.check_writable()
    if file.dropped:
        print(f"dropped {'; '.join(file.dropped)}")
        file.write()
    new = [shape for shape in shapes if arguments.again or not file.has(shape.key, shape.dtype)]
    if len(new) < len(shapes):
        print(f"{len(shapes) - len(new)} of {len(shapes)} shapes are tuned already (--again tunes them again)")
    done, interrupted = _tune(arguments, device, file, new) if new else (0, False)
    _print(file.table.shapes_with(file.table.triton), shapes)
    left = len(new) - done
    words = ["interrupted"] if interrupted else []
    words += [f"{left} of {len(shapes)} shapes are not tuned; the same command continues"] if left else []
    print("; ".join([*words, f"{len(file.table.shapes)} shapes in {short_path(file.path)}"]))
    return INTERRUPTED if interrupted else int(left > 0)


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not possible; a number of minutes above 0")
    return minutes


def _workers(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not possible; a whole number from 1")
    return int(text)


def _shapes(arguments: argparse.Namespace) -> "list[ShapeToTune]":
    from diffopt.bench.workloads import AttentionWorkload, chosen_cases, read_workload

    workload = read_workload(arguments.workload)
    if not isinstance(workload, AttentionWorkload):
        raise InputError("WORKLOAD", arguments.workload, "it has no attention shapes; try: attention")
    cases = chosen_cases(workload.cases, arguments.case, headline=workload.headline if arguments.headline else None)
    from diffopt.attention.tuner import ShapeToTune
    from diffopt_kernels.launch import LaunchKey

    return [ShapeToTune(case.name, LaunchKey(*case.sizes), arguments.dtype) for case in cases]


def _header(device: "torch.device") -> "TunedAttention":
    """What is tuned with; the ceilings are measured once it is clear that the file can be used."""
    from diffopt.attention.machine import machine
    from diffopt.gpus import TunedAttention
    from diffopt.measure.environment import environment

    here, around = machine(device), environment(device)
    software = around.software
    commit = software.commit or f"diffopt {software.packages['diffopt']}"
    return TunedAttention(
        date=around.time_utc,
        commit=commit + (" with changes" if software.dirty else ""),
        torch=str(here["torch"]),
        triton=str(here["triton"]),
        cudnn=str(around.machine.cudnn),
        driver=str(around.machine.driver),
        kernels=str(here["kernels"]),
        fp16_tflops=0.0,
        copy_tb_s=0.0,
    )


def _tune(
    arguments: argparse.Namespace, device: "torch.device", file: "TuningFile", shapes: "Sequence[ShapeToTune]"
) -> tuple[int, bool]:
    """How many shapes were tuned, and whether the user stopped it."""
    done = 0
    try:
        lines = _Lines(arguments.minutes)
        search = _search(device, arguments.workers, lines)
        lines.stage(f"measuring the ceilings of {file.gpu}")
        file.measured(search.trials.ceilings())
        for row in search.rows(shapes):
            file.keep(row)
            done += 1
            lines.kept(row)
    except KeyboardInterrupt:
        return done, True
    return done, False


def _search(device: "torch.device", workers: int | None, lines: "_Lines") -> "Search":
    import os

    import torch

    from diffopt.attention.tuner import GpuTrials, Search, other_backends, runs_on, workers_for
    from diffopt_kernels.support import compute_capability, device_reasons

    with torch.cuda.device(device):
        free, _ = torch.cuda.mem_get_info()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    trials = GpuTrials(str(device), workers or workers_for(cores, free))
    reasons = device_reasons(device)
    if reasons:
        lines.discarded("diffopt's kernels", "; ".join(reasons))
    possible = (lambda _: False) if reasons else runs_on(compute_capability(device))
    return Search(trials, lines, other_backends(device), possible, lines.out_of_time)


class _Lines:
    """Progress on stderr, a line per step; what is discarded goes to stdout, with the reason."""

    def __init__(self, minutes: float | None) -> None:
        self._start = time.monotonic()
        self._end = None if minutes is None else self._start + 60 * minutes

    def out_of_time(self) -> bool:
        """Whether the minutes are over."""
        return self._end is not None and time.monotonic() >= self._end

    def stage(self, text: str) -> None:
        """What is done next."""
        print(f"{time.monotonic() - self._start:6.1f} s  {text}", file=sys.stderr, flush=True)

    def discarded(self, name: str, reason: str) -> None:
        """What is out, and why."""
        print(f"discarded {name}: {reason}", flush=True)

    def kept(self, row: "TunedShape") -> None:
        """A shape that is done."""
        times = ", ".join(f"{name} {microseconds:.1f}" for name, microseconds in row.microseconds.items())
        self.stage(f"{row.case}: {times} µs")


def _print(rows: "Sequence[TunedShape]", shapes: "Sequence[ShapeToTune]") -> None:
    """The rows of the shapes asked for: our time beside the best other's."""
    from rich.table import Table

    from diffopt.commands.report import print_parts
    from diffopt.gpus import OWN

    asked = {(shape.key, shape.dtype) for shape in shapes}
    table = Table("shape", "launch", "µs", "best other", "µs", "ratio", box=None)
    for column in (2, 4, 5):
        table.columns[column].justify = "right"
    for row in rows:
        if (row.key, row.dtype) not in asked:
            continue
        ours = row.microseconds.get(OWN)
        others = [name for name in row.ranking if name != OWN]
        other = row.microseconds[others[0]] if others else None
        table.add_row(
            row.case,
            row.launch.label if row.launch else "none is right",
            "-" if ours is None else f"{ours:.1f}",
            others[0] if others else "none",
            "-" if other is None else f"{other:.1f}",
            "-" if ours is None or other is None else f"{ours / other:.2f}",
        )
    print_parts([table])
