"""The judge's process: float64 and the errors that are allowed. A contender's faults can't reach its memory."""

import gc
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch

from diffopt.attention.backends import BACKENDS
from diffopt.bench.attention.inputs import CONTENTS, FAULTY, Inputs, output_file, shape_inputs
from diffopt.bench.attention.record import AttentionErrors, AttentionRule
from diffopt.bench.attention.worker import is_sound, settle
from diffopt.bench.attention.worker_process import Commands
from diffopt.bench.workloads import AttentionShape
from diffopt.measure.ceilings import Ceilings, measure_ceilings
from diffopt_kernels import attention_reference
from diffopt_kernels.attention_check import PLANTED_FAULT, Errors, allowed_errors, errors_against

_MATH, _FUSED = BACKENDS["sdpa-math"], (BACKENDS["sdpa-flash"], BACKENDS["sdpa-efficient"])
_SCORES_AT_ONCE = 2**28  # elements: a gigabyte in float32, which PyTorch's math attention computes in


def judge_process(device: str) -> tuple[Commands, Callable[[], bool]]:
    """The commands of the judge's process (a `worker_process.Factory`)."""
    place = settle(device)
    return JudgeCommands(place).commands(), lambda: is_sound(place)


class JudgeCommands:
    """The commands, on one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._expected: dict[tuple[str, str], torch.Tensor] = {}

    def commands(self) -> Commands:
        return {name: getattr(self, name) for name in ("ceilings", "rules", "errors", "release")}

    def ceilings(self) -> Ceilings | None:
        """What this GPU reaches now; None on a CPU."""
        return measure_ceilings(self._device) if self._device.type == "cuda" else None

    def rules(self, shape: AttentionShape, dtype: str) -> list[AttentionRule]:
        """Compute float64 for every content, keep it, and say what is allowed."""
        return [self._rule(shape, dtype, content) for content in CONTENTS]

    def errors(self, dtype: str, contender: str, folder: str) -> dict[str, AttentionErrors]:
        """Errors by content of the outputs that a contender of this dtype left in `folder`; the files are removed.

        Raises:
            ValueError: an output of another shape or dtype.
        """
        found = {}
        for content in CONTENTS:
            file = output_file(folder, contender, content)
            out = torch.load(file, weights_only=True)
            file.unlink()
            expected = self._expected[dtype, content]
            if out.shape != expected.shape or out.dtype != getattr(torch, dtype):
                raise ValueError(f"the output is {tuple(out.shape)}, {out.dtype}")
            found[content] = recorded(errors_against(out.to(self._device), expected))
        return found

    def release(self) -> None:
        """Forget the last shape."""
        self._expected.clear()
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _rule(self, shape: AttentionShape, dtype: str, content: Any) -> AttentionRule:
        rule, self._expected[dtype, content] = judged(shape_inputs(shape, dtype, self._device, content), content)
        return rule


def judged(inputs: Inputs, content: Any) -> tuple[AttentionRule, torch.Tensor]:
    """What is allowed on these inputs, whose content decides whether a fault is planted; and the float64 output."""
    dtype = inputs[0].dtype
    expected = attention_reference(*inputs)
    exact = errors_against(in_parts(_math, inputs), expected)
    fused = [errors_against(_run(backend, inputs), expected) for backend in _fused_here(inputs)]
    best = min(fused, key=lambda errors: errors.relative_l2, default=None)
    limit = allowed_errors([errors for errors in (exact, best) if errors], expected, dtype)
    fault = None
    if content == FAULTY:
        fault = recorded(errors_against(in_parts(_faulty_math, inputs), expected))
    rule = AttentionRule(
        dtype=str(dtype).removeprefix("torch."),
        content=content,
        math=recorded(exact),
        fused=recorded(best) if best else None,
        limit=recorded(limit),
        fault=fault,
    )
    return rule, expected


def in_parts(run: Callable[..., torch.Tensor], inputs: Inputs) -> torch.Tensor:
    """`run(q, k, v)` over as few parts of rows, heads and queries as keep its scores small; the same arithmetic."""
    q, k, v = inputs
    if q.shape[0] * q.shape[2] * q.shape[1] * k.shape[1] <= _SCORES_AT_ONCE:
        return run(q, k, v)
    out = torch.empty_like(q)
    queries = max(1, _SCORES_AT_ONCE // k.shape[1])
    heads = max(1, queries // q.shape[1])
    starts = itertools.product(range(q.shape[0]), range(0, q.shape[2], heads), range(0, q.shape[1], queries))
    for row, head, query in starts:
        at = (slice(row, row + 1), slice(query, query + queries), slice(head, head + heads))
        keys = (at[0], slice(None), at[2])
        out[at] = run(q[at], k[keys], v[keys])
    return out


def _math(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return _MATH.run(q, k, v, None, None)


def _faulty_math(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return _MATH.run(q, k, v, None, PLANTED_FAULT / math.sqrt(q.shape[3]))


def _fused_here(inputs: Inputs) -> list[Any]:
    device = inputs[0].device
    return [b for b in _FUSED if not b.device_reasons(device) and not b.call_reasons(*inputs, None)]


def _run(backend: Any, inputs: Inputs) -> torch.Tensor:
    return backend.run(*inputs, None, None)


def recorded(errors: Errors) -> AttentionErrors:
    """As a record keeps them."""
    return AttentionErrors(relative_l2=errors.relative_l2, maximum=errors.maximum)
