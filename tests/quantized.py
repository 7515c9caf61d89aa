"""A weight as quantization libraries (torchao) put it into a stock layer: without memory, and only `linear` works."""

import torch
import torch.nn.functional as F
from torch import nn


class Quantized(torch.Tensor):
    """Stands for a tensor that is kept elsewhere in another form."""

    kept: torch.Tensor

    @staticmethod
    def __new__(cls, kept: torch.Tensor) -> "Quantized":
        options = {"dtype": kept.dtype, "device": kept.device, "strides": kept.stride()}
        return torch.Tensor._make_wrapper_subclass(cls, kept.shape, **options)

    def __init__(self, kept: torch.Tensor) -> None:
        self.kept = kept

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            return F.linear(args[0], args[1].kept, *args[2:])
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].kept)
        raise NotImplementedError(f"{func} of a quantized weight")


def quantized(linear: nn.Linear) -> nn.Parameter:
    """A layer's weight in that form; both multiply to the same bits."""
    return nn.Parameter(Quantized(linear.weight.data), requires_grad=False)
