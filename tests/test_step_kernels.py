"""Norms, activations and sums against float64 by the exactness rule, interpreted on a CPU and compiled on a GPU."""

import dataclasses
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from diffopt_kernels.launcher import Recent
from diffopt_kernels.step import add_layer_norm, bias_add, geglu, group_norm, group_norm_joined, layer_norm
from diffopt_kernels.step.check import AWKWARD_CASES, MODEL_CASES, StepCase, check_case
from diffopt_kernels.step.group_norm import GroupNormLaunch, group_norm_launch

# The interpreter computes bfloat16 wrongly, so it is tested compiled only.
DTYPES = [torch.float16, torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


def channels_last(*shape: int, **options) -> torch.Tensor:
    return torch.randn(*shape, **options).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", AWKWARD_CASES, ids=lambda case: f"{case.op}: {case.why}")
def test_awkward_cases_are_exact(case: StepCase, dtype: torch.dtype, kernel_device: torch.device) -> None:
    for result in check_case(case, dtype, kernel_device):
        assert result.right, result


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", MODEL_CASES, ids=lambda case: f"{case.op}: {case.why}")
def test_model_cases_are_exact(case: StepCase, dtype: torch.dtype, kernel_device: torch.device) -> None:
    for result in check_case(case, dtype, kernel_device):
        assert result.right, result


@pytest.mark.parametrize("op", ["group_norm", "layer_norm", "geglu", "bias_add"])
def test_a_planted_fault_is_found(op: str, kernel_device: torch.device) -> None:
    case = next(case for case in AWKWARD_CASES if case.op == op and not case.offset and case.shape[-1] > 1)
    assert not all(result.right for result in check_case(case, torch.float32, kernel_device, fault=1.01))


def test_layouts(kernel_device: torch.device) -> None:
    x = channels_last(2, 64, 6, 5, device=kernel_device)
    weight, bias = torch.randn(2, 64, device=kernel_device)
    with torch.no_grad():
        assert group_norm(x, 8, weight, bias, 1e-5).is_contiguous(memory_format=torch.channels_last)
        first, second = (part.contiguous(memory_format=torch.channels_last) for part in x.split([40, 24], dim=1))
        pair = group_norm(first, 8, weight, bias, 1e-5, second=second)
        assert torch.equal(pair, group_norm(x, 8, weight, bias, 1e-5)), "the same program, whatever it reads from"
        assert pair.is_contiguous(memory_format=torch.channels_last)
        normed, joined = group_norm_joined(first, second, 8, weight, bias, 1e-5)
        assert torch.equal(normed, pair)
        assert torch.equal(joined, x)
        assert joined.is_contiguous(memory_format=torch.channels_last)
        assert bias_add(x, bias, x).is_contiguous(memory_format=torch.channels_last)
        wide = torch.randn(9, 300, device=kernel_device)
        rows = wide[:, 10:138]  # a view, rows further apart than they are long
        assert torch.equal(geglu(rows), geglu(rows.contiguous()))
        assert torch.equal(
            layer_norm(rows[:, :64], weight, bias, 1e-5), layer_norm(rows[:, :64].clone(), weight, bias, 1e-5)
        )


def rows(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 2, 3, 1)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x, w: group_norm(x.contiguous(), 8, w, w, 1e-5), "x has strides .* allowed: channels-last memory"),
        (lambda x, w: group_norm(x, 7, w, w, 1e-5), "groups is 7; allowed: divisors of 64"),
        (lambda x, w: group_norm(x, 8, w[:5], w, 1e-5), r"weight.shape is \[5\]; allowed: \[64\]"),
        (lambda x, w: group_norm(x, 8, w, w.double(), 1e-5), "bias.dtype is torch.float64"),
        (lambda x, w: group_norm(x, 8, w, w, 1e-5, shift=w), r"shift.shape is \[64\]; allowed: \[2, 64\]"),
        (lambda x, w: group_norm(x, 8, w, w, 1e-5, second=x), r"weight.shape is \[64\]; allowed: \[128\]"),
        (lambda x, w: group_norm(x[:, :32], 8, w, w, 1e-5, second=x[:, 32:]), "x has strides .*; second has strides"),
        (
            lambda x, w: group_norm(x, 8, w.repeat(2), w.repeat(2), 1e-5, second=x[:1]),
            r"second.shape is \[1, 64, 6, 6\]",
        ),
        (lambda x, w: group_norm(x, 8, w.repeat(2), w.repeat(2), 1e-5, second=x.double()), "second.dtype is .*float64"),
        (lambda x, w: layer_norm(w, w, w, 1e-5), "x has 1 dimensions; allowed: at least 2"),
        (lambda x, w: add_layer_norm(rows(x), rows(x).transpose(1, 2), w, w, 1e-5), "residual has strides"),
        (lambda x, w: geglu(rows(x)[..., :63].contiguous()), r"x.shape\[-1\] is 63; allowed: even"),
        (lambda x, w: geglu(w.double()[None]), "x.dtype is torch.float64"),
        (lambda x, w: bias_add(x, w, x[:1]), r"residual is \[1, 64, 6, 6\]"),
    ],
)
def test_what_cannot_be_is_refused_in_words(call, words: str, kernel_device: torch.device) -> None:
    x, weight = channels_last(2, 64, 6, 6, device=kernel_device), torch.randn(64, device=kernel_device)
    for _ in range(2):  # the second time is no cached mistake
        with pytest.raises(ValueError, match=words), torch.no_grad():
            call(x, weight)


