"""attention(q, k, v) against float64 by the exactness rule, interpreted on a CPU and compiled on a GPU.

Masks have a file of their own, test_attention_mask.py.
"""

import math

import pytest
import torch
from attention_exactness import assert_exact

from diffopt_kernels import HEAD_DIMS, attention, attention_reference
from diffopt_kernels.attention_cases import MODEL_CASES, AttentionCase, make_inputs
from diffopt_kernels.launch import MODEL_HEAD_DIMS

# The interpreter computes bfloat16 wrongly, so it is tested compiled only.
DTYPES = [torch.float16, torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]

# One or two of each pair of parts that covers them; on a GPU, where it takes no time, all.
SOME_HEAD_DIMS = (8, 24, 40, 48, 72, 96, 104, 136, 168, 192, 200, 256)

SMALL_CASES = [
    AttentionCase("single query and key", 1, 1, 1, 1),
    AttentionCase("single key: the output is that value", 2, 5, 1, 3),
    AttentionCase("single query", 16, 1, 77, 4),
    AttentionCase("prompt length, not square", 2, 63, 77, 2, layout="surrounded"),
    AttentionCase("beyond one tile of queries and keys", 1, 129, 130, 1, "spread 3", "surrounded"),
    AttentionCase("logits times 30", 1, 64, 111, 2, "spread 30"),
    AttentionCase("maximum moves in every tile", 2, 17, 256, 2, "rising"),
    AttentionCase("missing keys would score highest", 2, 17, 111, 2, "far below zero", "surrounded"),
    AttentionCase("views of a fused projection", 2, 33, 33, 2, "spread 3", "fused"),
    AttentionCase("heads before tokens in memory", 2, 33, 33, 2, "spread 3", "heads first"),
    AttentionCase("one row of the batch for all", 2, 33, 33, 2, "spread 3", "broadcast"),
    AttentionCase("odd strides and addresses", 2, 33, 77, 2, "spread 3", "unaligned"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", MODEL_HEAD_DIMS)
@pytest.mark.parametrize("case", SMALL_CASES, ids=lambda case: case.why)
def test_small_cases_are_exact(
    case: AttentionCase, head_dim: int, dtype: torch.dtype, kernel_device: torch.device
) -> None:
    q, k, v = make_inputs(case, head_dim, dtype, kernel_device, seed=head_dim)
    out = attention(q, k, v)
    assert out.shape == q.shape
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert_exact(q, k, v, out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS if torch.cuda.is_available() else SOME_HEAD_DIMS)
def test_every_multiple_of_eight_is_exact(head_dim: int, dtype: torch.dtype, kernel_device: torch.device) -> None:
    """Through descriptors (many keys) and, unaligned, through pointers; NaN lies behind each head's last column."""
    for layout, n_k in (("unaligned", 77),) if dtype == torch.float32 else (("surrounded", 257), ("unaligned", 77)):
        case = AttentionCase("every head dim", 2, 33, n_k, 1, "spread 3", layout)
        q, k, v = make_inputs(case, head_dim, dtype, kernel_device, seed=head_dim)
        assert_exact(q, k, v, attention(q, k, v))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("head_dim", "case"),
    [(head_dim, case) for head_dim, cases in MODEL_CASES.items() for case in cases],
    ids=lambda x: getattr(x, "why", str(x)),
)
def test_model_shapes_are_exact(head_dim: int, case: AttentionCase, dtype: torch.dtype) -> None:
    q, k, v = make_inputs(case, head_dim, dtype, "cuda", seed=head_dim)
    assert_exact(q, k, v, attention(q, k, v))


def test_scale_multiplies_the_scores(kernel_device: torch.device) -> None:
    q, k, v = make_inputs(AttentionCase("scale", 1, 33, 77, 2), 40, torch.float32, kernel_device, seed=0)
    out = attention(q, k, v, scale=0.5)
    assert_exact(q, k, v, out, scale=0.5)
    assert not torch.allclose(out, attention(q, k, v), atol=1e-3), "scale was ignored"


def test_a_single_key_returns_its_value_bit_for_bit(kernel_device: torch.device) -> None:
    q, k, v = make_inputs(AttentionCase("single key", 2, 9, 1, 3), 80, torch.float16, kernel_device, seed=0)
    assert torch.equal(attention(q, k, v), v.expand_as(q))


def test_an_empty_batch_gives_an_empty_output(kernel_device: torch.device) -> None:
    q = torch.empty((0, 64, 8, 40), dtype=torch.float16, device=kernel_device)
    k = torch.empty((0, 77, 8, 40), dtype=torch.float16, device=kernel_device)
    out = attention(q, k, k)
    assert out.shape == (0, 64, 8, 40)
    assert out.dtype == torch.float16


def test_flattening_heads_moves_nothing(kernel_device: torch.device) -> None:
    q, k, v = make_inputs(AttentionCase("heads", 2, 9, 7, 3), 40, torch.float16, kernel_device, seed=0)
    out = attention(q, k, v)
    assert out.view(2, 9, 120).data_ptr() == out.data_ptr()


def test_a_nan_in_one_head_stays_there(kernel_device: torch.device) -> None:
    q, k, v = make_inputs(AttentionCase("nan", 2, 20, 33, 2), 64, torch.float16, kernel_device, seed=0)
    v[1, 3, 0, 5] = torch.nan
    out = attention(q, k, v)
    assert out[1, :, 0, 5].isnan().all()
    assert out.isnan().sum() == 20, "NaN reached another head, batch row or column"


def test_inputs_are_left_alone(kernel_device: torch.device) -> None:
    inputs = make_inputs(AttentionCase("inputs", 1, 20, 33, 2), 64, torch.float16, kernel_device, seed=0)
    before = [x.clone() for x in inputs]
    attention(*inputs)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


def test_the_reference_is_the_textbook_formula() -> None:
    """Independent of chunking and of torch's softmax: one row, written out."""
    q, k, v = make_inputs(AttentionCase("reference", 2, 3, 5, 2), 64, torch.float32, "cpu", seed=3)
    out = attention_reference(q, k, v)
    logits = [math.fsum((q[1, 2, 1] * k[1, n, 1]).double().tolist()) / 8 for n in range(5)]
    weights = [math.exp(x) / math.fsum(math.exp(y) for y in logits) for x in logits]
    wanted = sum(w * v[1, n, 1].double() for n, w in enumerate(weights))
    assert torch.allclose(out[1, 2, 1], wanted, rtol=0, atol=1e-6)


def test_the_reference_does_not_depend_on_its_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffopt_kernels import reference

    q, k, v = make_inputs(AttentionCase("chunks", 2, 30, 17, 3), 40, torch.float32, "cpu", seed=3)
    whole = attention_reference(q, k, v)
    monkeypatch.setattr(reference, "_SCORES_AT_ONCE", 17 * 7)  # 7 rows of one head
    assert torch.allclose(attention_reference(q, k, v), whole, rtol=0, atol=1e-14)
