"""What the step's kernels can take, as reasons in words, empty when there is none; and an image to write to."""

import torch

from diffopt_kernels.support import DTYPES


def common_reasons(x: torch.Tensor, *others: tuple[str, torch.Tensor | None, tuple[int, ...] | None]) -> list[str]:
    """Why x, or tensors that go with it, can't be inputs: name, tensor, wanted shape (None: looked at already)."""
    reasons = []
    if x.dtype not in DTYPES:
        reasons.append(f"x.dtype is {x.dtype}; allowed: {', '.join(str(dtype) for dtype in DTYPES)}")
    if x.requires_grad and torch.is_grad_enabled():
        reasons.append("x.requires_grad is True; allowed: False, or a call under torch.no_grad()")
    for name, other, shape in others:
        if other is None:
            continue
        if shape is None:
            pass
        elif tuple(other.shape) != shape:
            reasons.append(f"{name}.shape is {list(other.shape)}; allowed: {list(shape)}")
        elif other.stride(-1) != 1 and other.shape[-1] > 1:
            reasons.append(f"{name}.stride(-1) is {other.stride(-1)}; allowed: 1")
        if other.dtype != x.dtype:
            reasons.append(f"{name}.dtype is {other.dtype}; allowed: {x.dtype}, as x's")
        if other.device != x.device:
            reasons.append(f"{name}.device is {other.device}; allowed: {x.device}, as x's")
        if other.requires_grad and torch.is_grad_enabled():
            reasons.append(f"{name}.requires_grad is True; allowed: False, or a call under torch.no_grad()")
    return reasons


def image_reasons(x: torch.Tensor, name: str = "x") -> list[str]:
    """Why x isn't a batch of images in channels-last memory without gaps."""
    if x.dim() != 4:
        return [f"{name} has {x.dim()} dimensions; allowed: [B, C, H, W]"]
    if not x.is_contiguous(memory_format=torch.channels_last):
        return [f"{name} has strides {x.stride()}; allowed: channels-last memory"]
    return []


def rows_reasons(x: torch.Tensor, name: str = "x") -> list[str]:
    """Why x isn't rows of adjacent elements at equal steps, [..., C] that views as [M, C]."""
    if x.dim() < 2:
        return [f"{name} has {x.dim()} dimensions; allowed: at least 2"]
    if x.stride(-1) != 1:
        return [f"{name}.stride(-1) is {x.stride(-1)}; allowed: 1"]
    return [] if x.dim() == 2 or x.is_contiguous() else [f"{name} has strides {x.stride()}; allowed: contiguous"]


def empty_image(x: torch.Tensor, columns: int, scale: float = 1) -> torch.Tensor:
    """[B, columns, scale · H, scale · W] in channels-last memory, for what is made of x [B, C, H, W]."""
    batch, _, height, width = x.shape
    return x.new_empty((batch, int(height * scale), int(width * scale), columns)).permute(0, 3, 1, 2)
