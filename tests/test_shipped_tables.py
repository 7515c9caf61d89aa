"""The tuned tables in configs/gpus: readable, about launches that exist; and right on a GPU of their architecture."""

import json
import statistics
from pathlib import Path

import pytest
import torch

from diffopt.attention import tuning
from diffopt.attention.tuner import SIXTEEN_BIT, GpuTrials
from diffopt.attention.tuning import TunedRow, Tuning, misfit
from diffopt.config import config_folder
from diffopt.gpus import read_gpu, slug
from diffopt_kernels.candidates import labels_named
from diffopt_kernels.launch import LaunchKey

REPORTS = Path(__file__).parents[1] / "reports"
SDPA_BACKENDS = ("sdpa-cudnn", "sdpa-flash", "sdpa-efficient")
FILES = sorted((config_folder() / "gpus").glob("*.toml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_shipped_file_fits_the_gpu_it_is_named_after(path):
    gpu = read_gpu(path)
    assert slug(gpu.name).startswith(path.stem)
    assert gpu.peaks is not None
    if gpu.attention is not None:
        here = {"device": gpu.name, "triton": gpu.attention.triton}
        assert misfit(gpu, here, shipped=True) == ""
        assert "with changes" not in gpu.attention.commit
        assert gpu.attention.fp16_tflops < gpu.peaks.fp16_tflops
        tuned = {row.launch.label for row in gpu.attention.shapes if row.launch is not None}
        assert set(labels_named([str(path)])) == tuned, "a self-check by the file's name checks all of them"


@pytest.mark.parametrize("triton", ["3.6.0", "3.7.1"])
@pytest.mark.parametrize("name", ["NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA GH200 480GB"])
def test_gpus_of_hoppers_kind_have_launches_with_both_tritons(name, triton, monkeypatch):
    """By rules 20 of 34 shapes were slower than PyTorch's best (reports/triton-3.7.1-checks-h100.txt)."""
    monkeypatch.setattr(tuning, "machine_versions", lambda: {"triton": triton})
    monkeypatch.setattr(tuning, "user_file", lambda name: Path("no such file"))
    found = tuning.tuning.__wrapped__(name, "9.0")
    assert len(found.launches) >= 15
    assert any(launch.kernel == "hopper" for launch in found.launches.values())
    assert found.borrowed == ("GH200" in name or ("H200" in name and triton == "3.7.1"))
    assert not tuning.tuning.__wrapped__(name, "8.0").borrowed


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_auto_takes_no_layer_of_the_suite_slower_than_stock(path):
    """By the committed records: where ours was slower than PyTorch's best or xFormers, the table has another first."""
    table = read_gpu(path).attention
    assert table is not None
    rows = table.shapes_with(table.triton)  # the records are of that one, too
    tuned = Tuning({(row.key, row.dtype): TunedRow(row, path.name, table.date) for row in rows})
    records = [json.loads(line) for line in (REPORTS / f"{path.stem}.jsonl").read_text().splitlines()]
    suite = [record for record in records if record["kind"] == "attention"]
    assert len(suite) > 30
    for record in suite:
        times = {x["name"]: statistics.median(x["hot_us"]) for x in record["figures"] if x["state"] == "timed"}
        shape = record["shape"]
        if times["diffopt"] > min(times[name] for name in (*SDPA_BACKENDS, "xformers") if name in times):
            key = LaunchKey(shape["batch"], shape["n_q"], shape["n_k"], shape["heads"], shape["head_dim"])
            nearest = tuned.nearest(key, "float16")
            assert nearest is not None, shape["name"]
            assert nearest.shape.ranking[0] != "diffopt", shape["name"]


@pytest.mark.gpu
@pytest.mark.slow
def test_tuned_launches_are_right_on_all_cases():
    """Those of every table, on whatever Hopper GPU is here: they all run the same machine code."""
    if torch.cuda.get_device_capability(0)[0] != 9:
        pytest.skip("the tables are of Hopper GPUs")
    tables = [gpu.attention for gpu in map(read_gpu, FILES) if gpu.attention is not None]
    tuned = list(dict.fromkeys(row.launch for table in tables for row in table.shapes if row.launch is not None))
    assert tuned
    wrong = {
        launch.label: reason
        for launch, reason in GpuTrials("cuda:0", 8).check(tuned, SIXTEEN_BIT, thorough=True)
        if reason
    }
    assert not wrong
