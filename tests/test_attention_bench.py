"""`diffopt bench attention`: who is asked what in which order, and what becomes of the wrong, the absent and the dead.

The contenders here are fakes that answer like the processes; the real ones run in the test at the end, on a GPU.
"""

import argparse
import dataclasses
import importlib.util
import re
from pathlib import Path

import pytest
import torch
from sample_records import an_environment, attention_errors, attention_rules

from diffopt.bench.attention import peers
from diffopt.bench.attention import suite as attention
from diffopt.bench.attention.peers import PEERS
from diffopt.bench.attention.record import AttentionRecord, exact
from diffopt.bench.attention.report import compared
from diffopt.bench.attention.suite import Team, rotated, run_attention
from diffopt.bench.attention.worker_process import Answer
from diffopt.bench.record import read_records
from diffopt.bench.workloads import AttentionShape, AttentionWorkload, read_workload
from diffopt.commands import bench as command
from diffopt.config import ConfigError, config_folder
from diffopt.errors import InputError

CPU = torch.device("cpu")
NAMES = ("diffopt", "diffopt-bf16", "sdpa-cudnn", "flash-attn-4", "fa3-fwd")
CRASH = Answer("failed", why="the process ended with -11: boom", died=True)

# The table of the note on attention on Hopper: B, N_q, N_k, H, D.
HEADLINE = {
    "sd15-512 self 64x64": (2, 4096, 4096, 8, 40),
    "sd15-512 self 32x32": (2, 1024, 1024, 8, 80),
    "sd15-512 self 16x16": (2, 256, 256, 8, 160),
    "sd15-512 cross 64x64": (2, 4096, 77, 8, 40),
    "sd15-512 cross 32x32": (2, 1024, 77, 8, 80),
    "sd15-768 self": (2, 9216, 9216, 8, 40),
    "sd15-1024 self": (2, 16384, 16384, 8, 40),
    "sdxl self 64x64": (2, 4096, 4096, 10, 64),
    "sdxl self 32x32": (2, 1024, 1024, 20, 64),
    "sdxl cross 64x64": (2, 4096, 77, 10, 64),
    "sd15-1024 self 64x64": (2, 4096, 4096, 8, 80),
    "sd15-1024 self 32x32": (2, 1024, 1024, 8, 160),
}


class Fake:
    """Answers like the process of one contender, or like the judge; `answers` replaces some, by command or both."""

    def __init__(self, name, log, answers=None, us=10.0):
        self.name, self.log, self.answers, self.us = name, log, answers or {}, us
        self.closed = False

    def start(self):
        pass

    def close(self):
        self.closed = True

    def ask(self, command, *arguments, timeout):
        assert timeout > 0
        assert not self.closed
        shape = next((x.name for x in arguments if isinstance(x, AttentionShape)), "")
        self.log.append((self.name, command, shape))
        answer = self.answers.get((command, shape), self.answers.get(command))
        if callable(answer):
            return answer(*arguments)
        if answer is not None:
            return answer
        return Answer("ok", getattr(self, f"_{command}", lambda *_: None)(*arguments))

    def _hello(self):
        return {"reasons": [], "version": "1.2"}

    def _outputs(self, shape, folder):
        assert Path(folder).is_dir()
        return {"peak_memory": 1000}

    def _time(self, shape):
        return {"hot_us": self.us, "cold_us": 2 * self.us, "calls": 20, "input_sets": 3}

    def _rules(self, shape, dtype):
        return attention_rules(dtype)

    def _errors(self, dtype, contender, folder):
        return {"normal": attention_errors(1e-3), "spread 3": attention_errors(1e-3)}


@dataclasses.dataclass
class Bench:
    """A run of fakes: its records, what was asked (contender, command, shape), and the fakes."""

    records: list[AttentionRecord]
    log: list[tuple[str, str, str]]
    team: Team

    def asked(self, command, shape=None):
        return [who for who, what, which in self.log if what == command and shape in (None, which)]

    def states(self, number=0):
        return {figure.name: figure.state for figure in self.records[number].figures}

    def figure(self, name, number=0):
        return next(figure for figure in self.records[number].figures if figure.name == name)


SHAPES = (AttentionShape("small", 2, 64, 64, 2, 40, headline=True), AttentionShape("cross", 2, 64, 77, 2, 40))


