"""Plans: filled in by runs, saved, loaded, followed, and refused where they do not fit."""

import dataclasses
import json
import os

import pytest
import torch
from pipelines import make_pipeline, picture, same_picture

import diffopt
from diffopt.attention.machine import machine
from diffopt.attention.plan import AttentionShape, Choice, Plan
from diffopt.errors import InputError, OptimizeError
from diffopt_kernels.launch import LaunchKey


@pytest.fixture
def pipe():
    return make_pipeline("bundled")


@pytest.fixture(scope="module")
def plan():
    pipe = make_pipeline("bundled")
    with diffopt.optimized(pipe) as handle:
        picture(pipe, "bundled")
    return handle.plan


@pytest.fixture
def saved(plan, tmp_path):
    path = tmp_path / "plan.json"
    plan.save(path)
    return path


def test_a_plan_survives_saving_and_is_followed(pipe, saved):
    before = picture(pipe, "bundled")
    table = json.loads(saved.read_text())
    assert table["attention"] == "auto"
    assert {row["head_dim"] for row in table["choices"]} == {40, 80, 160}
    for row in table["choices"]:
        row["backend"], row["reason"] = "sdpa-math", "a test wants it"
    saved.write_text(json.dumps(table))

    handle = diffopt.optimize(pipe, plan=saved)
    after = picture(pipe, "bundled")
    runs = [run for row in handle.summary()["layers"] for run in row["runs"]]
    assert {(run["backend"], run["reason"]) for run in runs} == {("sdpa-math", "a test wants it")}
    assert torch.allclose(after.float(), before.float(), rtol=0.05, atol=0.05)
    handle.restore()
    assert same_picture(picture(pipe, "bundled"), before)


