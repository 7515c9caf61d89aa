"""The inputs of the attention suite: the same numbers in every process, made from a seed on the device."""

from pathlib import Path

import torch

from diffopt.bench.workloads import AttentionShape
from diffopt_kernels.attention_cases import AttentionCase, Content, make_inputs

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

SEED = 0
TIMED: Content = "normal"
"""What is timed, and checked too."""

FAULTY: Content = "spread 3"
"""What is checked besides, and where a wrong scale shows in every dtype: scores with a standard deviation of 3."""

CONTENTS: tuple[Content, ...] = (TIMED, FAULTY)


def shape_inputs(
    shape: AttentionShape, dtype: str, device: torch.device, content: Content = TIMED, seed: int = SEED
) -> Inputs:
    """q [batch, n_q, heads, head_dim], k and v [batch, n_k, heads, head_dim], contiguous."""
    case = AttentionCase(shape.name, shape.batch, shape.n_q, shape.n_k, shape.heads, content)
    return make_inputs(case, shape.head_dim, getattr(torch, dtype), device, seed)


def output_file(folder: str, contender: str, content: str) -> Path:
    """Where a contender's process leaves its output for the process that judges it."""
    return Path(folder) / f"{contender} {content}.pt"
