"""compute-sanitizer over every launch that ships, and the step's ops: `python -m diffopt_kernels.sanitize`.

Launches of one kernel, or cases of one op, run in one process under the sanitizer, inputs at most two tiles per axis
but for products, each tensor an allocation of its own (PyTorch's caching allocator off: inside a cached block an
overrun goes unseen). A group that fails is halved until the launch or case is named. First a planted fault, an output
one row short, has to be noticed in an attention kernel and in every op but products, else the check proves nothing.
Only that the memory traffic is clean is looked at here; exactness is the matter of selfcheck.py and step/selfcheck.py.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from diffopt_kernels.candidates import attention_candidates
from diffopt_kernels.launch import AttentionLaunch, attention_launches
from diffopt_kernels.selfcheck import parsed_with_also, versions
from diffopt_kernels.step.check import AWKWARD_CASES, OPS, PRODUCT_CASES, PRODUCTS, StepCase, case_outputs, runs
from diffopt_kernels.step.guarded import OneRowShort, Poisoned

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
_SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)")
_DONE = "launches ran under the sanitizer"
_FOUND = "found: "


@dataclass(frozen=True)
class Group:
    """Launches or an op's cases that share a process, and what came of it: `fault` is empty if nothing was found."""

    name: str
    launches: tuple[str, ...]
    fault: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 if no group has a fault and the planted one was noticed, else 1."""
    arguments = parsed_with_also(_parser(), argv)
    if arguments.here:
        return _run_here(arguments)
    reasons = _reasons(arguments.device)
    if reasons:
        print("; ".join(reasons))
        return 1
    shipped = _launches(arguments.device)
    chosen = [x for x in _known() if (x in shipped or x.label in arguments.also) and arguments.match in x.label]
    attention, steps = list(_groups(chosen)), list(_step_groups(arguments.match, arguments.device))
    groups = attention + steps
    writers = [*([_writer(shipped)] if attention else []), *(group for group in steps if group.name in OPS)]
    for group in writers if arguments.tool == "memcheck" else ():
        fault = _sanitize(group, arguments, planted=True)
        print(f"planted overrun: {fault or 'nothing'}", flush=True)
        if not fault.startswith(_FOUND):
            print(f"VOID: the planted overrun was not noticed in {group.name}")
            return 1
    with ThreadPoolExecutor(arguments.workers) as pool:
        results = [x for found in pool.map(lambda group: _checked(group, arguments), groups) for x in found]
    failed = [x for x in results if x.fault]
    print(f"{arguments.tool}: {len(results) - len(failed)} of {len(results)} groups are clean")
    if arguments.json:
        record = {"tool": arguments.tool, **versions(), "groups": [asdict(x) for x in results]}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    return int(bool(failed) or not results)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m diffopt_kernels.sanitize",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--here", nargs="+", metavar="LABEL", help="run these launches in this process, unchecked")
    parser.add_argument("--planted", action="store_true", help="with --here: into an output that is one row short")
    parser.add_argument("--tool", default="memcheck", choices=TOOLS)
    parser.add_argument("--match", default="", help="only launches whose label contains this")
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16"), help="for 16-bit launches")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu needs TRITON_INTERPRET=1")
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1), help="processes at once")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for one process")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record there")
    return parser


def _reasons(device: str) -> list[str]:
    import torch

    from diffopt_kernels.support import device_reasons

    if device == "cuda" and not torch.cuda.is_available():
        return ["no CUDA GPU is visible"]
    tool = [] if shutil.which("compute-sanitizer") else ["compute-sanitizer is not on PATH; the CUDA toolkit has it"]
    return tool + device_reasons(device)


def _launches(device: str) -> list[AttentionLaunch]:
    from diffopt_kernels.support import compute_capability

    return attention_launches(compute_capability()) if device == "cuda" else attention_launches()


def _known() -> list[AttentionLaunch]:
    """Whatever has a label: what is selected without tuning, and what tuning may find."""
    return list(dict.fromkeys([*attention_launches(), *attention_candidates()]))


def _groups(launches: Sequence[AttentionLaunch]) -> Iterator[Group]:
    """One group per kernel and kind of number, each once."""
    kinds = dict.fromkeys((x.kernel, x.float32) for x in launches)
    for kernel, float32 in kinds:
        labels = tuple(x.label for x in launches if (x.kernel, x.float32) == (kernel, float32))
        yield Group(f"{kernel}{' fp32' if float32 else ''}", labels)


def _step_cases() -> dict[str, StepCase]:
    """Cases without a model's size, by label; products of every size, for each selects launches of its own."""
    return {f"{case.op}: {case.why} {list(case.shape)}": case for case in AWKWARD_CASES + PRODUCT_CASES}


def _step_groups(match: str, device: str) -> Iterator[Group]:
    """One group per op of the step; the case of a planted overrun, which has rows, comes first."""
    import torch

    for op in (op for op in OPS + PRODUCTS if runs(op, torch.float16, torch.device(device))):
        cases = {x: case for x, case in _step_cases().items() if case.op == op and match in x}
        if cases:
            yield Group(op, tuple(sorted(cases, key=lambda x: min(cases[x].shape[-2:]) == 1)))


