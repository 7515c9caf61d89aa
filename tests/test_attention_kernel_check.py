"""The check that decides which launches ship: it passes right ones, and it can fail."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diffopt_kernels import AttentionLaunch, attention_launches, sanitize, selfcheck
from diffopt_kernels.attention_cases import (
    GUARD,
    AttentionCase,
    awkward_cases,
    make_inputs,
    poisoned_output,
    tiny_cases,
)
from diffopt_kernels.attention_check import (
    CaseResult,
    Errors,
    LaunchResult,
    allowed_errors,
    check_case,
    check_launch,
    errors_against,
)
from diffopt_kernels.candidates import attention_candidates
from diffopt_kernels.reference import attention_reference
from diffopt_kernels.support import compute_capability

SMALL = min(attention_launches(), key=lambda launch: (launch.float32, launch.block_m * launch.block_n))


def one_of_each_kind() -> dict[str, AttentionLaunch]:
    """Launches by label: of each kernel, for 16 and for 32 bits, the narrowest with one part and with two.

    All the others run in this session's tests of every head dim, and on a GPU in the whole check below.
    """
    kinds = {}
    for launch in sorted(attention_launches(), key=lambda x: sum(x.parts)):
        kinds.setdefault((launch.kernel, launch.float32, launch.parts[1] > 0), launch)
    return {launch.label: launch for launch in kinds.values()}


@pytest.mark.parametrize("launch", one_of_each_kind().values(), ids=one_of_each_kind())
def test_a_launch_of_each_kind_is_right_on_tiny_cases(launch: AttentionLaunch, kernel_device: torch.device) -> None:
    dtypes = [torch.float32 if launch.float32 else torch.float16]
    result = check_launch(launch, tiny_cases(launch), dtypes, kernel_device, seed=5)
    assert not result.void
    assert result.right, result.worst


@pytest.mark.gpu
def test_every_shipped_launch_passes_the_whole_check(capsys: pytest.CaptureFixture[str]) -> None:
    """Awkward cases and model shapes, float16, bfloat16 and float32, each launch in a process of its own."""
    code = selfcheck.main(["--all"])
    out = capsys.readouterr().out
    assert code == 0, out
    number = len(attention_launches(compute_capability()))
    assert f"{number} of {number} launches are right" in out


def test_a_scale_wrong_by_one_percent_fails(kernel_device: torch.device) -> None:
    case = AttentionCase("planted fault", 1, 65, 130, 1, "spread 3")
    assert check_case(SMALL, case, torch.float16, kernel_device).right
    assert not check_case(SMALL, case, torch.float16, kernel_device, fault=1.01).right


@pytest.mark.parametrize("late", ["right", "a bit off", "not written"])
def test_runs_that_differ_are_seen(late: str, monkeypatch) -> None:
    """Each run after the first writes the same, other bits or nothing, in which case memory holds the run before's."""
    outputs = []

    def launch_attention(q, k, v, out, scale, launch, mask=None):
        if not outputs or late != "not written":
            out.copy_(attention_reference(q, k, v, scale=scale))
            out[0, 0, 0, 0] += 0.001 * (bool(outputs) and late == "a bit off")
        outputs.append(out)
        return out

    monkeypatch.setattr(sys.modules["diffopt_kernels.attention_check"], "launch_attention", launch_attention)
    case = AttentionCase("twice", 1, 65, 65, 1, "spread 3", repeats=3)
    assert check_case(SMALL, case, torch.float16, torch.device("cpu")).right == (late == "right")
    assert len(outputs) == 3


def test_a_check_that_can_not_see_the_fault_is_void(kernel_device: torch.device, monkeypatch) -> None:
    check = sys.modules["diffopt_kernels.attention_check"]
    monkeypatch.setattr(check, "PLANTED_FAULT", 1.0)
    result = check_launch(SMALL, [AttentionCase("one", 1, 1, 1, 1)], [torch.float16], kernel_device)
    assert result.void == "a scale wrong by 1% passes in float16"
    assert not result.right