def bench(answers=None, *, rounds=5, shapes=SHAPES, on_record=None) -> Bench:
    """Run the fakes; `answers` by contender ("judge" too)."""
    answers, log = answers or {}, []
    workers = {name: Fake(name, log, answers.get(name), us=10.0 + i) for i, name in enumerate(NAMES)}
    result = Bench([], log, Team(workers, Fake("judge", log, answers.get("judge"))))
    run_attention(
        "attention",
        AttentionWorkload("test", "cuda", rounds, tuple(shapes)),
        shapes,
        device=CPU,
        on_record=on_record or result.records.append,
        peers=[PEERS[name] for name in NAMES],
        team=result.team,
    )
    return result


def test_every_contender_is_timed_and_recorded():
    result = bench()
    assert [record.shape.name for record in result.records] == ["small", "cross"]
    assert len({record.run for record in result.records}) == 1
    assert set(result.states().values()) == {"timed"}
    figure = result.figure("flash-attn-4")
    assert figure.hot_us == [13.0] * 5
    assert figure.cold_us == [26.0] * 5
    assert (figure.calls, figure.input_sets, figure.peak_memory, figure.version) == (20, 3, 1000, "1.2")
    assert result.records[0].headline == ("small",)
    assert all(process.closed for process in result.team.everyone())


def test_all_are_checked_before_the_first_is_timed_and_then_they_take_turns():
    result = bench(rounds=3)
    of_shape = [(who, what) for who, what, shape in result.log if shape == "small" and what in ("outputs", "time")]
    assert of_shape[:5] == [(name, "outputs") for name in NAMES]
    assert [who for who, _ in of_shape[5:]] == [*NAMES, *NAMES[1:], NAMES[0], *NAMES[2:], *NAMES[:2]]
    assert result.log.index(("judge", "release", "")) < result.log.index((NAMES[0], "time", "small"))
    compiled = max(i for i, entry in enumerate(result.log) if entry[1] == "warm_up")
    assert compiled < min(i for i, entry in enumerate(result.log) if entry[1] in ("rules", "outputs", "time"))


@pytest.mark.parametrize(("number", "order"), [(0, "abc"), (1, "bca"), (2, "cab"), (3, "abc")])
def test_each_round_starts_with_the_next_one(number, order):
    assert rotated(list("abc"), number) == list(order)


def test_nobody_left_is_no_error():
    assert rotated([], 3) == []


@pytest.mark.parametrize("error", [3e-3, float("inf"), float("nan")])
@pytest.mark.parametrize("content", ["normal", "spread 3"])
def test_a_wrong_contender_gets_no_speed(error, content):
    def errors(dtype, contender, folder):
        right = {"normal": attention_errors(1e-3), "spread 3": attention_errors(1e-3)}
        return Answer("ok", right | ({content: attention_errors(error)} if contender == "flash-attn-4" else {}))

    result = bench({"judge": {"errors": errors}})
    figure = result.figure("flash-attn-4")
    assert (figure.state, figure.hot_us, figure.cold_us) == ("wrong", [], [])
    assert content in figure.why
    assert "flash-attn-4" not in result.asked("time")
    assert result.states()["sdpa-cudnn"] == "timed"
    ratio = compared(result.records[0])
    assert (ratio.peer, ratio.excluded) == ("sdpa-cudnn", ("flash-attn-4",))


def test_if_ours_is_wrong_there_is_no_ratio():
    def errors(dtype, contender, folder):
        size = 1.0 if contender == "diffopt" else 1e-3
        return Answer("ok", {"normal": attention_errors(size), "spread 3": attention_errors(1e-3)})

    ratio = compared(bench({"judge": {"errors": errors}}).records[0])
    assert ratio.ratio is None
    assert ratio.void == "diffopt: wrong"


@pytest.mark.parametrize("name", ["sdpa-cudnn", "flash-attn-4", "fa3-fwd"])
def test_an_absent_required_peer_voids_the_ratio(name):
    result = bench({name: {"hello": Answer("ok", {"reasons": ["not installed"], "version": None})}})
    figure = result.figure(name)
    assert (figure.state, figure.why) == ("absent", "not installed")
    assert figure.install == PEERS[name].install
    assert name not in [*result.asked("warm_up"), *result.asked("outputs"), *result.asked("time")]
    for record in result.records:
        assert compared(record).ratio is None
        assert compared(record).void == f"{name}: absent"
    assert result.states()["diffopt"] == "timed"


