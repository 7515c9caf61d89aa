"""Distances, and the teacher-forced step rule: what is the same passes, a fault of one percent in the scale fails."""

import copy
import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from diffopt.attention.backends import BACKENDS, with_scale_fault
from diffopt.bench.random_models import random_pipeline, random_prompt
from diffopt.handle import optimize
from diffopt.measure import teacher_forced as rule
from diffopt.measure.exactness import nonfinite_count, relative_l2
from diffopt.measure.teacher_forced import (
    record_unet_calls,
    reference_forward,
    spread_out,
    stock_forwards,
    teacher_forced,
    using_stock,
)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Layers this small gain nothing from two threads, which wait for each other where another process has a core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_distances_of_known_tensors():
    reference = torch.tensor([3.0, 4.0])
    assert relative_l2(torch.tensor([3.0, 4.5]), reference) == pytest.approx(0.1)
    assert relative_l2(reference, reference) == 0
    assert relative_l2(torch.zeros(2), torch.zeros(2)) == 0
    assert relative_l2(torch.ones(2), torch.zeros(2)) == math.inf


def test_a_nan_is_within_no_limit():
    out = torch.tensor([1.0, math.nan])
    assert not relative_l2(out, torch.ones(2)) <= math.inf
    assert not relative_l2(torch.ones(2), out) <= math.inf
    assert not relative_l2(out, torch.zeros(2)) <= math.inf
    assert nonfinite_count(torch.tensor([1.0, math.nan, math.inf])) == 2


def test_different_shapes_are_an_error_not_a_broadcast():
    with pytest.raises(ValueError, match="shapes differ"):
        relative_l2(torch.ones(2, 1), torch.ones(2, 3))


def test_steps_are_spread_over_the_schedule():
    assert spread_out(31, 0) == spread_out(31, 99) == list(range(31))
    assert spread_out(31, 4) == [0, 10, 20, 30]
    assert spread_out(31, 1) == [30]


@pytest.fixture(scope="module")
def stock():
    return random_pipeline("tiny", device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def recorded(stock):
    stock.set_progress_bar_config(disable=True)
    prompt = random_prompt("tiny", device="cpu", dtype=torch.float32)
    return record_unet_calls(
        stock.unet, lambda: stock(**prompt, num_inference_steps=2, output_type="latent", height=64, width=64)
    )


def _unet_with(stock, backend):
    twin = copy.copy(stock)
    twin.unet = copy.deepcopy(stock.unet)
    optimize(twin, attention=backend)
    return twin.unet


def _certificate(pipe, recorded, our_unet, faulty_unet, **changes):
    calls, outputs = recorded
    arguments = {
        "ours": lambda call: call.run(our_unet),
        "fault": lambda call: call.run(faulty_unet),
        "fault_name": "softmax scale × 1.01",
        "stock": stock_forwards(pipe.unet),
        "reference": reference_forward(pipe.unet),
        "dtype": torch.float32,
        "stock_outputs": outputs,
    }
    return teacher_forced(calls, **{**arguments, **changes})


@pytest.mark.parametrize(
    "mask", [None, (2, 1, 21, 10), (1, 3, 1, 10)], ids=["no mask", "mask per query", "mask of keys"]
)
def test_math_takes_some_of_the_queries_at_a_time_where_scores_are_many(mask, monkeypatch):
    q, k, v = (torch.randn(2, 3, n, 8, dtype=torch.float64) for n in (21, 10, 10))
    added = None if mask is None else torch.randn(mask, dtype=torch.float64)
    expected = scaled_dot_product_attention(q, k, v, attn_mask=added)
    monkeypatch.setattr(rule, "SCORES_AT_ONCE", 2 * 3 * 10 * 4)
    with torch.profiler.profile() as profile, using_stock("sdpa-math"):
        out = scaled_dot_product_attention(q, k, v, attn_mask=added)
    (softmax,) = [event for event in profile.key_averages() if event.key == "aten::_safe_softmax"]
    assert softmax.count == 6
    assert relative_l2(out, expected) < 1e-14


def test_the_reference_takes_a_large_batch_in_turns(stock, recorded, monkeypatch):
    sample, timestep = recorded[0][0].arguments
    keywords = recorded[0][0].keywords
    words = keywords["encoder_hidden_states"]
    assert sample.shape[0] == words.shape[0] == rule.ROWS_AT_ONCE
    five = rule.UNetCall(
        (torch.cat([sample, 2 * sample, 3 * sample])[:5], timestep),
        {**keywords, "encoder_hidden_states": torch.cat([words, words.flip(0), words])[:5]},
    )
    whole = five.run(copy.deepcopy(stock.unet).to(torch.float64), torch.float64)
    seen, run = [], rule.UNetCall.run
    monkeypatch.setattr(rule.UNetCall, "run", lambda call, *others: seen.append(call.rows) or run(call, *others))
    assert relative_l2(reference_forward(stock.unet)(five), whole) < 1e-12
    assert seen == [2, 2, 1]


def test_calls_are_recorded_as_they_were(stock, recorded):
    calls, outputs = recorded
    assert len(calls) == len(outputs) == 3  # PNDM makes one call more than it has steps
    assert calls[0].timestep > calls[-1].timestep
    assert not stock.unet._forward_hooks
    assert not stock.unet._forward_pre_hooks
    assert torch.equal(calls[1].run(stock.unet), outputs[1])


def test_calls_share_clones_of_what_they_are_all_given():
    class Unet(torch.nn.Module):
        def forward(self, sample, timestep, *, prompt):
            return (sample + prompt,)

    unet, prompt, ids = Unet(), torch.zeros(2), [torch.ones(2)]

    def run():
        for step in range(4):
            if step == 2:
                prompt.add_(1)
            unet(torch.full((2,), step), torch.tensor(9 - step), prompt=prompt)
            unet(ids[0], torch.tensor(9 - step), prompt=prompt.clone())

    calls, _ = record_unet_calls(unet, run)
    prompts = [call.keywords["prompt"] for call in calls[::2]]
    assert [x.tolist() for x in prompts] == [[0, 0], [0, 0], [1, 1], [1, 1]]
    assert prompts[0] is prompts[1] is not prompts[2] is prompts[3] is not prompt
    assert len({id(call.arguments[0]) for call in calls[1::2]}) == 1
    assert len({id(call.keywords["prompt"]) for call in calls[1::2]}) == 4, "equal, but others"
    assert [call.timestep for call in calls] == [9, 9, 8, 8, 7, 7, 6, 6]


def test_a_call_is_told_its_timestep_on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: x + 0.5)
    sample, timestep, prompt = torch.ones(2), torch.tensor(7), torch.ones(2)
    for call in (
        rule.UNetCall((sample, timestep, prompt), {}),
        rule.UNetCall((sample,), {"timestep": timestep, "encoder_hidden_states": prompt}),
        rule.UNetCall((), {"sample": sample, "timestep": timestep, "encoder_hidden_states": prompt}),
    ):
        told = call.with_timestep_on_cpu()
        assert (call.timestep, told.timestep) == (7, 7.5)
        assert any(x is sample for x in (*told.arguments, *told.keywords.values()))
        assert any(x is prompt for x in (*told.arguments, *told.keywords.values()))
    assert rule.UNetCall((sample, 7), {}).with_timestep_on_cpu().timestep == 7, "a number stays one"