def test_gradients_are_refused(kernel_device: torch.device) -> None:
    x = torch.randn(4, 64, device=kernel_device, requires_grad=True)
    with pytest.raises(ValueError, match=r"x\.requires_grad is True"):
        geglu(x)


def test_empty_batches(kernel_device: torch.device) -> None:
    x, weight = channels_last(0, 64, 6, 6, device=kernel_device), torch.randn(64, device=kernel_device)
    with torch.no_grad():
        assert group_norm(x, 8, weight, weight, 1e-5).shape == x.shape
        assert group_norm(x, 8, weight.repeat(2), weight.repeat(2), 1e-5, second=x).shape == (0, 128, 6, 6)
        assert bias_add(x, weight, x).shape == x.shape
        assert geglu(torch.empty(0, 8, device=kernel_device)).shape == (0, 4)
        assert layer_norm(torch.empty(0, 64, device=kernel_device), weight, weight, 1e-5).shape == (0, 64)


def test_fakes_have_the_shapes_and_layouts_of_the_outputs() -> None:
    with FakeTensorMode(), torch.no_grad():
        x, weight = torch.empty(2, 64, 6, 6).to(memory_format=torch.channels_last), torch.empty(64)
        assert group_norm(x, 8, weight, weight, 1e-5, silu=True).stride() == x.stride()
        wide = torch.empty(128)
        pair = group_norm(x, 8, wide, wide, 1e-5, second=x)
        assert pair.shape == (2, 128, 6, 6)
        assert pair.is_contiguous(memory_format=torch.channels_last)
        assert [out.stride() for out in group_norm_joined(x, x, 8, wide, wide, 1e-5)] == [pair.stride()] * 2
        assert bias_add(x, weight, x).stride() == x.stride()
        total, normed = add_layer_norm(torch.empty(2, 9, 64), torch.empty(2, 9, 64), weight, weight, 1e-5)
        assert total.shape == normed.shape == (2, 9, 64)
        assert geglu(torch.empty(2, 9, 64)).shape == (2, 9, 32)


FLAT_CASES = [case for case in AWKWARD_CASES if case.op == "group_norm" and case.shape[2] * case.shape[3] <= 1024]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", FLAT_CASES, ids=lambda case: case.why)
def test_one_reduction_for_all_channels_is_exact_too(
    case: StepCase, dtype: torch.dtype, kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches = []

    def flat(*shape: int) -> GroupNormLaunch:
        launches.append(dataclasses.replace(group_norm_launch(*shape), flat=True))
        return launches[-1]

    module = sys.modules["diffopt_kernels.step.group_norm"]  # the package has the function under this name
    monkeypatch.setattr(module, "_PREPARED", Recent(8))
    monkeypatch.setattr(module, "group_norm_launch", flat)
    for result in check_case(case, dtype, kernel_device):
        assert result.right, result
    assert launches
    assert all(launch.whole and launch.groups == 1 for launch in launches)


@pytest.mark.timeout(60)  # a loop once had no end for many pictures at a time
@pytest.mark.parametrize("batch", [1, 2, 7, 16, 66, 4096])
@pytest.mark.parametrize(
    ("channels", "pixels"),
    [(320, 4096), (2560, 64), (1920, 1024), (2560, 1024), (2560, 576), (512, 4096), (128, 2**20), (64, 1), (8, 9)],
)
def test_launches_cover_every_group_and_pixel(batch: int, channels: int, pixels: int) -> None:
    groups = min(32, channels)
    launch = group_norm_launch(batch, pixels, channels, groups)
    assert launch.groups * (channels // groups) <= launch.columns
    assert launch.pixels * launch.loads * launch.columns <= 32768
    assert launch.chunk * launch.chunks >= pixels > launch.chunk * (launch.chunks - 1)
    assert launch.whole or launch.chunk % (launch.pixels * launch.loads) == 0
