"""The command line: every mistake is one line and exit code 2; pictures, info and reproduction from a picture."""

import json
import logging
import os
import re
import shutil
import signal
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tiny_model import VAE, one_thread, save_tiny_model  # noqa: F401

from diffopt.attention.backends import BACKENDS
from diffopt.cli import COMMANDS, main
from diffopt.commands.doctor import environment_notes
from diffopt.commands.generate import _stop_at_interrupt
from diffopt.commands.quiet import LIBRARIES
from diffopt.engine.png import read_png


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture
def run(capsys, monkeypatch):
    """Run a command in this process: exit code, stdout, stderr. What it sets for its own process is put back."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    levels = {name: logging.getLogger(name).level for name in LIBRARIES}

    def run_command(*arguments: str) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    with warnings.catch_warnings():
        yield run_command
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.enable_progress_bar()
    transformers.utils.logging.enable_progress_bar()


@pytest.fixture
def refusal(run):
    """Run a command that must be refused: its one line, without the newline."""

    def refused(*arguments: str) -> str:
        code, out, err = run(*arguments)
        assert (code, out) == (2, "")
        assert err.startswith("diffopt: ")
        assert err.count("\n") == 1
        assert err.endswith("\n")
        return err[:-1]

    return refused


# --- mistakes -------------------------------------------------------------------------------------------------------


def test_mistakes_in_the_words_of_a_command_are_one_line(refusal):
    assert all(name in refusal("paint") for name in COMMANDS)
    assert "COMMAND" in refusal()
    assert all(name in refusal("--", "generate") for name in COMMANDS)
    assert "--attention" in refusal("generate", "a cat", "--attentoin", "sdpa")
    assert "--seed" in refusal("generate", "a cat", "--seed")
    assert "PICTURE" in refusal("info")


@pytest.mark.parametrize("abbreviated", ["--atten", "--see"])
def test_options_are_not_abbreviated(refusal, abbreviated):
    assert "unrecognized" in refusal("generate", "a cat", abbreviated, "7")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model", "emojy"], "known: emoji, sd15"),
        (["--model", "./nowhere"], "no such file or folder"),
        (["--size", "100x128"], "width: 100 is not possible; a multiple of 8 is needed, such as 96"),
        (["--size", "100"], "such as 512x512"),
        (["--size", "512x512"], "at most 65536 pixels, such as 256x256"),
        (["--steps", "0"], "from 1 to 200"),
        (["--steps", "many"], "from 1 to 200"),
        (["-n", "65"], "count: '65'.*from 1 to 64"),
        (["--seed", "1.5"], "whole number from 0 to 4294967295"),
        (["--guidance", "nan"], "a number from 0 to 100"),
        (["--scheduler", "eular"], "known: euler"),
        (["--dtype", "int8"], "known: float16, bfloat16, float32"),
        (["--device", "gpu"], "allowed: cpu, cuda, cuda:N"),
        (["--attention", "flash"], "known: auto, diffopt, sdpa"),
        (["--output", "/proc/none"], "output: '/proc/none'.*a folder that can be written to is needed"),
        (["--config", "."], "it goes with a single .safetensors file"),
        (["--from", "nowhere.png"], "nowhere.png: can't be read: No such file"),
    ],
)
def test_bad_input_is_one_line_that_says_what_is_allowed(refusal, tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    assert re.search(words, refusal("generate", "a cat", "--device", "cpu", *options))


def test_a_prompt_is_needed(refusal):
    assert "prompt" in refusal("generate")


@pytest.mark.parametrize("name", [name for name in BACKENDS if name in ("sdpa-efficient", "sdpa-cudnn", "xformers")])
def test_a_backend_that_cannot_serve_gives_every_reason(refusal, tmp_path, name):
    line = refusal("generate", "a cat", "--device", "cpu", "--attention", name, "-o", tmp_path)
    assert f"{name} can't serve: " in line
    assert all(reason in line for reason in BACKENDS[name].device_reasons(torch.device("cpu")))
    assert "sdpa-math" in line  # what can


def test_a_gpu_that_is_not_here_is_one_line(refusal, tmp_path):
    line = refusal("generate", "a cat", "--device", "cuda:99", "-o", tmp_path)
    assert "device: 'cuda:99'" in line
    assert "usable CUDA GPUs here: " in line


def test_damaged_weights_are_one_line_and_write_nothing(refusal, model, tmp_path):
    folder = Path(shutil.copytree(model, tmp_path / "damaged"))
    (folder / VAE).write_bytes((folder / VAE).read_bytes()[:-10])
    assert "damaged or incomplete" in refusal("generate", "a cat", "--model", folder, "-o", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


# --- pictures -------------------------------------------------------------------------------------------------------


@pytest.fixture
def generate(run, model, tmp_path):
    """Make pictures with the tiny model; returns their paths as printed, and stderr."""

    def made(*options: str) -> tuple[list[Path], str]:
        code, out, err = run("generate", "--model", model, "--device", "cpu", "-o", tmp_path / "out", *options)
        assert code == 0, err
        lines = [re.fullmatch(r"(.*\.png)  \d+\.\d\d s  \d+\.\d\d it/s  seed (\d+)", line) for line in out.splitlines()]
        paths = [Path(line.group(1)) for line in lines if line]
        assert len(paths) == len(lines)
        assert [str(read_png(path)["seed"]) for path in paths] == [line.group(2) for line in lines if line]
        return paths, err

    return made


def test_pictures_are_listed_with_path_time_rate_and_seed(generate, tmp_path):
    paths, _ = generate("a cat", "--steps", "2", "--seed", "7", "-n", "2", "--negative", "blue", "--guidance", "2")
    assert [path.parent for path in paths] == [tmp_path / "out"] * 2
    first, second = (read_png(path) for path in paths)
    assert (first["seed"], second["seed"], first["steps"], first["guidance"]) == (7, 8, 2, 2.0)
    assert (first["prompt"], first["negative_prompt"], first["model"]) == ("a cat", "blue", "tiny")
    assert (first["width"], first["attention"]["requested"]) == (64, "auto")


def test_each_option_reaches_the_picture(generate):
    (path,), _ = generate(
        *("a cat", "--steps", "2", "--size", "72x64", "--scheduler", "euler", "--attention", "sdpa-math"),
        *("--dtype", "bfloat16"),
    )
    metadata = read_png(path)
    assert (metadata["width"], metadata["height"], metadata["scheduler"]) == (72, 64, "euler")
    assert metadata["attention"] == {"requested": "sdpa-math", "ran": {"sdpa-math": 14}, "kept": 0}
    assert metadata["dtype"] == "bfloat16"


def test_one_of_several_pictures_alone_is_the_same_file(generate):
    (_, _, third), _ = generate("a cat", "--steps", "2", "--seed", "7", "-n", "3")
    (alone,), _ = generate("a cat", "--steps", "2", "--seed", "9")
    assert alone.read_bytes() == third.read_bytes()


def test_from_a_picture_comes_the_same_file(generate):
    options = ("--steps", "3", "--size", "64x72", "--scheduler", "euler-a", "--negative", "blue", "--guidance", "2.5")
    (path,), _ = generate("a cat", *options, "--attention", "sdpa-math")
    (again,), err = generate("--from", path)
    assert again != path
    assert again.read_bytes() == path.read_bytes()
    assert "note" not in err


def test_options_beside_from_override_what_the_picture_says(generate):
    (path,), _ = generate("a cat", "--steps", "3", "--seed", "7", "--scheduler", "euler")
    (other,), _ = generate("a dog", "--from", path, "--seed", "8", "--steps", "2")
    before, after = read_png(path), read_png(other)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"prompt", "seed", "steps"}


def test_from_a_picture_of_other_weights_or_versions_says_so(generate, monkeypatch, run, model, tmp_path):
    (path,), _ = generate("a cat", "--steps", "2")
    folder = Path(shutil.copytree(model, tmp_path / "other"))
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / VAE)
    weights["decoder.conv_out.bias"] += 1
    save_file(weights, folder / VAE, metadata={"format": "pt"})
    monkeypatch.setattr("diffopt.engine.worker.versions", lambda: {"diffopt": "9", "torch": "9"})
    code, _, err = run("generate", "--model", folder, "--from", path, "-o", tmp_path / "out")
    assert code == 0
    (note,) = [line for line in err.split("\n") if "note" in line]
    assert "the model's weights are others" in note
    assert "torch" in note
    assert str(path) in note


def test_from_a_picture_of_a_local_model_asks_for_the_model(generate, refusal):
    (path,), _ = generate("a cat", "--steps", "1")
    assert "model: 'tiny'" in refusal("generate", "--from", path)
    assert "--model" in refusal("generate", "--from", path)


def test_from_a_picture_with_an_unknown_dtype_is_one_line(generate, refusal, model, tmp_path):
    (path,), _ = generate("a cat", "--steps", "1")
    info = PngInfo()
    info.add_itxt("diffopt", json.dumps(read_png(path) | {"dtype": "float12"}))
    Image.new("RGB", (8, 8)).save(tmp_path / "other.png", pnginfo=info)
    line = refusal("generate", "--from", tmp_path / "other.png", "--model", model, "-o", tmp_path / "out")
    assert "dtype: 'float12' is not possible; the picture says so; give another with --dtype: float16" in line


def test_a_prompt_that_is_too_long_is_noted(generate):
    _, err = generate("apple " * 100, "--steps", "1")
    assert "diffopt: note: prompt: the model reads 77 tokens" in err


# --- info, doctor, help ---------------------------------------------------------------------------------------------


def test_info_prints_what_a_picture_holds(run, generate):
    (path,), _ = generate("a cat", "--steps", "2", "--seed", "7")
    code, out, err = run("info", path)
    assert (code, err) == (0, "")
    for words in (
        "a cat",
        "seed             7",
        "tiny (",
        "64x64",
        "sdpa in 14 layers",
        "float32",
        "bit for bit stock's",
    ):
        assert words in out
    code, out, _ = run("info", path, "--json")
    assert json.loads(out) == read_png(path)


def test_info_of_several_pictures_names_each(run, generate):
    paths, _ = generate("a cat", "--steps", "2", "--seed", "7", "-n", "2")
    code, out, _ = run("info", *paths)
    assert code == 0
    first, second = out.split("\n\n")
    assert first.startswith(f"{paths[0]}\nprompt ")
    assert "seed             8" in second
    code, out, _ = run("info", *paths, "--json")
    assert json.loads(out) == [read_png(path) for path in paths]


def test_one_file_that_is_none_and_nothing_is_printed(refusal, generate, tmp_path):
    (path,), _ = generate("a cat", "--steps", "2")
    (tmp_path / "x.png").write_text("no picture")
    assert "not a PNG file" in refusal("info", path, tmp_path / "x.png")


def test_info_refuses_other_files(refusal, tmp_path):
    (tmp_path / "x.png").write_text("no picture")
    assert "not a PNG file" in refusal("info", tmp_path / "x.png")


def test_doctor_lists_machine_versions_models_and_backends(run):
    code, out, err = run("doctor", "--device", "cpu")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    for name in BACKENDS:
        (_,) = [line for line in lines if line.split()[:1] == [name] and ("works" in line or "no:" in line)]
    assert any(line.split()[:2] == ["sdpa", "works"] for line in lines)
    assert any(line.split()[:2] == ["sdpa-cudnn", "no:"] and "CUDA" in line for line in lines)
    for words in ("torch", "diffusers", "emoji", "ready", "DIFFUSERS_ATTN_BACKEND"):
        assert words in out


def test_doctor_finds_a_broken_bundled_model(run, monkeypatch, model):
    monkeypatch.setattr("diffopt.models.digest.weight_files", lambda folder: [Path(model) / "model_index.json"])
    code, out, _ = run("doctor", "--device", "cpu")
    assert code == 1
    assert "BROKEN" in out


def test_doctor_says_what_environment_variables_do():
    notes = dict(environment_notes({"DIFFUSERS_ATTN_BACKEND": "flash", "HF_HUB_OFFLINE": "1"}))
    assert "no effect" in notes["DIFFUSERS_ATTN_BACKEND"]
    assert "'flash'" in notes["DIFFUSERS_ATTN_BACKEND"]
    assert "HF_HUB_OFFLINE" in notes["model hub"]
    notes = dict(environment_notes({"HF_HUB_OFFLINE": "0"}))
    assert "not set" in notes["DIFFUSERS_ATTN_BACKEND"]
    assert "offline" not in notes["model hub"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(run, capsys, command):
    with pytest.raises(SystemExit) as left:
        run(command, "--help")
    assert left.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: diffopt {command}")


# --- interrupts -----------------------------------------------------------------------------------------------------


def test_the_first_interrupt_asks_to_stop_and_the_second_stops():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), _stop_at_interrupt() as stop:
        assert not stop.is_set()
        signal.raise_signal(signal.SIGINT)
        assert stop.is_set()
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the second interrupt did nothing")
    assert signal.getsignal(signal.SIGINT) is before


def test_an_interrupt_anywhere_else_is_exit_code_130(run, monkeypatch):
    def interrupted(_arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("diffopt.engine.png.read_metadata", interrupted)
    assert run("info", "x.png") == (130, "", "diffopt: interrupted\n")
