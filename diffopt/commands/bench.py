"""`diffopt bench NAME`: measure a workload, stock or peers against ours, and keep a record of each case."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffopt.commands.progress import ProgressLines, end_line
from diffopt.commands.start import INTERRUPTED
from diffopt.config import config_names
from diffopt.errors import InputError

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from diffopt.bench.attention.record import AttentionRecord
    from diffopt.bench.record import AnyRecord
    from diffopt.bench.step.record import StepRecord
    from diffopt.bench.workloads import AttentionShape, AttentionWorkload, Case, StepWorkload


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `bench`."""
    parser = commands.add_parser(
        "bench",
        help="measure stock against optimized",
        description="Measure a workload (configs/workloads): exactness first, then speed. Each case is kept when done.",
    )
    others = ", ".join(name for name in config_names("workloads") if name != "quick")
    parser.add_argument("name", metavar="NAME", help=f"workload: quick (start here), {others}")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: the first GPU, or the CPU without one)")
    parser.add_argument("--attention", metavar="BACKEND", help="of denoising steps: auto or a backend (default: auto)")
    parser.add_argument("--case", action="append", metavar="CASE", help="only this case; may be repeated")
    parser.add_argument("--headline", action="store_true", help="of attention: only the shapes of the headline")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument(
        "--peers", metavar="NAMES", help="of denoising steps: only these peers, names with commas between"
    )
    chosen.add_argument("--no-peers", action="store_true", help="of denoising steps: stock and ours alone")
    parser.add_argument(
        "--peer-limit",
        metavar="SECONDS",
        help="of denoising steps: leave out a peer whose first call takes longer (default: 1800)",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="records (default: out/bench/<machine>.jsonl)")
    parser.add_argument("--price", metavar="USD", help="dollars per hour of this machine (default: configs/gpus)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure every case; exit code 0 if ours was exact in all, 1 if not in one, 130 when interrupted."""
    # Before torch loads its OpenMP library: where something else has a core, threads that spin for each other take
    # several times as long (measured: 60 s became 300 s), and what is timed is the spinning.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from diffopt.bench.workloads import AttentionWorkload, read_workload
    from diffopt.commands.quiet import quiet_libraries, quiet_progress_bars

    workload = read_workload(arguments.name)
    cases = _chosen(arguments, workload)
    peers = _chosen_peers(arguments, workload)
    peer_limit_s = _peer_limit(arguments, workload)
    if arguments.price is not None:
        from diffopt.bench.report.cost import given_price

        given_price(arguments.price)
    quiet_libraries()
    if isinstance(workload, AttentionWorkload):
        from diffopt.bench.attention.peers import flash_attn_hidden

        with flash_attn_hidden():
            importlib.import_module("diffopt.bench.record")  # the first thing here that imports diffusers
    from diffopt.models import resolve_device

    device = resolve_device(arguments.device)
    if workload.needs == "cuda" and device.type != "cuda":
        raise InputError("--device", str(device), f"the workload {arguments.name} needs a CUDA GPU; try: small")

    cases = _possible(cases, device)
    from diffopt.attention.backends import AUTO, forced
    from diffopt.bench.record import check_writable, default_output
    from diffopt.measure.environment import environment

    if arguments.attention not in (None, AUTO):
        forced(arguments.attention, device)
    output = arguments.output or default_output(environment(device).machine.name)
    check_writable(output)
    quiet_progress_bars()
    print(f"{arguments.name}: {workload.description}", file=sys.stderr)
    pairs: list[str] = []
    if isinstance(workload, AttentionWorkload):
        records, interrupted = _measure_attention(arguments.name, workload, cases, device, output)
        exact = all(map(_ours_exact, records))
    else:
        if device.type == "cpu":
            _name_peers_left_out(cases, peers)
        records, interrupted = _measure_steps(arguments, cases, device, output, pairs, peers, peer_limit_s)
        exact = all(record.exact for record in records)
    _print(records)
    for pair in pairs:
        print(pair)
    print(f"{'interrupted; ' if interrupted else ''}{len(records)} of {len(cases)} records in {output}")
    if interrupted:
        return INTERRUPTED
    return 0 if exact and len(records) == len(cases) else 1


def _chosen(arguments: argparse.Namespace, workload: "StepWorkload | AttentionWorkload") -> list[Any]:
    """The cases asked for.

    Raises:
        InputError: an unknown case, none of the headline, or an option that this kind of workload doesn't take.
    """
    from diffopt.bench.workloads import AttentionWorkload, chosen_cases

    if workload.kind == "attention" and arguments.attention is not None:
        raise InputError("--attention", arguments.attention, f"the workload {arguments.name} runs every backend")
    if workload.kind != "attention" and arguments.headline:
        raise InputError("--headline", True, "allowed with the workload attention only")
    headline = workload.headline if isinstance(workload, AttentionWorkload) and arguments.headline else None
    return chosen_cases(workload.cases, arguments.case, headline=headline)


def _chosen_peers(
    arguments: argparse.Namespace, workload: "StepWorkload | AttentionWorkload"
) -> tuple[str, ...] | None:
    """The peers of denoising steps asked for; None for each case's own.

    Raises:
        InputError: an unknown peer, or a workload that has none to choose.
    """
    from diffopt.bench.workloads import STEP_PEERS

    if workload.kind == "attention" and (arguments.no_peers or arguments.peers is not None):
        option = "--no-peers" if arguments.no_peers else "--peers"
        raise InputError(option, arguments.peers or True, f"the workload {arguments.name} runs every peer")
    if arguments.no_peers:
        return ()
    if arguments.peers is None:
        return None
    names = tuple(dict.fromkeys(name.strip() for name in arguments.peers.split(",")))
    for name in names:
        if name not in STEP_PEERS:
            raise InputError("--peers", name, f"known: {', '.join(STEP_PEERS)}")
    return names


def _peer_limit(arguments: argparse.Namespace, workload: "StepWorkload | AttentionWorkload") -> float:
    """Seconds that a peer's first call may take.

    Raises:
        InputError: not a number above 0, or a workload whose peers have no first call.
    """
    from diffopt.bench.workloads import PEER_LIMIT_S

    given = arguments.peer_limit
    if given is None:
        return PEER_LIMIT_S
    if workload.kind == "attention":
        raise InputError("--peer-limit", given, f"the workload {arguments.name} has no denoising steps")
    try:
        limit = float(given)
    except ValueError:
        limit = 0.0
    if not 0 < limit < float("inf"):
        raise InputError("--peer-limit", given, "allowed: seconds above 0")
    return limit


def _name_peers_left_out(cases: "list[Case]", chosen: tuple[str, ...] | None) -> None:
    """On a CPU: one line on stderr about the peers that will be absent."""
    names = dict.fromkeys(name for case in cases for name in (case.peers if chosen is None else chosen))
    if names:
        print(f"peers left out on a CPU, because they need a GPU: {', '.join(names)}", file=sys.stderr)


def _possible(cases: list[Any], device: "torch.device") -> list[Any]:
    """The cases that can run here; those that need a GPU are named and left out on a CPU.

    Raises:
        InputError: none is left.
    """
    if device.type == "cuda":
        return cases
    possible = [case for case in cases if getattr(case, "needs", "any") == "any"]
    left_out = ", ".join(case.name for case in cases if case not in possible)
    if not possible:
        raise InputError("--case", left_out, "a CUDA GPU is needed for it")
    if left_out:
        print(f"left out on a CPU, because they need a GPU: {left_out}", file=sys.stderr)
    return possible


def _measure_steps(
    arguments: argparse.Namespace,
    cases: "list[Case]",
    device: "torch.device",
    output: Path,
    pairs: list[str],
    peers: tuple[str, ...] | None,
    peer_limit_s: float,
) -> "tuple[list[StepRecord], bool]":
    """Each case's record, written as soon as it is there; and whether the user stopped the run.

    A fault on the GPU leaves it useless to this process: the run ends there, in words.

    Args:
        pairs: gets a line for each pair of pictures that was written.
        peers: the ones to run; None for each case's own. peer_limit_s: what the first call of one may take.
    """
    from torch import AcceleratorError

    from diffopt.attention.backends import AUTO
    from diffopt.bench.record import append_record
    from diffopt.bench.report.cost import given_price, known_price
    from diffopt.bench.step.case import run_case
    from diffopt.bench.step.picture_pair import largest_difference, write_pair
    from diffopt.gpus import slug
    from diffopt.measure.environment import environment

    attention = arguments.attention or AUTO
    price = given_price(arguments.price) if arguments.price else known_price(environment(device).machine.gpu)
    pictures: dict[str, tuple[Image, Image]] = {}

    def keep_pictures(case: str, stock: "Image", ours: "Image") -> None:
        pictures[case] = stock, ours

    records = []
    try:
        for case in cases:
            progress = ProgressLines(f"{case.name}: ")
            record = run_case(
                arguments.name,
                case,
                device=device,
                attention=attention,
                price=price,
                peers=peers,
                peer_limit_s=peer_limit_s,
                progress=progress,
                on_pictures=keep_pictures,
            )
            append_record(output, record)
            records.append(record)
            if case.name in pictures:
                path = output.parent / f"{output.stem}-{slug(case.name)}-pair.png"
                write_pair(path, *pictures[case.name])
                difference = f"largest difference {largest_difference(*pictures[case.name])} of 255"
                pairs.append(f"{case.name}, stock left, diffopt right, {difference}: {path}")
            if record.interrupted:
                return records, True
    except KeyboardInterrupt:
        return records, True
    except RuntimeError as error:
        if not isinstance(error, AcceleratorError) and not str(error).startswith(("CUDA error", "Triton Error [CUDA]")):
            raise
        end_line()
        failed = cases[len(records)]
        hint = "" if peers == () else "; try --no-peers"
        print(f"{failed.name}: the GPU failed, so the run ends: {str(error).splitlines()[0]}{hint}", file=sys.stderr)
    finally:
        end_line()
    return records, False


def _measure_attention(
    name: str, workload: "AttentionWorkload", shapes: "list[AttentionShape]", device: "torch.device", output: Path
) -> "tuple[list[AttentionRecord], bool]":
    """Each shape's record, written as soon as it is there; and whether the user stopped the run."""
    from diffopt.bench.attention.suite import run_attention
    from diffopt.bench.record import append_record

    records: list[AttentionRecord] = []
    lines = ProgressLines("")

    def keep(record: "AttentionRecord") -> None:
        append_record(output, record)
        records.append(record)

    def progress(shape: str, stage: str, done: int, total: int) -> None:
        lines(f"{shape}: {stage}", done, total)

    try:
        run_attention(name, workload, shapes, device=device, on_record=keep, progress=progress)
    except KeyboardInterrupt:
        return records, True
    finally:
        end_line()
    return records, False


def _ours_exact(record: "AttentionRecord") -> bool:
    from diffopt.bench.attention.peers import OURS, OURS_BF16

    return all(figure.state == "timed" for figure in record.figures if figure.name in (OURS, OURS_BF16))


def _print(records: "Sequence[AnyRecord]") -> None:
    from diffopt.commands.report import print_report

    print_report(records)
