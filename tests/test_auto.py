"""What `auto` runs: the fastest exact backend that was measured for a shape, with the evidence; else what it can."""

import json

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from pipelines import make_pipeline, picture
from tuned_tables import row

import diffopt
from diffopt.attention import backends
from diffopt.attention.backends import BACKENDS, auto_order, measured_order
from diffopt.attention.layers import ATTRIBUTE, AttentionLayer
from diffopt.attention.plan import AttentionShape, Plan
from diffopt.attention.processors import DiffoptAttnProcessor
from diffopt.attention.tuning import TunedRow, Tuning
from diffopt_kernels.launch import LaunchKey

CPU = torch.device("cpu")
KEY = LaunchKey(2, 64, 64, 2, 80)  # layers of the bundled model at 64×64 pixels, guidance included
FILE = "configs/gpus/abacus.toml"


@pytest.fixture
def tuned(monkeypatch):
    """A table for whatever device asks: set its rows."""

    def set_rows(*rows):
        found = Tuning({(shape.key, shape.dtype): TunedRow(shape, FILE, "2026-11-23T10:00:00+00:00") for shape in rows})
        monkeypatch.setattr(backends, "use_tuned", lambda device: found)
        measured_order.cache_clear()

    yield set_rows
    measured_order.cache_clear()


def cpu_row(key=KEY, **microseconds):
    return row(key, dtype="float32", **microseconds)


def runs(handle, shape):
    """(backend, reason) of every layer that was called with a shape."""
    found = {
        (run["backend"], run["reason"])
        for layer in handle.summary()["layers"]
        for run in layer["runs"]
        if run["shape"].startswith(shape)
    }
    assert found
    return found


