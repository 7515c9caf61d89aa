"""Whether diffopt's kernels were ever checked on this kind of GPU with this Triton; if not, they are, once.

Triton is known to miscompile some tile shapes on some GPUs without a word, so a pair of GPU and Triton version that
nobody checked is not trusted: a self-check runs in a process of its own and its verdict is kept in the user's cache
folder. Until it has passed, PyTorch's SDPA serves.
"""

import dataclasses
import functools
import json
import logging
import subprocess
import sys
from pathlib import Path

import platformdirs
import torch

from diffopt.attention.machine import machine
from diffopt.attention.tuning import tuning
from diffopt.attention.whole_file import write_whole
from diffopt.gpus import find_gpu

logger = logging.getLogger(__name__)

SECONDS = 600
"""The longest a self-check may take."""


def verdicts_file() -> Path:
    """Where verdicts are remembered: one JSON object, from `_pair` to a list of reasons (empty: passed)."""
    return platformdirs.user_cache_path("diffopt") / "kernel-checks.json"


@functools.cache
def untrusted_reasons(device: torch.device) -> tuple[str, ...]:
    """Why the kernels are not trusted on a CUDA device; empty when they were checked and right.

    The first call on an unknown pair of GPU and Triton runs the self-check, which takes a minute or two.
    """
    here = machine(device)
    if {"triton": here["triton"], "kernels": here["kernels"]} in _shipped(here["device"]):
        return ()
    pair = _pair(here)
    verdicts = _read_verdicts()
    if pair not in verdicts:
        logger.warning("checking diffopt's kernels on %s with Triton %s, once", here["device"], here["triton"])
        verdicts[pair] = _self_check(here["device"] or "")
        _write_verdicts(verdicts)
    return tuple(verdicts[pair])


def _shipped(device: str | None) -> list[dict[str, str]]:
    """Versions of Triton and of the kernels that the project checked on a GPU, by the driver's name for it."""
    gpu = find_gpu(device or "")
    return [dataclasses.asdict(checked) for checked in gpu.checked] if gpu else []


def _pair(here: dict[str, str | None]) -> str:
    """GPU, Triton and the kernels' own source: a verdict about other kernels is none about these."""
    return f"{here['device']} | triton {here['triton']} | kernels {here['kernels']}"


def _self_check(device: str) -> list[str]:
    """Reasons against the kernels: all launches without tuning, and those that were tuned for this GPU."""
    tuned = sorted({launch.label for launch in tuning(device).launches.values()})
    command = [sys.executable, "-m", "diffopt_kernels.selfcheck", "--all", *(["--also", *tuned] if tuned else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return [f"the kernels' self-check did not end within {SECONDS} s"]
    if done.returncode == 0:
        return []
    lines = (done.stdout.strip() or done.stderr.strip() or "no output").splitlines()
    wrong = [" ".join(line.split()[1:]) for line in lines if " WRONG " in line or " VOID " in line]
    words = "; ".join([*wrong[:3], lines[-1]])
    return [f"the kernels' self-check failed on this GPU ({words}); see python -m {command[2]} --all"]


def _read_verdicts() -> dict[str, list[str]]:
    try:
        verdicts = json.loads(verdicts_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return verdicts if isinstance(verdicts, dict) else {}


def _write_verdicts(verdicts: dict[str, list[str]]) -> None:
    try:
        write_whole(verdicts_file(), json.dumps(verdicts, indent=2))
    except OSError as error:  # a read-only home: the check runs again next time, which is slow but right
        logger.warning("can't remember the verdict of the kernels' self-check: %s", error)