class TestRedraw:
    """A largest error just beyond its limit is drawn again: the further draws decide."""

    def check(self, monkeypatch, errors: list[float]) -> LaunchResult:
        """check_launch where the draws' largest errors are these shares of the limit, then the planted fault's is 9."""
        check, shares = sys.modules["diffopt_kernels.attention_check"], iter([*errors, 9.0])

        def case_result(launch, case, dtype, device, *, seed, fault=1.0):
            none = Errors(0, 0)
            return CaseResult(case.name, "float32", Errors(0, next(shares)), none, none, Errors(1, 1), overrun=False)

        monkeypatch.setattr(check, "check_case", case_result)
        return check_launch(SMALL, [AttentionCase("one", 1, 1, 1, 1)], [torch.float32], torch.device("cpu"))

    def test_right_in_every_further_draw_is_right(self, monkeypatch) -> None:
        result = self.check(monkeypatch, [1.2, 0.5, 0.9, 0.2, 1.0])
        assert result.right
        assert [case.ours.maximum for case in result.redrawn] == [1.2]
        assert len(result.cases) == 4
        assert len(result.as_record()["redrawn"]) == 1

    def test_beyond_the_limit_once_more_is_wrong(self, monkeypatch) -> None:
        assert not self.check(monkeypatch, [1.2, 0.5, 0.9, 1.01, 0.2]).right

    @pytest.mark.parametrize("far", [1.3, math.inf])
    def test_far_beyond_the_limit_gets_no_second_chance(self, monkeypatch, far) -> None:
        result = self.check(monkeypatch, [far])
        assert not result.right
        assert not result.redrawn


class TestRule:
    expected = torch.tensor([3.0, -4.0], dtype=torch.float64)

    def test_errors_are_relative_l2_and_largest_difference(self) -> None:
        errors = errors_against(torch.tensor([3.0, -4.5]), self.expected)
        assert errors == Errors(0.1, 0.5)

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
    def test_what_is_not_finite_never_passes(self, bad: float) -> None:
        errors = errors_against(torch.tensor([3.0, bad]), self.expected)
        assert errors == Errors(math.inf, math.inf)
        assert not errors.within(Errors(1e300, 1e300))

    def test_the_limit_is_twice_the_largest_peer_plus_one_unit_in_the_last_place(self) -> None:
        limit = allowed_errors([Errors(1e-3, 0.25), Errors(2e-3, 0.125)], self.expected, torch.float16)
        assert limit == Errors(4e-3 + 2**-10 / math.sqrt(12), 0.5 + 2**-10 * 4)

    def test_only_the_largest_error_may_be_the_draw(self) -> None:
        limit = Errors(1e-3, 1e-2)
        assert Errors(1e-3, 1.2e-2).near(limit)
        assert not Errors(1.1e-3, 1e-3).near(limit), "relative L2 is an average, no draw"
        assert not Errors(1.1e-3, 1.2e-2).near(limit)
        assert not Errors(1e-3, 1e-2).near(limit), "it is within"
        assert not Errors(1e-3, 1.3e-2).near(limit)

    def test_both_errors_count(self) -> None:
        limit = Errors(1e-3, 1e-2)
        assert limit.within(limit)
        assert not Errors(2e-3, 1e-2).within(limit)
        assert not Errors(1e-3, 2e-2).within(limit)

    def test_an_overrun_fails_whatever_the_errors(self) -> None:
        fine = CaseResult("case", "float16", Errors(0, 0), Errors(0, 0), None, Errors(1, 1), overrun=False)
        noticed = replace(fine, ours=Errors(2, 2))
        assert LaunchResult("x", (fine,), (noticed,)).right
        assert not LaunchResult("x", (fine, replace(fine, overrun=True)), (noticed,)).right
        assert not LaunchResult("x", (), (noticed,)).right, "nothing checked is not right"
        assert not LaunchResult("x", (fine,), ()).right, "without a planted fault the check proves nothing"


