"""What is tuned for a GPU: which files count, which are refused, what they say of a shape."""

import dataclasses

import pytest
from tuned_tables import GPU, KEY, header, launch_for, row, write_table

from diffopt import config
from diffopt.attention import tuning as module
from diffopt.attention.backends import BACKENDS
from diffopt.attention.tuning import launches_to_try, tuning, user_file
from diffopt.commands import doctor
from diffopt.gpus import read_gpu
from diffopt_kernels import launch as kernel_launches
from diffopt_kernels.launch import LaunchKey


@pytest.fixture(autouse=True)
def folders(monkeypatch, tmp_path):
    """Empty folders for shipped files and for the user's; nothing remembered before or after."""
    (tmp_path / "configs" / "gpus").mkdir(parents=True)
    monkeypatch.setattr(config, "config_folder", lambda: tmp_path / "configs")
    monkeypatch.setattr("diffopt.gpus.config_folder", lambda: tmp_path / "configs")
    monkeypatch.setattr(module, "config_folder", lambda: tmp_path / "configs")
    monkeypatch.setattr(module.platformdirs, "user_cache_path", lambda name: tmp_path / "cache")
    tuning.cache_clear()
    yield tmp_path
    tuning.cache_clear()


@pytest.fixture
def shipped(folders):
    return folders / "configs" / "gpus" / "abacus.toml"


def test_a_gpu_without_a_table_is_not_tuned():
    found = tuning(GPU)
    assert (found.rows, found.launches, found.refused) == ({}, {}, ())
    assert "diffopt tune" in found.words


def test_a_shipped_table_is_used_and_named(shipped):
    write_table(shipped, row(diffopt=98.14, sdpa_flash=278, sdpa_cudnn=151.6, case="sd15 self"))
    found = tuning(GPU)
    assert found.launches == {KEY: launch_for()}
    assert found.words == "1 shape from configs/gpus/abacus.toml, 2026-11-23"
    evidence = found.rows[KEY, "float16"].evidence
    assert evidence == "diffopt 98.1 µs, sdpa-cudnn 151.6, sdpa-flash 278.0 (configs/gpus/abacus.toml, 2026-11-23)"
    assert tuning("NVIDIA T1000").rows == {}


