"""The processors on single attention layers: our kernel inside a layer, also where CI has no GPU."""

import copy

import pytest
import torch
from diffusers.models import attention_processor as stock
from diffusers.models.attention_processor import Attention

from diffopt.attention.backends import BACKENDS, with_scale_fault
from diffopt.attention.layers import ATTRIBUTE, AttentionLayer
from diffopt.attention.machine import machine
from diffopt.attention.plan import Plan
from diffopt.attention.processors import DiffoptAttnProcessor, DiffoptFusedAttnProcessor
from diffopt.errors import BackendError


def layer(device: torch.device, *, cross: int | None = None, backend=BACKENDS["diffopt"], **options) -> Attention:
    """An optimized attention layer with two heads of 40, forced to `backend`."""
    torch.manual_seed(0)
    attn = Attention(query_dim=80, cross_attention_dim=cross, heads=2, dim_head=40, **options).to(device).eval()
    for projection in (attn.to_q, attn.to_k):
        projection.weight.data *= 3  # scores that matter
    plan = Plan(backend.name, machine(device))
    setattr(attn, ATTRIBUTE, AttentionLayer("layer", (backend,), plan))
    attn.set_processor(DiffoptAttnProcessor())
    return attn


def stock_twin(attn: Attention) -> Attention:
    twin = copy.deepcopy(attn)
    delattr(twin, ATTRIBUTE)
    twin.set_processor(stock.AttnProcessor2_0())
    return twin


def inputs(device: torch.device, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(device)


@pytest.mark.parametrize(
    ("x", "context", "options"),
    [
        ((2, 20, 80), None, {}),
        ((2, 20, 80), (2, 7, 24), {}),
        ((1, 80, 4, 5), None, {"residual_connection": True, "rescale_output_factor": 2.0, "norm_num_groups": 8}),
    ],
    ids=["self", "cross", "image with norm, residual and rescaling"],
)
@torch.no_grad()
def test_a_layer_on_our_kernel_equals_stock(kernel_device, x, context, options):
    cross = None if context is None else context[-1]
    attn = layer(kernel_device, cross=cross, **options)
    x = inputs(kernel_device, *x)
    context = None if context is None else inputs(kernel_device, *context)
    out = attn(x, encoder_hidden_states=context)
    expected = stock_twin(attn)(x, encoder_hidden_states=context)
    assert out.shape == expected.shape
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert {backend for _, backend, _ in getattr(attn, ATTRIBUTE).calls} == {"diffopt"}


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=str)
@torch.no_grad()
def test_a_padded_prompt_is_masked_inside_our_kernel(kernel_device, dtype):
    """As UNets hand it over, [B, 1, N_k]; the processor repeats it for the heads."""
    attn = layer(kernel_device, cross=24)
    x, context = inputs(kernel_device, 2, 20, 80), inputs(kernel_device, 2, 7, 24)
    attends = torch.ones(2, 1, 7, dtype=torch.bool, device=kernel_device)
    attends[1, :, 3:] = False
    mask = attends if dtype == torch.bool else (1 - attends.float()) * -10000.0
    out = attn(x, encoder_hidden_states=context, attention_mask=mask)
    expected = stock_twin(attn)(x, encoder_hidden_states=context, attention_mask=mask)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(out[1], attn(x, encoder_hidden_states=context)[1], atol=1e-3), "the mask was ignored"
    assert {backend for _, backend, _ in getattr(attn, ATTRIBUTE).calls} == {"diffopt"}


@torch.no_grad()
def test_the_comparison_notices_a_scale_that_is_wrong_by_one_percent(kernel_device):
    attn = layer(kernel_device, backend=with_scale_fault(BACKENDS["diffopt"]))
    x = inputs(kernel_device, 2, 20, 80)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(attn(x), stock_twin(attn)(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_fused_projections_reach_the_kernel_as_views(kernel_device):
    attn = layer(kernel_device)
    x = inputs(kernel_device, 2, 20, 80)
    expected = stock_twin(attn)(x)
    attn.fuse_projections()
    attn.set_processor(DiffoptFusedAttnProcessor())
    attn.to_q.weight.data.zero_()  # no longer used
    torch.testing.assert_close(attn(x), expected, rtol=1e-5, atol=1e-5)


def test_gradients_are_refused_by_name_and_taken_by_auto(kernel_device, monkeypatch):
    both = (BACKENDS["diffopt"], BACKENDS["sdpa"])
    monkeypatch.setattr("diffopt.attention.layers.auto_order", lambda device: both)  # as on a GPU
    attn = layer(kernel_device).bfloat16()  # in float32 auto leaves the kernel out
    x = inputs(kernel_device, 2, 20, 80).bfloat16()
    with pytest.raises(BackendError, match=r"q\.requires_grad is True"):
        attn(x)
    state = getattr(attn, ATTRIBUTE)
    state.plan.attention, state.candidates = "auto", both
    attn(x).sum().backward()
    assert attn.to_q.weight.grad is not None
    ((_, backend, reason),) = state.calls
    assert backend == "sdpa"
    assert reason.startswith("diffopt: q.requires_grad is True")


@pytest.mark.parametrize("cls", [DiffoptAttnProcessor, DiffoptFusedAttnProcessor])
def test_diffusers_can_make_processors_again(cls):
    """It calls `type(processor)()`, and branches on these words in class names."""
    again = type(cls())()
    assert vars(again) == {}
    assert "Added" not in cls.__name__
    assert "XFormers" not in cls.__name__


@torch.no_grad()
def test_a_processor_on_a_layer_never_optimized_computes_as_stock(kernel_device):
    attn = stock_twin(layer(kernel_device))
    x = inputs(kernel_device, 2, 20, 80)
    expected = attn(x)
    attn.set_processor(DiffoptAttnProcessor())
    assert torch.equal(attn(x), expected)


@torch.no_grad()
def test_compiled_layers_run_our_kernel(kernel_device):
    attn = layer(kernel_device).half()  # in float32 auto leaves the kernel out
    state = getattr(attn, ATTRIBUTE)
    state.plan.attention, state.candidates = "auto", (BACKENDS["diffopt"], BACKENDS["sdpa"])
    x = inputs(kernel_device, 2, 20, 80).half()
    expected = stock_twin(attn)(x)
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    out = torch.compile(attn, backend=keep, fullgraph=True)(x)
    torch._dynamo.reset()
    torch.testing.assert_close(out, expected, rtol=1e-2, atol=1e-3)
    assert any("diffopt_kernels.attention" in str(node.target) for graph in graphs for node in graph.graph.nodes)