def _writer(launches: Sequence[AttentionLaunch]) -> Group:
    """The launches that the overrun is planted in: those with plain stores, for descriptors know their bounds.

    None is planted in products: they write through descriptors, too, but for those in shares.
    """
    return next(group for group in reversed(list(_groups(launches))) if group.name.startswith("pointers"))


def _checked(group: Group, arguments: argparse.Namespace) -> list[Group]:
    """The group with its fault; of a failing group of several, its failing parts and the rest, each printed."""
    fault = _sanitize(group, arguments)
    count = len(group.launches)
    verdict = fault or "clean"
    name = group.launches[0] if count == 1 else f"{count} launches"
    print(f"{arguments.tool} {group.name:<20} {name:<44} {verdict}", flush=True)
    if not fault or count == 1:
        return [Group(group.name, group.launches, fault)]
    halves = (group.launches[: count // 2], group.launches[count // 2 :])
    parts = [part for half in halves for part in _checked(Group(group.name, half), arguments)]
    return (
        parts if any(part.fault for part in parts) else [Group(group.name, group.launches, f"together only: {fault}")]
    )


def _sanitize(group: Group, arguments: argparse.Namespace, *, planted: bool = False) -> str:
    """What the sanitizer found with a group in one process, or with its first when planted; empty if nothing."""
    labels = group.launches[:1] if planted else group.launches
    kernels = group.name if group.name in OPS + PRODUCTS else "attention"
    command = ["compute-sanitizer", "--tool", arguments.tool, "--print-limit", "3"]
    if arguments.tool != "initcheck":  # which has to see who wrote the inputs
        command += ["--kernel-name", f"kns={kernels}"]  # PyTorch's own kernels are not instrumented
    command += [sys.executable, "-m", "diffopt_kernels.sanitize", "--dtype", arguments.dtype]
    command += ["--device", arguments.device, *["--planted"] * planted, "--here", *labels]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=arguments.timeout, check=False
        )
    except subprocess.TimeoutExpired:
        return f"no result within {arguments.timeout:.0f} s"
    summary = _SUMMARY.search(done.stdout)
    report = [line.removeprefix("=========").strip() for line in done.stdout.splitlines() if line.startswith("=====")]
    if summary and int(summary[1]):
        first = next((line for line in report if line and not line.startswith("COMPUTE-SANITIZER")), summary[0])
        return f"{_FOUND}{first} ({summary[1]} in all)"
    if summary and done.returncode == 0 and f"{len(labels)} {_DONE}" in done.stdout:
        return ""
    said = [line for line in (*done.stderr.splitlines(), *done.stdout.splitlines()) if line.strip("= ")]
    return f"process ended with {done.returncode}: {(said or ['no output'])[-1][:200]}"


def _run_here(arguments: argparse.Namespace) -> int:
    """Each launch on each tiny case, or each op's case, in this process; every output must be written and finite."""
    steps = _step_cases()
    known = {launch.label: launch for launch in _known()}
    for label in arguments.here:
        unwritten = _run_step(steps[label], arguments) if label in steps else _run_launch(known[label], arguments)
        if unwritten:
            print(f"{label}: not all of the output was written at {unwritten}")
            return 1
    print(f"{len(arguments.here)} {_DONE}")
    return 0


def _run_step(case: StepCase, arguments: argparse.Namespace) -> str:
    """The dtype in which the op left something unwritten; empty if none. Kernels don't differ in 16-bit dtypes."""
    import torch

    dtypes = (getattr(torch, arguments.dtype), torch.float32)
    for dtype in (dtype for dtype in dtypes if runs(case.op, dtype, torch.device(arguments.device))):
        # Without guard bands, which would hide from the sanitizer what they show to the self-check.
        mode = OneRowShort() if arguments.planted else Poisoned()
        for ours, _, _ in case_outputs(case, dtype, torch.device(arguments.device), mode):
            if not ours.isfinite().all():
                return str(dtype)
    return ""


def _run_launch(launch: AttentionLaunch, arguments: argparse.Namespace) -> str:
    """The name of the tiny case at which something was left unwritten; empty if none.

    The planted fault takes the one case whose last tile is not full.
    """
    import torch

    from diffopt_kernels.attention import is_aligned, launch_attention
    from diffopt_kernels.attention_cases import make_inputs, make_mask, tiny_cases

    dtype = torch.float32 if launch.float32 else getattr(torch, arguments.dtype)
    cases = list(tiny_cases(launch))
    for case in cases[1:2] if arguments.planted else cases:
        q, k, v = make_inputs(case, launch.head_dim, dtype, arguments.device, seed=0)
        if launch.kernel != "pointers" and not all(is_aligned(x) for x in (q, k, v)):
            q, k, v = (x.contiguous() for x in (q, k, v))
        mask = make_mask(case, dtype, arguments.device, seed=0)
        rows = q.shape[1] - arguments.planted
        out = torch.full((q.shape[0], rows, *q.shape[2:]), torch.nan, dtype=dtype, device=arguments.device)
        launch_attention(q, k, v, out, launch.head_dim**-0.5, launch, mask)
        if not out.isfinite().all():
            return case.name
    return ""


if __name__ == "__main__":
    sys.exit(main())
