"""Which variants of the step kernels Triton would compile for a UNet, found without a GPU and without compiling.

The UNet runs on tensors without memory, with diffopt's forwards and attention processors. Each op prepares its launches
as it does on a GPU; instead of being launched they are noted with all that Triton compiles a variant for: constexprs,
options, types, and which arguments are 1, or divisible by 16 and not exempt from being asked.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn
from triton.runtime.jit import JITFunction, KernelParam

from diffopt.attention.processors import DiffoptAttnProcessor
from diffopt.bench.random_configs import RandomModelConfig
from diffopt.unet import forwards, fused
from diffopt_kernels.launcher import Pointer, Recent

OURS = {
    "geglu": ("_OP",),
    "group_norm": ("_OP", "_JOINED_OP"),
    "layer_norm": ("_NORM", "_ADD_NORM"),
    "sums": ("_OP",),
    "thin_convolution": ("_OP",),
    "upsample": ("_OP",),
}
"""Modules of plain Triton kernels, and the ops in them; each stands for a function that launches."""
_FUNCTIONS = {"_OP": "_run", "_JOINED_OP": "_run_joined", "_NORM": "_norm", "_ADD_NORM": "_add_norm"}

Variant = tuple[str, ...]
"""A kernel's name, and what it is compiled for."""


def variant_of_launch(kernel: Any, arguments: dict[str, Any], tensors: tuple[torch.Tensor, ...]) -> Variant:
    """What a launch would be compiled for, as Triton 3.6 tells variants apart."""
    known = []
    for parameter in _parameters(kernel):
        name, value = parameter.name, arguments[parameter.name]
        if isinstance(value, Pointer):
            tensor = tensors[value.tensor]
            aligned = tensor.storage_offset() * tensor.element_size() % 16 == 0
            known.append(f"{name}: {tensor.dtype} aligned={aligned}")
        elif parameter.is_constexpr or value is None:
            known.append(f"{name}={value}")
        elif isinstance(value, int):
            kind = "i32" if -(2**31) <= value < 2**31 else "i64"
            specialised = not parameter.do_not_specialize
            one, aligned = specialised and value == 1, specialised and value % 16 == 0
            known.append(f"{name}: {kind} one={one} aligned={aligned}")
    known += [f"{name}={value}" for name, value in arguments.items() if name not in kernel.arg_names]
    return (kernel.fn.__name__, *known)


def _parameters(kernel: Any) -> list[KernelParam]:
    """Of a kernel, interpreted or not."""
    if not isinstance(kernel, JITFunction):
        kernel = JITFunction(kernel.fn, do_not_specialize=kernel.kwargs["do_not_specialize"])
    return kernel.params


@contextmanager
def noted_launches(patch: pytest.MonkeyPatch, *, products: bool) -> Iterator[set[Variant]]:
    """Inside it, what our plain kernels would be compiled for when a UNet on the meta device runs.

    With `products`, Hopper's products (which are not noted) do the work that they do on an H100.
    """
    found: set[Variant] = set()

    class Noted:
        def __init__(self, kernel, grid, arguments, *, device):
            self.kernel, self.arguments = kernel, arguments
            assert len(grid) <= 3
            assert all(size >= 1 for size in grid)

        def __call__(self, *tensors):
            found.add(variant_of_launch(self.kernel, self.arguments, tensors))

    for name, ops in OURS.items():
        module: Any = sys.modules[f"diffopt_kernels.step.{name}"]
        patch.setattr(module, "PreparedLaunch", Noted)
        patch.setattr(module, "_PREPARED", Recent(512))
        patch.setattr(module, "device_reasons", lambda device: [])
        for op in ops:
            patch.setattr(module, op, getattr(module, _FUNCTIONS[op]))
    patch.setattr(sys.modules["diffopt_kernels.step.products"], "_multiprocessors", lambda device: 132)  # an H100's
    patch.setattr(forwards, "fits", lambda x: True)
    patch.setattr(forwards, "_products_run_on", lambda x: products)
    patch.setattr(torch, "is_autocast_enabled", lambda *kind: False)  # the meta device has no autocast to ask for
    patch.setattr(fused, "device_reasons", lambda device: [])
    patch.setattr(fused, "product_device_reasons", lambda device: [])
    stock = torch.nn.functional.conv2d
    patch.setattr("torch.nn.functional.conv2d", lambda *args: stock(*args).to(memory_format=torch.channels_last))
    with torch.no_grad():
        yield found


def unet_on_meta(config: RandomModelConfig, dtype: torch.dtype = torch.float16) -> UNet2DConditionModel:
    """A UNet without memory, with diffopt's forwards and processors."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config.unet)
    nn.Module.to(unet, dtype).requires_grad_(False).eval()
    unet.set_attn_processor(DiffoptAttnProcessor())  # pyright: ignore[reportArgumentType]  (diffusers lists its own)
    fused.put_on(unet)
    return unet


def run(unet: UNet2DConditionModel, batch: int, width: int, height: int) -> None:
    """One forward for pictures of a size in pixels."""
    empty = {"dtype": unet.dtype, "device": "meta"}
    added = {}
    if unet.config["addition_embed_type"] == "text_time":
        added = {"text_embeds": torch.empty(batch, 1280, **empty), "time_ids": torch.empty(batch, 6, **empty)}
    unet(
        torch.empty(batch, 4, height // 8, width // 8, **empty),
        torch.empty((), device="meta"),
        torch.empty(batch, 77, unet.config["cross_attention_dim"], **empty),
        added_cond_kwargs=added,
        return_dict=False,
    )