def test_our_attention_passes_and_the_planted_fault_is_caught(stock, recorded):
    ours = _unet_with(stock, "sdpa-math")
    fault = _unet_with(stock, with_scale_fault(BACKENDS["sdpa-math"]))
    certificate = _certificate(stock, recorded, ours, fault)
    assert certificate.passed, certificate.verdict()
    assert [step.step for step in certificate.steps] == [0, 1, 2]
    assert all(step.fault_caught for step in certificate.steps)
    assert all(set(step.stock) == {"sdpa-flash", "sdpa-math"} for step in certificate.steps)
    assert certificate.reference_dtype == "float64"


def test_stock_itself_is_bitwise_stock(stock, recorded):
    fault = _unet_with(stock, with_scale_fault(BACKENDS["sdpa"]))
    certificate = _certificate(stock, recorded, stock.unet, fault)
    assert certificate.bitwise_stock
    assert certificate.passed
    assert not _certificate(stock, recorded, fault, fault).bitwise_stock


def test_a_scale_wrong_by_one_percent_fails(stock, recorded):
    fault = _unet_with(stock, with_scale_fault(BACKENDS["sdpa"]))
    certificate = _certificate(stock, recorded, fault, fault)
    assert not certificate.passed
    assert not certificate.void
    assert certificate.verdict().startswith("FAILED")


def test_a_check_that_misses_the_planted_fault_is_void(stock, recorded):
    certificate = _certificate(stock, recorded, stock.unet, stock.unet)
    assert certificate.void
    assert not certificate.passed
    assert certificate.verdict().startswith("void")


def test_a_fault_that_only_breaks_down_proves_nothing(stock, recorded):
    certificate = _certificate(
        stock, recorded, stock.unet, None, fault=lambda call: torch.full((2, 4, 8, 8), math.nan), steps=[0]
    )
    assert certificate.void


def test_nan_in_one_step_fails(stock, recorded):
    fault = _unet_with(stock, with_scale_fault(BACKENDS["sdpa"]))

    def ours(call):
        output = call.run(stock.unet)
        if call is recorded[0][1]:
            output[0, 0, 0, 0] = math.nan
        return output

    certificate = _certificate(stock, recorded, None, fault, ours=ours)
    assert certificate.nonfinite == 1
    assert not certificate.passed
    assert certificate.worst is not None
    assert certificate.worst.step == 1


def test_a_stock_backend_that_breaks_down_excuses_nothing(stock, recorded):
    fault = _unet_with(stock, with_scale_fault(BACKENDS["sdpa"]))
    broken = {"sdpa-math": lambda call: call.run(stock.unet) * math.inf}
    certificate = _certificate(stock, recorded, fault, fault, stock=broken, steps=[0])
    assert not certificate.passed