def test_a_contender_that_cannot_even_start_is_absent():
    result = bench({"fa3-fwd": {"hello": CRASH}})
    assert result.figure("fa3-fwd").why == CRASH.why


def test_a_planted_fault_that_passes_voids_the_check_of_its_dtype():
    rules = lambda shape, dtype: Answer("ok", attention_rules(dtype, 1e-3 if dtype == "bfloat16" else 1e-2))  # noqa: E731
    result = bench({"judge": {"rules": rules}})
    assert result.states()["fa3-fwd"] == result.states()["diffopt-bf16"] == "void"
    assert result.states()["diffopt"] == "timed"
    assert "planted fault" in result.figure("fa3-fwd").why


def test_without_a_reference_nobody_is_timed():
    result = bench({"judge": {"rules": CRASH}})
    assert set(result.states().values()) == {"void"}
    assert result.asked("time") == []
    assert "nothing to check against" in result.figure("diffopt").why


@pytest.mark.parametrize("command_", ["outputs", "time"])
def test_a_crash_costs_one_figure_of_one_shape(command_):
    result = bench({"sdpa-cudnn": {(command_, "small"): CRASH}})
    assert result.states() == {name: "failed" if name == "sdpa-cudnn" else "timed" for name in NAMES}
    assert result.figure("sdpa-cudnn").why == CRASH.why
    assert result.figure("sdpa-cudnn").hot_us == []
    assert result.asked(command_, "small").count("sdpa-cudnn") == 1
    assert set(result.states(1).values()) == {"timed"}


def test_a_crash_in_a_later_round_takes_the_samples_with_it():
    answers = iter([Answer("ok", {"hot_us": 1.0, "cold_us": 1.0, "calls": 1, "input_sets": 1}), CRASH])
    result = bench({"sdpa-cudnn": {"time": lambda shape: next(answers)}}, shapes=SHAPES[:1])
    assert (result.figure("sdpa-cudnn").state, result.figure("sdpa-cudnn").hot_us) == ("failed", [])


def test_a_shape_that_killed_a_contender_while_compiling_is_not_tried_again():
    result = bench({"flash-attn-4": {("warm_up", "small"): CRASH}})
    assert result.figure("flash-attn-4").state == "failed"
    assert "flash-attn-4" not in result.asked("outputs", "small")
    assert result.states(1)["flash-attn-4"] == "timed"


def test_what_raised_while_compiling_is_asked_again_when_it_is_checked():
    result = bench({"flash-attn-4": {"warm_up": Answer("out of memory", why="too much at once")}})
    assert set(result.states().values()) == {"timed"}


@pytest.mark.parametrize("status", ["refused", "out of memory"])
def test_a_refusal_is_named_and_voids_the_ratio(status):
    result = bench({"sdpa-cudnn": {"outputs": Answer(status, why="no")}}, shapes=SHAPES[:1])
    assert result.states()["sdpa-cudnn"] == status
    assert compared(result.records[0]).void == f"sdpa-cudnn: {status}"


def test_an_interrupt_keeps_what_is_complete_and_ends_the_processes():
    kept, fakes = [], []

    def stop(record):
        kept.append(record)
        raise KeyboardInterrupt

    start = attention._start
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "_start", lambda run: (fakes.extend(run.team.everyone()), start(run)))
        with pytest.raises(KeyboardInterrupt):
            bench(on_record=stop)
    assert [record.shape.name for record in kept] == ["small"]
    assert len(fakes) == len(NAMES) + 1
    assert all(fake.closed for fake in fakes)


def test_the_suite_holds_the_twelve_shapes_of_the_note():
    workload = read_workload("attention")
    assert isinstance(workload, AttentionWorkload)
    assert {case.name: case.sizes for case in workload.cases if case.headline} == HEADLINE
    assert workload.headline == tuple(HEADLINE)


