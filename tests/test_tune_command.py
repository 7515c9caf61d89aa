"""`diffopt tune` from its words to its file, the GPU a stand-in; and once on a real one."""

import dataclasses
import re

import pytest
import torch
from test_tuner import FakeGpu
from tuned_tables import GPU, header, row, write_table

from diffopt.attention import tuning
from diffopt.attention.tuner import Search
from diffopt.attention.tuning import user_file
from diffopt.cli import main
from diffopt.commands import tune
from diffopt.gpus import read_gpu

CASES = ("sd15-512 self 64x64", "sd15-512 cross 64x64")


class StoppedGpu(FakeGpu):
    """Ctrl-C comes while a shape is timed for long."""

    stop_at = CASES[1]

    def time(self, shape, launches, backends, *, rounds):
        if shape.case == self.stop_at and backends:
            raise KeyboardInterrupt
        return super().time(shape, launches, backends, rounds=rounds)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU to tune: `gpu.trials` is what the search asks."""
    monkeypatch.setattr("diffopt.models.resolve_device", lambda name: torch.device("cuda", 0))
    monkeypatch.setattr("diffopt.attention.machine.device_name", lambda device: GPU)
    monkeypatch.setattr(tuning.platformdirs, "user_cache_path", lambda name: tmp_path / "cache")
    monkeypatch.setattr(tune, "_header", lambda device: header())

    class Machine:
        trials = FakeGpu()

    def search(device, workers, lines):
        return Search(Machine.trials, lines, ["sdpa", "sdpa-cudnn"], lambda launch: True, lines.out_of_time)

    monkeypatch.setattr(tune, "_search", search)
    return Machine


@pytest.fixture
def forget():
    """Have tables read again, as another process would."""
    tuning.tuning.cache_clear()
    yield tuning.tuning.cache_clear
    tuning.tuning.cache_clear()


@pytest.fixture
def run(capsys):
    def run_command(*words, cases=CASES):
        code = main(["tune", *(word for case in cases for word in ("--case", case)), *map(str, words)])
        out, err = capsys.readouterr()
        return code, out, err

    return run_command


def tuned(path):
    return [shape.case for shape in read_gpu(path).attention.shapes]


def test_shapes_are_tuned_into_the_users_folder(gpu, run):
    code, out, _ = run()
    assert code == 0
    assert tuned(user_file(GPU)) == list(CASES)
    assert "2 shapes in" in out
    assert "sd15-512 self 64x64" in out
    assert "0.83" in out  # 50 µs of 60
    table = read_gpu(user_file(GPU)).attention
    assert (table.fp16_tflops, table.copy_tb_s) == (700.0, 4.0)


def test_what_is_discarded_is_printed_with_its_reason(gpu, run):
    from test_tuner import labels

    gpu.trials = FakeGpu(wrong_briefly={labels()[0]: "relative error 1.2"})
    code, out, _ = run()
    assert code == 0
    assert f"discarded {labels()[0]}: relative error 1.2\n" in out


def test_an_interruption_keeps_what_was_found_and_the_same_command_continues(gpu, run):
    gpu.trials = StoppedGpu()
    code, out, _ = run()
    assert code == 130
    assert "interrupted; 1 of 2 shapes are not tuned" in out
    assert tuned(user_file(GPU)) == [CASES[0]]

    gpu.trials = FakeGpu()
    code, out, _ = run()
    assert code == 0
    assert "1 of 2 shapes are tuned already" in out
    assert {case for case, _, _ in gpu.trials.timed} == {CASES[1]}
    assert tuned(user_file(GPU)) == list(CASES)

    gpu.trials = FakeGpu()
    assert run()[0] == 0
    assert gpu.trials.timed == []
    assert run("--again")[0] == 0
    assert {case for case, _, _ in gpu.trials.timed} == set(CASES)


def test_minutes_end_the_search_and_say_so(gpu, run, monkeypatch):
    now = iter(range(0, 10_000, 20))
    monkeypatch.setattr(tune.time, "monotonic", lambda: next(now))
    code, out, _ = run("--minutes", 1)
    assert code == 1
    assert "2 of 2 shapes are not tuned; the same command continues" in out
    assert not user_file(GPU).exists()


def test_output_goes_where_it_is_asked_to_and_another_gpus_file_is_refused(gpu, run, tmp_path):
    path = tmp_path / "abacus.toml"
    assert run("--output", path)[0] == 0
    assert tuned(path) == list(CASES)
    assert not user_file(GPU).exists()
    other = write_table(tmp_path / "other.toml", row(diffopt=98.0), gpu="NVIDIA T1000")
    before = other.read_bytes()
    code, out, err = run("--output", other, "--again")
    assert (code, out) == (2, "")
    assert err == f"diffopt: {other} is about NVIDIA T1000, this is {GPU}; move it away, or choose another --output\n"
    assert other.read_bytes() == before


def test_what_is_said_of_another_gpus_table_works(gpu, run, forget):
    path = write_table(user_file(GPU), row(diffopt=98.0), gpu="NVIDIA T1000")
    assert "move it away, then run: diffopt tune" in tuning.tuning(GPU).words
    assert run()[0] == 2
    path.rename(path.with_name("moved-away.toml"))
    assert run()[0] == 0
    forget()
    assert not tuning.tuning(GPU).refused
    assert len(tuning.tuning(GPU).rows) == 2


def damage_launch(path, case):
    """Give the row of a case a launch that no kernel has."""
    head, tail = path.read_text().split(f'case = "{case}"')
    path.write_text(f'{head}case = "{case}"{re.sub("block_m = [0-9]+", "block_m = 7", tail, count=1)}')


def test_rows_whose_launch_nobody_has_are_said_and_tuned_anew(gpu, run, forget):
    assert run()[0] == 0
    damage_launch(user_file(GPU), CASES[1])
    forget()
    assert "is none that these kernels have" in tuning.tuning(GPU).words
    gpu.trials = FakeGpu()
    code, out, _ = run()
    assert code == 0
    (line,) = [line for line in out.splitlines() if line.startswith("dropped")]
    assert line.startswith(f"dropped {CASES[1]}: launch 'd40 ")
    assert line.endswith("is none that these kernels have")
    assert "1 of 2 shapes are tuned already" in out
    assert {case for case, _, _ in gpu.trials.timed} == {CASES[1]}
    assert tuned(user_file(GPU)) == list(CASES)
    forget()
    assert not tuning.tuning(GPU).refused


def test_a_dropped_row_that_was_not_asked_for_hinders_nobody(gpu, run, forget):
    assert run()[0] == 0
    before = read_gpu(user_file(GPU)).attention
    damage_launch(user_file(GPU), CASES[1])
    gpu.trials = FakeGpu()
    code, out, _ = run(cases=CASES[:1])
    assert (code, gpu.trials.timed) == (0, [])
    assert "1 shapes in" in out
    forget()
    assert not tuning.tuning(GPU).refused
    assert read_gpu(user_file(GPU)).attention == dataclasses.replace(before, shapes=before.shapes[:1])


def test_headline_and_dtype_choose_what_is_tuned(gpu, run):
    code, _, _ = run("--headline", "--dtype", "bfloat16", cases=())
    assert code == 0
    shapes = read_gpu(user_file(GPU)).attention.shapes
    assert len(shapes) == 12
    assert {shape.dtype for shape in shapes} == {"bfloat16"}


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--case", "sd15"), "--case: 'sd15' is not possible; known: sd15-512 self 64x64"),
        (("--minutes", "soon"), "--minutes: 'soon' is not possible; a number of minutes above 0"),
        (("--minutes", "-1"), "--minutes: '-1' is not possible"),
        (("--workers", "0"), "--workers: '0' is not possible; a whole number from 1"),
        (("--dtype", "float8"), "invalid choice: 'float8'"),
        (
            ("--headline", "--case", "sd15-512 cross 16x16"),
            "--case: 'sd15-512 cross 16x16' is not possible; with --headline:",
        ),
        (("step",), "WORKLOAD: 'step' is not possible; it has no attention shapes"),
        (("nothing",), "workload: 'nothing' is not possible; known: attention"),
    ],
)
def test_mistakes_are_one_line(run, words, line):
    code, out, err = run(*words, cases=())
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert line in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
def test_a_cpu_is_not_tuned(run):
    code, _, err = run()
    assert code == 2
    assert "tuning needs a CUDA GPU" in err


@pytest.mark.gpu
@pytest.mark.slow
def test_a_small_shape_is_tuned_on_a_gpu(run, monkeypatch, tmp_path):
    """Few candidates, one of them wrong: a launch whose columns don't cover the head dim."""
    from diffopt.attention import tuner
    from diffopt.attention.tuning import launches_to_try

    wrong = []

    def few(key, dtype):
        right = [launch for launch in launches_to_try(key, dtype) if launch.kernel == "pointers"][:3]
        wrong[:] = [dataclasses.replace(right[0], parts=(128, 0))]
        return [*right, *wrong]

    monkeypatch.setattr(tuner, "launches_to_try", few)
    path = tmp_path / "gpu.toml"
    code, out, _ = run("--output", path, cases=("sd15-512 self 16x16",))
    assert code == 0
    assert f"discarded {wrong[0].label}: " in out
    (shape,) = read_gpu(path).attention.shapes
    assert shape.launch is not None
    assert shape.launch != wrong[0]
    assert {"diffopt", "sdpa", "sdpa-flash"} <= set(shape.microseconds)
    assert read_gpu(path).attention.fp16_tflops > 10
