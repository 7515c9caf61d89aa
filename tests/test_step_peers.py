"""Peers of denoising steps: made from stock's twin, checked before they are timed, left out with words."""

import argparse
import signal
import time

import pydantic
import pytest
import torch
from recorders import Recorder
from sample_records import a_peer, a_step_record
from tiny_case import tiny_case

from diffopt.attention.backends import BACKENDS, Backend
from diffopt.bench.record import append_record, read_records
from diffopt.bench.step import check
from diffopt.bench.step import peers as step_peers
from diffopt.bench.step.case import run_case
from diffopt.bench.step.peer_record import StepPeer
from diffopt.bench.step.peers import PEERS, Way, captured_way, compiled_way
from diffopt.bench.step.record import StepRecord
from diffopt.bench.workloads import COMPILE_PEERS, PEER_LIMIT_S, STEP_PEERS, StepWorkload, read_workload
from diffopt.commands import bench as command
from diffopt.config import ConfigError, config_folder
from diffopt.errors import InputError
from diffopt.measure.teacher_forced import UNetCall

CPU = torch.device("cpu")
COMPILED = COMPILE_PEERS[0]


def anywhere(_):
    return []


@pytest.fixture
def stand_ins(monkeypatch):
    """Peers that run on a CPU: a capturer that calls the work again, and a compiler that compiles nothing."""
    captured = captured_way(Recorder)
    monkeypatch.setitem(PEERS, "cuda-graph", Way(captured.prepare, anywhere, captured.problem))
    monkeypatch.setitem(PEERS, COMPILED, compiled_way(anywhere, backend="eager"))


def _run(*names, **changes) -> StepRecord:
    return run_case("test", tiny_case(**changes), device=CPU, peers=names)


def _peers(record) -> dict[str, StepPeer]:
    return {peer.name: peer for peer in record.peers}


@pytest.mark.usefixtures("stand_ins")
def test_peers_run_the_same_loop_in_the_same_rounds(tmp_path):
    record = _run("cuda-graph", COMPILED)
    for peer in record.peers:
        assert (peer.state, peer.why) == ("timed", "")
        assert len(peer.loop_s) == len(peer.unet_s) == 2
        assert peer.first_call_s is not None
        assert peer.first_call_s > 0
        assert peer.loop is not None
        assert peer.loop_its == pytest.approx(2 / peer.loop.median)
        assert peer.loop_ratio is not None
        assert record.optimized is not None
        assert peer.loop_ratio.ratio == pytest.approx(peer.loop.median / record.optimized.loop.median)
        assert len(peer.distances) == len(record.exactness.steps)
        certificate = peer.certificate(record.exactness)
        assert certificate is not None
        assert certificate.passed
    assert [peer.name for peer in record.peers] == ["cuda-graph", COMPILED]
    append_record(tmp_path / "r.jsonl", record)
    assert read_records(tmp_path / "r.jsonl") == [record]


def test_a_captured_peer_has_nothing_else_of_ours(monkeypatch):
    seen = []
    captured = captured_way(Recorder)

    def prepare(pipe):
        captured.prepare(pipe)
        seen.append(pipe.unet)

    monkeypatch.setitem(PEERS, "cuda-graph", Way(prepare, anywhere, captured.problem))
    record = _run("cuda-graph")
    (unet,) = seen
    assert {type(processor).__name__ for processor in unet.attn_processors.values()} == {"AttnProcessor2_0"}
    assert not any("forward" in module.__dict__ for module in unet.modules() if module is not unet)
    assert unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert _peers(record)["cuda-graph"].state == "timed"


def test_a_peer_that_is_not_exact_keeps_its_distance_and_has_no_speed(monkeypatch):
    def prepare(pipe):
        pipe.unet.conv_out.weight.data.mul_(1.5)

    monkeypatch.setitem(PEERS, "cuda-graph", Way(prepare, anywhere))
    peer = _peers(_run("cuda-graph"))["cuda-graph"]
    assert peer.state == "inexact"
    assert "FAILED" in peer.why
    assert min(peer.distances) > 0.1
    assert peer.loop_its is None
    assert peer.first_call_s is not None


@pytest.mark.parametrize(
    ("attention", "dtype", "runs"),
    [("sdpa-math", torch.float16, "sdpa-math"), ("auto", torch.float16, "diffopt"), ("auto", torch.float32, "sdpa")],
)
def test_the_planted_fault_is_in_what_would_run(monkeypatch, attention, dtype, runs):
    """Of `auto` the first that takes the call; its own kernel takes no float32 there."""
    ran = []

    def stand_in(name: str, *reasons: str) -> Backend:
        def run(q, k, v, mask, scale):
            ran.append((name, scale))
            return q

        return Backend(name, run, anywhere, lambda *_: list(reasons))

    order = stand_in("refusing", "no such call"), stand_in("diffopt"), stand_in("sdpa")
    monkeypatch.setattr(check, "auto_order", lambda device: order)
    monkeypatch.setitem(BACKENDS, "sdpa-math", stand_in("sdpa-math"))
    x = torch.zeros(1, 4, 2, 64, dtype=dtype)
    check._faulty(attention, CPU).run(x, x, x, None, None)
    assert ran == [(runs, pytest.approx(1.01 / 8))]


