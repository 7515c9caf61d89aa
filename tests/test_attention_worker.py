"""What the processes of the attention suite do, in this process on a CPU: outputs, the judge's verdict, the plan of a
graph. Times need a GPU (test_attention_bench.py)."""

import dataclasses
import importlib.metadata

import pytest
import torch

from diffopt.bench.attention import judge as attention_judge
from diffopt.bench.attention.clock import CALLS, calls_per_graph, input_sets, replays
from diffopt.bench.attention.inputs import CONTENTS, output_file, shape_inputs
from diffopt.bench.attention.judge import JudgeCommands, in_parts
from diffopt.bench.attention.peers import PEERS
from diffopt.bench.attention.record import AttentionFigure, exact
from diffopt.bench.attention.worker import ContenderCommands, is_sound
from diffopt.bench.attention.worker_process import RefusedError
from diffopt.bench.workloads import AttentionShape

CPU = torch.device("cpu")
SHAPE = AttentionShape("tiny", 2, 64, 77, 2, 40)


def contender(run=None, **changes):
    peer = PEERS["sdpa-math"]
    return ContenderCommands(dataclasses.replace(peer, run=run or peer.run, **changes), CPU)


def judged(commands, folder, dtype="float16"):
    """A contender's figure after its outputs were judged, and the rules."""
    judge = JudgeCommands(CPU)
    rules = judge.rules(SHAPE, dtype)
    commands.outputs(SHAPE, str(folder))
    errors = judge.errors(dtype, "sdpa-math", str(folder))
    figure = AttentionFigure(name="x", dtype=dtype, required=True, state="right", errors=errors)
    return figure, rules


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_right_contender_passes(tmp_path, dtype):
    figure, rules = judged(contender(dtype=dtype), tmp_path, dtype)
    assert [rule.content for rule in rules] == list(CONTENTS)
    assert all(0 < figure.errors[content].relative_l2 < 1e-2 for content in CONTENTS)
    assert exact(figure, rules)
    assert list(tmp_path.iterdir()) == []


def _scaled(q, k, v):
    return PEERS["sdpa-math"].run(q * 1.01, k, v)


def _one_element_off(q, k, v):
    out = PEERS["sdpa-math"].run(q, k, v).clone()
    out[-1, -1, -1, -1] += 0.25
    return out


def _unwritten(q, k, v):
    out = PEERS["sdpa-math"].run(q, k, v).clone()
    out[0, 3] = torch.nan
    return out


@pytest.mark.parametrize("run", [_scaled, _one_element_off, _unwritten])
def test_a_wrong_contender_does_not(tmp_path, run):
    figure, rules = judged(contender(run), tmp_path)
    assert not exact(figure, rules)
    assert not any(rule.void for rule in rules)


@pytest.mark.parametrize("run", [lambda q, k, v: q[:, :-1], lambda q, k, v: q.float()])
def test_an_output_of_another_shape_or_dtype_is_named(tmp_path, run):
    with pytest.raises(ValueError, match="the output is"):
        judged(contender(run), tmp_path)


def test_a_rule_without_a_planted_fault_proves_nothing(tmp_path):
    figure, rules = judged(contender(), tmp_path)
    assert not exact(figure, [rule.model_copy(update={"fault": None}) for rule in rules])
    assert not exact(figure, [rule.model_copy(update={"fault": rule.math}) for rule in rules])
    assert not exact(figure, [])


def test_a_planted_fault_that_would_pass_is_seen(monkeypatch):
    monkeypatch.setattr(attention_judge, "PLANTED_FAULT", 1.0)
    assert [rule.void for rule in JudgeCommands(CPU).rules(SHAPE, "float16")] == [False, True]


def test_contenders_and_judge_see_the_same_inputs_and_every_content_is_another_one():
    one, other = (shape_inputs(SHAPE, "float16", CPU) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert not torch.equal(one[0], shape_inputs(SHAPE, "float16", CPU, seed=1)[0])
    assert not torch.equal(one[0], shape_inputs(SHAPE, "float16", CPU, "spread 3")[0])
    assert [tuple(x.shape) for x in one] == [(2, 64, 2, 40), (2, 77, 2, 40), (2, 77, 2, 40)]


def test_a_refusal_is_told_as_such(tmp_path):
    commands = contender(refusals=lambda *_: ["no 40", "no 77"])
    with pytest.raises(RefusedError, match="no 40; no 77"):
        commands.outputs(SHAPE, str(tmp_path))
    assert not output_file(str(tmp_path), "sdpa-math", "normal").exists()


def test_hello_prepares_only_what_is_there():
    prepared = []
    here = contender(prepare=prepared.append)
    assert here.hello() == {"reasons": [], "version": importlib.metadata.version("torch")}
    assert prepared == [CPU]
    assert contender(prepare=prepared.append, absent_reasons=lambda _: ["gone"]).hello()["reasons"] == ["gone"]
    assert prepared == [CPU]


def test_large_scores_are_computed_in_parts(monkeypatch):
    inputs = shape_inputs(AttentionShape("x", 3, 50, 77, 5, 40), "float32", CPU)
    whole = PEERS["sdpa-math"].run(*inputs)
    for scores in (77 * 7, 77 * 50 * 2, 10):
        shapes = []

        def run(q, k, v, shapes=shapes):
            shapes.append(q.shape[1] * k.shape[1] * q.shape[2])
            return PEERS["sdpa-math"].run(q, k, v)

        monkeypatch.setattr(attention_judge, "_SCORES_AT_ONCE", scores)
        torch.testing.assert_close(in_parts(run, inputs), whole)
        assert max(shapes) <= max(scores, 77)
        assert sum(shapes) == 3 * 50 * 77 * 5


def test_a_cpu_is_sound():
    assert is_sound(CPU)


@pytest.mark.parametrize(("call_s", "calls"), [(9e-6, 20), (1e-3, 20), (2e-3, 10), (0.04, 1), (0.3, 1)])
def test_long_calls_come_in_short_graphs(call_s, calls):
    assert calls_per_graph(call_s) == calls <= CALLS


@pytest.mark.parametrize("set_mb", [0.5, 3, 49, 51, 99])
def test_a_set_of_inputs_comes_back_only_after_twice_the_cache(set_mb):
    sets = input_sets(int(set_mb * 1e6), int(50e6))
    assert (sets - 1) * set_mb >= 100
    assert (sets - 3) * set_mb < 100


def test_one_set_beyond_twice_the_cache_is_cold_already():
    assert input_sets(101, 50) == 1


@pytest.mark.parametrize("graph_s", [1e-4, 3e-3, 2e-2, 0.031, 0.3])
def test_a_sample_is_warmed_up_and_takes_little_time(graph_s):
    warm, measured = replays(graph_s)
    assert 1 <= measured <= 5
    assert warm * graph_s >= 0.003 or (warm, measured) == (0, 1)
    assert (warm + measured) * graph_s < 0.1 or measured == 1
