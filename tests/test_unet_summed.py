"""Summed weights once per run: the same bits as summing them at every step, and anew whenever they may be others.

`Tape` stands in for CUDA graphs and a function for the convolution, which no CPU has.
"""

import copy
import types

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.upsampling import Upsample2D
from pipelines import picture
from tiny_model import one_thread  # noqa: F401
from twins import SIDE, Twins, at_step
from upsampling import upsampled_convolution

from diffopt.unet import forwards, summed
from diffopt_kernels.step import reference
from diffopt_kernels.step.upsampled_convolution import takes_upsampled


@pytest.fixture(name="twins")
def _twins(monkeypatch) -> Twins:
    def summed_weights(weight, out=None):
        sums = reference.summed_weights_reference(weight, dtype=weight.dtype)
        return sums if out is None else out.copy_(sums)

    monkeypatch.setattr(forwards, "_products_run_on", lambda x: True)
    monkeypatch.setattr(forwards, "takes_upsampled", lambda x, columns: True)
    monkeypatch.setattr(forwards, "upsample_reasons", lambda x: [])  # a stock block before it may change the layout
    monkeypatch.setattr(forwards.kernels, "upsample", lambda x: F.interpolate(x, scale_factor=2.0))
    monkeypatch.setattr(forwards, "upsampled_convolution_reasons", lambda *_: [])
    monkeypatch.setattr(forwards.kernels, "upsampled_convolution", upsampled_convolution)
    monkeypatch.setattr(summed.kernels, "summed_weights", summed_weights)
    twins = Twins(monkeypatch)
    for pipe in (twins.captured, twins.reference):
        for module in pipe.unet.modules():
            if type(module) is Upsample2D:
                module.forward = types.MethodType(forwards.upsample, module)
    return twins


def times(twins: Twins) -> int:
    return twins.handle.summary()["step"]["sums"]


def weight_of(pipe) -> torch.Tensor:
    return pipe.unet.up_blocks[0].upsamplers[0].conv.weight


def test_once_per_run_and_the_same_bits(twins: Twins) -> None:
    first = twins.same_picture()
    assert times(twins) == 1
    assert torch.equal(twins.same_picture(), first)
    assert times(twins) == 2, "another picture may have other weights"
    assert "captured apart: summed weights, 2 replays" in twins.handle.report()


def test_calls_of_all_sizes_share_them(twins: Twins) -> None:
    twins.same_picture()
    twins.same_picture(width=24)
    assert len(twins.handle.summary()["step"]["buckets"]) == 2
    assert len(twins.captured.unet.diffopt_graphs._apart._sums) == 1


@pytest.mark.parametrize("how", ["in place", "replaced", "data"])
def test_weights_changed_between_two_runs_show(twins: Twins, how: str) -> None:
    before = twins.same_picture()
    for pipe in (twins.captured, twins.reference):
        weight = weight_of(pipe)
        if how == "in place":
            weight.mul_(1.5)
        elif how == "data":
            weight.data.mul_(1.5)
        else:
            weight.data = (weight.data * 1.5).contiguous(memory_format=torch.channels_last)
    assert not torch.equal(twins.same_picture(), before)


def test_weights_changed_within_a_run_show_at_the_next_step(twins: Twins) -> None:
    before = twins.same_picture()
    changed = twins.same_picture(**at_step(1, lambda pipe, _: weight_of(pipe).mul_(1.5)))
    assert not torch.equal(changed, before)
    assert times(twins) == 3


def lora(unet) -> dict[str, torch.Tensor]:
    """An adapter of the upsampler's convolution."""
    name = "up_blocks.0.upsamplers.0.conv"
    weight, generator = unet.get_submodule(name).weight, torch.Generator().manual_seed(0)
    down, up = (2, *weight.shape[1:]), (len(weight), 2, 1, 1)
    shapes = {"lora_A": down, "lora_B": up}
    return {f"unet.{name}.{key}.weight": 0.3 * torch.randn(x, generator=generator) for key, x in shapes.items()}


def fuse(pipe) -> None:
    """It leaves no trace on the weight that PyTorch would count."""
    weight = weight_of(pipe)
    before = id(weight), weight._version, weight.data_ptr()
    pipe.load_lora_weights(lora(pipe.unet), adapter_name="one")
    pipe.fuse_lora(components=["unet"])
    pipe.unload_lora_weights()
    weight = weight_of(pipe)
    assert (id(weight), weight._version, weight.data_ptr()) == before


def test_an_adapter_fused_within_a_run_shows_at_the_next_step(twins: Twins) -> None:
    before = twins.same_picture()
    assert not torch.equal(twins.same_picture(**at_step(1, lambda pipe, _: fuse(pipe))), before)
    assert not torch.equal(twins.same_picture(), before)


def test_the_second_one_fused_within_a_run_shows_at_the_next_step(twins: Twins) -> None:
    """The first one ever leaves attributes on the model, by which alone it is seen."""
    for pipe in (twins.captured, twins.reference):
        fuse(pipe)
    before = twins.same_picture()
    captures = twins.handle.summary()["step"]["captures"]
    assert not torch.equal(twins.same_picture(**at_step(1, lambda pipe, _: fuse(pipe))), before)
    assert twins.handle.summary()["step"]["captures"] == captures, "no other graph, so that only the sums are made anew"


def test_adapters_of_an_upsampler_come_and_go(twins: Twins) -> None:
    plain = twins.same_picture()
    for pipe in (twins.captured, twins.reference):
        pipe.load_lora_weights(lora(pipe.unet), adapter_name="one")
    whole = twins.same_picture()
    assert not torch.equal(whole, plain)
    assert not torch.equal(twins.same_picture(**at_step(1, lambda pipe, _: pipe.set_adapters(["one"], [0.3]))), whole)
    for pipe in (twins.captured, twins.reference):
        pipe.fuse_lora(components=["unet"])
    fused = twins.same_picture()
    assert not torch.equal(fused, plain)
    assert not torch.equal(
        twins.same_picture(**at_step(1, lambda pipe, _: pipe.unfuse_lora(components=["unet"]))), fused
    )


def test_other_padding_ends_it(twins: Twins) -> None:
    twins.same_picture()
    for pipe in (twins.captured, twins.reference):
        pipe.unet.up_blocks[0].upsamplers[0].conv.padding_mode = "circular"
    before = times(twins)
    twins.same_picture()
    assert times(twins) == before


def test_a_copy_has_its_own(twins: Twins) -> None:
    expected = twins.same_picture()
    copied = copy.deepcopy(twins.captured)
    weight_of(twins.captured).mul_(2)
    assert torch.equal(picture(copied, "bundled", steps=4, **SIDE), expected)


def test_without_a_recording_they_are_made_where_they_are_used(twins: Twins) -> None:
    conv = twins.reference.unet.up_blocks[0].upsamplers[0].conv
    with summed.collected() as used:
        made = summed.sums_of(conv)
    assert used == [conv]
    with summed.given({conv: torch.zeros(1)}):
        assert summed.sums_of(conv).numel() == 1
    assert torch.equal(summed.sums_of(conv), made)


def test_what_cannot_use_them_makes_none() -> None:
    """In float32 they would be 236 MB for SD1.5, made in every run and never read."""
    x = torch.empty(1, 64, 2, 2, dtype=torch.float16)
    assert takes_upsampled(x, 64)
    assert not takes_upsampled(x.float(), 64)
    assert not takes_upsampled(x, 60)
    assert not takes_upsampled(x[:, :60], 64)
