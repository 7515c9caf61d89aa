"""A process that starts, makes two pictures and prints as JSON how long each stage took: `warm_start.py` starts it.

Nothing but the standard library is imported before the clock is read: the imports are a stage.
"""

import dataclasses
import json
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclasses.dataclass(frozen=True)
class Request:
    """What the process is asked for; it travels as JSON.

    Attributes:
        case: the fields of a `Case`.
        weights: the folder with random weights of this case; None where `case` names a model that can be loaded.
        device: as torch names it.
        attention: what `optimize` is asked for.
        started: `time.monotonic()` of the parent when it started this process; that clock is the same for all.
    """

    case: dict[str, Any]
    weights: str | None
    device: str
    attention: str
    started: float


def run(request: Request) -> dict[str, Any]:
    """Make the pictures.

    Returns:
        "seconds": by stage (fields of `WarmStart`), "backends": the attention backends that served.
    """
    seconds: dict[str, float] = {}
    marked = request.started

    def mark(stage: str) -> None:
        nonlocal marked
        now = time.monotonic()
        seconds[stage], marked = now - marked, now

    mark("process_s")
    import torch

    from diffopt.bench.step.contenders import whole_arguments
    from diffopt.bench.workloads import Case
    from diffopt.config import build
    from diffopt.handle import optimize
    from diffopt.measure.timing import synchronize

    case, device = build(Case, request.case, where="case"), torch.device(request.device)
    mark("imports_s")
    torch.zeros((), device=device)
    synchronize(device)
    mark("device_s")
    pipe = _read(case, request.weights, device)
    pipe.set_progress_bar_config(disable=True)
    synchronize(device)
    mark("weights_s")
    handle = optimize(pipe, attention=request.attention, decode=case.decode)
    synchronize(device)
    mark("optimize_s")
    for stage in ("picture_s", "second_picture_s"):
        pipe(**whole_arguments(case, device), output_type="pil")
        mark(stage)
    return {"seconds": seconds, "backends": sorted(backends_of(handle.summary()))}


def backends_of(summary: dict[str, Any]) -> set[str]:
    """The attention backends that served, by a handle's summary."""
    return {run["backend"] for layer in summary["layers"] for run in layer["runs"]}


def _read(case: Any, weights: str | None, device: "torch.device") -> Any:
    from pathlib import Path

    from diffopt.bench.random_configs import random_kind
    from diffopt.bench.random_models import read_random_pipeline
    from diffopt.bench.step.contenders import dtype_on
    from diffopt.models import load

    kind, dtype = random_kind(case.model), dtype_on(device)
    if kind is not None and weights is not None:
        return read_random_pipeline(kind, Path(weights), device=device, dtype=dtype)
    return load(case.model, device=device, dtype=dtype)


if __name__ == "__main__":
    print(json.dumps(run(Request(**json.loads(sys.argv[1])))))
