"""Whether diffopt's kernels were ever checked on this kind of GPU with this Triton; if not, they are, once.

Triton is known to miscompile some tile shapes on some GPUs without a word, so a pair of GPU and Triton version that
nobody checked is not trusted: a self-check runs in a process of its own and its verdict is kept in the user's cache
folder. Until it has passed, PyTorch's SDPA serves, and diffusers' own blocks. Attention and the step's kernels have a
verdict each: one says nothing about the other.
"""

import functools
import hashlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import platformdirs
import torch

from diffopt.attention.machine import compute_capability, device_name, machine, step_kernels_hash
from diffopt.attention.tuning import tuning
from diffopt.config import parse_json
from diffopt.gpus import Checked, find_gpu
from diffopt.whole_file import write_whole

logger = logging.getLogger(__name__)

SECONDS = 600
"""The longest a self-check may take."""


def verdicts_file() -> Path:
    """Where verdicts are remembered: one JSON object, from `_pair` to a list of reasons (empty: passed)."""
    return platformdirs.user_cache_path("diffopt") / "kernel-checks.json"


@functools.cache
def untrusted_reasons(device: torch.device) -> tuple[str, ...]:
    """Why the attention kernels are not trusted on a CUDA device; empty when they were checked and right.

    The first call on an unknown pair of GPU and Triton runs the self-check, which takes a minute or two.
    """
    here = machine(device)
    if any((c.triton, c.kernels) == (here["triton"], here["kernels"]) for c in _shipped(here["device"])):
        return ()
    tuned = _tuned_labels(device)
    return _verdict(_pair(here, tuned), lambda: _self_check(tuned, device))


@functools.cache
def untrusted_step_reasons(device: torch.device) -> tuple[str, ...]:
    """The same of the step's kernels (norms, activations, sums, products): one verdict on all of them."""
    here = machine(device)
    if any((c.triton, c.step) == (here["triton"], step_kernels_hash()) for c in _shipped(here["device"])):
        return ()
    return _verdict(_step_pair(here), lambda: _step_self_check(device))


def _verdict(pair: str, check: Callable[[], list[str]]) -> tuple[str, ...]:
    """The remembered verdict on a pair, or that of the check, remembered from now on."""
    verdicts = _read_verdicts()
    if pair not in verdicts:
        logger.warning("checking diffopt's kernels once: %s", pair)
        reasons = check()
        verdicts = {**_read_verdicts(), pair: reasons}  # read again: another process may have written meanwhile
        _write_verdicts(verdicts)
    return tuple(verdicts[pair])


def _shipped(device: str | None) -> tuple[Checked, ...]:
    """What the project checked on a GPU, by the driver's name for it."""
    gpu = find_gpu(device or "")
    return gpu.checked if gpu else ()


def _pair(here: dict[str, str | None], tuned: Sequence[str]) -> str:
    """GPU, Triton, the kernels' own source and tables' launches: a verdict about others is none about these."""
    launches = f" | launches {hashlib.sha256('; '.join(tuned).encode()).hexdigest()[:16]}" if tuned else ""
    return f"{here['device']} | triton {here['triton']} | kernels {here['kernels']}{launches}"


def _step_pair(here: dict[str, str | None]) -> str:
    return f"{here['device']} | triton {here['triton']} | step {step_kernels_hash()}"


def _tuned_labels(device: torch.device) -> tuple[str, ...]:
    """Launches that tables have for a GPU."""
    found = tuning(device_name(device), compute_capability(device))
    return tuple(sorted({launch.label for launch in found.launches.values()}))


def _self_check(tuned: Sequence[str], device: torch.device) -> list[str]:
    """Reasons against the kernels on a GPU: all launches without tuning, and those of tables."""
    return _run_check("diffopt_kernels.selfcheck", "--all", *(["--also", *tuned] if tuned else []), device=device)


def _step_self_check(device: torch.device) -> list[str]:
    """Reasons against the step's kernels on a GPU: every op in every dtype."""
    return _run_check("diffopt_kernels.step.selfcheck", device=device)


def _run_check(module: str, *options: str, device: torch.device) -> list[str]:
    """Reasons that a self-check's rows give; empty when it passed."""
    command, environment = [sys.executable, "-m", module, *options], _where_only_is(device)
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return [f"the kernels' self-check did not end within {SECONDS} s"]
    if done.returncode == 0:
        return []
    lines = (done.stdout.strip() or done.stderr.strip() or "no output").splitlines()
    rows = [line for line in lines if " WRONG " in line or " VOID " in line]
    wrong = [" ".join(row.lstrip("0123456789 ").split()) for row in rows]  # without the launch's number
    words = "; ".join([*wrong[:3], lines[-1]])
    return [f"the kernels' self-check failed on this GPU ({words}); see python -m {module}"]


def _where_only_is(device: torch.device) -> dict[str, str]:
    """The environment of a process that shall see this GPU and no other: a machine's GPUs may differ."""
    if torch.cuda.device_count() < 2:
        return dict(os.environ)
    name = "CUDA_VISIBLE_DEVICES" if torch.version.hip is None else "HIP_VISIBLE_DEVICES"
    index = torch.cuda.current_device() if device.index is None else device.index
    seen = os.environ.get(name)
    return {**os.environ, name: str(index) if seen is None else seen.split(",")[index].strip()}


def _read_verdicts() -> dict[str, list[str]]:
    try:
        verdicts = parse_json(verdicts_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return verdicts if isinstance(verdicts, dict) else {}


def _write_verdicts(verdicts: dict[str, list[str]]) -> None:
    try:
        write_whole(verdicts_file(), json.dumps(verdicts, indent=2))
    except OSError as error:  # a read-only home: the check runs again next time, which is slow but right
        logger.warning("can't remember the verdict of the kernels' self-check: %s", error)
