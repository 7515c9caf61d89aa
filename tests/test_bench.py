"""`diffopt bench`: a tiny workload from start to record, and every way it refuses or stops."""

import argparse
import dataclasses
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from tiny_case import tiny_case

from diffopt.attention.backends import BACKENDS, with_scale_fault
from diffopt.bench.record import default_output, read_records
from diffopt.bench.schema import RecordError
from diffopt.bench.step import case as step_module
from diffopt.bench.step import check as step_check
from diffopt.bench.step import disturbance
from diffopt.bench.step.case import run_case
from diffopt.bench.step.contenders import load_subject, twin
from diffopt.bench.step.loop_clock import time_loop
from diffopt.bench.step.picture_clock import PictureTime, pictures_of, time_pictures
from diffopt.bench.step.picture_pair import largest_difference
from diffopt.bench.step.record import StepRecord
from diffopt.bench.workloads import StepWorkload, read_workload
from diffopt.commands import bench as command
from diffopt.config import ConfigError, config_folder, config_names
from diffopt.errors import BackendError, InputError
from diffopt.gpus import Price, find_gpu
from diffopt.handle import optimize
from diffopt.measure.environment import Clocks
from diffopt.measure.memory import PeakMemory

CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Layers this small gain nothing from two threads, which wait for each other where another process has a core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _parse(*arguments):
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers(required=True))
    return parser.parse_args(["bench", *map(str, arguments)])


@pytest.fixture
def tiny_workload(monkeypatch):
    """A workload of one tiny case under the name `small`."""
    workload = StepWorkload("tiny", "any", (tiny_case(),))
    monkeypatch.setattr("diffopt.bench.workloads.read_workload", lambda name: workload)


@pytest.mark.parametrize("kind", ["tiny", "tiny-xl"])
def test_a_case_becomes_a_whole_record(kind):
    stages = []
    record = run_case(
        "test",
        tiny_case(f"random:{kind}"),
        device=CPU,
        attention="sdpa-math",
        progress=lambda stage, *_: stages.append(stage),
    )
    assert record.exactness.passed, record.exactness.verdict()
    assert list(dict.fromkeys(stages)) == [
        "load the model",
        "first calls and peak memory",
        "exactness",
        "UNet forwards",
        "denoising loops",
    ]
    assert record.workload.unet_calls == (3 if kind == "tiny" else 2)  # PNDM makes one more than it has steps
    assert len(record.exactness.steps) == 2
    assert record.stock is not None
    assert record.optimized is not None
    for contender in (record.stock, record.optimized):
        assert len(contender.loop_s) == len(contender.call_s) == len(contender.unet_s) == 2
        assert all(0 < loop < call for loop, call in zip(contender.loop_s, contender.call_s, strict=True))
        assert contender.loop_its == pytest.approx(2 / contender.loop.median)
    ran = {run["backend"] for layer in record.plan["layers"] for run in layer["runs"]}
    assert ran == {"sdpa-math"}
    assert record.workload.model.seed == 0
    assert len(record.workload.model.hash) == 64


def test_the_bundled_model_can_be_measured():
    record = run_case("test", tiny_case("emoji", exactness_steps=1, repetitions=1, warmup=0), device=CPU)
    assert record.workload.model.seed is None
    assert record.exactness.passed, record.exactness.verdict()
    assert record.exactness.bitwise_stock  # on a CPU `auto` is PyTorch's own attention


def test_attention_that_is_not_exact_gets_no_speed(monkeypatch):
    wrong = with_scale_fault(BACKENDS["sdpa"])
    monkeypatch.setattr(step_module, "optimize", lambda pipe, **_: optimize(pipe, attention=wrong))
    record = run_case("test", tiny_case(), device=CPU)
    assert not record.exactness.passed
    assert not record.exactness.void
    assert record.stock is record.optimized is record.comparison is record.method is None


def test_a_check_without_its_planted_fault_is_void(monkeypatch):
    monkeypatch.setattr(step_check, "FAULT", 1.0)
    record = run_case("test", tiny_case(), device=CPU)
    assert record.exactness.void
    assert record.stock is None


