"""The warm start: a fresh process reads the model, optimizes it and makes a picture, with an earlier one's caches."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from diffopt.bench.random_configs import random_kind
from diffopt.bench.random_models import write_weights
from diffopt.bench.step.warm_start_process import Request, backends_of
from diffopt.bench.step.warm_start_record import NOT_COUNTED, STAGES, WarmStart
from diffopt.bench.workloads import Case
from diffopt.errors import DiffoptError, one_line

STEPS = 20
RUNS = 2
"""The first fills the caches on disk (compiled kernels, verdicts, the system's own of files), the last one counts."""

SECONDS = 300
"""The longest a process may take; what compiles and checks kernels for minutes has run in the caller before."""

_MODULE = "diffopt.bench.step.warm_start_process"


class WarmStartError(DiffoptError):
    """A process that didn't do what its times would stand for."""


def measure_warm_start(
    case: Case,
    pipe: Any,
    *,
    device: torch.device,
    attention: str,
    summary: dict[str, Any],
    on_run: Callable[[int], object] = lambda done: None,
) -> WarmStart:
    """Time the way to a case's first picture of 20 steps. Whatever goes wrong is words in the result.

    Args:
        pipe: the case's stock pipeline: random weights come from it, by way of files.
        attention: what `optimize` is asked for.
        summary: of the handle that was measured; where other backends served there, the times are none of its own.
        on_run: told how many processes have ended.
    """
    case = dataclasses.replace(case, steps=STEPS)
    answer: dict[str, Any] = {}
    try:
        with _weights(case, pipe) as weights:
            for number in range(RUNS):
                on_run(number)
                answer = ask(Request(dataclasses.asdict(case), weights, str(device), attention, 0.0), SECONDS)
        on_run(RUNS)
        return _record(answer, backends_of(summary))
    except DiffoptError as error:
        return WarmStart(steps=STEPS, why=str(error))
    except Exception as error:  # a warm start is worth less than the record it stands in
        return WarmStart(steps=STEPS, why=f"{type(error).__name__}: {one_line(error)}")


def ask(request: Request, seconds: float) -> dict[str, Any]:
    """What a process says to a request (`warm_start_process.run`); its `started` is filled in.

    It leads a group of its own, which is ended whole when the caller's patience ends or Ctrl-C comes: nothing of it
    stays on the GPU.

    Raises:
        WarmStartError: it took longer than that, or failed; its last words.
        OSError: it can't be started.
    """
    request = dataclasses.replace(request, started=time.monotonic())
    command = [sys.executable, "-m", _MODULE, json.dumps(dataclasses.asdict(request))]
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, errors="replace", start_new_session=True, **pipes) as process:
        try:
            output, errors = process.communicate(timeout=seconds)
        except BaseException as error:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise WarmStartError(f"no picture within {seconds:g} s") from None
            raise
    if process.returncode:
        raise WarmStartError(f"the process ended with {process.returncode}: {_last_line(errors or output)[:160]}")
    return json.loads(_last_line(output))


def _record(answer: dict[str, Any], measured: set[str]) -> WarmStart:
    other = set(answer["backends"]) - measured
    if other:
        raise WarmStartError(f"{', '.join(sorted(other))} served, not {', '.join(sorted(measured))} as in the loops")
    seconds = answer["seconds"]
    counted = sum(seconds[stage] for stage in STAGES if stage not in NOT_COUNTED)
    return WarmStart(steps=STEPS, warm_start_s=counted, **seconds)


@contextlib.contextmanager
def _weights(case: Case, pipe: Any) -> Iterator[str | None]:
    """A folder with a case's random weights for the length of the block; None for a model that has its own files."""
    if random_kind(case.model) is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="diffopt-warm-start-") as folder:
        write_weights(pipe, Path(folder))
        yield folder


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no output")
