"""What really ran: counted per kind of layer, with fallbacks, kept processors and silent no-ops."""

import dataclasses
import json

import pytest
import torch
from pipelines import make_pipeline, picture
from rich.console import Console
from sample_records import a_step_record

import diffopt
from diffopt.attention.backends import BACKENDS
from diffopt.attention.plan import Choice, Plan
from diffopt.bench.report.audit import audit, audit_data, audit_lines, module_lines
from diffopt.bench.report.data import report_data
from diffopt.bench.report.rows import rows_of
from diffopt.bench.report.tables import report_tables


def a_layer(kind, *runs, **changes):
    keys = ("backend", "calls", "reason", "fallback")
    return {"kind": kind, "optimized": True, "runs": [dict(zip(keys, run, strict=True)) for run in runs], **changes}


PLAN = {
    "layers": [
        a_layer("cross", ("sdpa", 5, "diffopt: head dim 36", True)),
        a_layer("self", ("diffopt", 7, "fastest", False), ("sdpa", 2, "diffopt: no", True)),
        a_layer("self", ("diffopt", 7, "second", False), ("diffopt", 1, "third", False)),
        a_layer("self", optimized=False, reasons=["MyProcessor computes something of its own and is kept"]),
    ],
    "step": {
        "captures": 3,
        "prologues": 2,
        "tables": 4,
        "sums": 3,
        "buckets": [
            {"inputs": "2×4×64×64 float16, 3 inputs", "replays": 31},
            {"inputs": "2×4×96×96 float16, 3 inputs", "replays": 20},
            {"inputs": "4×4×64×64 float16, 3 inputs", "replays": 9},
        ],
        "uncaptured": [{"reason": "gradients are enabled", "calls": 1}, {"reason": "out of memory", "calls": 5}],
    },
    "modules": {
        "fused": {"ResnetBlock2D": 22, "GEGLU": 16},
        "shared": [{"what": "queries, keys and values, layer by layer", "layers": 48}],
        "kept": [
            {"name": "a", "kind": "GEGLU", "reasons": ["it has a forward of its own"]},
            {"name": "b", "kind": "GEGLU", "reasons": ["it has a forward of its own"]},
            {"name": "c", "kind": "ResnetBlock2D", "reasons": ["it changes the size"]},
        ],
    },
    "vae": [{"kind": "AutoencoderKL", "fused": {"Decoder": 1, "ResnetBlock2D": 14}, "kept": [], "reasons": []}],
    "notes": ["diffusers' attention backend is set to 'flash', which has no effect on this UNet"],
}


def test_layers_and_calls_are_counted_by_kind_and_backend():
    found = [(ran.kind, ran.backend, ran.layers, ran.calls, ran.fallbacks) for ran in audit(PLAN)]
    assert found == [("self", "diffopt", 2, 15, 0), ("self", "sdpa", 1, 2, 2), ("cross", "sdpa", 1, 5, 5)]
    data = audit_data(PLAN)
    assert data["fallbacks"] == 7
    assert sum(data["kept"].values()) == 1
    assert data["step"]["captures"] == 3
    assert data["modules"]["kept"]["GEGLU (it has a forward of its own)"] == 2
    json.dumps(data)


def test_modules_that_are_all_kept_are_named():
    row = {"name": "a", "kind": "GEGLU", "reasons": ["no kernel takes float64"]}
    modules = {"fused": {}, "shared": [], "kept": [row, row]}
    assert module_lines(modules) == ["not fused: GEGLU (no kernel takes float64): 2"]
    assert module_lines({}) == []


def test_lines_are_compact_and_name_silent_no_ops():
    assert audit_lines(PLAN) == [
        "self-attention: diffopt in 2 layers, 15 calls (fastest; second; and 1 more reasons)",
        "self-attention: sdpa in 1 layer, 2 calls, fallbacks: 2 (diffopt: no)",
        "cross-attention: sdpa in 1 layer, 5 calls, fallbacks: 5 (diffopt: head dim 36)",
        "kept as they were: 1 layers (MyProcessor computes something of its own and is kept)",
        "UNet calls captured: 3 graphs, 60 replays (2×4×64×64 float16, 3 inputs: 31; "
        "2×4×96×96 float16, 3 inputs: 20; and 1 more graphs)",
        "keys and values of the prompt: computed apart for these, 2 replays",
        "time embeddings: computed apart for these, 4 replays",
        "summed weights: computed apart for these, 3 replays",
        "UNet calls not captured: 5 (out of memory)",
        "UNet calls not captured: 1 (gradients are enabled)",
        "fused: 22 ResnetBlock2D, 16 GEGLU",
        "shared products: 48 layers (queries, keys and values, layer by layer)",
        "not fused: GEGLU (it has a forward of its own): 2",
        "not fused: ResnetBlock2D (it changes the size): 1",
        "VAE: fused: 1 Decoder, 14 ResnetBlock2D",
        "note: diffusers' attention backend is set to 'flash', which has no effect on this UNet",
    ]
    assert audit_lines({}) == []


def test_show_prints_it_below_the_table():
    records = [a_step_record(plan=PLAN)]
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for part in report_tables(report_data(records), rows_of(records)):
        console.print(part, markup=False)
    text = console.export_text()
    for line in audit_lines(PLAN):
        assert line in text, line


@pytest.fixture
def refusing(monkeypatch):
    """A backend that comes first on this device and takes nothing from cross-attention."""
    refusing = dataclasses.replace(
        BACKENDS["sdpa-math"], call_reasons=lambda q, k, v, mask: ["77 keys"] if k.shape[1] == 77 else []
    )
    monkeypatch.setitem(BACKENDS, "sdpa-math", refusing)
    monkeypatch.setattr("diffopt.handle.backends.auto_order", lambda device: (refusing, BACKENDS["sdpa"]))
    monkeypatch.setattr("diffopt.attention.layers.auto_order", lambda device: (refusing, BACKENDS["sdpa"]))


@pytest.mark.usefixtures("refusing")
def test_fallbacks_are_counted_in_every_layer_of_a_shape():
    pipe = make_pipeline("bundled")
    handle = diffopt.optimize(pipe)
    picture(pipe, "bundled")
    summary = handle.summary()
    cross = [run for layer in summary["layers"] if layer["kind"] == "cross" for run in layer["runs"]]
    assert len(cross) == 10
    assert all(run["fallback"] and run["backend"] == "sdpa" for run in cross)
    assert not any(run["fallback"] for layer in summary["layers"] if layer["kind"] == "self" for run in layer["runs"])
    assert summary["fallbacks"] == {"sdpa-math: 77 keys": sum(run["calls"] for run in cross)}
    assert f"note: {sum(run['calls'] for run in cross)} calls fell back: sdpa-math: 77 keys" in handle.report()
    handle.restore()


def test_a_plan_remembers_what_is_a_fallback(tmp_path):
    pipe = make_pipeline("bundled")
    with diffopt.optimized(pipe) as handle:
        picture(pipe, "bundled")
    plan = handle.plan
    shape = next(iter(plan.choices))
    plan.choices[shape] = Choice("sdpa", "diffopt: no", fallback=True)
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json", torch.device("cpu"))
    assert again.choices == plan.choices
    table = json.loads((tmp_path / "plan.json").read_text())
    table["schema"] = 2
    for row in table["choices"]:
        del row["fallback"]
    (tmp_path / "old.json").write_text(json.dumps(table))
    assert not any(choice.fallback for choice in Plan.load(tmp_path / "old.json", torch.device("cpu")).choices.values())