def test_an_interrupt_keeps_what_is_complete():
    def stop_in_round_two(stage, done, total):
        if stage == "denoising loops" and done == 2:
            raise KeyboardInterrupt

    record = run_case("test", tiny_case(repetitions=5), device=CPU, progress=stop_in_round_two)
    assert record.interrupted
    assert record.stock is not None
    assert len(record.stock.loop_s) == 1


def test_an_interrupt_before_the_first_round_keeps_the_certificate():
    def stop(stage, done, total):
        if stage == "UNet forwards":
            raise KeyboardInterrupt

    record = run_case("test", tiny_case(), device=CPU, progress=stop)
    assert record.interrupted
    assert record.exactness.passed
    assert record.stock is None


def test_twins_are_equal_and_independent():
    subject = load_subject(tiny_case(), CPU)
    other = twin(subject.pipe)
    arguments = {**subject.arguments(), "output_type": "latent"}
    a = subject.pipe(**arguments).images
    assert torch.equal(a, other(**{**subject.arguments(), "output_type": "latent"}).images)
    other.unet.conv_in.weight.data.zero_()
    assert not torch.equal(subject.pipe.unet.conv_in.weight, other.unet.conv_in.weight)
    assert torch.equal(subject.pipe.vae.decoder.conv_in.weight, other.vae.decoder.conv_in.weight)
    assert other.vae is not subject.pipe.vae
    assert other.scheduler is not subject.pipe.scheduler


def test_the_loop_is_timed_from_its_first_step_to_its_last_latent(monkeypatch):
    subject = load_subject(tiny_case(), CPU)
    pipe = subject.pipe
    before, step = pipe.prepare_latents, pipe.scheduler.step

    def slow_before(*arguments, **keywords):
        time.sleep(0.3)
        return before(*arguments, **keywords)

    def slow_step(*arguments, **keywords):
        time.sleep(0.1)
        return step(*arguments, **keywords)

    monkeypatch.setattr(pipe, "prepare_latents", slow_before)
    monkeypatch.setattr(pipe.scheduler, "step", slow_step)
    timed = time_loop(pipe, subject.arguments())
    assert timed.loop_s >= 0.3  # three scheduler steps are inside
    assert timed.call_s - timed.loop_s >= 0.3  # what comes before the loop isn't
    assert "progress_bar" not in vars(pipe)
    assert not hasattr(pipe, "_progress_bar_config")


def test_the_command_writes_a_record_and_prints_its_table(tiny_workload, tmp_path, capsys):
    output = tmp_path / "records.jsonl"
    arguments = _parse("small", "--device", "cpu", "--output", output)
    assert arguments.run(arguments) == 0
    (record,) = read_records(output)
    assert isinstance(record, StepRecord)
    printed = capsys.readouterr()
    assert "tiny-64" in printed.out
    assert "passed" in printed.out
    assert "exactness" in printed.err


def test_the_command_says_when_something_is_not_exact(tiny_workload, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(step_check, "FAULT", 1.0)
    arguments = _parse("small", "--device", "cpu", "--output", tmp_path / "r.jsonl")
    assert arguments.run(arguments) == 1
    assert "void" in capsys.readouterr().out


def test_an_interrupted_command_keeps_its_record_and_exits_130(tiny_workload, tmp_path, monkeypatch):
    run = step_module.run_case

    def interrupted(*arguments, **keywords):
        return run(*arguments, **keywords).model_copy(update={"interrupted": True})

    monkeypatch.setattr(step_module, "run_case", interrupted)
    arguments = _parse("small", "--device", "cpu", "--output", tmp_path / "r.jsonl")
    assert arguments.run(arguments) == 130
    assert len(read_records(tmp_path / "r.jsonl")) == 1


def test_a_fault_on_the_gpu_ends_the_run_in_words(tiny_workload, tmp_path, capsys, monkeypatch):
    def broken(*arguments, **keywords):
        raise torch.AcceleratorError("CUDA error: unspecified launch failure\nSearch for it")

    monkeypatch.setattr(step_module, "run_case", broken)
    arguments = _parse("small", "--device", "cpu", "--output", tmp_path / "r.jsonl")
    assert arguments.run(arguments) == 1
    printed = capsys.readouterr()
    words = "tiny-64: the GPU failed, so the run ends: CUDA error: unspecified launch failure; try --no-peers"
    assert words in printed.err.splitlines()
    assert "0 of 1 records" in printed.out


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        (["smal"], InputError, "'smal' is not possible; known: small"),
        (["step", "--device", "cpu"], InputError, "needs a CUDA GPU"),
        (["small", "--device", "tpu"], InputError, "allowed: cpu, cuda"),
        (["small", "--case", "big"], InputError, "known: emoji-128"),
        (["small", "--device", "cpu", "--attention", "magic"], InputError, "known: auto, diffopt"),
        (["small", "--device", "cpu", "--attention", "sdpa-cudnn"], BackendError, "needs a CUDA GPU"),
        (["small", "--device", "cpu", "--output", "/dev/null/r.jsonl"], RecordError, "can't be written"),
    ],
)
def test_bad_input_is_one_line_before_any_work(given, error, words, monkeypatch):
    monkeypatch.setattr(step_module, "run_case", None)
    arguments = _parse(*given)
    with pytest.raises(error, match=words) as caught:
        arguments.run(arguments)
    assert "\n" not in str(caught.value)


