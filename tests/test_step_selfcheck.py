"""The check that decides whether the step's ops may run: right ones pass, wrong ones turn it."""

import json
import sys

import pytest
import torch

from diffopt_kernels.attention_check import Errors
from diffopt_kernels.step import check, selfcheck
from diffopt_kernels.step.guarded import Guarded

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TINY = [case for case in check.AWKWARD_CASES if case.why in ("odd sizes", "one row", "large gates", "one pixel")]


def module(op: str):
    return sys.modules[f"diffopt_kernels.step.{'sums' if op == 'bias_add' else op}"]


@pytest.mark.gpu
def test_every_op_passes_the_whole_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert selfcheck.main([]) == 0, capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("op", check.OPS)
def test_right_ops_pass(op: str, dtype: torch.dtype, kernel_device: torch.device) -> None:
    result = check.check_op(op, TINY, dtype, kernel_device, seed=7)
    assert not result.void
    assert result.right, result


@pytest.mark.parametrize("op", check.OPS)
def test_the_planted_fault_is_noticed_beside_perfect_kernels_in_bfloat16(op: str, monkeypatch) -> None:
    """On a CPU in place of kernels: references rounded once; the interpreter computes bfloat16 wrongly."""

    def rounded(function):
        def run(x, *arguments, **options):
            torch.empty_like(x)
            out = function(x, *arguments, **options)
            return tuple(y.to(x.dtype) for y in out) if isinstance(out, tuple) else out.to(x.dtype)

        return run

    def add_layer_norm(x, residual, weight, bias, eps, sum_bias=None):
        total, normed = check.exact.layer_norm_reference(x, weight, bias, eps, residual=residual)
        return (total if sum_bias is None else total + sum_bias.to(total.dtype)), normed

    monkeypatch.setattr(check, "group_norm", rounded(check.exact.group_norm_reference))
    monkeypatch.setattr(check, "layer_norm", rounded(lambda *a: check.exact.layer_norm_reference(*a)[1]))
    monkeypatch.setattr(check, "add_layer_norm", rounded(add_layer_norm))
    monkeypatch.setattr(check, "geglu", rounded(check.exact.geglu_reference))
    monkeypatch.setattr(check, "bias_add", rounded(check.exact.bias_add_reference))
    monkeypatch.setattr(check, "thin_convolution", rounded(check.exact.convolution_reference))
    monkeypatch.setattr(Guarded, "allocations", 1)
    for seed in range(5):
        result = check.check_op(op, TINY, torch.bfloat16, torch.device("cpu"), seed=seed)
        assert result.right, result
        assert max(fault.share for fault in result.faults) > 2


def test_a_check_that_cannot_see_the_fault_is_void(kernel_device: torch.device, monkeypatch) -> None:
    monkeypatch.setattr(check, "planted_fault", lambda dtype: 1.0)
    result = check.check_op("geglu", TINY, torch.float32, kernel_device)
    assert result.void == "a planted fault passes in float32"
    assert not result.right


def test_nothing_checked_is_not_right(kernel_device: torch.device) -> None:
    assert not check.check_op("geglu", [], torch.float32, kernel_device).right


@pytest.mark.parametrize("op", check.OPS)
def test_what_is_left_unwritten_is_wrong(op: str, kernel_device: torch.device, monkeypatch) -> None:
    monkeypatch.setattr(module(op), "_prepared", lambda *_, **options: lambda *_: None)
    monkeypatch.setattr(module(op), "_PREPARED", type(module(op)._PREPARED)(8))
    result = check.check_op(op, TINY, torch.float32, kernel_device)
    assert not any(case.right or case.near for case in result.cases)


def test_an_overrun_is_wrong_however_exact_the_output(kernel_device: torch.device, monkeypatch) -> None:
    prepared = module("geglu")._prepared

    def overruns(x):
        run = prepared(x)

        def both(x, out):
            run(x, out)
            torch.as_strided(out, (1,), (1,), out.storage_offset() + out.numel()).fill_(1.0)

        return both

    monkeypatch.setattr(module("geglu"), "_prepared", overruns)
    monkeypatch.setattr(module("geglu"), "_PREPARED", type(module("geglu")._PREPARED)(8))
    result = check.check_op("geglu", TINY, torch.float32, kernel_device)
    assert result.cases
    assert all(case.overrun and case.ours.within(case.limit) for case in result.cases)
    assert not result.right


