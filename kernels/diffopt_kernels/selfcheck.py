"""Check launches on this GPU, each in a process of its own: `python -m diffopt_kernels.selfcheck --all`.

A launch that reads or writes where it must not poisons its process, so every launch gets one, with a time limit. What
"right" means is in attention_check.py. --candidates checks what tuning may find instead of what is selected without it,
--also adds single ones of those.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from diffopt_kernels.launch import AttentionLaunch, attention_launches

_SIXTEEN_BIT = ("float16", "bfloat16")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 if every checked launch is right and no check is void, else 1."""
    arguments = parsed_with_also(_parser(), argv)
    launches = _known_launches(arguments)
    if arguments.launch is not None:
        return _check_here(launches[arguments.launch], arguments)
    return _check_all(launches, arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m diffopt_kernels.selfcheck",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--all", action="store_true", help="every launch, one process each (the default)")
    what.add_argument("--launch", type=int, metavar="INDEX", help="this one, in this process, result as JSON")
    parser.add_argument("--candidates", action="store_true", help="candidates.py's launches, not launch.py's")
    parser.add_argument("--match", default="", help="only launches whose label contains this")
    parser.add_argument("--dtype", nargs="+", default=_SIXTEEN_BIT, choices=_SIXTEEN_BIT, help="for 16-bit launches")
    parser.add_argument("--tiny", action="store_true", help="at most two tiles per axis (interpreter, sanitizer)")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu needs TRITON_INTERPRET=1")
    parser.add_argument("--seed", type=int, help="of the inputs; fresh each time if absent, and in the record")
    parser.add_argument("--workers", type=int, default=min(12, os.cpu_count() or 1), help="processes at once")
    parser.add_argument("--timeout", type=float, default=240, help="seconds for one process")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record there")
    return parser


def parsed_with_also(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """What was parsed with an option more, `--also`, as labels; ends with one line where it names no launches."""
    words = "these of the candidates, too: labels, or configs/gpus/*.toml"
    parser.add_argument("--also", nargs="+", default=[], metavar="WHAT", help=words)
    arguments = parser.parse_args(argv)
    if arguments.also:
        from diffopt_kernels.candidates import labels_named

        try:
            arguments.also = labels_named(arguments.also)
        except ValueError as error:
            parser.error(f"--also: {error}")
    return arguments


def _known_launches(arguments: argparse.Namespace) -> list[AttentionLaunch]:
    """What an index counts; candidates come after the others, so that a label or an index means the same everywhere."""
    if not arguments.candidates and not arguments.also:
        return attention_launches()
    from diffopt_kernels.candidates import attention_candidates

    if arguments.candidates:
        return attention_candidates()
    return list(
        dict.fromkeys([*attention_launches(), *(x for x in attention_candidates() if x.label in arguments.also)])
    )


def _capability(device: str) -> tuple[int, int]:
    """Of the GPU; the interpreter does all that a Hopper GPU does."""
    import torch

    from diffopt_kernels.support import compute_capability

    return compute_capability() if device == "cuda" and torch.cuda.is_available() else (9, 0)


def _check_here(launch: AttentionLaunch, arguments: argparse.Namespace) -> int:
    import torch

    from diffopt_kernels.attention_cases import MODEL_CASES, awkward_cases, tiny_cases
    from diffopt_kernels.attention_check import check_launch

    cases = list(tiny_cases(launch) if arguments.tiny else awkward_cases(launch))
    if not arguments.tiny and not launch.float32:
        cases += [case for case in MODEL_CASES.get(launch.head_dim, ()) if launch.takes(case.n_k)]
    dtypes = [torch.float32] if launch.float32 else [getattr(torch, name) for name in arguments.dtype]
    seed = int.from_bytes(os.urandom(3), "big") if arguments.seed is None else arguments.seed
    result = check_launch(launch, cases, dtypes, torch.device(arguments.device), seed=seed)
    print(json.dumps({**result.as_record(), "seed": seed}))
    return int(not result.right)


def run_child(module: str, arguments: Sequence[str], timeout: float) -> tuple[object, str]:
    """The JSON of the last line of `python -m module arguments`, or None and why there is none; seconds."""
    command = [sys.executable, "-m", module, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return None, f"no result within {timeout:.0f} s"
    lines = done.stdout.strip().splitlines()
    try:
        return json.loads(lines[-1]), ""
    except (IndexError, json.JSONDecodeError):
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return None, f"process ended with {done.returncode}: {last[:200]}"


def _check_all(launches: Sequence[AttentionLaunch], arguments: argparse.Namespace) -> int:
    from diffopt_kernels.support import device_reasons

    reasons = missing(arguments.device) or device_reasons(arguments.device)
    if reasons:
        print("; ".join(reasons))
        return 1
    here = {*attention_launches(_capability(arguments.device)), *(x for x in launches if x.label in arguments.also)}
    chosen = [
        (i, x) for i, x in enumerate(launches) if arguments.match in x.label and (arguments.candidates or x in here)
    ]
    options = ["--dtype", *arguments.dtype, "--device", arguments.device]
    options += ["--also", *arguments.also] if arguments.also else []
    options += ["--tiny"] * arguments.tiny + ["--candidates"] * arguments.candidates
    options += ["--seed", str(arguments.seed)] if arguments.seed is not None else []

    def check(item: tuple[int, AttentionLaunch]) -> dict:
        index, launch = item
        record, failure = run_child("diffopt_kernels.selfcheck", ["--launch", str(index), *options], arguments.timeout)
        record = record if isinstance(record, dict) else {"label": launch.label, "right": False, "failure": failure}
        print(_row(index, record), flush=True)
        return {"index": index, **record}

    with ThreadPoolExecutor(arguments.workers) as pool:
        records = list(pool.map(check, chosen))
    right = [r for r in records if r["right"]]
    print(f"{len(right)} of {len(records)} launches are right")
    if arguments.json:
        arguments.json.write_text(json.dumps({**versions(), "launches": records}, indent=1) + "\n")
    return int(len(right) < len(records))


def missing(device: str) -> list[str]:
    """Why there is no such device here; empty if there is."""
    import torch

    return ["no CUDA GPU is visible"] if device == "cuda" and not torch.cuda.is_available() else []


def _row(index: int, record: dict) -> str:
    head = f"{index:>4} {record['label']:<44}"
    if "failure" in record:
        return f"{head} WRONG  {record['failure']}"
    wrong = [c for c in record["cases"] if c["overrun"] or not _within(c)]
    case = max(record["cases"], key=lambda c: (c in wrong, c["ours"]["relative_l2"] / c["limit"]["relative_l2"]))
    verdict = f"VOID ({record['void']})" if record["void"] else "right" if record["right"] else "WRONG"
    fused = f"{case['fused']['relative_l2']:.2e}" if case["fused"] else "-"
    text = (
        f"{head} {verdict}  {len(record['cases']) - len(wrong)}/{len(record['cases'])}  closest to its limit: L2 "
        f"{case['ours']['relative_l2']:.2e} (math {case['math']['relative_l2']:.2e}, fused {fused}, "
        f"allowed {case['limit']['relative_l2']:.2e}) at {case['case']} {case['dtype']}"
    )
    return text + (" OVERRUN" if case["overrun"] else "")


def _within(case: dict) -> bool:
    return all(case["ours"][key] <= case["limit"][key] for key in ("relative_l2", "maximum"))


def versions() -> dict[str, str]:
    """What a result is valid for."""
    import torch
    import triton

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"device": device, "torch": torch.__version__, "triton": triton.__version__}


if __name__ == "__main__":
    sys.exit(main())
