"""Pictures of several prompts: differences by hand, distributions, and what a case keeps of them."""

import json
import math
import sys

import numpy as np
import pydantic
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sample_records import a_step_record, some_differences, some_free_running
from tiny_case import tiny_case

from diffopt.bench.record import append_record, read_records
from diffopt.bench.report.data import report_data
from diffopt.bench.report.render import page
from diffopt.bench.step import free_running as module
from diffopt.bench.step.case import run_case
from diffopt.bench.step.free_running import other_backend, psnr_db
from diffopt.bench.step.free_running_record import PictureDifferences
from diffopt.bench.step.free_running_words import free_running_data, free_running_lines
from diffopt.bench.step.prompts import PROMPTS
from diffopt.bench.workloads import read_workload
from diffopt.measure.teacher_forced import UNetCall

CPU = torch.device("cpu")
DIFFERENCES = st.lists(st.tuples(st.floats(0, 100) | st.just(math.inf), st.integers(0, 255)), min_size=1, max_size=30)


def test_psnr_of_known_pictures():
    black = np.zeros((4, 4, 3), np.uint8)
    assert psnr_db(black, black) == math.inf
    assert psnr_db(black, black + 255) == 0
    assert psnr_db(black, black + 1) == pytest.approx(48.13, abs=0.01)


@given(pairs=DIFFERENCES)
def test_a_distribution_is_made_of_measured_values_worst_last(pairs):
    psnr, maximum = map(list, zip(*pairs, strict=True))
    found = some_differences(psnr_db=psnr, ssim=None, max_difference=maximum).distributions()
    decibels, largest = found["psnr_db"], found["max_difference"]
    assert decibels is not None
    assert largest is not None
    assert found["ssim"] is None
    assert set(decibels) <= set(psnr)
    assert set(largest) <= set(maximum)
    assert decibels.worst == min(psnr)
    assert largest.worst == max(maximum)
    assert decibels.worst <= decibels.p5 <= decibels.median
    assert largest.worst >= largest.p5 >= largest.median


def test_samples_of_unequal_numbers_are_no_differences():
    with pytest.raises(pydantic.ValidationError, match="unequal numbers"):
        some_differences(max_difference=[1])
    with pytest.raises(pydantic.ValidationError, match="or none"):
        PictureDifferences(left="a", right="b", psnr_db=[], ssim=None, max_difference=[])


def test_there_are_a_hundred_different_prompts():
    assert len(set(PROMPTS)) == len(PROMPTS) == 100


def test_a_case_keeps_the_pictures_of_its_prompts_beside_two_stock_backends(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage.metrics", None)
    stages = []
    case = tiny_case(free_running_prompts=2, repetitions=1, warmup=0)
    record = run_case("test", case, device=CPU, progress=lambda stage, *_: stages.append(stage))
    found = record.free_running
    assert found is not None
    assert "pictures of several prompts" in stages
    assert (found.prompts, found.steps) == (2, 2)
    assert found.ours.identical == 2  # on a CPU `auto` is PyTorch's own attention
    assert found.ours.psnr_db == [math.inf, math.inf]
    assert found.ours.ssim is None
    assert found.stock is not None
    assert found.stock.right == "stock on sdpa-math"
    assert len(found.stock.psnr_db) == 2
    assert found.nonfinite_ours == found.nonfinite_stock == 0
    assert record.stock is not None


def test_similarity_is_measured_where_scikit_image_is():
    pytest.importorskip("skimage", reason='needs scikit-image: pip install "diffopt[report]"')
    comparison = module._Comparison("a", "b")
    picture = np.random.default_rng(0).random((16, 16, 3))
    comparison.add(picture, picture)
    comparison.add(picture, 1 - picture)
    ssim = comparison.differences().ssim
    assert ssim is not None
    assert ssim[0] == pytest.approx(1)
    assert ssim[1] < 0.2


def test_nan_is_counted_and_ours_may_not_have_more_than_stock():
    comparison = module._Comparison("a", "b")
    whole = np.full((16, 16, 3), 0.5)
    broken = whole.copy()
    broken[0, 0, 0] = math.nan
    comparison.add(whole, broken)
    assert (comparison.nonfinite_left, comparison.nonfinite_right) == (0, 1)
    assert not some_free_running(nonfinite_ours=1).finite
    assert some_free_running(nonfinite_ours=1, nonfinite_stock=1).finite


def test_pictures_that_break_down_get_no_speed(monkeypatch):
    monkeypatch.setattr("diffopt.bench.step.case.free_running", lambda *_, **__: some_free_running(nonfinite_ours=1))
    record = run_case("test", tiny_case(free_running_prompts=1), device=CPU)
    assert record.exactness.passed
    assert record.stock is None


def test_the_other_backend_is_the_first_with_other_bits():
    output = torch.ones(2)
    call = UNetCall((), {})
    forwards = {"same": lambda _: output.clone(), "other": lambda _: output + 1, "third": lambda _: output + 2}
    assert other_backend(call, output, forwards) == "other"
    assert other_backend(call, output, {"same": forwards["same"]}) is None


def test_a_record_with_pictures_is_of_version_3(tmp_path):
    record = a_step_record(free_running=some_free_running())
    append_record(tmp_path / "r.jsonl", record)
    assert read_records(tmp_path / "r.jsonl") == [record]
    with pytest.raises(pydantic.ValidationError, match="version 2 holds fields of version 3"):
        a_step_record(free_running=some_free_running(), schema_version=2)


def test_the_workloads_for_reports_ask_for_pictures():
    for name in ("quick", "standard", "full"):
        cases = {case.name: case for case in read_workload(name).cases}
        assert cases["emoji-128"].free_running_prompts > 0
        assert cases["sd15-512"].free_running_prompts > 0


def test_reports_show_both_distributions():
    record = a_step_record(free_running=some_free_running())
    found = report_data([record])["gpus"]["NVIDIA Test"]["step"]["sd15-512"]["pictures_compared"]
    assert found["ours"]["psnr_db"] == {"median": 50.0, "p5": 50.0, "worst": 50.0}
    assert found["stock"]["max_difference"]["worst"] == 4
    assert found["ours"]["identical"] == 1
    json.dumps(found, allow_nan=False)
    same = some_free_running(ours=some_differences(psnr_db=[math.inf, math.inf], max_difference=[0, 0]), stock=None)
    assert free_running_data(same)["ours"]["psnr_db"]["worst"] is None
    assert free_running_lines(None) == []
    assert "diffopt against stock: PSNR 50.0 / 50.0 / 50.0 dB, SSIM" in free_running_lines(record.free_running)[1]
    text = page([record], [])
    for words in ("2 pictures of 10 steps", "diffopt against stock", "50.0 / 50.0 / 50.0", "stock on sdpa-math"):
        assert words in text, words
