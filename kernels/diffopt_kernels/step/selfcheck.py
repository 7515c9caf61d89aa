"""Check the step's ops on this GPU, each in each dtype in a process of its own.

What "right" means is in check.py. Inputs are fresh each time unless --seed says otherwise.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from diffopt_kernels.selfcheck import missing, run_child, versions

DTYPES = ("float16", "bfloat16", "float32")
_MODULE = "diffopt_kernels.step.selfcheck"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 if every op is right in every dtype and no check is void, else 1."""
    arguments = _parser().parse_args(argv)
    if arguments.here is not None:
        return _check_here(arguments)
    return _check_all(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m {_MODULE}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--here", nargs=2, metavar=("OP", "DTYPE"), help="these, in this process, result as JSON")
    parser.add_argument("--match", default="", help="only ops whose name contains this")
    parser.add_argument("--dtype", nargs="+", default=DTYPES, choices=DTYPES)
    parser.add_argument("--tiny", action="store_true", help="without the models' shapes")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu needs TRITON_INTERPRET=1")
    parser.add_argument("--seed", type=int, help="of the inputs; fresh each time if absent, and in the record")
    parser.add_argument("--workers", type=int, default=min(12, os.cpu_count() or 1), help="processes at once")
    parser.add_argument("--timeout", type=float, default=240, help="seconds for one process")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record there")
    return parser


def _check_here(arguments: argparse.Namespace) -> int:
    import torch

    from diffopt_kernels.step.check import AWKWARD_CASES, MODEL_CASES, PRODUCT_CASES, SMALL_PRODUCT_CASES, check_op

    op, dtype = arguments.here
    cases = AWKWARD_CASES + (SMALL_PRODUCT_CASES if arguments.tiny else MODEL_CASES + PRODUCT_CASES)
    seed = int.from_bytes(os.urandom(3), "big") if arguments.seed is None else arguments.seed
    result = check_op(op, cases, getattr(torch, dtype), torch.device(arguments.device), seed=seed)
    print(json.dumps({**result.as_record(), "seed": seed}))
    return int(not result.right)


def _check_all(arguments: argparse.Namespace) -> int:
    import torch

    from diffopt_kernels.step.check import OPS, PRODUCTS, runs
    from diffopt_kernels.support import device_reasons

    reasons = missing(arguments.device) or device_reasons(arguments.device)
    if reasons:
        print("; ".join(reasons))
        return 1
    options = ["--device", arguments.device, *["--tiny"] * arguments.tiny]
    options += ["--seed", str(arguments.seed)] if arguments.seed is not None else []

    def check(item: tuple[str, str]) -> dict[str, Any]:
        op, dtype = item
        record, failure = run_child(_MODULE, ["--here", op, dtype, *options], arguments.timeout)
        record = record if isinstance(record, dict) else {"op": op, "dtype": dtype, "right": False, "failure": failure}
        print(_row(record), flush=True)
        return record

    pairs = [(op, dtype) for op in PRODUCTS + OPS for dtype in arguments.dtype]  # the ones that take longest first
    device = torch.device(arguments.device)
    chosen = [(op, x) for op, x in pairs if arguments.match in op and runs(op, getattr(torch, x), device)]
    with ThreadPoolExecutor(arguments.workers) as pool:
        records = list(pool.map(check, chosen))
    right = sum(record["right"] for record in records)
    print(f"{right} of {len(records)} ops are right, each dtype counted")
    if arguments.json:
        arguments.json.write_text(json.dumps({**versions(), "ops": records}, indent=1) + "\n")
    return int(right < len(records) or not records)


def _row(record: dict[str, Any]) -> str:
    head = f"{record['op']:<21} {record['dtype']:<8}"
    if "failure" in record:
        return f"{head} WRONG  {record['failure']}"
    wrong = [case for case in record["cases"] if case["overrun"] or _share(case) > 1]
    worst = max(record["cases"], key=lambda case: (case["overrun"], _share(case)), default=None)
    verdict = f"VOID ({record['void']})" if record["void"] else "right" if record["right"] else "WRONG"
    text = f"{head} {verdict}  {len(record['cases']) - len(wrong)}/{len(record['cases'])}"
    if worst is None:
        return text
    text += f"  closest to its limit: {_share(worst):.2f} of it at {worst['case']['why']} {worst['case']['shape']}"
    return text + (" OVERRUN" if worst["overrun"] else "")


def _share(case: dict[str, Any]) -> float:
    """How much of its limit a case takes: the larger of both errors' shares."""
    return max(case["ours"][key] / case["limit"][key] for key in ("relative_l2", "maximum"))


if __name__ == "__main__":
    sys.exit(main())
