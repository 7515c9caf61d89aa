"""`diffopt verify`: what a certificate holds, what fails it, what makes it void, and what is remembered of it."""

import argparse
import dataclasses
import json
import math
import sys

import platformdirs
import pytest
import torch
from sample_records import (
    a_certificate,
    a_verification,
    attention_errors,
    attention_rules,
    some_free_running,
    some_layer_errors,
)
from tiny_model import one_thread  # noqa: F401  (a fixture of this module)

from diffopt.attention import verified
from diffopt.attention.backends import BACKENDS, with_scale_fault
from diffopt.attention.plan import AttentionShape, Choice
from diffopt.bench.schema import RecordError
from diffopt.bench.step import check as step_check
from diffopt.bench.verify import layer_check
from diffopt.bench.verify import run as verify_module
from diffopt.bench.verify.run import verify_case
from diffopt.commands import verify as command
from diffopt.errors import BackendError, InputError, ModelError

CPU = torch.device("cpu")
SMALL = ("--model", "random:tiny", "--device", "cpu", "--prompts", "1", "--steps", "2")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / "cache" / name)


def _run(*arguments):
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers(required=True))
    parsed = parser.parse_args(["verify", *map(str, arguments)])
    return parsed.run(parsed)


def test_a_certificate_of_this_machine_passes_and_is_remembered(tmp_path, capsys):
    output = tmp_path / "new" / "certificate.json"
    assert _run(*SMALL, "--json", "--output", output) == 0
    printed = json.loads(capsys.readouterr().out)
    assert json.loads(output.read_text()) == printed
    assert [path.name for path in output.parent.iterdir()] == ["certificate.json"]
    assert printed["passed"] is printed["bitwise_stock"] is True
    assert printed["void"] is False
    assert printed["nonfinite"] == 0
    assert len(printed["layers"]) >= 4  # self- and cross-attention at two sizes
    for layer in printed["layers"]:
        assert layer["backend"] == "sdpa"
        assert {rule["content"] for rule in layer["rules"]} == {"normal", "spread 3"}
        for rule in layer["rules"]:
            assert layer["errors"][rule["content"]]["relative_l2"] <= rule["limit"]["relative_l2"]
            assert rule["math"]["relative_l2"] > 0
    assert printed["exactness"]["steps"][0]["fault"] > printed["exactness"]["steps"][0]["allowed"]
    assert printed["free_running"]["ours"]["psnr_db"] == ["Infinity"]
    key = verified.verified_key(CPU, model_hash=printed["model"]["hash"], dtype="float32", attention="auto")
    entry = verified.find_verified(key)
    assert entry is not None
    assert entry.verified.id == printed["id"]
    assert entry.verified.layer_share <= 1
    assert set(entry.choices.values()) == {"sdpa"}


@pytest.mark.parametrize(("scale", "rows"), [("1", 1), ("2.5", 2)])
def test_another_scheduler_and_guidance_have_certificates_of_their_own(capsys, scale, rows):
    """They are not what pictures with the model's own are checked by; a failure concerns those too."""
    assert _run(*SMALL) == 0
    kept = verified.verified_file().read_text()
    capsys.readouterr()
    assert _run(*SMALL, "--scheduler", "dpmpp-2m-karras", "--guidance", scale, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["scheduler"], printed["guidance"]) == (
        "DPMSolverMultistepScheduler (dpmpp-2m-karras)",
        float(scale),
    )
    assert printed["passed"] is printed["bitwise_stock"] is True
    assert all(layer["shape"].startswith(f"{rows}×") for layer in printed["layers"])
    assert verified.verified_file().read_text() == kept


@pytest.mark.parametrize("options", [(), ("--scheduler", "ddim", "--guidance", "0")], ids=["usual", "others"])
def test_attention_that_is_wrong_fails_and_an_earlier_pass_is_forgotten(monkeypatch, capsys, options):
    assert _run(*SMALL) == 0
    assert json.loads(verified.verified_file().read_text())
    wrong = dataclasses.replace(with_scale_fault(BACKENDS["sdpa"]), name="sdpa")
    monkeypatch.setitem(BACKENDS, "sdpa", wrong)
    assert _run(*SMALL, *options) == 1
    out = capsys.readouterr().out
    assert "FAILED: 0 of" in out
    assert json.loads(verified.verified_file().read_text()) == {}


def test_a_check_that_finds_no_planted_fault_is_void(monkeypatch, capsys):
    monkeypatch.setattr(step_check, "FAULT", 1.0)
    assert _run(*SMALL) == 1
    assert "void: the planted fault" in capsys.readouterr().out


def test_the_terminal_shows_ours_beside_pytorch_and_says_how_to_get_ssim(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "skimage.metrics", None)
    assert _run(*SMALL) == 0
    printed = capsys.readouterr()
    for words in ("PyTorch math", "stock sdpa-flash", "stock on sdpa-math against stock", "bitwise stock: yes"):
        assert words in printed.out, words
    assert 'SSIM needs scikit-image: pip install "diffopt[report]"' in printed.out
    assert "whole pictures" in printed.err


@pytest.mark.parametrize(
    ("changes", "passed", "void"),
    [
        ({}, True, False),
        ({"exactness": a_certificate(ours=0.5)}, False, False),
        ({"exactness": a_certificate(fault=1e-3)}, False, True),
        ({"exactness": a_certificate(nonfinite=1)}, False, False),
        ({"layers": [some_layer_errors(), some_layer_errors(error=1.0)]}, False, False),
        ({"layers": [some_layer_errors(error=math.inf)]}, False, False),
        ({"layers": [some_layer_errors(nonfinite=1)]}, False, False),
        ({"layers": [some_layer_errors(fault=1e-4)]}, False, True),
        ({"layers": [some_layer_errors(fault=None)]}, False, True),
        ({"layers": [some_layer_errors(fault=1e-4, fault_can_show=False)]}, True, False),
        ({"free_running": some_free_running(nonfinite_ours=1)}, False, False),
    ],
)
def test_a_verdict_is_made_from_numbers(changes, passed, void):
    found = a_verification(**changes)
    assert (found.passed, found.void) == (passed, void)
    assert found.verdict().startswith("void" if void else "passed" if passed else "FAILED")
    assert "\n" not in found.verdict()