def test_a_peer_is_judged_at_every_step_that_was_replayed():
    """Against the reference of that step; its bits against stock's, and what is not finite is added up."""
    calls = [UNetCall((torch.tensor(float(number)),), {}) for number in range(4)]
    outputs = [torch.tensor([1.0, number]) for number in range(4)]
    exact = {1: torch.tensor([1.0, 1.0]), 3: torch.tensor([1.0, 2.0])}

    def judged(made):
        return check.distances_of(lambda call: made[int(call.arguments[0])], calls, outputs, exact)

    distances, nonfinite, bitwise = judged(outputs)
    assert distances == pytest.approx([0.0, 1 / 5**0.5])
    assert (nonfinite, bitwise) == (0, True)
    nan = torch.tensor([1.0, torch.nan])
    for made, found in (({1: nan, 3: nan}, 2), ({1: nan, 3: outputs[3]}, 1), ({1: exact[1], 3: exact[3]}, 0)):
        assert judged(made)[1:] == (found, False)


def test_a_peer_that_can_not_be_made_is_recorded_with_the_reason(monkeypatch):
    def prepare(pipe):
        raise ValueError("no compiler here\nand much more")

    monkeypatch.setitem(PEERS, COMPILED, Way(prepare, anywhere))
    record = _run("cuda-graph", COMPILED)
    peers = _peers(record)
    assert (peers["cuda-graph"].state, peers["cuda-graph"].why) == ("absent", "needs a CUDA GPU")
    assert (peers[COMPILED].state, peers[COMPILED].why) == ("failed", "ValueError: no compiler here")
    assert record.comparison is not None


def test_a_peer_whose_first_call_takes_too_long_is_given_up(monkeypatch):
    def prepare(pipe):
        try:
            time.sleep(60)
        except Exception:  # as compilers do
            time.sleep(60)

    monkeypatch.setitem(PEERS, COMPILED, Way(prepare, anywhere))
    handler, began = signal.getsignal(signal.SIGALRM), time.monotonic()
    before = signal.setitimer(signal.ITIMER_REAL, 500)
    record = run_case("test", tiny_case(), device=CPU, peers=(COMPILED,), peer_limit_s=0.05)
    assert time.monotonic() - began < 50
    peer = _peers(record)[COMPILED]
    assert (peer.state, peer.why) == ("failed", "its first call takes longer than 0.05 s (--peer-limit)")
    assert record.comparison is not None
    assert signal.getsignal(signal.SIGALRM) is handler
    assert 400 < signal.setitimer(signal.ITIMER_REAL, *before)[0] < 500  # an alarm of before goes on


def test_uncaptured_calls_are_a_failure(monkeypatch):
    def refusing():
        recorder = Recorder()
        recorder.refuses = RuntimeError("out of memory")
        return recorder

    captured = captured_way(refusing)
    monkeypatch.setitem(PEERS, "cuda-graph", Way(captured.prepare, anywhere, captured.problem))
    peer = _peers(_run("cuda-graph"))["cuda-graph"]
    assert peer.state == "failed"
    assert "out of memory" in peer.why


def test_a_peer_that_fails_while_it_is_timed_takes_nobody_along(monkeypatch):
    def prepare(pipe):
        step, calls = pipe.scheduler.step, []

        def fails_later(*arguments, **keywords):
            calls.append(1)
            if len(calls) > 8:
                raise RuntimeError("gone")
            return step(*arguments, **keywords)

        pipe.scheduler.step = fails_later

    monkeypatch.setitem(PEERS, "cuda-graph", Way(prepare, anywhere))
    record = _run("cuda-graph")
    peer = _peers(record)["cuda-graph"]
    assert (peer.state, peer.why) == ("failed", "RuntimeError: gone")
    assert peer.loop_s == []
    assert record.stock is not None
    assert len(record.stock.loop_s) == 2


def test_what_was_left_out_is_in_the_record():
    record = run_case("test", tiny_case(peers=("cuda-graph",)), device=CPU, peers=())
    assert record.peers == []
    assert record.peers_left_out == ("cuda-graph",)


