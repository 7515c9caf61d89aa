"""Kernels are trusted on a pair of GPU and Triton only after a check, which runs once."""

import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from diffopt.attention import machine, trust
from diffopt.attention.machine import kernels_hash, step_kernels_hash
from diffopt.gpus import Checked, Gpu, find_gpu
from diffopt_kernels.candidates import attention_candidates
from diffopt_kernels.launch import LaunchKey

GPU = torch.device("cuda", 0)
HERE = {"device": "NVIDIA Abacus", "torch": "2.99", "triton": "9.9.9", "kernels": "0123456789abcdef"}


@pytest.fixture
def unknown_gpu(monkeypatch, tmp_path):
    """A GPU nobody knows, an empty cache folder, and a self-check that is counted instead of run."""
    runs: list[list[str]] = []
    verdict: list[str] = []

    def check(tuned, device) -> list[str]:
        runs.append(list(verdict))
        return list(verdict)

    monkeypatch.setattr(trust, "machine", lambda device: HERE)
    monkeypatch.setattr(trust, "device_name", lambda device: HERE["device"])
    monkeypatch.setattr(trust, "compute_capability", lambda device: "1.0")
    monkeypatch.setattr(trust, "verdicts_file", lambda: tmp_path / "cache" / "kernel-checks.json")
    monkeypatch.setattr(trust, "_self_check", check)
    new_process()
    yield runs, verdict, tmp_path / "cache" / "kernel-checks.json"
    new_process()


def new_process() -> None:
    """Forget what a process remembers."""
    trust.untrusted_reasons.cache_clear()
    trust.untrusted_step_reasons.cache_clear()


def test_an_unknown_pair_is_checked_once_and_remembered(unknown_gpu):
    runs, _, file = unknown_gpu
    assert trust.untrusted_reasons(GPU) == ()
    trust.untrusted_reasons.cache_clear()  # as in the next process
    assert trust.untrusted_reasons(GPU) == ()
    assert len(runs) == 1
    assert "NVIDIA Abacus | triton 9.9.9" in file.read_text()


def test_a_failed_check_keeps_the_kernels_off(unknown_gpu):
    runs, verdict, _ = unknown_gpu
    verdict.append("launch 3 is wrong")
    assert trust.untrusted_reasons(GPU) == ("launch 3 is wrong",)
    trust.untrusted_reasons.cache_clear()
    assert trust.untrusted_reasons(GPU) == ("launch 3 is wrong",)
    assert len(runs) == 1


def test_changed_kernels_are_checked_again(unknown_gpu, monkeypatch):
    runs, _, _ = unknown_gpu
    trust.untrusted_reasons(GPU)
    trust.untrusted_reasons.cache_clear()
    monkeypatch.setattr(trust, "_pair", lambda here, tuned: "the same GPU with other kernels")
    trust.untrusted_reasons(GPU)
    assert len(runs) == 2


@pytest.mark.parametrize("damaged", ['{"cut', "[" * 100_000])
def test_a_damaged_or_unwritable_cache_only_costs_another_check(unknown_gpu, damaged):
    runs, _, file = unknown_gpu
    file.parent.mkdir()
    file.write_text(damaged)
    assert trust.untrusted_reasons(GPU) == ()
    file.unlink()
    file.parent.rmdir()
    file.parent.write_text("a file where the folder should be")
    trust.untrusted_reasons.cache_clear()
    assert trust.untrusted_reasons(GPU) == ()
    assert len(runs) == 2


@pytest.mark.parametrize("text", ["[]", "[1]", "null", '"passed"'])
def test_a_cache_that_is_no_object_only_costs_another_check(unknown_gpu, text):
    runs, _, file = unknown_gpu
    file.parent.mkdir()
    file.write_text(text)
    for _ in range(2):
        assert trust.untrusted_reasons(GPU) == ()
        new_process()
    assert len(runs) == 1


@pytest.mark.parametrize(
    ("triton", "kernels", "checks"),
    [("9.9.9", HERE["kernels"], 0), ("9.9.8", HERE["kernels"], 1), ("9.9.9", "other", 1)],
)
def test_only_what_the_project_checked_needs_no_check(unknown_gpu, monkeypatch, triton, kernels, checks):
    runs, _, _ = unknown_gpu
    gpu = Gpu(HERE["device"], checked=(Checked(triton, kernels),))
    monkeypatch.setattr(trust, "find_gpu", {HERE["device"]: gpu}.get)
    assert trust.untrusted_reasons(GPU) == ()
    assert len(runs) == checks


