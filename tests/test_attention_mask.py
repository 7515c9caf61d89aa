"""attention(q, k, v, mask=...): exact for every kind of mask, and PyTorch's own answer where a query has no key."""

import pytest
import torch
from attention_exactness import assert_exact
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from diffopt_kernels import attention, attention_launch, attention_reference, launch_attention
from diffopt_kernels.attention_cases import AttentionCase, make_inputs, make_mask
from diffopt_kernels.launch import LaunchKey

# The lowest number less a maximum, times log2(e), is -inf, and its power 0, as wanted; numpy warns of it.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in multiply:RuntimeWarning")

# The interpreter computes bfloat16 wrongly, so it is tested compiled only.
DTYPES = [torch.float16, torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]

CASES = [
    AttentionCase("padded prompt", 2, 33, 77, 2, "spread 3", mask="keys"),
    AttentionCase("padded prompt, whole tiles", 2, 33, 128, 2, "rising", mask="keys"),
    AttentionCase("first tiles hold no key", 2, 33, 131, 2, "spread 3", "surrounded", "late keys"),
    AttentionCase("queries without keys", 1, 131, 77, 2, "spread 3", "surrounded", "pairs"),
    AttentionCase("one pair of many heads", 2, 17, 64, 3, "normal", "fused", "pairs"),
    AttentionCase("bias with -inf", 2, 33, 77, 3, "spread 3", "heads first", "bias"),
    AttentionCase("missing keys would score highest", 1, 64, 96, 2, "far below zero", mask="bias"),
    AttentionCase("lowest numbers, keys before queries", 1, 65, 77, 2, "spread 3", "unaligned", "wide bias"),
]


def inputs(case: AttentionCase, head_dim: int, dtype: torch.dtype, device: torch.device):
    return (
        *make_inputs(case, head_dim, dtype, device, seed=head_dim),
        make_mask(case, dtype, device, seed=head_dim),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [40, 168])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.why)
def test_masked_cases_are_exact(
    case: AttentionCase, head_dim: int, dtype: torch.dtype, kernel_device: torch.device
) -> None:
    q, k, v, mask = inputs(case, head_dim, dtype, kernel_device)
    out = attention(q, k, v, mask=mask)
    assert_exact(q, k, v, out, mask=mask)
    assert not torch.allclose(out, attention(q, k, v), atol=1e-3), "the mask changed nothing"


BACKENDS = [SDPBackend.MATH, pytest.param(SDPBackend.EFFICIENT_ATTENTION, marks=pytest.mark.gpu)]


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda x: x.name)
@pytest.mark.parametrize("kind", ["boolean", "-inf"])
def test_a_query_without_keys_gets_zeros_as_from_pytorch(backend, kind: str, kernel_device: torch.device) -> None:
    q, k, v = make_inputs(AttentionCase("no keys", 2, 40, 72, 2), 64, torch.float16, kernel_device, seed=0)
    attends = torch.ones(40, 72, dtype=torch.bool, device=kernel_device)
    attends[5:9] = False
    mask = attends if kind == "boolean" else torch.zeros_like(attends, dtype=q.dtype).masked_fill(~attends, -torch.inf)
    with sdpa_kernel(backend):
        heads_first = [x.transpose(1, 2) for x in (q, k, v)]
        theirs = scaled_dot_product_attention(*heads_first, attn_mask=mask).transpose(1, 2)
    for out in (theirs, attention(q, k, v, mask=mask), attention_reference(q, k, v, mask=mask)):
        assert (out[:, 5:9] == 0).all()
        assert (out[:, :5] != 0).any(-1).all()
        assert out.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_the_lowest_numbers_are_not_minus_infinity(dtype: torch.dtype, kernel_device: torch.device) -> None:
    """A row of nothing but float32's lowest number weighs all keys alike, as in PyTorch; times log2(e) it overflows."""
    q, k, v = make_inputs(AttentionCase("lowest", 2, 33, 72, 2), 64, dtype, kernel_device, seed=0)
    mask = torch.full((33, 1), torch.finfo(torch.float32).min, device=kernel_device)
    out = attention(q, k, v, mask=mask)
    assert torch.allclose(out, v.mean(1, keepdim=True).expand_as(out), atol=1e-3)