@pytest.mark.parametrize(("date", "microseconds"), [("2026-11-24", 90), ("2026-11-22", 100)])
def test_of_two_files_the_newer_row_counts_and_the_rest_is_merged(shipped, date, microseconds):
    other = LaunchKey(2, 1024, 1024, 8, 80)
    write_table(shipped, row(diffopt=100), row(other, diffopt=20))
    write_table(user_file(GPU), row(diffopt=90), date=f"{date}T10:00:00+00:00")
    found = tuning(GPU)
    assert found.rows[KEY, "float16"].shape.microseconds == {"diffopt": microseconds}
    assert found.rows[other, "float16"].shape.microseconds == {"diffopt": 20}


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda text: text[: len(text) // 2], "not valid TOML"),
        (lambda text: text.replace("commit =", "comit ="), "unknown key 'comit'"),
        (lambda text: text.replace("dtype =", "dtyp ="), "unknown key 'dtyp'"),
        (lambda text: text.replace('"float16"', '"float8"'), "'float8'; allowed: float16, bfloat16, float32"),
        (lambda text: text.replace("diffopt = 98.0", "diffopt = -1.0"), "diffopt takes -1.0 µs"),
        (lambda text: text.replace("diffopt = 98.0", "diffopt = nan"), "diffopt takes nan µs"),
        (lambda text: text.replace("diffopt = 98.0, ", ""), "belong together"),
        (lambda text: text.replace("batch = 2", "batch = 0"), "a size is 0"),
        (lambda text: text.replace("num_warps = 4", "num_warps = 3"), "is none that these kernels have"),
        (lambda text: text.replace("head_dim = 40\n", "head_dim = 64\n"), "is for another head dim"),
        (lambda text: text.replace('kernel = "', 'kernel = "sorcery-'), "kernel: 'sorcery-"),
        (lambda text: text.replace(f'triton = "{header().triton}"', 'triton = "1.0"'), "tuned with Triton 1.0, here"),
        (lambda text: text.replace(header().kernels, "0" * 16), "tuned for other kernels (0000"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_in_one_line_and_left_alone(monkeypatch, damage, words):
    warned = []  # not by caplog: libraries that other tests load switch loggers off
    monkeypatch.setattr(module.logger, "warning", lambda text, *values: warned.append(text % values))
    path = write_table(user_file(GPU), row(diffopt=98.0, sdpa=278.0))
    path.write_text(damage(path.read_text()))
    before = path.read_bytes()
    found = tuning(GPU)
    assert (found.rows, found.launches) == ({}, {})
    (line,) = found.refused
    assert words in line
    assert path.name in line
    assert line.endswith("run: diffopt tune --again")
    assert "\n" not in line
    assert warned == [f"tuned launches: {line}"]
    assert line in found.words
    assert path.read_bytes() == before


def test_a_table_of_another_gpu_is_refused_with_the_way_out():
    path = write_table(user_file(GPU), row(diffopt=98.0), gpu="NVIDIA T1000")
    (line,) = tuning(GPU).refused
    assert line.endswith("it is for NVIDIA T1000, this is NVIDIA Abacus; move it away, then run: diffopt tune")
    assert read_gpu(path).name == "NVIDIA T1000"


def test_a_damaged_file_does_not_hide_the_other(shipped):
    write_table(shipped, row(diffopt=100))
    path = write_table(user_file(GPU), row(diffopt=90), date="2026-11-24")
    path.write_text("[attention")
    assert tuning(GPU).rows[KEY, "float16"].shape.microseconds == {"diffopt": 100}


def test_a_damaged_shipped_file_of_another_gpu_is_no_concern_of_this_one(shipped):
    (shipped.parent / "another.toml").write_text("name = ")
    write_table(shipped, row(diffopt=100))
    assert tuning(GPU).launches


def test_a_shipped_table_for_another_triton_is_refused_with_the_way_out(shipped):
    write_table(shipped, row(diffopt=100), triton="1.0")
    found = tuning(GPU)
    assert not found.launches
    (line,) = found.refused
    assert line.endswith(f"tuned with Triton 1.0, here it is {header().triton}; run: diffopt tune")


def test_a_row_serves_the_triton_it_names_and_else_the_tables(shipped):
    """What was measured with another Triton says nothing, not even of shapes where nothing else does."""
    other, here = LaunchKey(2, 1024, 1024, 8, 80), header().triton
    again = dataclasses.replace(row(diffopt=90, sdpa=80), launch=launch_for(index=4), triton="2.0")
    write_table(shipped, row(diffopt=100), again, row(other, diffopt=20), triton="1.0")
    (line,) = tuning(GPU).refused
    assert line.endswith(f"tuned with Triton 1.0 and 2.0, here it is {here}; run: diffopt tune")
    tuning.cache_clear()
    shipped.write_text(shipped.read_text().replace('triton = "2.0"', f'triton = "{here}"'))
    found = tuning(GPU)
    assert {key: row.shape.microseconds for key, row in found.rows.items()} == {(KEY, "float16"): again.microseconds}
    assert found.launches == {KEY: launch_for(index=4)}
    assert (found.words, found.refused) == ("1 shape from configs/gpus/abacus.toml, 2026-11-23", ())


def test_a_row_has_the_date_it_was_measured_at_and_the_file_that_of_its_last_one(shipped):
    """A table is tuned in several goes; rows of another Triton, which are not in use, make it no younger."""
    dates = {"first": None, "last": "2026-11-25", "second": "2026-11-24", "other": "2026-11-30"}
    rows = [row(LaunchKey(2, 512, 512, heads, 40), case=case, sdpa=1) for heads, case in enumerate(dates, 1)]
    rows[-1] = dataclasses.replace(rows[-1], triton="1.0")
    text = write_table(shipped, *rows).read_text()
    for case, date in dates.items():
        text = text.replace(f'case = "{case}"\n', f'case = "{case}"\n' + (f'date = "{date}"\n' if date else ""))
    shipped.write_text(text)
    found = tuning(GPU)
    evidence = {row.shape.case: row.evidence.rpartition(", ")[2] for row in found.rows.values()}
    assert evidence == {"first": "2026-11-23)", "last": "2026-11-25)", "second": "2026-11-24)"}
    assert found.words == "3 shapes from configs/gpus/abacus.toml, 2026-11-25"


class TestTablesOfOtherGpus:
    """A GPU for which no table fits takes the one of another GPU with its compute capability."""

    HINT = "what was measured on another GPU may not be the fastest here (run: diffopt tune)"

    @pytest.fixture
    def kin(self, folders):
        """Writes the file of another GPU of capability 1.0."""

        def write(name: str, *rows, capability="1.0", **changes):
            path = write_table(folders / "configs" / "gpus" / f"{name}.toml", *rows, gpu=f"NVIDIA {name}", **changes)
            path.write_text(f'compute_capability = "{capability}"\n{path.read_text()}')
            return path

        return write

    def test_it_serves_with_its_launches_and_ranking_and_says_so(self, kin):
        kin("Slate", row(diffopt=98.14, sdpa_cudnn=151.6))
        found = tuning(GPU, "1.0")
        assert found.launches == {KEY: launch_for()}
        source = "configs/gpus/Slate.toml, measured on NVIDIA Slate"
        assert found.words == f"1 shape from {source}, 2026-11-23; {self.HINT}"
        assert found.rows[KEY, "float16"].evidence == f"diffopt 98.1 µs, sdpa-cudnn 151.6 ({source}, 2026-11-23)"

    @pytest.mark.parametrize("capability", ["", "1.1"])
    def test_not_on_another_kind_of_gpu(self, kin, capability):
        kin("Slate", row(diffopt=98))
        assert tuning(GPU, capability).rows == {}

    def test_not_with_another_triton_and_not_with_launches_that_are_gone(self, kin, monkeypatch):
        kin("Slate", row(diffopt=98), triton="1.0")
        assert tuning(GPU, "1.0").rows == {}
        tuning.cache_clear()
        kin("Chalk", row(diffopt=98))
        assert tuning(GPU, "1.0").rows
        tuning.cache_clear()
        monkeypatch.setattr(module, "launches_to_try", lambda key, dtype: [])
        assert tuning(GPU, "1.0").rows == {}

    def test_of_two_the_one_with_more_shapes_serves_alone(self, kin):
        other = LaunchKey(2, 1024, 1024, 8, 80)
        kin("Chalk", row(diffopt=98, sdpa=99))
        kin("Slate", row(diffopt=97), row(other, diffopt=20))
        found = tuning(GPU, "1.0")
        assert {row.shape.microseconds["diffopt"] for row in found.rows.values()} == {97, 20}

    def test_a_shipped_table_that_fits_serves_alone(self, kin, shipped):
        kin("Slate", row(diffopt=98))
        write_table(shipped, row(LaunchKey(2, 1024, 1024, 8, 80), diffopt=20))
        found = tuning(GPU, "1.0")
        assert [row.shape.microseconds["diffopt"] for row in found.rows.values()] == [20]
        assert not found.borrowed

    def test_what_the_user_tuned_comes_first_and_refused_tables_do_not(self, kin, shipped):
        kin("Slate", row(diffopt=98), date="2026-12-24T00:00:00+00:00")
        write_table(shipped, row(diffopt=50), triton="1.0")
        found = tuning(GPU, "1.0")
        assert [row.shape.microseconds["diffopt"] for row in found.rows.values()] == [98]
        assert found.borrowed
        assert found.words.endswith("run: diffopt tune")
        assert "abacus.toml is not used: tuned with Triton 1.0" in found.words
        tuning.cache_clear()
        write_table(user_file(GPU), row(diffopt=60))
        found = tuning(GPU, "1.0")
        assert [row.shape.microseconds["diffopt"] for row in found.rows.values()] == [60]
        assert not found.borrowed
        assert "Slate" not in found.words

    def test_it_still_serves_shapes_that_the_user_has_not_tuned(self, kin):
        other = LaunchKey(2, 1024, 1024, 8, 80)
        kin("Slate", row(diffopt=98), row(other, diffopt=20))
        write_table(user_file(GPU), row(diffopt=99))
        found = tuning(GPU, "1.0")
        assert {key: row.shape.microseconds["diffopt"] for (key, _), row in found.rows.items()} == {KEY: 99, other: 20}
        assert found.words.startswith(
            "1 shape from configs/gpus/Slate.toml, measured on NVIDIA Slate, 2026-11-23; 1 shape"
        )
        assert found.words.endswith(self.HINT)


def test_shipped_launches_serve_changed_kernels_too(shipped):
    """A release checks them; only the user's file has no one but `diffopt tune` to check it."""
    write_table(shipped, row(diffopt=100), kernels="0" * 16)
    assert tuning(GPU).launches


@pytest.mark.parametrize(
    ("key", "dtype", "found"),
    [
        (KEY, "float16", True),
        (KEY, "bfloat16", True),
        (KEY, "float32", False),
        (LaunchKey(4, 4096, 4096, 8, 40), "float16", True),
        (LaunchKey(2, 8192, 8192, 8, 40), "float16", True),
        (LaunchKey(2, 16384, 16384, 8, 40), "float16", False),
        (LaunchKey(2, 4096, 77, 8, 40), "float16", False),
        (LaunchKey(2, 4096, 3072, 8, 40), "float16", True),
        (LaunchKey(2, 4096, 4096, 8, 80), "float16", False),
    ],
)
def test_a_ranking_carries_to_near_shapes_only(shipped, key, dtype, found):
    write_table(shipped, row(diffopt=100))
    assert (tuning(GPU).nearest(key, dtype) is not None) == found


def test_few_keys_and_many_are_never_near_each_other(shipped):
    """They are other kernels' work, however little their numbers differ."""
    few, many = LaunchKey(2, 4096, 256, 8, 40), LaunchKey(2, 4096, 257, 8, 40)
    write_table(shipped, row(many, sdpa=1))
    assert tuning(GPU).nearest(dataclasses.replace(many, n_k=300), "float16") is not None
    assert tuning(GPU).nearest(few, "float16") is None


def test_the_nearest_shape_wins_and_the_same_dtype_before_the_other(shipped):
    far, near = LaunchKey(2, 2048, 2048, 8, 40), LaunchKey(2, 4096, 4096, 10, 40)
    write_table(shipped, row(far, case="far", sdpa=1), row(near, case="near", sdpa=1))
    assert tuning(GPU).nearest(KEY, "float16").shape.case == "near"
    shipped.unlink()
    tuning.cache_clear()
    write_table(shipped, row(case="fp16", sdpa=1), row(near, case="bf16", dtype="bfloat16", sdpa=1))
    assert tuning(GPU).nearest(KEY, "bfloat16").shape.case == "bf16"
    assert tuning(GPU).nearest(KEY, "float16").shape.case == "fp16"


def test_a_row_whose_launch_cannot_take_so_many_keys_says_nothing(shipped):
    """The kernels pass it over as well, so that its time would be another launch's."""
    tuned, asked = LaunchKey(2, 4096, 77, 8, 40), LaunchKey(2, 4096, 154, 8, 40)
    short = next(launch for launch in launches_to_try(tuned, "float16") if launch.kernel == "short")
    few = dataclasses.replace(row(tuned, case="77 keys", diffopt=9.1), launch=short)
    write_table(shipped, few)
    assert tuning(GPU).nearest(LaunchKey(2, 4096, 64, 8, 40), "float16").shape.case == "77 keys"
    assert tuning(GPU).nearest(asked, "float16") is None
    tuning.cache_clear()
    write_table(shipped, few, row(tuned, case="no launch", dtype="bfloat16", sdpa=1))
    assert tuning(GPU).nearest(asked, "float16").shape.case == "no launch"


def test_of_two_shapes_equally_near_the_one_counts_whose_launch_the_kernels_take(shipped):
    half, twice = LaunchKey(1, 4096, 4096, 8, 40), LaunchKey(4, 4096, 4096, 8, 40)
    other = dataclasses.replace(row(twice, diffopt=2), launch=launch_for(index=4))
    write_table(shipped, row(half, diffopt=1), other)
    found = tuning(GPU)
    taken = kernel_launches._nearest_tuned(KEY, found.launches)
    assert found.nearest(KEY, "float16").shape.launch == taken


@pytest.mark.parametrize("name", ["batch", "n_q", "n_k", "heads"])
def test_nothing_is_near_an_empty_call(shipped, name):
    write_table(shipped, row(diffopt=100))
    assert tuning(GPU).nearest(dataclasses.replace(KEY, **{name: 0}), "float16") is None


def test_the_kernels_take_float16_rows_before_bfloat16_ones(shipped):
    other = LaunchKey(2, 77, 77, 8, 40)
    bf16 = dataclasses.replace(row(KEY, case="bf16", dtype="bfloat16", diffopt=90), launch=launch_for(index=4))
    write_table(shipped, bf16, row(diffopt=100), row(other, dtype="bfloat16", diffopt=9), row(dtype="float32", sdpa=9))
    launches = tuning(GPU).launches
    assert set(launches) == {KEY, other}
    assert launches[KEY] == launch_for() != bf16.launch


def test_tuned_launches_reach_the_kernels(shipped, monkeypatch):
    tuned = launch_for(index=4)
    path = write_table(shipped, row(diffopt=100))
    text = path.read_text()
    for name in ("block_m", "block_n", "num_warps", "num_stages"):
        text = text.replace(f"{name} = {getattr(launch_for(), name)}", f"{name} = {getattr(tuned, name)}")
    path.write_text(text.replace(f'"{launch_for().kernel}"', f'"{tuned.kernel}"'))
    monkeypatch.setattr(module, "device_name", lambda device: GPU)
    monkeypatch.setattr(module, "compute_capability", lambda device: "1.0")
    module.use_tuned.cache_clear()
    try:
        module.use_tuned("cuda:0")
        chosen = kernel_launches.attention_launch(KEY, float32=False, aligned=True, capability=(9, 0), device_name=GPU)
        assert chosen == tuned != kernel_launches.attention_launch(KEY, float32=False, aligned=True, capability=(9, 0))
    finally:
        module.use_tuned.cache_clear()
        kernel_launches.use_tuned_launches(GPU, {})


def test_float32_has_nothing_to_choose_from():
    assert {launch.float32 for launch in launches_to_try(KEY, "float32")} == {True}
    assert len(launches_to_try(KEY, "float32")) == 1
    assert launches_to_try(LaunchKey(1, 64, 64, 1, 44), "float16") == []


def test_doctor_says_from_which_file_a_gpu_is_tuned(shipped, monkeypatch):
    write_table(shipped, row(diffopt=100))
    monkeypatch.setattr("diffopt.attention.machine.device_name", lambda device: GPU)
    monkeypatch.setattr("diffopt.attention.machine.compute_capability", lambda device: "1.0")
    ours_first = (BACKENDS["diffopt"], BACKENDS["sdpa"])
    monkeypatch.setattr("diffopt.attention.backends.BACKENDS", {})
    monkeypatch.setattr("diffopt.attention.backends.auto_order", lambda device: ours_first)
    rows = dict(doctor._backends("cuda:0"))
    assert rows["tuned"] == "1 shape from configs/gpus/abacus.toml, 2026-11-23"
    assert rows["auto"].startswith(
        "tries diffopt, then sdpa, in float32 sdpa alone; of shapes that are tuned the fastest"
    )
