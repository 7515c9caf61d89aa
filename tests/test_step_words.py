"""What reports say of peers and of where a step's time goes: the best that counts, void ratios, dashes, no crash."""

import json

import pytest
import torch
from rich.console import Console
from sample_records import a_certificate, a_peer, a_step_record, an_environment

from diffopt.bench.record import append_record, read_records
from diffopt.bench.report.data import report_data
from diffopt.bench.report.grids import grids_of
from diffopt.bench.report.readme import measured_section
from diffopt.bench.report.render import index, page
from diffopt.bench.report.rows import rows_of
from diffopt.bench.report.tables import report_tables
from diffopt.bench.step.words import floor_us, over_best, peers_words, profile_words
from diffopt.bench.workloads import COMPILE_PEERS, STEP_PEERS
from diffopt.measure.profile import FORWARDS, KINDS, ForwardProfile, kind_of, profile_forward
from diffopt.measure.teacher_forced import UNetCall
from diffopt.measure.timing import paired_ratio

REDUCE, NO_GRAPHS, TUNED = COMPILE_PEERS
H100 = an_environment(gpu="NVIDIA H100 80GB HBM3")


def _entry(record):
    data = report_data([record])
    json.dumps(data, allow_nan=False)
    return data["gpus"][record.environment.machine.name]["step"]["sd15-512"]


def _shown(record) -> str:
    console = Console(width=400, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for part in report_tables(report_data([record]), rows_of([record])):
        console.print(part, markup=False)
    return console.export_text()


def test_ours_is_compared_with_the_fastest_mode_that_was_exact():
    inexact = a_peer(TUNED, state="inexact", why="FAILED: far off", distances=[0.5])
    peers = [a_peer("cuda-graph", [1.2, 1.2, 1.2]), a_peer(REDUCE), a_peer(NO_GRAPHS, [1.8, 1.8, 1.8]), inexact]
    record = a_step_record(peers=peers)
    entry = _entry(record)
    assert entry["ratio_vs_torch_compile"] == 1.5
    low, high = entry["ratio_vs_torch_compile_interval"]
    assert low <= 1.5 <= high
    assert (entry["ratio_vs_torch_compile_mode"], entry["ratio_vs_torch_compile_why"]) == (REDUCE, "")
    assert entry["peers"][REDUCE]["loop_its"] == 20
    assert entry["peers"][REDUCE]["exactness"].startswith("passed")
    assert entry["peers"][TUNED]["loop_its"] is None
    assert entry["peers"][TUNED]["exactness"].startswith("FAILED")
    assert over_best(record).name == "cuda-graph"
    words = peers_words(record)
    assert words.startswith("peers: cuda-graph 25.00 it/s (UNet alone 0.83, first call 60.0 s); ")
    assert "compile-max-autotune not exact (FAILED: far off)" in words
    assert words.endswith("over the best, cuda-graph")


def test_a_peers_unet_alone_has_numbers_of_its_own():
    unet = paired_ratio([3.0, 3.0, 3.0], [1.0, 1.0, 1.0])
    entry = _entry(a_step_record(peers=[a_peer(REDUCE, unet_ratio=unet)]))
    peer = entry["peers"][REDUCE]
    assert (peer["loop_its"], peer["unet_its"]) == (20, pytest.approx(1 / 1.5))
    assert (peer["ratio"], peer["unet_ratio"], entry["ratio_vs_torch_compile"]) == (1.5, 3.0, 1.5)


def test_modes_that_were_left_out_stand_beside_the_ratio():
    entry = _entry(a_step_record(peers=[a_peer(REDUCE)], peers_left_out=[NO_GRAPHS, "cuda-graph"]))
    assert entry["ratio_vs_torch_compile"] == 1.5
    assert entry["ratio_vs_torch_compile_why"] == f"left out: {NO_GRAPHS}"


@pytest.mark.parametrize("state", ["failed", "absent"])
def test_a_missing_mode_makes_the_ratio_void(state):
    entry = _entry(a_step_record(peers=[a_peer(REDUCE), a_peer(TUNED, state=state, why="no memory", distances=[])]))
    assert entry["ratio_vs_torch_compile"] is entry["ratio_vs_torch_compile_mode"] is None
    assert entry["ratio_vs_torch_compile_why"] == f"void: {TUNED} {state} (no memory)"
    assert entry["peers"][REDUCE]["ratio"] == 1.5


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, "none was run"),
        ({"peers_left_out": COMPILE_PEERS[:2]}, f"left out: {REDUCE}, {NO_GRAPHS}"),
        ({"peers": [a_peer(REDUCE, state="inexact", why="FAILED", distances=[0.5])]}, "none was exact"),
        ({"peers": [a_peer("cuda-graph")]}, "none was run"),
        ({"certificate": a_certificate(ours=0.5)}, "the exactness check did not pass"),
    ],
)
def test_a_ratio_that_is_not_there_has_its_reason(changes, why):
    entry = _entry(a_step_record(**changes))
    assert entry["ratio_vs_torch_compile"] is None
    assert entry["ratio_vs_torch_compile_why"].startswith(why)