def test_records_go_to_the_current_folder_by_default():
    assert default_output("NVIDIA H200 (x)") == Path("out/bench/nvidia-h200-x.jsonl")


def test_the_shipped_workloads_and_gpus_are_readable():
    assert {"quick", "standard", "full", "small", "step"} <= set(config_names("workloads"))
    cases = [case for name in config_names("workloads") for case in read_workload(name).cases]
    assert {"emoji-128", "sd15-512", "sd21-768", "sdxl-1024"} <= {case.name for case in cases}
    for name in ("NVIDIA H100 80GB HBM3", "NVIDIA H200"):
        gpu = find_gpu(name)
        assert gpu is not None
        assert gpu.peaks.fp16_tflops > gpu.peaks.fp32_tflops > 0
        assert "datasheet" in gpu.peaks.source
    assert find_gpu("NVIDIA T1000") is None
    assert config_folder().is_dir()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("steps = 0", "steps: 0; at least 1"),
        ("warmup = -1", "warmup: -1; 0 or more"),
        ("free_running_prompts = -1", "free_running_prompts: -1; 0 or more"),
        ("width = 100", "width: 100; a multiple of 8"),
        ("guidance = 1.0", "guidance: 1.0; above 1"),
        ('decode = "float8"', "decode: 'float8'; allowed: stock, float16"),
        ("surprise = 1", "unknown key 'surprise'"),
    ],
)
def test_a_workload_that_makes_no_sense_is_named(change, words, tmp_path, monkeypatch):
    folder = tmp_path / "workloads"
    folder.mkdir()
    key = change.split(" = ")[0]
    text = (config_folder() / "workloads" / "small.toml").read_text()
    lines = [line for line in text.splitlines() if line.split(" = ")[0] != key]
    (folder / "bad.toml").write_text("\n".join([*lines, change]))
    monkeypatch.setattr("diffopt.config.config_folder", lambda: tmp_path)
    with pytest.raises(ConfigError, match=f"bad.toml.*{words}"):
        read_workload("bad")


def test_whole_pictures_are_timed_by_stage():
    case = tiny_case(picture_repetitions=2, picture_warmup=0)
    price = Price(3.6, "2026-11-23", "a test")
    record = run_case("test", case, device=CPU, attention="sdpa-math", price=price)
    assert record.price == price
    assert record.method is not None
    assert record.method.pictures is not None
    assert record.comparison is not None
    assert record.comparison.pictures is not None
    for contender in (record.stock, record.optimized):
        assert contender is not None
        pictures = contender.pictures
        assert pictures is not None
        assert len(pictures.whole_s) == 2
        assert pictures.text_encoder_s is None  # random weights have no text encoder
        for whole, loop, vae in zip(pictures.whole_s, pictures.unet_s, pictures.vae_s, strict=True):
            assert 0 < loop + vae < whole
        assert pictures.images_per_s == pytest.approx(2 / sum(pictures.whole_s))
        assert pictures.energy_j is pictures.energy_per_image_j is pictures.power_w is None