def test_the_suite_holds_the_further_shapes():
    workload = read_workload("attention")
    assert isinstance(workload, AttentionWorkload)
    sizes = {case.sizes for case in workload.cases}
    for tokens, heads in ((4096, 5), (1024, 10), (256, 20), (9216, 5), (2304, 10), (576, 20)):  # SD2.1 at 512 and 768
        assert {(2, tokens, tokens, heads, 64), (2, tokens, 77, heads, 64)} <= sizes
    assert (2, 65536, 65536, 8, 40) in sizes  # SD1.5 at 2048
    assert {(2, 48 * 84, 48 * 84, 10, 64), (2, 24 * 42, 24 * 42, 20, 64)} <= sizes  # SDXL at 768x1344
    assert {1, 2, 16} == {size[0] for size in sizes}
    assert {77, 154, 231} <= {size[2] for size in sizes}
    for case in workload.cases:
        shape = re.search(r"(\d+)x(\d+)( batch|$| \d+ keys)", case.name)
        assert shape is None or int(shape[1]) * int(shape[2]) == case.n_q, case.name


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("rounds = 7", "rounds = 0", "rounds: 0; at least 1"),
        ("rounds = 7", "", "'rounds' is missing"),
        ("heads = 20", "heads = 0", "heads: 0; at least 1"),
        ('name = "sdxl self 64x64"', 'name = "sdxl self 32x32"', "'sdxl self 32x32' is there twice"),
        ('kind = "attention"', 'kind = "step"', "unknown key 'rounds'"),
        ('kind = "attention"', 'kind = "attn"', "kind: 'attn'"),
        ("n_q = 1024", "n_q = 1024\nn_x = 1", "unknown key 'n_x'"),
    ],
)
def test_a_suite_that_makes_no_sense_is_named(old, new, words, tmp_path, monkeypatch):
    text = (config_folder() / "workloads" / "attention.toml").read_text()
    assert old in text
    (tmp_path / "workloads").mkdir()
    (tmp_path / "workloads" / "bad.toml").write_text(text.replace(old, new, 1))
    monkeypatch.setattr("diffopt.config.config_folder", lambda: tmp_path)
    with pytest.raises(ConfigError, match=words):
        read_workload("bad")


@pytest.mark.parametrize("key", ["fa3-fwd", "flash-attn-4", "sdpa-cudnn", "sdpa-flash", "sdpa-efficient"])
def test_the_required_peers_are_these(key):
    assert PEERS[key].required
    assert PEERS[key].install.startswith("pip install ")


def test_only_bf16_is_compared_with_bf16():
    assert [name for name, peer in PEERS.items() if peer.dtype == "bfloat16"] == ["diffopt-bf16", "fa3-fwd"]
    assert not PEERS["sdpa-math"].required
    assert not PEERS["xformers"].required


@pytest.mark.parametrize(
    ("module", "words"),
    [("no_such_package", "no_such_package isn't installed"), ("json", "json can't be imported: .*flash_attn_func.*")],
)
def test_a_peer_that_is_not_there_says_why(module, words):
    reasons = peers._imports(module, "flash_attn_func")
    assert re.fullmatch(words, "; ".join(reasons(torch.device("cuda"))))
    assert reasons(CPU) == ["needs a CUDA GPU, not cpu"]


def _parse(*arguments):
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers(required=True))
    return parser.parse_args(["bench", *map(str, arguments)])


