"""PNG files: what they carry, that it is read back, and that no half-written or overwritten file can happen."""

import dataclasses
import json
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import platformdirs
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from diffopt.attention.verified import Entry, Verified, find_verified, remember_verified, verified_key
from diffopt.engine.certificate import picture_certificate, plan_digest, stock_certificate
from diffopt.engine.metadata import SCHEMA, MetadataError, PictureCertificate
from diffopt.engine.png import BLOCK, check_folder, png_bytes, read_metadata, read_png, write_png
from diffopt.engine.worker import GeneratedPicture
from diffopt.errors import DiffoptError, InputError

METADATA = {
    "schema": SCHEMA,
    "prompt": "a red apple, noto style",
    "negative_prompt": "",
    "seed": 7,
    "steps": 20,
    "guidance": 3.0,
    "scheduler": None,
    "scheduler_class": "DPMSolverMultistepScheduler",
    "width": 16,
    "height": 8,
    "model": "emoji",
    "model_hash": "0123456789abcdef" * 4,
    "dtype": "float32",
    "device": {"kind": "cpu", "name": "x86_64", "threads": 2},
    "attention": {"requested": "auto", "ran": {"sdpa": 20}, "kept": 0},
    "versions": {"diffopt": "0.1.0", "torch": "2.13.0", "triton": None},
    "certificate": {
        "state": "bitwise stock",
        "plan": "0123456789abcdef",
        "verified": None,
        "unchecked": 0,
        "command": None,
    },
}


def picture(**metadata) -> GeneratedPicture:
    noise = np.random.default_rng(0).integers(0, 256, (8, 16, 3), dtype=np.uint8)
    metadata = METADATA | metadata
    return GeneratedPicture(Image.fromarray(noise), metadata["seed"], 1.0, 20.0, metadata)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*"))


def test_what_was_written_is_read_back(tmp_path):
    made = picture()
    path = write_png(made, tmp_path)
    assert path.name == "00001-7-a-red-apple-noto-style.png"
    assert read_png(path) == METADATA
    assert np.array_equal(np.asarray(Image.open(path)), np.asarray(made.image))


def test_parameters_are_in_the_form_that_image_tools_read(tmp_path):
    with Image.open(write_png(picture(), tmp_path)) as image:
        assert image.text["parameters"] == (
            "a red apple, noto style\n"
            "Steps: 20, Sampler: DPM++ 2M, CFG scale: 3, Seed: 7, Size: 16x8, Model hash: 0123456789, Model: emoji, "
            "Version: diffopt 0.1.0"
        )


def test_parameters_with_a_negative_prompt_and_awkward_names(tmp_path):
    made = picture(negative_prompt="blue", scheduler="euler-a", model="a, b: c", scheduler_class="Whatever")
    with Image.open(write_png(made, tmp_path)) as image:
        lines = image.text["parameters"].splitlines()
    assert lines[1] == "Negative prompt: blue"
    assert "Sampler: Euler a, " in lines[2]
    assert 'Model: "a, b: c", ' in lines[2]


@pytest.mark.parametrize(
    "prompt", ["ein Äpfel", "苹果 🍎", "two\nlines\twith\u2028breaks", "", "../../etc/passwd", "x" * 5000]
)
def test_any_prompt_survives_and_makes_a_safe_name(tmp_path, prompt):
    folder = tmp_path / "out"
    path = write_png(picture(prompt=prompt), folder)
    assert path.parent == folder
    assert path.name.isascii()
    assert len(path.name) < 80
    assert read_png(path)["prompt"] == prompt


def test_the_same_picture_is_the_same_file(tmp_path):
    assert png_bytes(picture()) == png_bytes(picture())


def test_names_count_up_and_nothing_is_overwritten(tmp_path):
    first = write_png(picture(), tmp_path)
    (tmp_path / "00041-notes.txt").write_text("keep")
    second = write_png(picture(), tmp_path)
    assert (first.name[:5], second.name[:5]) == ("00001", "00042")
    assert files(tmp_path) == sorted([first.name, "00041-notes.txt", second.name])


def test_writers_at_the_same_time_do_not_collide(tmp_path):
    paths: list[Path] = []

    def work() -> None:
        for _ in range(10):
            paths.append(write_png(picture(), tmp_path))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(paths)) == 40 == len(files(tmp_path))