@pytest.mark.usefixtures("unknown_gpu")
def test_launches_of_tables_are_checked_too_and_others_again(monkeypatch):
    """Those of another GPU's table as well, which serves this one."""
    tuned, other = attention_candidates([40])[:2]
    table = SimpleNamespace(launches={LaunchKey(2, 64, 64, 8, 40): tuned, LaunchKey(2, 96, 96, 8, 40): tuned})
    monkeypatch.setattr(trust, "tuning", lambda *gpu: {(HERE["device"], "1.0"): table}[gpu])
    checked = []
    monkeypatch.setattr(trust, "_self_check", lambda tuned, device: checked.append(tuned) or [])
    for _ in range(2):
        assert trust.untrusted_reasons(GPU) == ()
        new_process()
    assert checked == [(tuned.label,)]
    table.launches[LaunchKey(2, 96, 96, 8, 40)] = other
    assert trust.untrusted_reasons(GPU) == ()
    assert checked[1:] == [tuple(sorted((tuned.label, other.label)))]


def test_the_check_is_told_launches_of_tables(monkeypatch):
    commands = []

    def run(command, **_):
        commands.append(command)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(trust.subprocess, "run", run)
    assert trust._self_check(["a launch"], GPU) == []
    assert commands[0][-3:] == ["--all", "--also", "a launch"]
    assert trust._self_check([], GPU) == []
    assert commands[1][-1] == "--all"


