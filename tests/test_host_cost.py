"""The command that says what an eager call costs the host."""

import json

import pytest
import torch

from diffopt_kernels import host_cost


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert host_cost.main([]) == 1
    assert capsys.readouterr().out == "no CUDA GPU is visible\n"


@pytest.mark.gpu
def test_it_prints_and_writes_ours_beside_pytorchs(tmp_path, capsys):
    record = tmp_path / "cost.json"
    assert host_cost.main(["--json", str(record)]) == 0
    costs = json.loads(record.read_text())["microseconds"]
    assert {"scaled_dot_product_attention", "diffopt_kernels.attention", "pointers alone"} <= set(costs)
    assert all(cost > 0 for cost in costs.values())
    assert capsys.readouterr().out.count("µs") == len(costs)
