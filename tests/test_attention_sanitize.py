"""The sanitizer's command: what it runs, what it calls clean, and how it names the launch at fault.

A stand-in for compute-sanitizer lies on PATH; the real one needs a GPU.
"""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from diffopt_kernels import attention_launches, sanitize
from diffopt_kernels.launcher import PreparedLaunch
from diffopt_kernels.step.check import OPS, case_outputs, runs
from diffopt_kernels.step.guarded import OneRowShort
from diffopt_kernels.support import compute_capability

STAND_IN = """#!{python}
import os, sys
here = sys.argv[sys.argv.index("--here") + 1:]
assert os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
assert sys.argv[1:3] == ["--tool", "{tool}"]
print("========= COMPUTE-SANITIZER")
if "--planted" in sys.argv:
    found = {notices} and not any(x in here[0] for x in ("descriptors", "short", "hopper"))  # they know their bounds
elif {together}:
    found = len(here) > 1
else:
    found = any(label in {bad} for label in here)
if found:
    print("========= Invalid __global__ write of size 2 bytes")
if not {silent}:
    print(len(here), "launches ran under the sanitizer")
print("========= {summary}: {{}} {unit}".format(int(found)))
sys.exit(int(found))
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A function that installs a compute-sanitizer which finds faults in `bad` launches."""

    def install(bad=(), *, notices=True, together=False, silent=False, tool="memcheck") -> None:
        summary, unit = (
            ("RACECHECK SUMMARY", "hazards displayed") if tool == "racecheck" else ("ERROR SUMMARY", "errors")
        )
        text = STAND_IN.format(
            python=sys.executable,
            bad=list(bad),
            notices=notices,
            together=together,
            silent=silent,
            tool=tool,
            summary=summary,
            unit=unit,
        )
        path = tmp_path / "compute-sanitizer"
        path.write_text(text)
        path.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))

    return install


def run(*options: str) -> int:
    return sanitize.main(["--device", "cuda" if torch.cuda.is_available() else "cpu", *options])


def step_cases() -> list[str]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return [label for label, case in sanitize._step_cases().items() if runs(case.op, torch.float16, device)]


def launches() -> list[str]:
    here = attention_launches(compute_capability()) if torch.cuda.is_available() else attention_launches()
    return [launch.label for launch in here]


def test_every_shipped_launch_is_run_once(stand_in, tmp_path: Path, capsys) -> None:
    stand_in()
    assert run("--json", str(tmp_path / "record.json")) == 0
    groups = json.loads((tmp_path / "record.json").read_text())["groups"]
    assert sorted(label for group in groups for label in group["launches"]) == sorted(launches() + step_cases())
    assert len(groups) == len({group["name"] for group in groups}) >= 2
    assert not any(group["fault"] for group in groups)
    out = capsys.readouterr().out
    assert f"{len(groups)} of {len(groups)} groups are clean" in out
    assert "planted overrun: found: Invalid __global__ write" in out


def test_a_failing_group_is_split_until_the_launches_are_named(stand_in, tmp_path: Path, capsys) -> None:
    pointers = [label for label in launches() if " pointers " in label and "fp32" not in label]
    bad = {pointers[0], pointers[-2]}
    stand_in(bad)
    assert run("--json", str(tmp_path / "record.json")) == 1
    groups = json.loads((tmp_path / "record.json").read_text())["groups"]
    assert {tuple(group["launches"]) for group in groups if group["fault"]} == {(label,) for label in bad}
    assert sorted(label for group in groups for label in group["launches"]) == sorted(launches() + step_cases())
    assert "found: Invalid __global__ write of size 2 bytes (1 in all)" in capsys.readouterr().out


def test_what_fails_only_together_is_not_forgotten(stand_in, tmp_path: Path) -> None:
    stand_in(together=True)
    assert run("--match", "fp32", "--json", str(tmp_path / "record.json")) == 1
    groups = json.loads((tmp_path / "record.json").read_text())["groups"]
    failed = [group for group in groups if group["fault"]]
    assert failed
    assert all(group["fault"].startswith("together only: found: ") for group in failed)
    assert all(len(group["launches"]) == 2 for group in failed)