def test_without_hard_links_nothing_is_overwritten_either(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(os, "listdir", lambda folder: [])  # another process has just written the same number
    first, second = write_png(picture(), tmp_path), write_png(picture(), tmp_path)
    assert first != second
    assert files(tmp_path) == sorted([first.name, second.name])
    assert read_png(first) == read_png(second) == METADATA


def test_the_file_has_the_usual_permissions(tmp_path):
    expected = tmp_path / "ordinary"
    expected.touch()
    assert write_png(picture(), tmp_path).stat().st_mode == expected.stat().st_mode


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    """A real limit on file size: the kernel refuses to write past it, as a full disk would."""
    script = """
        import resource, sys
        sys.path.insert(0, sys.argv[1])
        from test_png import picture, write_png, DiffoptError
        write_png(picture(), sys.argv[2])
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
        try:
            write_png(picture(seed=8), sys.argv[2])
        except DiffoptError as error:
            print(error)
    """
    arguments = [sys.executable, "-c", textwrap.dedent(script), str(Path(__file__).parent), str(tmp_path)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == f"output {tmp_path}: the disk is full; seed 8 was not written\n"
    assert files(tmp_path) == ["00001-7-a-red-apple-noto-style.png"]


def test_an_interrupt_while_writing_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(_descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_png(picture(), tmp_path)
    assert files(tmp_path) == []


def test_the_data_is_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    order = []
    fsync, link = os.fsync, os.link
    monkeypatch.setattr(os, "fsync", lambda descriptor: (order.append("fsync"), fsync(descriptor)))
    monkeypatch.setattr(os, "link", lambda source, target: (order.append("link"), link(source, target)))
    write_png(picture(), tmp_path)
    assert order == ["fsync", "link"]


# --- folders --------------------------------------------------------------------------------------------------------


def test_a_folder_is_made_and_left_clean(tmp_path):
    assert check_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert files(tmp_path / "a" / "b") == []


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"output: .*a folder that can be written to is needed"):
        check_folder(tmp_path / "file")
    with pytest.raises(InputError, match="Not a directory"):
        check_folder(tmp_path / "file" / "below")
    with pytest.raises(InputError, match="a folder that can be written to"):
        check_folder("/proc/diffopt")


def test_a_folder_that_vanished_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DiffoptError, match=r"output .*can't be written"):
        write_png(picture(), tmp_path / "file")


# --- files that were not made by diffopt ----------------------------------------------------------------------------


def saved_with(path: Path, **texts: str) -> Path:
    info = PngInfo()
    for keyword, text in texts.items():
        info.add_itxt(keyword, text)
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(MetadataError) as caught:
        read_png(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_pictures_without_a_block_are_refused(tmp_path):
    assert "without diffopt's block" in refusal(saved_with(tmp_path / "a.png", parameters="a cat"))
    Image.new("RGB", (8, 8)).save(tmp_path / "b.jpg")
    assert "a JPEG file" in refusal(tmp_path / "b.jpg")
    (tmp_path / "c.png").write_text("no picture")
    assert "not a PNG file" in refusal(tmp_path / "c.png")
    assert "No such file" in refusal(tmp_path / "d.png")
    assert "can't be read" in refusal(tmp_path)


@pytest.mark.parametrize("cut", [40, 200, -60])
def test_a_damaged_picture_is_refused(tmp_path, cut):
    path = write_png(picture(), tmp_path)
    path.write_bytes(path.read_bytes()[:cut])
    refusal(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema": SCHEMA + 1}, f"schema {SCHEMA + 1}"),
        ({"surprise": 1}, "unknown key 'surprise'"),
        ({"seed": "7"}, "seed"),
        ({"device": {"kind": "cpu"}}, "key 'name' is missing"),
        ({"versions": {"torch": 2}}, "versions.torch"),
        ({"prompt": None}, "prompt"),
    ],
)
def test_a_block_that_is_not_understood_is_refused(tmp_path, change, words):
    assert words in refusal(saved_with(tmp_path / "a.png", **{BLOCK: json.dumps(METADATA | change)}))


def test_a_block_that_lacks_a_field_is_refused(tmp_path):
    without = {name: value for name, value in METADATA.items() if name != "seed"}
    assert "'seed' is missing" in refusal(saved_with(tmp_path / "a.png", **{BLOCK: json.dumps(without)}))
    assert "not JSON" in refusal(saved_with(tmp_path / "b.png", **{BLOCK: "{"}))
    assert "nested too deeply" in refusal(saved_with(tmp_path / "d.png", **{BLOCK: "[" * 100_000}))
    assert "schema None" in refusal(saved_with(tmp_path / "c.png", **{BLOCK: "[]"}))


# --- the certificate ------------------------------------------------------------------------------------------------

CPU, GPU = torch.device("cpu"), torch.device("cuda")
RAN = {("down.attn1", "2×64×64 2h d40 float16", "diffopt"), ("down.attn2", "2×64×77 2h d40 float16", "sdpa")}
CHOICES = {shape: backend for _, shape, backend in RAN}
VERIFIED = Verified("0123456789abcdef", "2026-11-23T10:20:30+00:00", 0.49, 0.6, 8, 5, 61.2, 0.9991, 3)


def certificate(ran=RAN, device=GPU, **changes):
    arguments = {"model": "emoji", "model_hash": "abc", "dtype": "float16", "attention": "auto", **changes}
    return picture_certificate(ran, device, **arguments)


@pytest.fixture
def memory(tmp_path, monkeypatch):
    """A cache folder of its own, and a machine without a GPU that keys can be made for."""
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / name)
    monkeypatch.setattr("diffopt.attention.machine.device_name", lambda device: f"NVIDIA Test {device.type}")