@pytest.mark.parametrize(("gpu", "words"), [(None, ""), ("X", "peers: cuda-graph absent (too old)")])
def test_absent_peers_are_one_short_line_and_on_a_cpu_none(gpu, words):
    absent = a_peer("cuda-graph", state="absent", why="too old", distances=[])
    record = a_step_record(environment=an_environment(gpu=gpu), peers=[absent])
    assert peers_words(record) == words
    assert peers_words(a_step_record()) == ""


def test_tables_index_and_readme_name_the_peers(tmp_path):
    record = a_step_record(peers=[a_peer(REDUCE)], peers_left_out=(TUNED,), profile=a_profile(), environment=H100)
    append_record(tmp_path / "r.jsonl", record)
    assert read_records(tmp_path / "r.jsonl") == [record]
    line = f"peers: {REDUCE} 20.00 it/s (UNet alone 0.67, first call 60.0 s); ours × 1.500"
    assert line in _shown(record)
    text = index([record], [])
    assert f"| case | machine | stock | {REDUCE} | diffopt | over the best |" in text
    assert f"- left out everywhere: {TUNED}\n" in text
    (row,) = [line for line in text.splitlines() if "20.00 (60.0)" in line]
    assert row.startswith("| sd15-512 | NVIDIA H100")
    assert " | 20.00 (60.0) | " in row
    assert "| × 1.500 (" in row
    assert "| case | machine | attention | convolution | matmul |" in text
    for words in (f"over the best, {REDUCE}; left out: {TUNED}", profile_words(record)):
        assert words in _shown(record)


def test_what_one_machine_left_out_and_another_ran_is_not_left_out_everywhere():
    """And a machine where none can be has no row among those that have."""
    absent = a_peer("cuda-graph", state="absent", why="needs a GPU", distances=[])
    records = [
        a_step_record(peers=[a_peer(REDUCE)]),
        a_step_record(case="two", peers=[a_peer("cuda-graph")], peers_left_out=(REDUCE, TUNED)),
        a_step_record(case="three", environment=an_environment(gpu=None), peers=[absent]),
    ]
    (grid,) = grids_of(records)
    cases = {row[0]: dict(zip(grid.headings[3:5], row[3:5], strict=True)) for row in grid.rows}
    assert cases == {
        "sd15-512": {"cuda-graph": "—", REDUCE: "20.00 (60.0)"},
        "two": {"cuda-graph": "20.00 (60.0)", REDUCE: "not run"},
    }
    assert grid.notes == [f"left out everywhere: {TUNED}"]
    assert grids_of(records[2:]) == []


@pytest.mark.parametrize(
    ("peers", "words"),
    [
        ([a_peer(REDUCE), a_peer(TUNED, [1.2, 1.3, 1.1])], f"| × 1.20 {TUNED} |"),
        ([a_peer(REDUCE), a_peer(TUNED, state="failed", why="no memory", distances=[])], "| — |"),
        ([], "| — |"),
    ],
)
def test_the_readme_has_a_column_for_the_fastest_one(peers, words):
    pytest.importorskip("scipy", reason='needs scipy: pip install "diffopt[report]"')
    text = measured_section({"a.jsonl": [a_step_record(peers=peers)]}, folder="reports", plot=False)
    (row,) = [line for line in text.splitlines() if line.startswith("| sd15-512")]
    assert words in row


def test_the_readme_says_which_ones_did_not_run():
    pytest.importorskip("scipy", reason='needs scipy: pip install "diffopt[report]"')
    most = [a_peer(name) for name in STEP_PEERS if name != TUNED]
    records = [
        a_step_record(peers=most, peers_left_out=(TUNED,)),
        a_step_record(case="sd21-768", peers=most),  # when `bench step` did not have it yet
        a_step_record(case="sdxl-1024", peers=[a_peer(name) for name in STEP_PEERS]),
        a_step_record(case="emoji-128"),  # which `bench step` has not
    ]
    text = measured_section({"a.jsonl": records}, folder="reports", plot=False)
    where = "sd15-512 on NVIDIA Test and sd21-768 on NVIDIA Test"
    assert f"- peers that did not run: {where}: {TUNED}\n" in text


def test_tables_say_why_a_number_is_missing_or_odd():
    peers = [a_peer(REDUCE), a_peer(TUNED, state="failed", why="no memory", distances=[])]
    broken = ForwardProfile(why="RuntimeError: no profiler")
    text = index([a_step_record(peers=peers, profile=broken)], [])
    assert f"- sd15-512 on NVIDIA Test: {TUNED} failed (no memory)\n" in text
    assert "- sd15-512 on NVIDIA Test: no profile of a UNet forward: RuntimeError: no profiler\n" in text
    (row,) = [line for line in text.splitlines() if "| failed |" in line]
    assert row.endswith("| — |")
    assert f"| sd15-512 | NVIDIA Test |{' — |' * (len(KINDS) + 3)}" in text
    skipped = a_peer(REDUCE).model_copy(update={"why": "the compiler left out CUDA graphs 2 times"})
    assert "timed (the compiler left out CUDA graphs 2 times)" in index([a_step_record(peers=[skipped])], [])