def test_the_stages_of_a_picture_hold_what_belongs_to_them(monkeypatch):
    subject = load_subject(tiny_case("emoji"), CPU)
    pipe = subject.pipe
    slow = {"text": (pipe.text_encoder, "forward", 0.2), "step": (pipe.scheduler, "step", 0.1)}
    slow["vae"] = (pipe.vae.decoder, "forward", 0.3)
    for owner, name, seconds in slow.values():
        method = getattr(owner, name)

        def slowed(*arguments, method=method, seconds=seconds, **keywords):
            time.sleep(seconds)
            return method(*arguments, **keywords)

        monkeypatch.setattr(owner, name, slowed)
    timed = time_pictures(pipe, subject.whole_arguments())
    assert timed.text_encoder_s is not None
    assert timed.text_encoder_s >= 0.2
    assert timed.unet_s >= 0.2  # two scheduler steps
    assert timed.vae_s >= 0.3
    assert timed.whole_s >= timed.text_encoder_s + timed.unet_s + timed.vae_s
    assert timed.png_s > 0
    assert not {"encode_prompt", "progress_bar", "_progress_bar_config"} & set(vars(pipe))
    assert "decode" not in vars(pipe.vae)


def test_energy_is_per_image_and_missing_where_one_call_lacks_it():
    times = [PictureTime(2.0, 0.1, 1.5, 0.3, 0.01, joules) for joules in (100.0, 140.0)]
    pictures = pictures_of(times, batch=4)
    assert pictures.energy_j == [100.0, 140.0]
    assert pictures.energy_per_image_j == 30.0
    assert pictures.power_w == 60.0
    assert pictures.images_per_s == 2.0
    assert pictures_of([*times, dataclasses.replace(times[0], energy_j=None)], batch=1).energy_per_image_j is None


def test_an_interrupt_during_the_pictures_keeps_the_loops():
    def stop(stage, done, total):
        if stage == "whole pictures":
            raise KeyboardInterrupt

    record = run_case("test", tiny_case(picture_repetitions=3), device=CPU, progress=stop)
    assert record.interrupted
    assert record.stock is not None
    assert len(record.stock.loop_s) == 2
    assert record.stock.pictures is None


def test_throttled_clocks_and_other_processes_are_flagged(monkeypatch):
    masks = iter([0x0, 0x40, 0x44, 0x1])
    monkeypatch.setattr(disturbance, "clocks", lambda _: Clocks(1000, 1000, 90, 500.0, next(masks)))
    counts = iter([1, 2, None, 1])
    monkeypatch.setattr(disturbance, "gpu_processes", lambda _: next(counts))
    watch = disturbance.Watch(CPU)
    for _ in range(4):
        watch.look()
    assert watch.flags() == (
        "clocks throttled (thermal slowdown by the hardware) at 2 of 4 looks",
        "another process on the GPU at 1 of 4 looks",
        "clocks throttled (power cap) at 1 of 4 looks",
    )


def test_first_calls_memory_and_looks_are_those_of_whom_they_stand_with(monkeypatch):
    """And the GPU is looked at after measured samples only."""
    looks, memory, loop = [], iter([3000, 2000]), step_module.time_loop
    monkeypatch.setattr(step_module, "_memory_alone", lambda *_: PeakMemory(None, None, next(memory), None))
    calls = iter(range(1, 100))
    monkeypatch.setattr(step_module, "time_loop", lambda *a: dataclasses.replace(loop(*a), call_s=float(next(calls))))
    watch = SimpleNamespace(look=lambda: looks.append(1), flags=lambda: (f"hot at {len(looks)} of 9 looks",))
    monkeypatch.setattr(step_module, "Watch", lambda device: watch)
    record = run_case("test", tiny_case(repetitions=2, warmup=3), device=CPU, attention="sdpa-math")
    assert record.method is not None
    assert record.method.first_call_s == {"stock": 1.0, "optimized": 2.0}
    assert record.method.flags == ("hot at 4 of 9 looks",)
    assert record.stock is not None
    assert record.optimized is not None
    assert (record.stock.memory.reserved, record.optimized.memory.reserved) == (3000, 2000)


def test_a_cpu_and_a_gpu_without_nvml_have_nothing_to_flag():
    watch = disturbance.Watch(CPU)
    watch.look()
    assert watch.flags() == ()


