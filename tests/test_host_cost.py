"""The command that says what an eager call costs the host."""

import json

import pytest
import torch

from diffopt_kernels import host_cost

OURS = {"diffopt_kernels.attention", "diffopt_kernels.attention, the op", "torch.empty_like"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert host_cost.main([]) == 1
    assert capsys.readouterr().out == "no CUDA GPU is visible\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="in the interpreter")
def test_every_call_is_timed_and_a_refusal_named(monkeypatch: pytest.MonkeyPatch):
    """On a CPU: which rows there are, and that a backend which refuses the inputs has none."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(host_cost, "CALLS", 1)
    monkeypatch.setattr(host_cost, "ROUNDS", 1)
    costs, refusals = host_cost.host_costs(torch.device("cpu"))
    of_pytorch = {what for what in costs if what.startswith("scaled_dot_product_attention")}
    assert {"scaled_dot_product_attention", "scaled_dot_product_attention, math forced"} <= of_pytorch
    assert "scaled_dot_product_attention, cudnn forced" not in of_pytorch
    assert set(costs) - of_pytorch == OURS | {"pointers alone", "pointers alone, by Triton"}
    assert refusals == {"pointers": "interpreted on the CPU"}


@pytest.mark.gpu
def test_it_prints_and_writes_ours_beside_pytorchs(tmp_path, capsys):
    path = tmp_path / "cost.json"
    assert host_cost.main(["--json", str(path)]) == 0
    record = json.loads(path.read_text())
    costs = record["microseconds"]
    assert OURS | {"scaled_dot_product_attention", "scaled_dot_product_attention, flash forced"} <= set(costs)
    assert {"pointers alone", "pointers alone, by Triton"} <= set(costs)
    assert all(cost > 0 for cost in costs.values())
    assert capsys.readouterr().out.count("µs") == len(costs)
    assert record["refusals"] == {}, "the direct way is not taken"