def key(**changes):
    return verified_key(GPU, **{"model_hash": "abc", "dtype": "float16", "attention": "auto", **changes})


def test_on_a_cpu_stocks_own_calls_are_bitwise_and_need_no_memory(monkeypatch):
    monkeypatch.setattr("diffopt.engine.certificate.find_verified", None)
    stock_calls = {("a", "shape", "sdpa")}
    found = certificate(stock_calls, CPU)
    assert (found.state, found.verified, found.command) == ("bitwise stock", None, None)
    assert str(found).startswith("bit for bit stock's")
    assert stock_certificate().state == "stock"


@pytest.mark.usefixtures("memory")
def test_what_was_not_verified_names_the_command():
    assert str(certificate()) == "not verified here: diffopt verify --model emoji"
    other = certificate({("a", "s", "sdpa-math")}, CPU, attention="sdpa-math", model="my model")
    assert other.command == "diffopt verify --model 'my model' --attention sdpa-math"


@pytest.mark.usefixtures("memory")
def test_a_verified_picture_holds_the_numbers():
    remember_verified(key(), Entry(VERIFIED, CHOICES))
    found = certificate()
    assert (found.state, found.verified, found.unchecked) == ("verified", VERIFIED, 0)
    words = str(found)
    for part in ("2026-11-23 10:20 UTC", "0.49", "0.60", "of 8 pictures 5 bit", "61.2 dB", "0.9991", "3 of 255"):
        assert part in words, part
    wider = certificate(RAN | {("x", "2×4096×4096 2h d40 float16", "diffopt")})
    assert wider.unchecked == 1
    assert "1 of this picture's layer shapes not checked" in str(wider)
    assert certificate({("down.attn1", "2×64×64 2h d40 float16", "sdpa")}).unchecked == 1  # another backend ran


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize("other", [{"model_hash": "x"}, {"dtype": "bfloat16"}, {"attention": "diffopt"}])
def test_a_check_of_something_else_does_not_count(other):
    remember_verified(key(**other), Entry(VERIFIED, CHOICES))
    assert certificate().state == "not verified here"
    remember_verified(key(**other), None)
    assert find_verified(key(**other)) is None


@pytest.mark.usefixtures("memory")
def test_other_code_is_not_verified(monkeypatch):
    remember_verified(key(), Entry(VERIFIED, CHOICES))
    assert certificate().state == "verified"
    monkeypatch.setattr("diffopt.measure.environment.source_hash", lambda: "0" * 64)
    assert certificate().state == "not verified here"


def test_the_plan_digest_is_of_what_ran_whatever_the_order():
    assert plan_digest(sorted(RAN)) == plan_digest(sorted(RAN, reverse=True))
    assert plan_digest(RAN) != plan_digest(set(list(RAN)[:1]))


def test_a_verified_certificate_survives_in_the_file(tmp_path):
    block = dataclasses.asdict(PictureCertificate("verified", "0" * 16, VERIFIED, 2))
    assert read_png(write_png(picture(certificate=block), tmp_path))["certificate"] == block


def test_pictures_of_schema_1_are_read(tmp_path):
    old = {name: value for name, value in METADATA.items() if name != "certificate"} | {"schema": 1}
    found = read_png(saved_with(tmp_path / "a.png", **{BLOCK: json.dumps(old)}))
    assert found == {**old, "certificate": None}
    assert read_metadata(tmp_path / "a.png").certificate is None
