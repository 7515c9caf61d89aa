"""attention inside torch.compile, CUDA graphs and fake tensors."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from diffopt_kernels import attention
from diffopt_kernels.attention_cases import AttentionCase, make_inputs


def inputs(device, n_q: int, n_k: int, layout="contiguous", batch: int = 2, head_dim: int = 40, seed: int = 0):
    case = AttentionCase("tracing", batch, n_q, n_k, 2, "spread 3", layout)
    return make_inputs(case, head_dim, torch.float16, device, seed)


@pytest.mark.parametrize("layout", ["contiguous", "heads first", "unaligned"])
def test_opcheck(layout, kernel_device: torch.device) -> None:
    """Schema (no mutation, no aliasing), fake against real, and tracing with dynamic shapes."""
    arguments = (*inputs(kernel_device, 17, 33, layout), 0.25)
    torch.library.opcheck(
        torch.ops.diffopt_kernels.attention.default,
        arguments,
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


@pytest.mark.parametrize("dtype", [torch.bool, torch.float16], ids=str)
def test_opcheck_with_a_mask(dtype: torch.dtype, kernel_device: torch.device) -> None:
    mask = torch.randn(2, 1, 17, 33, device=kernel_device)
    mask = mask > -0.5 if dtype == torch.bool else mask.to(dtype)
    torch.library.opcheck(
        torch.ops.diffopt_kernels.attention.default,
        (*inputs(kernel_device, 17, 33), 0.25, mask),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


def test_a_masked_call_traces_without_a_graph_break(kernel_device: torch.device) -> None:
    def masked(q, k, v, mask):
        return attention(q, k, v, mask=mask[:, None, None]) + 1.0

    torch._dynamo.reset()
    mask = torch.ones(2, 33, dtype=torch.bool, device=kernel_device)
    mask[1, 20:] = False
    arguments = (*inputs(kernel_device, 17, 33), mask)
    assert torch.equal(torch.compile(masked, fullgraph=True, backend="aot_eager")(*arguments), masked(*arguments))


@pytest.mark.parametrize("layout", ["contiguous", "heads first", "fused"])
def test_the_fake_has_the_shape_dtype_and_strides_of_the_real_output(layout, kernel_device: torch.device) -> None:
    real_inputs = inputs(kernel_device, 17, 17, layout)
    real = attention(*real_inputs)
    with FakeTensorMode() as mode:
        fake = attention(*(mode.from_tensor(x) for x in real_inputs))
    assert (fake.shape, fake.dtype, fake.stride(), fake.device) == (real.shape, real.dtype, real.stride(), real.device)


def compiled_block(backend: str):
    def block(q, k, v):
        return attention(q * 1.0, k, v).flatten(2) + 1.0

    torch._dynamo.reset()
    return block, torch.compile(block, fullgraph=True, backend=backend)


def test_traces_without_a_graph_break(kernel_device: torch.device) -> None:
    block, compiled = compiled_block("aot_eager")
    arguments = inputs(kernel_device, 17, 33)
    assert torch.equal(compiled(*arguments), block(*arguments))


def test_new_sequence_lengths_compile_a_bounded_number_of_times(kernel_device: torch.device) -> None:
    block, compiled = compiled_block("aot_eager")
    compiles = torch._dynamo.utils.counters["stats"]
    before = compiles["unique_graphs"]
    for n_q, n_k in ((17, 33), (19, 35), (23, 41), (29, 43), (31, 47), (37, 53)):
        arguments = inputs(kernel_device, n_q, n_k)
        assert torch.equal(compiled(*arguments), block(*arguments))
    assert 1 <= compiles["unique_graphs"] - before <= 2, "each new length compiles again"


def test_a_bad_input_is_refused_while_tracing_too(kernel_device: torch.device) -> None:
    _, compiled = compiled_block("aot_eager")
    q, k, v = inputs(kernel_device, 17, 33)
    with pytest.raises(Exception, match="allowed: 33, N_k of k"):
        compiled(q, k, v[:, :20])


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [40, 64, 80, 160])
def test_inductor_runs_it_as_one_op(head_dim: int) -> None:
    block, compiled = compiled_block("inductor")
    for n_q, n_k in ((256, 256), (1024, 77), (100, 77), (77, 300)):
        arguments = inputs("cuda", n_q, n_k, head_dim=head_dim)
        assert torch.equal(compiled(*arguments), block(*arguments))


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [40, 64, 80, 128, 160])
def test_a_captured_graph_follows_its_inputs(head_dim: int) -> None:
    """Capture with one input, replay with others: every byte the kernel reads comes from the captured addresses."""
    for n_q, n_k in ((256, 256), (1000, 77)):
        static = inputs("cuda", n_q, n_k, head_dim=head_dim, seed=1)
        attention(*static)  # compiles outside the capture
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = attention(*static)
        for seed in (2, 3):
            fresh = inputs("cuda", n_q, n_k, head_dim=head_dim, seed=seed)
            for old, new in zip(static, fresh, strict=True):
                old.copy_(new)
            captured.fill_(torch.nan)
            graph.replay()
            assert torch.equal(captured, attention(*fresh))


@pytest.mark.gpu
def test_it_runs_on_the_current_stream() -> None:
    arguments = inputs("cuda", 512, 512)
    wanted = attention(*arguments)
    stream = torch.cuda.Stream()
    delayed = [torch.zeros_like(x) for x in arguments]
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for x, y in zip(delayed, arguments, strict=True):
            x.copy_(y)
        out = attention(*delayed)
    stream.synchronize()
    assert torch.equal(out, wanted)


@pytest.mark.gpu
def test_the_only_memory_it_takes_is_the_output() -> None:
    arguments = inputs("cuda", 4096, 4096)
    attention(*arguments)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = attention(*arguments)
    assert torch.cuda.max_memory_allocated() - before <= out.nbytes + 1024
