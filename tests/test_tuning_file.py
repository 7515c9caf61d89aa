"""The file `diffopt tune` writes: continued, refused, started over; never half written."""

import dataclasses
import tomllib

import pytest
from tuned_tables import GPU, KEY, header, row, write_table

from diffopt import whole_file
from diffopt.attention.tuning_file import TuningFile, TuningFileError
from diffopt.gpus import read_gpu
from diffopt.measure.ceilings import Ceilings
from diffopt_kernels.launch import LaunchKey

OTHER = LaunchKey(2, 1024, 1024, 8, 80)
BY_HAND = """# The abacus. Beads are wood.
name = "NVIDIA Abacus"
checked = [{ triton = "3.6.0", kernels = "0123456789abcdef" }]

[peaks]
fp16_tflops = 1.0
fp32_tflops = 0.5
source = "a schoolbook"
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "gpus" / "abacus.toml"


def open_file(path, *, again=False, **changes):
    return TuningFile.open(path, GPU, header(**changes), again=again)


def test_rows_are_read_back_as_they_were_kept(path):
    rows = [row(diffopt=98.14, sdpa_flash=278.0), row(OTHER, sdpa=3.0, dtype="bfloat16")]
    file = open_file(path)
    file.measured(Ceilings(712.5, 4.125))
    for shape in rows:
        file.keep(shape)
    gpu = read_gpu(path)
    assert gpu.name == GPU
    assert gpu.attention == file.table
    assert [dataclasses.replace(shape, date=None) for shape in gpu.attention.shapes] == rows
    assert [shape.date for shape in gpu.attention.shapes][-1] == gpu.attention.date


def test_rows_without_a_date_keep_the_tables_when_it_is_continued(path):
    write_table(path, row(diffopt=98.14))
    file = open_file(path)
    file.keep(row(OTHER, sdpa=3.0))
    table = read_gpu(path).attention
    assert table is not None
    assert [shape.date for shape in table.shapes] == [header().date, table.date]
    assert table.date > header().date


def test_a_row_is_a_few_lines_a_person_can_read(path):
    open_file(path).keep(row(diffopt=98.14, sdpa_flash=278.0))
    assert "microseconds = {diffopt = 98.14, sdpa-flash = 278.0}\n" in path.read_text()
    assert max(map(len, path.read_text().splitlines())) <= 140


def test_what_a_person_wrote_stays(path):
    path.parent.mkdir()
    path.write_text(BY_HAND)
    file = open_file(path)
    file.keep(row(diffopt=98.0))
    file.keep(row(diffopt=97.0))
    text = path.read_text()
    assert text.startswith(BY_HAND)
    assert text.count("[attention]") == 1
    assert [shape.microseconds for shape in read_gpu(path).attention.shapes] == [{"diffopt": 97.0}]


def test_a_second_run_continues(path):
    open_file(path).keep(row(diffopt=98.0))
    file = open_file(path)
    assert file.has(KEY, "float16")
    assert not file.has(KEY, "bfloat16")
    assert not file.has(OTHER, "float16")
    file.keep(row(OTHER, diffopt=20.0))
    assert [shape.key for shape in read_gpu(path).attention.shapes] == [KEY, OTHER]


@pytest.mark.parametrize("again", [False, True])
def test_what_is_no_file_is_refused_and_stays(tmp_path, again):
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(TuningFileError, match=r"is a folder or device; choose a file with --output"):
        open_file(tmp_path / "folder.toml", again=again)
    assert (tmp_path / "folder.toml").is_dir()


def test_rows_of_another_triton_are_not_this_ones_and_stay(path):
    foreign = dataclasses.replace(row(diffopt=90.0), triton="9.9")
    open_file(path).keep(foreign)
    file = open_file(path, again=True)
    assert not file.has(KEY, "float16")
    for microseconds in (98.0, 97.0):
        file.keep(row(diffopt=microseconds))
    assert file.has(KEY, "float16")
    table = read_gpu(path).attention
    assert [(shape.triton, shape.microseconds) for shape in table.shapes] == [
        ("9.9", {"diffopt": 90.0}),
        (None, {"diffopt": 97.0}),
    ]
    assert table.tritons == (header().triton, "9.9")


@pytest.mark.parametrize("version", ["torch", "triton", "cudnn", "driver", "kernels"])
def test_other_versions_are_refused_unless_again(path, version):
    open_file(path).keep(row(diffopt=98.0))
    before = path.read_bytes()
    with pytest.raises(
        TuningFileError, match=rf"was tuned with {version} .*, here it is {version} 1.0; --again"
    ) as caught:
        open_file(path, **{version: "1.0"})
    assert "\n" not in str(caught.value)
    file = open_file(path, again=True, **{version: "1.0"})
    assert path.read_bytes() == before  # until there is something better
    assert not file.has(KEY, "float16")
    file.keep(row(OTHER, diffopt=20.0))
    assert [shape.key for shape in read_gpu(path).attention.shapes] == [OTHER]


def test_again_keeps_the_shapes_it_does_not_touch(path):
    open_file(path).keep(row(diffopt=98.0))
    file = open_file(path, again=True)
    file.keep(row(OTHER, diffopt=20.0))
    assert [shape.key for shape in read_gpu(path).attention.shapes] == [KEY, OTHER]


@pytest.mark.parametrize("again", [False, True])
def test_rows_whose_launch_nobody_has_are_dropped_and_said(path, again):
    good, bad = row(diffopt=98.0), row(OTHER, case="a bad shape", diffopt=20.0)
    bad = dataclasses.replace(bad, launch=dataclasses.replace(bad.launch, block_m=7))
    write_table(path, good, bad, row(OTHER, dtype="bfloat16", sdpa=3.0))
    before = path.read_bytes()
    file = open_file(path, again=again)
    assert file.dropped == (f"a bad shape: launch {bad.launch.label!r} is none that these kernels have",)
    assert file.has(KEY, "float16")
    assert file.has(OTHER, "bfloat16")
    assert not file.has(OTHER, "float16")
    assert path.read_bytes() == before
    file.write()
    assert read_gpu(path).attention == file.table
    assert open_file(path).dropped == ()


def test_a_table_of_which_nothing_is_left_can_be_written(path):
    bad = row(diffopt=98.0)
    write_table(path, dataclasses.replace(bad, launch=dataclasses.replace(bad.launch, block_m=7)))
    open_file(path).write()
    assert read_gpu(path).attention.shapes == ()


def test_another_gpus_file_is_never_touched(path):
    write_table(path, row(diffopt=98.0), gpu="NVIDIA T1000")
    before = path.read_bytes()
    for again in (False, True):
        with pytest.raises(TuningFileError, match="is about NVIDIA T1000, this is NVIDIA Abacus"):
            open_file(path, again=again)
    assert path.read_bytes() == before


@pytest.mark.parametrize("text", ["[attention", "surprise = 1\n", "\xff"])
def test_a_file_that_cannot_be_read_is_refused_or_moved_aside(path, text):
    path.parent.mkdir()
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(TuningFileError, match=r"--again moves .* aside"):
        open_file(path)
    assert path.read_bytes() == text.encode("latin-1")
    open_file(path, again=True).keep(row(diffopt=98.0))
    assert path.with_name("abacus.toml.old").read_bytes() == text.encode("latin-1")
    assert read_gpu(path).attention.shapes


def test_a_write_that_fails_leaves_the_former_file(path, monkeypatch):
    file = open_file(path)
    file.keep(row(diffopt=98.0))
    before = path.read_bytes()

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(whole_file.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        file.keep(row(OTHER, diffopt=20.0))
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_place_that_cannot_be_written_is_found_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TuningFileError, match="can't be written"):
        open_file(tmp_path / "file" / "abacus.toml").check_writable()
    open_file(tmp_path / "new" / "abacus.toml").check_writable()
    assert list((tmp_path / "new").iterdir()) == []


def test_every_field_of_a_launch_survives(path):
    shape = row(diffopt=98.0)
    launch = dataclasses.replace(shape.launch, float32=True, turns="softmax", programs=2, query_tiles=3, tail=1)
    open_file(path).keep(dataclasses.replace(shape, launch=launch, dtype="float32"))
    assert read_gpu(path).attention.shapes[0].launch == launch
    written = tomllib.loads(path.read_text())["attention"]["shapes"][0]["launch"]
    assert set(written) == {field.name for field in dataclasses.fields(launch)}