def test_the_intermediate_result_is_guarded_too(kernel_device: torch.device) -> None:
    case = next(case for case in check.AWKWARD_CASES if case.why == "80 channels in each group, in chunks")
    guarded = Guarded()
    for _ in check.case_outputs(case, torch.float32, kernel_device, guarded):
        pass
    assert guarded.allocations == 2  # moments and output


@pytest.mark.parametrize(("further", "right"), [(0.9, True), (1.1, False)])
def test_a_result_just_beyond_its_limit_is_drawn_again(monkeypatch, further: float, right: bool) -> None:
    def draw(case, dtype, device, seed=0, fault=1.0):
        share = 9.0 if fault > 1 else 1.2 if seed == 3 else further
        none = Errors(0, 0)
        yield check.StepResult(case, "float32", Errors(0, share), none, Errors(1, 1), overrun=False)

    monkeypatch.setattr(check, "check_case", draw)
    cases = [next(case for case in TINY if case.op == "geglu")]
    result = check.check_op("geglu", cases, torch.float32, torch.device("cpu"), seed=3)
    assert len(result.redrawn) == 1
    assert len(result.cases) == 4
    assert result.right is right


class TestCommand:
    def test_each_op_has_a_process_and_a_row(self, tmp_path, capsys) -> None:
        record = tmp_path / "record.json"
        options = ["--match", "bias_add", "--tiny", "--device", DEVICE, "--dtype", "float16", "float32"]
        assert selfcheck.main([*options, "--seed", "3", "--json", str(record)]) == 0
        written = json.loads(record.read_text())
        assert [(op["op"], op["dtype"], op["seed"]) for op in written["ops"]] == [
            ("bias_add", "float16", 3),
            ("bias_add", "float32", 3),
        ]
        assert all(op["right"] for op in written["ops"])
        assert "2 of 2 ops are right" in capsys.readouterr().out

    def test_a_wrong_op_is_a_row_and_an_exit_code(self, monkeypatch, capsys) -> None:
        """In this process: a kernel that doubles its output."""
        monkeypatch.setattr(check, "bias_add", lambda *tensors: 2 * torch.ops.diffopt_kernels.bias_add(*tensors))
        options = ["--here", "bias_add", "float32", "--tiny", "--device", DEVICE]
        assert selfcheck.main(options) == 1
        record = json.loads(capsys.readouterr().out)
        assert record["right"] is False
        row = selfcheck._row(record)
        assert row.startswith("bias_add      float32  WRONG  0/1")
        assert "odd sizes" in row

    @pytest.mark.parametrize("op", check.OPS + check.PRODUCTS)
    def test_without_the_models_shapes_cases_are_left(self, op: str, monkeypatch, capsys) -> None:
        """None at all would not be right: on a Hopper GPU this would turn down products that nobody looked at."""
        looked_at: list[check.StepCase] = []

        def check_op(op, cases, dtype, device, *, seed):
            looked_at.extend(case for case in cases if case.op == op)
            return check.OpResult(op, "float16", (), ())

        monkeypatch.setattr(check, "check_op", check_op)
        selfcheck.main(["--here", op, "float16", "--tiny", "--device", DEVICE])
        assert looked_at
        assert check.fault_case(op) in looked_at
        assert not any("sd15" in case.why for case in looked_at)

    def test_a_process_that_dies_is_wrong(self, monkeypatch, capsys) -> None:
        monkeypatch.setattr(selfcheck.sys, "executable", "/bin/false")
        assert selfcheck.main(["--match", "geglu", "--device", DEVICE, "--dtype", "float32"]) == 1
        assert "geglu         float32  WRONG  process ended with 1" in capsys.readouterr().out

    def test_a_match_without_ops_is_no_success(self, capsys) -> None:
        assert selfcheck.main(["--match", "no such op", "--device", DEVICE]) == 1

    @pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
    def test_without_a_gpu_it_says_so(self, capsys) -> None:
        assert selfcheck.main([]) == 1
        assert capsys.readouterr().out == "no CUDA GPU is visible\n"
