"""How far a result is from a reference.

A NaN anywhere makes a distance NaN, and NaN never passes: every rule is `error <= allowed`. The rule for a whole UNet
is `diffopt.measure.teacher_forced`; the one for a kernel lives with the kernels (`diffopt_kernels.attention_check`).
"""

import contextlib
import math
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def ieee_float32() -> Iterator[None]:
    """A block whose float32 convolutions and products are not rounded to TF32. The setting is the whole process's."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def relative_l2(out: torch.Tensor, reference: torch.Tensor) -> float:
    """‖out − reference‖ / ‖reference‖ over all elements, in float64.

    A reference of zeros makes it 0 for zeros and infinite for anything else; NaN on either side makes it NaN.

    Raises:
        ValueError: different shapes (broadcasting would hide a missing row).
    """
    difference, reference = _difference(out, reference)
    error, norm = difference.norm().item(), reference.norm().item()
    if norm == 0:
        return error if error == 0 or math.isnan(error) else math.inf
    return error / norm


def nonfinite_count(out: torch.Tensor) -> int:
    """Number of NaN and infinite elements."""
    return int((~torch.isfinite(out)).sum().item())


def _difference(out: torch.Tensor, reference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if out.shape != reference.shape:
        raise ValueError(f"shapes differ: {tuple(out.shape)} and {tuple(reference.shape)}")
    reference = reference.double()
    return out.to(reference.device).double() - reference, reference