def test_a_sanitizer_that_notices_nothing_proves_nothing(stand_in, capsys) -> None:
    stand_in(notices=False)
    assert run() == 1
    assert "VOID: the planted overrun was not noticed" in capsys.readouterr().out


@pytest.mark.parametrize("op", OPS)
def test_an_overrun_is_planted_in_every_op(stand_in, op: str, capsys) -> None:
    stand_in(notices=False)
    assert run("--match", op) == 1
    assert f"VOID: the planted overrun was not noticed in {op}" in capsys.readouterr().out


@pytest.mark.parametrize("op", OPS)
def test_no_op_refuses_the_planted_overrun(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PreparedLaunch, "__call__", lambda *_: None)  # what it would overrun here is this process
    case = sanitize._step_cases()[next(label for label in step_cases() if label.startswith(f"{op}:"))]
    for ours, stock, _ in case_outputs(case, torch.float32, torch.device("cpu"), OneRowShort()):
        assert ours.untyped_storage().nbytes() < stock.numel() * 4


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
def test_the_sanitizer_notices_an_overrun_of_each_op(op: str) -> None:
    if not shutil.which("compute-sanitizer"):
        pytest.skip("compute-sanitizer is not on PATH")
    (group,) = (group for group in sanitize._step_groups("", "cuda") if group.name == op)
    assert sanitize._sanitize(group, sanitize._parser().parse_args([]), planted=True).startswith("found: Invalid")


@pytest.mark.parametrize("kernel", ["descriptors", "short", "hopper"])
def test_an_overrun_is_planted_in_another_kernel_beside_one_that_knows_its_bounds(stand_in, kernel: str, capsys):
    label = next(x.label for x in sanitize._known() if x.kernel == kernel)
    stand_in()
    assert run("--match", label, "--also", label) == 0
    assert "1 of 1 groups are clean" in capsys.readouterr().out


def test_a_failing_case_of_an_op_is_named(stand_in, capsys) -> None:
    stand_in({"geglu: large gates [2, 5, 128]"})
    assert run("--match", "geglu") == 1
    assert "geglu: large gates" in capsys.readouterr().out


def test_a_process_that_ran_no_launch_is_not_clean(stand_in, capsys) -> None:
    stand_in(silent=True)
    assert run("--match", launches()[0]) == 1
    assert "process ended with 0" in capsys.readouterr().out


def test_hazards_between_threads_are_found(stand_in) -> None:
    stand_in(launches()[:1], tool="racecheck")
    assert run("--match", launches()[0], "--tool", "racecheck") == 1
    assert run("--match", launches()[1], "--tool", "racecheck") == 0


def test_without_the_sanitizer_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("PATH", "")
    assert run() == 1
    assert "compute-sanitizer is not on PATH" in capsys.readouterr().out


def test_a_match_without_launches_is_no_success(stand_in) -> None:
    stand_in()
    assert run("--match", "no such launch") == 1


class TestLaunchesInThisProcess:
    smallest = min(launches(), key=lambda label: int(label[1:].split()[0]))

    def test_each_tiny_case_is_run(self, capsys) -> None:
        assert run("--here", self.smallest) == 0
        assert capsys.readouterr().out == "1 launches ran under the sanitizer\n"

    def test_each_case_of_a_step_op_is_run(self, capsys) -> None:
        assert run("--here", *(label for label in step_cases() if label.startswith("layer_norm"))) == 0
        assert capsys.readouterr().out == "6 launches ran under the sanitizer\n"

    def test_a_step_output_that_was_not_written_is_noticed(self, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
        module = sys.modules["diffopt_kernels.step.geglu"]
        monkeypatch.setattr(module, "_prepared", lambda x: lambda *_: None)
        monkeypatch.setattr(module, "_PREPARED", type(module._PREPARED)(8))
        assert run("--here", "geglu: odd sizes [3, 11, 602]") == 1
        assert "geglu: odd sizes [3, 11, 602]: not all of the output was written" in capsys.readouterr().out

    def test_an_output_that_was_not_written_is_noticed(self, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
        attention = sys.modules["diffopt_kernels.attention"]
        monkeypatch.setattr(attention, "launch_attention", lambda *_: None)
        assert run("--here", self.smallest) == 1
        assert "not all of the output was written" in capsys.readouterr().out