def test_the_file_is_whole_or_absent(pipe, saved):
    assert [path.name for path in saved.parent.iterdir()] == ["plan.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.update(schema=99), "schema 99 is not known; this version reads schema 2 and 3"),
        (lambda table: table["made_for"].update(torch="1.0"), "made for torch 1.0, here it is"),
        (lambda table: table["made_for"].update(kernels="0" * 16), "made for kernels 0{16}, here it is"),
        (lambda table: table["made_for"].pop("triton"), "made for triton None, here it is"),
        (lambda table: table["made_for"].update(device="NVIDIA Abacus"), "made for device NVIDIA Abacus, here it is"),
        (lambda table: table["choices"][0].update(backend="sorcery"), "unknown backend 'sorcery'; known: diffopt"),
        (lambda table: table.update(attention="sorcery"), "unknown backend 'sorcery'; known: diffopt"),
        (lambda table: table["choices"][0].pop("heads"), r"damaged: choices\[0\]: key 'heads' is missing"),
        (lambda table: table.pop("choices"), "damaged: key 'choices' is missing"),
        (lambda table: table.update(choices={}), "damaged: choices: {} is a dict, expected tuple"),
        (lambda table: table["choices"].append("sdpa"), r"damaged: choices: 'sdpa' is a str, expected dict"),
        (lambda table: table["choices"][0].update(batch="two"), r"choices\[0\]: batch: 'two' is a str, expected int"),
        (lambda table: table["choices"][1].update(masked="x"), r"choices\[1\]: masked: 'x' is a str, expected bool"),
        (lambda table: table["choices"][0].update(fallback=0), "fallback: 0 is a int, expected bool"),
        (lambda table: table["choices"][0].update(backend=None), "backend: None is a NoneType, expected str"),
        (lambda table: table["choices"][0].update(heads=[8]), r"heads: \[8\] is a list, expected int"),
        (lambda table: table["choices"][0].update(speed=1), "unknown key 'speed'"),
        (lambda table: table.update(made_for=[]), r"made_for: \[\] is a list, expected dict"),
        (lambda table: table["made_for"].update(torch=2), r"made_for\.torch: 2 is a int, expected str"),
        (lambda table: table.update(attention=1), "attention: 1 is a int, expected str"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_in_one_line(pipe, saved, change, message):
    table = json.loads(saved.read_text())
    change(table)
    saved.write_text(json.dumps(table))
    with pytest.raises(OptimizeError, match=message) as caught:
        diffopt.optimize(pipe, plan=saved)
    assert "\n" not in str(caught.value)
    diffopt.optimize(pipe).restore()  # nothing half-done


def test_a_damaged_or_missing_file_is_refused(pipe, tmp_path):
    (tmp_path / "cut.json").write_text('{"schema": 1, "att')
    for name in ("cut.json", "absent.json"):
        with pytest.raises(OptimizeError, match=f"{name}: can't be read"):
            diffopt.optimize(pipe, plan=tmp_path / name)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"schema": 3, "choices": ' + "[" * 100_000 + "]" * 100_000 + "}"])
def test_a_file_that_is_nested_without_end_is_refused(pipe, tmp_path, text):
    path = tmp_path / "deep.json"
    path.write_text(text)
    with pytest.raises(OptimizeError, match=r"deep\.json: can't be read: it is nested too deeply") as caught:
        diffopt.optimize(pipe, plan=path)
    assert "\n" not in str(caught.value)


def test_a_shape_is_looked_up_by_queries_and_keys_of_its_own():
    """Cross-attention has other times and launches than self-attention of as many queries."""
    q, k = torch.empty(2, 64, 8, 40), torch.empty(2, 77, 8, 40)
    assert AttentionShape.of(q, k, None).key == LaunchKey(2, 64, 77, 8, 40)


def test_a_masked_shape_has_words_of_its_own():
    """What was verified is looked up by them."""
    plain = AttentionShape(2, 64, 77, 8, 40, "float16")
    assert str(plain) == "2×64×77 8h d40 float16"
    assert str(dataclasses.replace(plain, masked=True)) == "2×64×77 8h d40 float16 masked"


def test_a_plan_with_another_attention_is_refused(pipe, saved):
    with pytest.raises(InputError, match="the plan was made with attention='auto'"):
        diffopt.optimize(pipe, attention="sdpa-math", plan=saved)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
def test_a_plan_that_names_a_backend_this_machine_lacks_is_refused(pipe):
    plan = Plan("auto", machine(torch.device("cpu")))
    plan.choices[AttentionShape(2, 64, 64, 2, 40, "float32")] = Choice("sdpa-cudnn", "made elsewhere")
    with pytest.raises(diffopt.DiffoptError, match="sdpa-cudnn can't serve: needs a CUDA GPU"):
        diffopt.optimize(pipe, plan=plan)


def test_a_moved_model_starts_its_choices_over(pipe):
    handle = diffopt.optimize(pipe)
    handle.plan.made_for = {**handle.plan.made_for, "device": "a device it was on before"}
    handle.plan.choices[AttentionShape(1, 1, 1, 1, 40, "float32")] = Choice("sdpa", "there")
    picture(pipe, "bundled")
    assert handle.plan.made_for == machine(pipe.device)
    assert AttentionShape(1, 1, 1, 1, 40, "float32") not in handle.plan.choices


def test_a_plan_made_for_another_model_is_refused(pipe):
    plan = Plan("auto", machine(pipe.device))
    plan.choices[AttentionShape(2, 4096, 4096, 8, 40, "float32")] = Choice("sdpa", "made for SD1.5")
    with pytest.raises(OptimizeError, match="a layer with 2×4096×4096 8h d40 float32; this UNet's heads: 1 of 160, "):
        diffopt.optimize(pipe, plan=plan)
    diffopt.optimize(pipe).restore()  # nothing half-done


def test_a_plan_is_still_the_same_after_more_shapes_were_met(pipe, saved):
    handle = diffopt.optimize(pipe, plan=saved)
    picture(pipe, "bundled", width=72)
    assert len(handle.plan.choices) > len(Plan.load(saved, pipe.device).choices)
    assert diffopt.optimize(pipe, plan=saved) is handle


def test_another_plan_is_refused_while_one_is_followed(pipe, saved):
    diffopt.optimize(pipe, plan=saved)
    table = json.loads(saved.read_text())
    table["choices"][0]["backend"] = "sdpa-math"
    saved.write_text(json.dumps(table))
    with pytest.raises(OptimizeError, match=r"already optimized with other choices than this plan's; call restore\(\)"):
        diffopt.optimize(pipe, plan=saved)


def test_a_link_to_a_plan_stays_a_link(plan, saved, tmp_path):
    link = tmp_path / "link.json"
    link.symlink_to("plan.json")
    saved.write_text("former")
    plan.save(link)
    assert link.is_symlink()
    assert json.loads(saved.read_text()) == plan.to_dict()


def test_what_is_no_file_keeps_its_place(plan, tmp_path):
    """A pipe here; run by root, a plan saved to /dev/null took the place of the device."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    plan.save(pipe)
    assert json.loads(os.read(reader, 1 << 20)) == plan.to_dict()
    os.close(reader)
    assert pipe.is_fifo()


@pytest.mark.parametrize("place", [".", "/"])
def test_a_folder_is_no_place_for_a_plan(plan, place):
    with pytest.raises(IsADirectoryError):
        plan.save(place)