def test_a_speed_beside_a_failed_check_is_refused():
    with pytest.raises(pydantic.ValidationError, match="a speed of cuda-graph stands beside"):
        a_step_record(peers=[a_peer("cuda-graph", distances=[0.5])])
    with pytest.raises(pydantic.ValidationError, match="is inexact: speeds belong to timed ones"):
        a_peer("cuda-graph", state="inexact")
    with pytest.raises(pydantic.ValidationError, match="holds fields of version 4"):
        a_step_record(peers=[a_peer("cuda-graph")], schema_version=3)


@pytest.mark.gpu
def test_peers_and_profile_on_a_gpu():
    case = tiny_case(steps=4, exactness_steps=0)
    record = run_case("test", case, device=torch.device("cuda"), peers=("cuda-graph", COMPILED))
    assert record.exactness.passed, record.exactness.verdict()
    peers = _peers(record)
    assert (peers["cuda-graph"].state, peers["cuda-graph"].why) == ("timed", "")
    assert peers[COMPILED].state in ("timed", "inexact"), peers[COMPILED].why
    assert record.profile is not None
    assert record.profile.why == ""
    assert record.profile.total_us > 0
    assert record.profile.launches
    assert record.profile.flops


def test_every_peer_has_a_way():
    assert tuple(PEERS) == STEP_PEERS
    assert all(way.reasons(CPU) == ["needs a CUDA GPU"] for way in PEERS.values())
    assert step_peers.PEERS is PEERS


def _parse(*arguments):
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers(required=True))
    return parser.parse_args(["bench", *map(str, arguments)])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            ["step", "--peers", "cuda-graph,magic"],
            "'magic' is not possible; known: cuda-graph, compile-reduce-overhead",
        ),
        (["step", "--peers", ""], "'' is not possible; known: cuda-graph"),
        (["attention", "--no-peers"], "the workload attention runs every peer"),
        (["attention", "--peers", "cuda-graph"], "the workload attention runs every peer"),
    ],
)
def test_bad_choices_are_one_line_before_any_work(given, words):
    arguments = _parse(*given)
    with pytest.raises(InputError, match=words) as caught:
        arguments.run(arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "recorded", "left_out", "words"),
    [
        ([], ["cuda-graph"], (), "peers left out on a CPU, because they need a GPU: cuda-graph\n"),
        (["--peers", COMPILED], [COMPILED], ("cuda-graph",), f"because they need a GPU: {COMPILED}\n"),
        (["--no-peers"], [], ("cuda-graph",), ""),
    ],
)
def test_the_command_chooses_peers(options, recorded, left_out, words, tmp_path, capsys, monkeypatch):
    workload = StepWorkload("tiny", "any", (tiny_case(peers=("cuda-graph",)),))
    monkeypatch.setattr("diffopt.bench.workloads.read_workload", lambda name: workload)
    arguments = _parse("small", "--device", "cpu", "--output", tmp_path / "r.jsonl", *options)
    assert arguments.run(arguments) == 0
    (record,) = read_records(tmp_path / "r.jsonl")
    assert isinstance(record, StepRecord)
    assert [(peer.name, peer.state) for peer in record.peers] == [(name, "absent") for name in recorded]
    assert record.peers_left_out == left_out
    assert ("peers left out" in (printed := capsys.readouterr().err)) == bool(words)
    assert words in printed


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        *(("small", given, "seconds above 0") for given in ("0", "-1", "soon", "nan", "inf")),
        ("attention", "60", "has no denoising steps"),
    ],
)
def test_the_limit_of_peers_is_seconds_of_denoising_steps(name, given, words):
    arguments = _parse(name, "--peer-limit", given)
    with pytest.raises(InputError, match=f"--peer-limit.*{given}.*{words}"):
        arguments.run(arguments)


def test_the_help_says_the_limit_of_peers(capsys):
    with pytest.raises(SystemExit):
        _parse("small", "--help")
    assert f"(default: {PEER_LIMIT_S:g})" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('peers = ["magic"]', "peers: 'magic'; known: cuda-graph"),
        ('peers = ["cuda-graph", "cuda-graph"]', "'cuda-graph' is there twice"),
    ],
)
def test_a_workloads_peers_are_known_ones(line, words, tmp_path, monkeypatch):
    (tmp_path / "workloads").mkdir()
    text = (config_folder() / "workloads" / "small.toml").read_text()
    (tmp_path / "workloads" / "bad.toml").write_text(f"{text}\n{line}\n")
    monkeypatch.setattr("diffopt.config.config_folder", lambda: tmp_path)
    with pytest.raises(ConfigError, match=f"bad.toml.*{words}"):
        read_workload("bad")


def test_the_step_workload_has_the_peers_its_goals_are_about():
    workload = read_workload("step")
    assert isinstance(workload, StepWorkload)
    peers = {case.name: case.peers for case in workload.cases}
    assert peers["sd15-512"] == peers["sd21-768"] == peers["sdxl-1024"] == STEP_PEERS