def names(order):
    return list(order.names)


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Every backend serves, as on a GPU, until told otherwise."""
    refused = {}
    for name, backend in BACKENDS.items():
        monkeypatch.setitem(
            BACKENDS, name, backends.dataclasses.replace(backend, device_reasons=lambda _, n=name: refused.get(n, []))
        )
    monkeypatch.setattr(backends, "own_kernel_reasons", lambda device: refused.get("diffopt", []))
    return refused


def test_the_fastest_measured_backend_comes_first(tuned, on_a_gpu):
    tuned(row(diffopt=98.14, sdpa_flash=278, sdpa_cudnn=151.6))
    key = row().key
    order = measured_order(CPU, key, "float16")
    assert names(order) == ["diffopt", "sdpa-cudnn", "sdpa-flash", "sdpa"]
    assert order.evidence == f"diffopt 98.1 µs, sdpa-cudnn 151.6, sdpa-flash 278.0 ({FILE}, 2026-11-23)"


def test_our_kernel_gives_way_where_it_is_slower(tuned, on_a_gpu):
    tuned(row(diffopt=30, xformers=20, sdpa=25))
    assert names(measured_order(CPU, row().key, "float16")) == ["xformers", "sdpa", "diffopt"]


def test_our_kernel_is_left_out_where_no_launch_was_right(tuned, on_a_gpu):
    tuned(row(sdpa_cudnn=25))
    assert names(measured_order(CPU, row().key, "float16")) == ["sdpa-cudnn", "sdpa"]


def test_what_is_not_here_or_not_known_is_left_out(tuned, on_a_gpu):
    tuned(row(xformers=1, abacus=2, diffopt=3, sdpa_flash=4))
    on_a_gpu.update({"xformers": ["not installed"], "diffopt": ["its check failed"]})
    assert names(measured_order(CPU, row().key, "float16")) == ["sdpa-flash", "sdpa"]


def test_a_near_shape_is_ranked_by_its_neighbour_and_says_so(tuned, on_a_gpu):
    tuned(row(case="sd15 self", sdpa_flash=5, diffopt=6))
    order = measured_order(CPU, LaunchKey(1, 4096, 4096, 8, 40), "float16")
    assert names(order)[0] == "sdpa-flash"
    assert order.evidence.endswith("at sd15 self, the nearest tuned shape")
    assert measured_order(CPU, LaunchKey(2, 4096, 77, 8, 40), "float16") is None


def test_without_a_table_our_kernel_comes_first_if_it_can_serve(tuned, on_a_gpu):
    tuned()
    assert [backend.name for backend in auto_order(CPU)] == ["diffopt", "sdpa"]
    on_a_gpu["diffopt"] = ["no Triton"]
    assert [backend.name for backend in auto_order(CPU)] == ["sdpa"]


OURS_FIRST = (BACKENDS["diffopt"], BACKENDS["sdpa"])


@pytest.fixture
def our_kernel_is_trusted(monkeypatch):
    """As on a GPU, whatever the device: the kernel is on, and nothing was measured."""
    monkeypatch.setattr("diffopt.attention.layers.auto_order", lambda device: OURS_FIRST)
    monkeypatch.setattr("diffopt.attention.layers.measured_order", lambda *_: None)


@pytest.mark.usefixtures("our_kernel_is_trusted")
@pytest.mark.parametrize(
    ("dtype", "backend", "reason"),
    [
        (torch.float16, "diffopt", "first of diffopt, sdpa"),
        (torch.bfloat16, "diffopt", "first of diffopt, sdpa"),
        (torch.float32, "sdpa", "first of sdpa; diffopt's float32 kernel was never timed"),
    ],
)
@pytest.mark.parametrize("masked", [False, True])
def test_without_a_table_float32_goes_to_sdpa(kernel_device, dtype, backend, reason, masked):
    q = torch.randn(1, 16, 2, 40, device=kernel_device, dtype=dtype)
    mask = torch.zeros(1, 1, 16, 16, device=kernel_device, dtype=dtype) if masked else None
    state = AttentionLayer("a layer", OURS_FIRST, Plan("auto", {}))
    assert state.choose(q, q, q, mask).name == backend
    assert dict(state.calls) == {(AttentionShape.of(q, q, mask), backend, reason): 1}
    assert not state.fallbacks
    forced = AttentionLayer("a layer", OURS_FIRST[:1], Plan("diffopt", {}))
    assert forced.choose(q, q, q, mask).name == "diffopt"


@pytest.mark.skipif(torch.cuda.is_available(), reason="its table is for the CPU")
def test_layers_run_what_was_measured_and_the_plan_keeps_the_evidence(tuned, tmp_path):
    pipe = make_pipeline("bundled")
    before = picture(pipe, "bundled")
    tuned(cpu_row(sdpa_math=1, sdpa=2))
    handle = diffopt.optimize(pipe)
    torch.testing.assert_close(picture(pipe, "bundled"), before, rtol=1e-3, atol=1e-3)
    evidence = f"sdpa-math 1.0 µs, sdpa 2.0 ({FILE}, 2026-11-23)"
    assert runs(handle, "2×64×64 2h d80") == {("sdpa-math", evidence)}
    assert evidence in handle.report()
    assert runs(handle, "2×64×77 2h d80") == {("sdpa-math", f"{evidence} at a shape, the nearest tuned shape")}
    assert runs(handle, "2×16×16 1h d160") == {("sdpa", "first of sdpa")}

    handle.plan.save(tmp_path / "plan.json")
    (kept,) = [
        choice
        for choice in json.loads((tmp_path / "plan.json").read_text())["choices"]
        if (choice["batch"], choice["query_tokens"], choice["key_tokens"], choice["head_dim"]) == (2, 64, 64, 80)
    ]
    assert (kept["backend"], kept["reason"]) == ("sdpa-math", evidence)
    handle.restore()
    tuned(cpu_row(sdpa=1, sdpa_math=2))  # the plan says otherwise, and is followed
    handle = diffopt.optimize(pipe, plan=tmp_path / "plan.json")
    picture(pipe, "bundled")
    assert runs(handle, "2×64×64 2h d80") == {("sdpa-math", evidence)}


@pytest.mark.skipif(torch.cuda.is_available(), reason="its table is for the CPU")
def test_a_backend_asked_for_by_name_is_not_outranked(tuned):
    pipe = make_pipeline("bundled")
    tuned(cpu_row(sdpa_math=1, sdpa=2))
    handle = diffopt.optimize(pipe, attention="sdpa")
    picture(pipe, "bundled")
    assert runs(handle, "2×64×64 2h d80") == {("sdpa", "asked for")}


def layer(tuned_rows, tuned):
    tuned(*tuned_rows)
    return AttentionLayer("a layer", (BACKENDS["sdpa"],), Plan("auto", {}))


def call(*, grad=False, mask=None):
    q = torch.randn(2, 64, 2, 80, requires_grad=grad)
    return q, q, q, mask


@pytest.mark.skipif(torch.cuda.is_available(), reason="its table is for the CPU")
def test_what_the_first_cannot_serve_goes_to_the_next_and_is_counted(tuned, monkeypatch):
    refusing = backends.dataclasses.replace(BACKENDS["sdpa-math"], call_reasons=lambda *_: ["not this one"])
    monkeypatch.setitem(BACKENDS, "sdpa-math", refusing)
    state = layer([cpu_row(sdpa_math=1, sdpa_flash=2, sdpa=3)], tuned)
    assert state.choose(*call()).name == "sdpa-flash"
    assert dict(state.calls) == {
        (AttentionShape(2, 64, 64, 2, 80, "float32"), "sdpa-flash", "sdpa-math: not this one"): 1
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="its table is for the CPU")
def test_masked_calls_are_not_ranked_by_unmasked_times(tuned):
    state = layer([cpu_row(sdpa_math=1, sdpa=2)], tuned)
    assert state.choose(*call()).name == "sdpa-math"
    assert state.choose(*call(mask=torch.zeros(1, 1, 64, 64))).name == "sdpa"


@pytest.mark.usefixtures("our_kernel_is_trusted")
def test_a_mask_with_a_gradient_is_another_kind_of_call(kernel_device):
    state = AttentionLayer("a layer", OURS_FIRST, Plan("auto", {}))
    q = torch.randn(1, 16, 2, 40, device=kernel_device, dtype=torch.float16)
    mask = torch.zeros(1, 1, 16, 16, device=kernel_device, dtype=torch.float16)
    assert state.choose(q, q, q, mask).name == "diffopt"
    graded = mask.clone().requires_grad_()
    assert state.choose(q, q, q, graded).name == "sdpa"
    with torch.no_grad():
        assert state.choose(q, q, q, graded).name == "diffopt"
    assert [reason for _, _, reason in state.fallbacks] == [
        "diffopt: mask.requires_grad is True; allowed: False, or a call under torch.no_grad()"
    ]


@torch.no_grad()
@pytest.mark.parametrize(
    ("times", "dtype", "dynamic", "ours"),
    [
        ({"diffopt": 1, "sdpa": 2}, "float32", False, True),
        ({"sdpa": 1, "diffopt": 2}, "float32", False, False),
        ({"sdpa_flash": 1, "diffopt": 2, "sdpa": 3}, "float32", False, False),
        ({"sdpa": 1, "diffopt": 2}, "float16", True, True),  # for any size: nothing was measured
        ({"diffopt": 1, "sdpa": 2}, "float32", True, False),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="its table is for the CPU")
def test_compiled_layers_follow_the_table_where_sizes_are_numbers(tuned, on_a_gpu, times, dtype, dynamic, ours):
    attn = Attention(160, heads=2, dim_head=80, processor=DiffoptAttnProcessor()).eval().to(getattr(torch, dtype))
    tuned(row(LaunchKey(2, 20, 20, 2, 80), dtype=dtype, **times))
    setattr(attn, ATTRIBUTE, AttentionLayer("a layer", auto_order(CPU), Plan("auto", {})))
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    x = torch.randn(2, 20, 160).to(attn.to_q.weight)
    torch._dynamo.reset()
    out = torch.compile(attn, backend=keep, fullgraph=True, dynamic=dynamic)(x)
    torch._dynamo.reset()
    attn.set_processor(AttnProcessor2_0())
    small = dtype == "float16"
    torch.testing.assert_close(out, attn(x), rtol=1e-2 if small else 1e-4, atol=1e-3 if small else 1e-5)
    targets = {str(node.target) for graph in graphs for node in graph.graph.nodes}
    assert any("diffopt_kernels" in target for target in targets) == ours
    assert any("scaled_dot_product_attention" in target for target in targets) != ours
