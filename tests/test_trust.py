"""Kernels are trusted on a pair of GPU and Triton only after a check, which runs once."""

from types import SimpleNamespace

import pytest
import torch

from diffopt.attention import trust
from diffopt.gpus import Checked, Gpu
from diffopt_kernels.candidates import attention_candidates
from diffopt_kernels.launch import LaunchKey

GPU = torch.device("cuda", 0)
HERE = {"device": "NVIDIA Abacus", "torch": "2.99", "triton": "9.9.9", "kernels": "0123456789abcdef"}


@pytest.fixture
def unknown_gpu(monkeypatch, tmp_path):
    """A GPU nobody knows, an empty cache folder, and a self-check that is counted instead of run."""
    runs: list[list[str]] = []
    verdict: list[str] = []

    def check(device: str) -> list[str]:
        assert device == HERE["device"]
        runs.append(list(verdict))
        return list(verdict)

    monkeypatch.setattr(trust, "machine", lambda device: HERE)
    monkeypatch.setattr(trust, "verdicts_file", lambda: tmp_path / "cache" / "kernel-checks.json")
    monkeypatch.setattr(trust, "_self_check", check)
    trust.untrusted_reasons.cache_clear()
    yield runs, verdict, tmp_path / "cache" / "kernel-checks.json"
    trust.untrusted_reasons.cache_clear()


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
    monkeypatch.setattr(trust, "_pair", lambda here: "the same GPU with other kernels")
    trust.untrusted_reasons(GPU)
    assert len(runs) == 2


def test_a_damaged_or_unwritable_cache_only_costs_another_check(unknown_gpu):
    runs, _, file = unknown_gpu
    file.parent.mkdir()
    file.write_text('{"cut')
    assert trust.untrusted_reasons(GPU) == ()
    file.unlink()
    file.parent.rmdir()
    file.parent.write_text("a file where the folder should be")
    trust.untrusted_reasons.cache_clear()
    assert trust.untrusted_reasons(GPU) == ()
    assert len(runs) == 2


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


def test_launches_tuned_for_this_gpu_are_checked_too(monkeypatch):
    tuned = attention_candidates([40])[0]
    table = SimpleNamespace(launches={LaunchKey(2, 64, 64, 8, 40): tuned, LaunchKey(2, 96, 96, 8, 40): tuned})
    monkeypatch.setattr(trust, "tuning", {HERE["device"]: table}.__getitem__)
    commands = []

    def run(command, **_):
        commands.append(command)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(trust.subprocess, "run", run)
    assert trust._self_check(HERE["device"]) == []
    assert commands[0][-2:] == ["--also", tuned.label]


def test_the_real_check_fails_without_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("about a machine without a GPU")
    reasons = trust._self_check("no GPU of this name")
    assert len(reasons) == 1
    assert "self-check failed on this GPU (no CUDA GPU is visible)" in reasons[0]