@pytest.fixture
def fake_runs(monkeypatch, tmp_path):
    """`diffopt bench attention` on a machine with a GPU, with fakes for processes."""
    monkeypatch.setattr("diffopt.models.resolve_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr("diffopt.measure.environment.environment", lambda device: an_environment())
    monkeypatch.setattr("diffopt.bench.attention.suite.environment", lambda device: an_environment())
    monkeypatch.setattr("diffopt.bench.attention.suite.clocks", lambda device: None)
    log, answers = [], {}

    def team(device, peers):
        return Team({p.name: Fake(p.name, log, answers.get(p.name)) for p in peers}, Fake("judge", log))

    monkeypatch.setattr(Team, "on", team)
    return log, answers, tmp_path / "records.jsonl"


def test_the_command_measures_the_headline_and_prints_its_table(fake_runs, capsys):
    _, _, output = fake_runs
    arguments = _parse("attention", "--headline", "--output", output)
    assert arguments.run(arguments) == 0
    assert [record.shape.name for record in read_records(output)] == list(HEADLINE)
    printed = capsys.readouterr().out
    assert "geometric mean of 12 shapes: 1.000" in printed
    assert "flash-attn-4" in printed
    assert "12 of 12 records in" in printed


def test_the_command_exits_1_if_ours_fails_and_0_if_a_peer_does(fake_runs):
    _, answers, output = fake_runs
    arguments = _parse("attention", "--case", "sdxl self 64x64", "--output", output)
    answers["sdpa-cudnn"] = {"outputs": CRASH}
    assert arguments.run(arguments) == 0
    answers["diffopt"] = {"outputs": CRASH}
    assert arguments.run(arguments) == 1


def test_an_interrupted_command_keeps_the_records(fake_runs, capsys):
    _, answers, output = fake_runs

    def interrupt(shape):
        raise KeyboardInterrupt

    answers["diffopt"] = {("time", "sd15-512 self 32x32"): interrupt}
    arguments = _parse("attention", "--output", output)
    assert arguments.run(arguments) == 130
    assert [record.shape.name for record in read_records(output)] == ["sd15-512 self 64x64"]
    assert "interrupted; 1 of 56 records" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["attention", "--device", "cpu"], "needs a CUDA GPU"),
        (["attention", "--attention", "sdpa"], "runs every backend"),
        (["attention", "--case", "sdxl"], "known: sd15-512 self 64x64"),
        (["attention", "--headline", "--case", "sd21-512 self 64x64"], "with --headline: sd15-512"),
        (["small", "--headline"], "attention only"),
    ],
)
def test_bad_input_is_one_line(given, words):
    arguments = _parse(*given)
    with pytest.raises(InputError, match=words) as caught:
        arguments.run(arguments)
    assert "\n" not in str(caught.value)


def test_real_processes_check_each_other_on_a_cpu_and_are_not_timed_there():
    """Two contenders that work on a CPU, one that doesn't, and the judge; graphs need a GPU, so the timing fails."""
    records: list[AttentionRecord] = []
    names = ("sdpa-math", "sdpa-flash", "flash-attn-4")
    run_attention(
        "test",
        AttentionWorkload("test", "any", 2, SHAPES),
        SHAPES[:1],
        device=CPU,
        on_record=records.append,
        peers=[PEERS[name] for name in names],
    )
    (record,) = records
    figures = {figure.name: figure for figure in record.figures}
    assert {name: figure.state for name, figure in figures.items()} == {
        "sdpa-math": "failed",
        "sdpa-flash": "failed",
        "flash-attn-4": "absent",
    }
    assert all(exact(figures[name], record.rules) for name in names[:2])
    assert record.ceilings is None
    assert all(not figure.hot_us for figure in record.figures)


@pytest.mark.gpu
def test_the_real_thing_on_two_small_shapes():
    """Ours and the peers that are here: right, timed in both states, and nothing but the output allocated."""
    shapes = [AttentionShape("self", 2, 256, 256, 4, 40), AttentionShape("cross", 2, 512, 77, 4, 64)]
    records: list[AttentionRecord] = []
    workload = AttentionWorkload("test", "cuda", 3, tuple(shapes))
    run_attention("test", workload, shapes, device=torch.device("cuda"), on_record=records.append)
    assert [record.shape for record in records] == shapes
    for record in records:
        assert record.ceilings is not None
        assert record.ceilings.fp16_tflops > 1
        figures = {figure.name: figure for figure in record.figures}
        for name in ("diffopt", "diffopt-bf16", "sdpa-flash", "sdpa-efficient", "sdpa-math"):
            figure = figures[name]
            assert figure.state == "timed", figure
            assert len(figure.hot_us) == len(figure.cold_us) == 3
            assert all(us > 0 for us in figure.hot_us + figure.cold_us)
        for figure in record.figures:
            assert figure.state in ("timed", "absent", "refused"), figure
        shape = record.shape
        assert figures["diffopt"].peak_memory == 2 * shape.batch * shape.n_q * shape.heads * shape.head_dim
        assert figures["sdpa-math"].peak_memory > figures["diffopt"].peak_memory


def test_xformers_is_imported_where_flash_attn_4_can_not_be_seen(tmp_path, monkeypatch):
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    seen = []

    def device_reasons(device):
        seen.append(importlib.util.find_spec("flash_attn"))
        return []

    monkeypatch.setattr(peers, "_XFORMERS", dataclasses.replace(peers._XFORMERS, device_reasons=device_reasons))
    assert PEERS["xformers"].absent_reasons(torch.device("cpu")) == []
    assert seen == [None]
    assert importlib.util.find_spec("flash_attn") is not None, "hidden for good"