@pytest.mark.parametrize(
    ("gpus", "seen", "index", "child"),
    [
        *[
            (2, None, 0, "0"),
            (2, None, 1, "1"),
            (2, None, None, "1"),
            (2, "3,5", 1, "5"),
            (2, "GPU-a, GPU-b", 1, "GPU-b"),
        ],
        *[(1, None, 0, None), (1, "7", 0, "7"), (0, None, 0, None)],
    ],
)
@pytest.mark.parametrize("check", [lambda gpu: trust._self_check([], gpu), trust._step_self_check])
def test_the_checked_gpu_is_the_one_asked_about(monkeypatch, check, gpus, seen, index, child):
    """A machine may hold GPUs of two kinds: a verdict is remembered under the name of the one that is meant."""
    environments = []

    def run(command, env, **_):
        environments.append(env)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(trust.subprocess, "run", run)
    monkeypatch.setattr(trust.torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(trust.torch.cuda, "current_device", lambda: 1)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if seen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
    assert check(torch.device("cuda", index)) == []
    assert environments[0].get("CUDA_VISIBLE_DEVICES") == child


@pytest.mark.parametrize("check", [lambda: trust._self_check([], GPU), lambda: trust._step_self_check(GPU)])
def test_the_real_check_fails_without_a_gpu(check):
    if torch.cuda.is_available():
        pytest.skip("about a machine without a GPU")
    reasons = check()
    assert len(reasons) == 1
    assert "self-check failed on this GPU (no CUDA GPU is visible)" in reasons[0]


@pytest.mark.parametrize("check", [lambda: trust._self_check([], GPU), lambda: trust._step_self_check(GPU)])
def test_a_check_that_does_not_end_is_a_reason_against(monkeypatch, check):
    def run(command, timeout, **_):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(trust.subprocess, "run", run)
    assert check() == ["the kernels' self-check did not end within 600 s"]


@pytest.mark.parametrize(
    ("stderr", "words"), [("Traceback\nImportError: no module named triton\n", "ImportError: no"), ("", "no output")]
)
def test_a_check_that_prints_no_rows_says_what_it_died_of(monkeypatch, stderr, words):
    done = SimpleNamespace(returncode=1, stdout="\n", stderr=stderr)
    monkeypatch.setattr(trust.subprocess, "run", lambda *_, **__: done)
    (reason,) = trust._self_check([], GPU)
    assert f"self-check failed on this GPU ({words}" in reason


class TestStepKernels:
    """The kernels around attention have a verdict of their own."""

    @pytest.fixture
    def step_runs(self, unknown_gpu, monkeypatch):
        """Step self-checks, counted instead of run; what they find is `found`."""
        runs, found = [], []
        monkeypatch.setattr(trust, "_step_self_check", lambda device: runs.append(1) or list(found))
        return runs, found

    def test_checked_once_and_remembered_beside_attention(self, unknown_gpu, step_runs):
        runs, _, file = unknown_gpu
        for _ in range(2):
            assert trust.untrusted_step_reasons(GPU) == ()
            assert trust.untrusted_reasons(GPU) == ()
            new_process()
        assert len(runs) == len(step_runs[0]) == 1
        text = file.read_text()
        assert f"NVIDIA Abacus | triton 9.9.9 | step {step_kernels_hash()}" in text
        assert "NVIDIA Abacus | triton 9.9.9 | kernels" in text

    @pytest.mark.parametrize("wrong", ["attention", "step"])
    def test_one_verdict_says_nothing_about_the_other(self, unknown_gpu, step_runs, wrong):
        (unknown_gpu[1] if wrong == "attention" else step_runs[1]).append("it is wrong")
        for _ in range(2):
            assert trust.untrusted_reasons(GPU) == (("it is wrong",) if wrong == "attention" else ())
            assert trust.untrusted_step_reasons(GPU) == (("it is wrong",) if wrong == "step" else ())
            new_process()

    @pytest.mark.parametrize(
        ("triton", "step", "checks"), [("9.9.9", "", 1), ("9.9.9", "here", 0), ("9.9.8", "here", 1), ("9.9.9", "x", 1)]
    )
    def test_only_what_the_project_checked_needs_no_check(self, step_runs, monkeypatch, triton, step, checks):
        step = step_kernels_hash() if step == "here" else step
        gpu = Gpu(HERE["device"], checked=(Checked(triton, HERE["kernels"], step),))
        monkeypatch.setattr(trust, "find_gpu", {HERE["device"]: gpu}.get)
        assert trust.untrusted_step_reasons(GPU) == ()
        assert len(step_runs[0]) == checks

    def test_the_verdict_names_the_wrong_ops(self, monkeypatch):
        rows = [
            "geglu      float16  right  6/6  closest to its limit: 0.30 of it",
            "group_norm bfloat16 WRONG  21/22  closest to its limit: 7.10 of it at one pixel [1, 64, 1, 1] OVERRUN",
            "bias_add   float32  WRONG  no result within 240 s",
            "layer_norm float16  VOID   0/2  a planted fault was not noticed",
            "10 of 12 ops are right, each dtype counted",
        ]
        done = SimpleNamespace(returncode=1, stdout="\n".join(rows), stderr="")
        commands = []
        monkeypatch.setattr(trust.subprocess, "run", lambda command, **_: commands.append(command) or done)
        (reason,) = trust._step_self_check(GPU)
        assert "group_norm bfloat16 WRONG 21/22" in reason
        assert "bias_add float32 WRONG no result within 240 s" in reason
        assert "layer_norm float16 VOID 0/2" in reason
        assert "geglu" not in reason
        assert reason.endswith("see python -m diffopt_kernels.step.selfcheck")
        assert commands[0][1:] == ["-m", "diffopt_kernels.step.selfcheck"]

    def test_only_sources_that_decide_count(self, tmp_path, monkeypatch):
        """What is beside the kernels (checks, references, attention) may change without a new check."""
        package = Path(machine.diffopt_kernels.__file__).parent
        copy = tmp_path / "diffopt_kernels"
        shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__"))
        monkeypatch.setattr(machine.diffopt_kernels, "__file__", str(copy / "__init__.py"))
        hash_now = step_kernels_hash.__wrapped__
        before = hash_now()
        assert before == step_kernels_hash(), "where the package lies plays no role"
        for name in ("step/check.py", "step/selfcheck.py", "step/reference.py", "attention.py", "_attention_fwd.py"):
            (copy / name).write_text("changed")
        assert hash_now() == before
        sources = ("_rows.py", "_group_norm.py", "sums.py", "tiles.py", "upsample.py")
        for name in (*(f"step/{source}" for source in sources), "launcher.py", "triton_entry.py"):
            (copy / name).write_text("changed")
            assert hash_now() != before
            before = hash_now()


def test_what_the_h100_needs_no_check_of_are_these_kernels():
    """Whoever changes a kernel takes its hash out of configs/gpus, or checks it there anew; attention is checked."""
    gpu = find_gpu("NVIDIA H100 80GB HBM3")
    assert gpu is not None
    assert gpu.attention is not None
    checked = {(checked.triton, checked.kernels) for checked in gpu.checked}
    assert {(triton, kernels_hash()) for triton in gpu.attention.tritons} <= checked
    assert {checked.kernels for checked in gpu.checked} <= {kernels_hash(), ""}
    assert {checked.step for checked in gpu.checked} <= {step_kernels_hash(), ""}