def test_bitwise_needs_every_step_and_every_picture():
    certificate = a_certificate(bitwise_stock=True)
    assert not a_verification(exactness=certificate).bitwise_stock  # one of two pictures differs
    same = some_free_running().ours.model_copy(update={"max_difference": [0, 0]})
    pictures = some_free_running(ours=same)
    assert a_verification(exactness=certificate, free_running=pictures).bitwise_stock
    assert not a_verification(free_running=pictures).bitwise_stock


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        (["--prompts", "0"], InputError, "--prompts: '0' is not possible; a whole number from 1 to 1000"),
        (["--prompts", "many"], InputError, "a whole number from 1 to 1000"),
        (["--prompts", "1" * 5000], InputError, "a whole number from 1 to 1000"),  # more digits than Python reads
        (["--steps", "-1"], InputError, "--steps: '-1'"),
        (["--scheduler", "dppm-2m"], InputError, "scheduler: 'dppm-2m' is not possible; known: dpmpp-2m, .*ddim"),
        (["--scheduler", "lcm", "--steps", "51"], InputError, "--steps: '51' .*the scheduler lcm takes at most 50"),
        (["--guidance", "much"], InputError, "--guidance: 'much' .*a number from 0 to 100"),
        (["--guidance", "nan"], InputError, "a number from 0 to 100 is needed; 1 or less is no guidance"),
        (["--guidance", "-1"], InputError, "a number from 0 to 100"),
        (["--model", "emojy"], InputError, "known: emoji"),
        (["--model", "random:big"], InputError, "random weights of: .*tiny"),
        (["--model", "./nowhere"], ModelError, "no such file or folder"),
        (["--device", "tpu"], InputError, "allowed: cpu, cuda"),
        (["--device", "cpu", "--attention", "magic"], InputError, "known: auto, diffopt"),
        (["--device", "cpu", "--attention", "sdpa-cudnn"], BackendError, "needs a CUDA GPU"),
        (["--device", "cpu", "--output", "/dev/null/c.json"], RecordError, "can't be written"),
        (["--device", "cpu", "--output", "/"], RecordError, "/: can't be written: Is a directory"),
        (["--device", "cpu", "--output", "n" * 250], RecordError, "can't be written: File name too long"),
    ],
)
def test_bad_input_is_one_line_before_any_work(given, error, words, monkeypatch):
    monkeypatch.setattr(verify_module, "verify", None)
    with pytest.raises(error, match=words) as caught:
        _run(*given)
    assert "\n" not in str(caught.value)


def test_a_model_is_verified_at_its_own_size():
    case = verify_case("emoji", CPU, prompts=8)
    assert (case.width, case.height, case.steps, case.guidance) == (128, 128, 10, 3.0)
    assert verify_case("emoji", torch.device("cuda"), prompts=8).steps == 20
    assert verify_case("random:sd15", CPU, prompts=8).width == 512
    assert verify_case("random:sdxl", CPU, prompts=8, steps=3).width == 1024


def test_a_cache_that_cannot_be_written_is_a_note(monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / "file" / name)
    assert _run(*SMALL) == 0
    assert "verified.json can't be written" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000, '{"key": 3}', '{"key": {"verified": {}, "choices": {}}}'])
def test_a_damaged_memory_is_none(text):
    verified.verified_file().parent.mkdir(parents=True)
    verified.verified_file().write_text(text)
    assert verified.find_verified("key") is None


def test_the_newest_entries_are_kept():
    entry = verified.Entry(verified.Verified("id", "time", 0.5, 0.5, 1, 1, None, None, 0), {})
    for number in range(verified.KEPT + 2):
        verified.remember_verified(f"key {number}", entry)
    verified.remember_verified("key 2", entry)  # again: now the newest
    kept = json.loads(verified.verified_file().read_text())
    assert list(kept) == [*(f"key {number}" for number in range(3, verified.KEPT + 2)), "key 2"]
    assert verified.find_verified("key 5") == entry
    assert verified.find_verified("key 1") is None


@pytest.mark.parametrize(("first", "redrawn", "right"), [(1.0, 0, True), (1.2, 1, True), (1.3, 0, False)])
def test_an_error_just_beyond_its_limit_is_drawn_again(monkeypatch, first, redrawn, right):
    """As the kernels' own check does: the further draws must all be within."""
    rules = {rule.content: rule for rule in attention_rules("float16")}
    seeds = []

    def draw(shape, backend, device, content, seed):
        seeds.append(seed)
        limit = rules[content].limit.relative_l2
        error = limit * (first if seed == 0 and content == "normal" else 0.5 + seed / 10)
        return layer_check._Draw(rules[content], attention_errors(error), 0)

    monkeypatch.setattr(layer_check, "_draw", draw)
    shape = AttentionShape(2, 64, 77, 1, 40, "float16")
    found = layer_check._check(shape, Choice("sdpa", "a test"), 1, CPU)
    assert (found.redrawn, found.right) == (redrawn, right)
    assert len(seeds) == 2 + 4 * redrawn
    assert found.share == pytest.approx(0.9 if redrawn else first)  # the worst of the further draws
