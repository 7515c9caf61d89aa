"""Kernels are trusted on a pair of GPU and Triton only after a check, which runs once."""

import pytest
import torch

from diffopt.attention import trust

GPU = torch.device("cuda", 0)
HERE = {"device": "NVIDIA Abacus", "torch": "2.99", "triton": "9.9.9"}


@pytest.fixture
def unknown_gpu(monkeypatch, tmp_path):
    """A GPU nobody knows, an empty cache folder, and a self-check that is counted instead of run."""
    runs: list[list[str]] = []
    verdict: list[str] = []

    def check() -> list[str]:
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


def test_a_pair_the_project_checked_needs_no_check(unknown_gpu, monkeypatch):
    runs, _, _ = unknown_gpu
    monkeypatch.setattr(trust, "_shipped", lambda device: ("9.9.9",) if device == "NVIDIA Abacus" else ())
    assert trust.untrusted_reasons(GPU) == ()
    assert not runs


def test_the_real_check_fails_without_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("about a machine without a GPU")
    reasons = trust._self_check()
    assert len(reasons) == 1
    assert "self-check failed on this GPU (no CUDA GPU is visible)" in reasons[0]