def assert_same_numbers(out, q, k, v, mask) -> None:
    """`out` is attention with this contiguous mask: bitwise in the interpreter. Compiled, each kind of mask is a kernel
    of its own, which may add up in another order."""
    assert_exact(q, k, v, out, mask=mask)
    if q.device.type == "cpu":
        assert torch.equal(out, attention(q, k, v, mask=mask))


def test_a_mask_is_read_in_place(kernel_device: torch.device) -> None:
    """What lies between a view's elements is never read: NaN there changes nothing."""
    q, k, v = make_inputs(AttentionCase("view", 2, 33, 45, 3), 64, torch.float32, kernel_device, seed=0)
    around = torch.full((2, 3, 36, 2 * 45 + 3), torch.nan, device=kernel_device)
    mask = around[:, :, 1:34, 1:91:2]
    mask.copy_(torch.randn(mask.shape))
    assert_same_numbers(attention(q, k, v, mask=mask), q, k, v, mask.contiguous())


@pytest.mark.parametrize("shape", [(), (45,), (33, 1), (3, 1, 45), (2, 1, 1, 45), (1, 3, 33, 1)], ids=str)
def test_a_broadcast_mask_is_the_expanded_one(shape: tuple[int, ...], kernel_device: torch.device) -> None:
    q, k, v = make_inputs(AttentionCase("broadcast", 2, 33, 45, 3, "spread 3"), 64, torch.float16, kernel_device, 0)
    mask = torch.randn(shape, device=kernel_device).half()
    assert_same_numbers(attention(q, k, v, mask=mask), q, k, v, mask.expand(2, 3, 33, 45).contiguous())


def test_a_mask_that_allows_everything_changes_at_most_a_rounding(kernel_device: torch.device) -> None:
    q, k, v = make_inputs(AttentionCase("all", 2, 33, 77, 3, "spread 3"), 64, torch.float16, kernel_device, seed=0)
    mask = torch.ones(33, 77, dtype=torch.bool, device=kernel_device)
    assert_exact(q, k, v, attention(q, k, v, mask=mask))


def test_a_launch_that_can_not_take_a_mask_does_not_ignore_it(kernel_device: torch.device) -> None:
    q, k, v = make_inputs(AttentionCase("descriptors", 1, 33, 77, 1), 64, torch.float16, kernel_device, seed=0)
    launch = attention_launch(LaunchKey(1, 33, 999, 1, 64), float32=False, aligned=True, capability=(9, 0))
    assert launch.kernel != "pointers"
    with pytest.raises(ValueError, match=r"a mask was given with d64 .*allowed: launches of the pointers kernel"):
        launch_attention(q, k, v, torch.empty_like(q), 1.0, launch, torch.ones(33, 77, device=kernel_device))


def test_the_reference_is_pytorchs_formula() -> None:
    """In float64 PyTorch's math and the reference differ by rounding alone, fully masked rows included."""
    for case in CASES:
        q, k, v, mask = inputs(case, 40, torch.float64, torch.device("cpu"))
        heads_first = [x.transpose(1, 2) for x in (q, k, v)]
        mask = mask if mask is None or mask.dtype == torch.bool else mask.double()
        with sdpa_kernel(SDPBackend.MATH):
            theirs = scaled_dot_product_attention(*heads_first, attn_mask=mask).transpose(1, 2)
        assert torch.allclose(attention_reference(q, k, v, mask=mask), theirs, rtol=0, atol=1e-12), case.why


def test_the_masked_reference_does_not_depend_on_its_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffopt_kernels import reference

    for case in CASES[3:]:
        q, k, v, mask = inputs(case, 40, torch.float32, torch.device("cpu"))
        whole = attention_reference(q, k, v, mask=mask)
        with monkeypatch.context() as patch:
            patch.setattr(reference, "_SCORES_AT_ONCE", case.n_k * 7)  # 7 rows of one head
            assert torch.allclose(attention_reference(q, k, v, mask=mask), whole, rtol=0, atol=1e-12)
            patch.setattr(reference, "_SCORES_AT_ONCE", case.n_k * case.n_q * 2)  # 2 heads, not the batch row's 3
            assert torch.allclose(attention_reference(q, k, v, mask=mask), whole, rtol=0, atol=1e-12)