def test_the_page_has_peers_and_profile():
    pytest.importorskip("jinja2", reason='needs jinja2: pip install "diffopt[report]"')
    text = page([a_step_record(peers=[a_peer(REDUCE)], profile=a_profile(), environment=H100)], [])
    assert f"{REDUCE} 20.00 it/s" in text
    assert "where time goes" in text
    assert "where time goes" not in page([a_step_record()], [])


def a_profile(**changes) -> ForwardProfile:
    fields = {"forwards": 3, "microseconds": {"attention": 1000.0, "convolution": 3000.0, "other": 0.0}}
    return ForwardProfile(**{**fields, "launches": 412.0, "flops": int(1.6e12), **changes})


def test_the_profile_stands_beside_the_floor():
    record = a_step_record(profile=a_profile(), environment=H100)
    assert floor_us(record) == pytest.approx(1.6e12 / 989e12 * 1e6)
    assert profile_words(record) == (
        "a UNet forward's 4000 µs of GPU time: attention 1000 (25%), convolution 3000 (75%); 412 launches; "
        "floor 1618 µs (1.60 TFLOP at the datasheet's peak)"
    )
    assert _entry(record)["profile"]["microseconds"]["convolution"] == 3000


def test_an_unknown_gpu_and_uncounted_operations_print_a_dash():
    assert "floor — (1.60 TFLOP" in profile_words(a_step_record(profile=a_profile()))
    assert "floor — (— at" in profile_words(a_step_record(profile=a_profile(flops=None), environment=H100))
    assert profile_words(a_step_record()) == ""
    failed = a_step_record(profile=ForwardProfile(why="RuntimeError: no profiler"))
    assert profile_words(failed) == "no profile of a UNet forward: RuntimeError: no profiler"
    assert _entry(failed)["profile"]["floor_us"] is None


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("attention_descriptors_kernel", "attention"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128>>", "attention"),
        ("fmha_cutlassF_f16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel)", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x256", "attention"),
        ("sm90_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc_tilesize128x128x64", "convolution"),
        ("void cudnn::ops::nchwToNhwcKernel<__half, __half, float>", "copies"),
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_bias_TNN", "matmul"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_f16_s16816gemm_relu_f16_64x64_32x6_tn_align8>", "matmul"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float, __half>", "matmul"),
        ("group_norm_apply_kernel", "norm"),
        ("void at::native::RowwiseMomentsCUDAKernel<c10::Half, float, int>", "norm"),
        ("geglu_kernel", "elementwise"),
        ("geglu_product_kernel", "matmul"),
        ("convolution_kernel", "convolution"),
        ("convolution_sums_kernel", "convolution"),
        ("thin_convolution_gather_kernel", "convolution"),
        ("bias_add_kernel", "elementwise"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::Half>>", "elementwise"),
        ("void at::native::elementwise_kernel<128, 4, direct_copy_kernel_cuda(at::TensorIteratorBase&)>", "copies"),
        ("void at::native::CatArrayBatchedCopy_vectorized<OpaqueType<2u>>", "copies"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("something_new", "other"),
    ],
)
def test_kernels_are_sorted_by_their_names(kernel, kind):
    assert kind_of(kernel) == kind
    assert kind in KINDS


class _Unet:
    device = torch.device("cpu")

    def __call__(self, x, **_):
        return (x @ x,)


def test_a_profile_is_per_forward_and_counts_stocks_operations():
    def kernels(run, device):
        run()
        return [("geglu_kernel", 3.0), ("nvjet_hsh", 6.0)] * FORWARDS

    call = UNetCall((torch.eye(8),), {})
    profile = profile_forward(call, _Unet(), lambda: call.run(_Unet()), kernels)
    assert profile is not None
    assert (profile.microseconds["elementwise"], profile.microseconds["matmul"]) == (3.0, 6.0)
    assert (profile.launches, profile.total_us, profile.flops) == (2, 9.0, 2 * 8**3)
    assert profile_forward(call, _Unet(), lambda: None) is None  # a CPU has no kernels


def test_a_profiler_that_fails_costs_nothing_but_the_profile():
    def broken(run, device):
        raise RuntimeError("CUPTI is in use\nby another")

    profile = profile_forward(UNetCall((torch.eye(8),), {}), _Unet(), lambda: None, broken)
    assert profile is not None
    assert profile.why == "RuntimeError: CUPTI is in use"
    empty = profile_forward(UNetCall((torch.eye(8),), {}), _Unet(), lambda: None, lambda run, device: [])
    assert empty is not None
    assert empty.why == "the profiler saw no kernels"