@pytest.mark.parametrize("price", ["0", "-3.99", "cheap"])
def test_a_price_that_is_none_is_refused_before_any_work(price, monkeypatch):
    monkeypatch.setattr(step_module, "run_case", None)
    arguments = _parse("small", "--device", "cpu", f"--price={price}")
    with pytest.raises(InputError, match=r"--price.*above 0"):
        arguments.run(arguments)


def test_a_price_is_kept_in_the_record(tiny_workload, tmp_path):
    arguments = _parse("small", "--device", "cpu", "--output", tmp_path / "r.jsonl", "--price", "3.99")
    assert arguments.run(arguments) == 0
    (record,) = read_records(tmp_path / "r.jsonl")
    assert isinstance(record, StepRecord)
    assert record.price is not None
    assert (record.price.usd_per_hour, record.price.source) == (3.99, "given on the command line")


def test_the_pair_of_pictures_is_written_and_named(monkeypatch, tmp_path, capsys):
    workload = StepWorkload("tiny", "any", (tiny_case(picture_repetitions=1), tiny_case(name="big", needs="cuda")))
    monkeypatch.setattr("diffopt.bench.workloads.read_workload", lambda name: workload)
    arguments = _parse("quick", "--device", "cpu", "--output", tmp_path / "r.jsonl")
    assert arguments.run(arguments) == 0
    printed = capsys.readouterr()
    pair = tmp_path / "r-tiny-64-pair.png"
    assert f"tiny-64, stock left, diffopt right, largest difference 0 of 255: {pair}" in printed.out
    assert f"1 of 1 records in {tmp_path / 'r.jsonl'}" in printed.out
    assert "left out on a CPU, because they need a GPU: big" in printed.err
    assert "quick: tiny\n" in printed.err
    with Image.open(pair) as image:
        assert image.size == (64 + 8 + 64, 64)
        left, right = image.crop((0, 0, 64, 64)), image.crop((72, 0, 136, 64))
    assert largest_difference(left, right) == 0
    assert len(left.getcolors(64 * 64)) > 1


def test_the_difference_of_a_pair_is_its_largest():
    left, right = Image.new("RGB", (4, 4), (10, 20, 30)), Image.new("RGB", (4, 4), (10, 20, 30))
    assert largest_difference(left, right) == 0
    right.putpixel((3, 1), (10, 25, 0))
    assert largest_difference(left, right) == 30


def test_cases_that_all_need_a_gpu_are_refused_on_a_cpu(monkeypatch):
    monkeypatch.setattr(step_module, "run_case", None)
    arguments = _parse("quick", "--device", "cpu", "--case", "sd15-512")
    with pytest.raises(InputError, match="'sd15-512' is not possible; a CUDA GPU is needed"):
        arguments.run(arguments)


def test_a_case_of_one_name_is_the_same_work_in_every_workload():
    work = ("model", "width", "height", "steps", "batch", "guidance", "seed", "decode")
    found: dict[str, set] = {}
    for name in config_names("workloads"):
        workload = read_workload(name)
        for case in workload.cases if isinstance(workload, StepWorkload) else ():
            found.setdefault(case.name, set()).add(tuple(getattr(case, key) for key in work))
    assert {"emoji-128", "sd15-512"} <= set(found)
    assert [name for name, works in found.items() if len(works) > 1] == []


def test_peak_memory_is_that_of_a_second_whole_call(monkeypatch):
    """The first one after models moved captures anew; both go from prompt to pixels."""

    events = []

    def measured(run, device):
        events.append("measure")
        run()

    class Model:
        def to(self, device):
            events.append(str(device))

    monkeypatch.setattr(step_module, "time_pictures", lambda pipe, arguments: events.append(arguments))
    monkeypatch.setattr(step_module, "peak_memory", measured)
    mine, other = (SimpleNamespace(unet=Model(), vae=Model()) for _ in range(2))
    step_module._memory_alone(mine, other, lambda: "whole call", torch.device("cuda"))
    assert events == [*["cpu"] * 4, *["cuda"] * 2, "whole call", "measure", "whole call", *["cuda"] * 2]