class TestCases:
    def test_an_output_starts_as_nan_between_guard_bands(self) -> None:
        out, before, after = poisoned_output(torch.Size((2, 3, 1, 40)), torch.float16, torch.device("cpu"))
        assert out.isnan().all()
        assert (before == GUARD).all()
        assert (after == GUARD).all()
        out.zero_()
        assert (before == GUARD).all()
        assert (after == GUARD).all()

    @pytest.mark.parametrize("layout", ["fused", "heads first", "surrounded", "unaligned"])
    def test_a_layout_changes_strides_and_no_value(self, layout) -> None:
        plain = AttentionCase("layout", 2, 9, 7, 3)
        case = replace(plain, layout=layout)
        for x, y in zip(
            make_inputs(plain, 40, torch.float16, "cpu", 1), make_inputs(case, 40, torch.float16, "cpu", 1), strict=True
        ):
            assert torch.equal(x, y)
            assert y.stride() != x.stride()

    @pytest.mark.parametrize("content", ["rising", "falling", "one key", "far below zero"])
    def test_adversarial_scores_are_what_they_say(self, content) -> None:
        q, k, _ = make_inputs(AttentionCase("scores", 1, 8, 64, 1, content), 64, torch.float32, "cpu", 1)
        scores = (q[0, :, 0] @ k[0, :, 0].T).mean(0) / 8
        if content == "far below zero":
            assert scores.max() < -150
        else:
            assert abs(int(scores.argmax()) - {"rising": 63, "falling": 0, "one key": 32}[content]) <= 3
            assert scores.max() - scores.median() > 15

    def test_awkward_cases_straddle_the_tiles_of_their_launch(self) -> None:
        cases = list(awkward_cases(SMALL))
        assert {1, SMALL.block_n, SMALL.block_n + 1, 2 * SMALL.block_n - 1} <= {case.n_k for case in cases}
        assert {1, SMALL.block_m, SMALL.block_m + 1, 2 * SMALL.block_m - 1} <= {case.n_q for case in cases}


class TestCommand:
    def test_it_checks_in_a_process_of_its_own_and_writes_the_record(self, tmp_path, kernel_device, capsys) -> None:
        record = tmp_path / "record.json"
        options = ["--match", SMALL.label, "--tiny", "--device", kernel_device.type, "--dtype", "float16"]
        assert selfcheck.main([*options, "--seed", "3", "--json", str(record)]) == 0
        written = json.loads(record.read_text())
        assert [entry["label"] for entry in written["launches"]] == [SMALL.label]
        assert written["launches"][0]["right"] is True
        assert written["launches"][0]["seed"] == 3
        assert "1 of 1 launches are right" in capsys.readouterr().out

    def test_a_candidate_can_be_checked_beside_what_is_selected(self, kernel_device, capsys) -> None:
        candidate = next(x for x in attention_candidates() if x not in attention_launches() and x.kernel == "pointers")
        options = ["--match", candidate.label, "--tiny", "--device", kernel_device.type, "--dtype", "float16"]
        assert selfcheck.main(options) == 0
        assert "0 of 0 launches" in capsys.readouterr().out
        assert selfcheck.main([*options, "--also", candidate.label]) == 0
        assert "1 of 1 launches are right" in capsys.readouterr().out

    @pytest.mark.parametrize("command", [selfcheck, sanitize])
    def test_what_names_no_launch_is_refused_in_one_line(self, command, tmp_path: Path, capsys) -> None:
        damaged = tmp_path / "damaged.toml"
        damaged.write_text("[attention]\nshapes = [{launch = {parts = 3}}]\n")
        for what, said in (
            ("d40 nonsense", "'d40 nonsense' is no launch"),
            (str(tmp_path / "absent.toml"), "absent.toml has no tuned launches that can be read: FileNotFoundError"),
            (str(damaged), "damaged.toml has no tuned launches that can be read: TypeError"),
        ):
            with pytest.raises(SystemExit) as ended:
                command.main(["--also", what])
            assert ended.value.code == 2
            assert said in capsys.readouterr().err.splitlines()[-1]

    def test_a_process_that_dies_is_a_wrong_launch(self, monkeypatch, capsys) -> None:
        monkeypatch.setattr(selfcheck.sys, "executable", "/bin/false")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        assert selfcheck.main(["--match", SMALL.label, "--tiny", "--device", device]) == 1
        assert "WRONG  process ended with 1" in capsys.readouterr().out

    @pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
    def test_without_a_gpu_it_says_so_and_starts_nothing(self, monkeypatch, capsys) -> None:
        monkeypatch.setattr(selfcheck, "run_child", lambda *_: pytest.fail("a process was started"))
        assert selfcheck.main([]) == 1
        assert capsys.readouterr().out == "no CUDA GPU is visible\n"

    def test_a_launch_that_writes_rubbish_is_wrong(self, monkeypatch, capsys) -> None:
        """In this process: the kernel's output replaced by zeros must turn the verdict."""
        check = sys.modules["diffopt_kernels.attention_check"]
        monkeypatch.setattr(check, "launch_attention", lambda q, k, v, out, *_: out.zero_())
        device = "cuda" if torch.cuda.is_available() else "cpu"
        index = attention_launches().index(SMALL)
        assert selfcheck.main(["--launch", str(index), "--tiny", "--device", device, "--dtype", "float16"]) == 1
        assert json.loads(capsys.readouterr().out)["right"] is False
