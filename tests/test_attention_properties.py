"""attention on random shapes, head dims, dtypes, memory layouts and masks: always exact, and it reads nothing else.

The examples are the same in every run (conftest.py); HYPOTHESIS_PROFILE=random draws new ones.
"""

from dataclasses import dataclass

import pytest
import torch
from attention_exactness import assert_exact
from conftest import HAS_GPU
from hypothesis import given, settings
from hypothesis import strategies as st

from diffopt_kernels import HEAD_DIMS, attention, attention_reference

DTYPES = [torch.float16, torch.float32, *([torch.bfloat16] if HAS_GPU else [])]  # the interpreter has no bfloat16
EXAMPLES = 300 if HAS_GPU else 30


@dataclass(frozen=True)
class Layout:
    """How a tensor of given sizes lies in memory: a view of a buffer that is NaN everywhere else.

    Attributes:
        order: axes from the slowest to the fastest.
        gaps: extra elements after each axis, by position in `order`.
        offset: elements before the first.
        repeated: axes that hold one entry for all indices, with stride 0.
    """

    order: tuple[int, ...]
    gaps: tuple[int, ...]
    offset: int
    repeated: frozenset[int]

    def place(self, values: torch.Tensor) -> torch.Tensor:
        """A view with these values (of the first entry where an axis is repeated)."""
        strides, stride = [0] * values.dim(), 1
        for axis, gap in zip(reversed(self.order), reversed(self.gaps), strict=True):
            if axis not in self.repeated:
                strides[axis] = stride
                stride = stride * values.shape[axis] + gap
        filler = True if values.dtype == torch.bool else torch.nan
        buffer = torch.full((self.offset + stride + 1,), filler, dtype=values.dtype, device=values.device)
        sizes = [1 if axis in self.repeated else n for axis, n in enumerate(values.shape)]
        view = buffer.as_strided(sizes, strides, self.offset)
        view.copy_(values[tuple(slice(n) for n in sizes)])
        return view.expand(values.shape)


def layouts(axes: int, *, fastest: tuple[int, ...] = (), repeatable: tuple[int, ...]) -> st.SearchStrategy[Layout]:
    """Any order of the axes (but those that have to be fastest), any gaps, any of the repeatable axes repeated.

    Gaps and offsets are often multiples of 16 bytes, so that aligned inputs are as common as unaligned ones.
    """
    free = [axis for axis in range(axes) if axis not in fastest]
    gap = st.sampled_from([0, 0, 8, 16, 1, 3])
    return st.builds(
        lambda order, gaps, offset, repeated: Layout((*order, *fastest), gaps, offset, frozenset(repeated)),
        st.permutations(free),
        st.tuples(*[gap] * axes),
        gap,
        st.sets(st.sampled_from(repeatable), max_size=1) if repeatable else st.just(set()),
    )


TENSORS = layouts(4, fastest=(3,), repeatable=(0, 2))
SCALES = st.none() | st.floats(0.01, 1.0)


@st.composite
def calls(draw: st.DrawFn, device: torch.device):
    """q, k and v of one call, with a generator for what else it takes."""
    n_q, n_k, heads = draw(st.integers(1, 90)), draw(st.integers(1, 140)), draw(st.integers(1, 3))
    batch = max(draw(st.integers(1, 2)), -(-64 // (n_q * heads)))  # over a few rows the larger rounding is luck
    head_dim, dtype = draw(st.sampled_from(HEAD_DIMS)), draw(st.sampled_from(DTYPES))
    spread = draw(st.sampled_from([1.0, 3.0]))
    generator = torch.Generator(device).manual_seed(draw(st.integers(0, 2**20)))

    def tensor(n: int, factor: float = 1.0) -> torch.Tensor:
        values = torch.randn((batch, n, heads, head_dim), generator=generator, device=device) * factor
        return draw(TENSORS).place(values.to(dtype))

    return tensor(n_q, spread), tensor(n_k), tensor(n_k), generator


@st.composite
def masks(draw: st.DrawFn, q: torch.Tensor, k: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A mask of any kind that broadcasts to [B, H, N_q, N_k], some of it closed, with rows and tiles wholly closed."""
    sizes = [n if draw(st.booleans()) else 1 for n in (q.shape[0], q.shape[2], q.shape[1], k.shape[1])]
    values = torch.randn(sizes, generator=generator, device=q.device)
    closed = values > draw(st.sampled_from([-0.5, 0.5, 2.0]))
    first = draw(st.sampled_from([0, 0, sizes[2] // 2]))
    closed[:, :, :first] = True
    first = draw(st.sampled_from([0, 0, sizes[3] - 1]))
    closed[..., :first] = True
    kind = draw(st.sampled_from(["boolean", "as q", "float32"]))
    if kind == "boolean":
        values = ~closed
    else:
        lowest = draw(st.sampled_from([-torch.inf, -10000.0]))
        values = torch.where(closed, lowest, values).to(q.dtype if kind == "as q" else torch.float32)
    view = draw(layouts(4, repeatable=(0, 1, 2, 3))).place(values)
    leading = next((axis for axis, n in enumerate(sizes) if n > 1), 3)
    return view[(0,) * draw(st.integers(0, leading))]  # leading ones may be left out


@settings(max_examples=EXAMPLES)
@given(data=st.data(), scale=SCALES)
def test_any_shape_and_strides_are_exact(data: st.DataObject, scale: float | None, kernel_device) -> None:
    q, k, v, _ = data.draw(calls(kernel_device))
    assert_exact(q, k, v, attention(q, k, v, scale=scale), scale=scale)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # numpy, of what becomes a weight of 0
@settings(max_examples=EXAMPLES)
@given(data=st.data(), scale=SCALES)
def test_any_mask_is_exact(data: st.DataObject, scale: float | None, kernel_device) -> None:
    q, k, v, generator = data.draw(calls(kernel_device))
    mask = data.draw(masks(q, k, generator))
    out = attention(q, k, v, mask=mask, scale=scale)
    if (attention_reference(q, k, v, mask=mask, scale=scale) == 0).all():
        assert (out == 0).all(), "no query has a key"
    else:
        assert_exact(q, k, v, out, mask=mask, scale=scale)


@settings(max_examples=EXAMPLES)
@given(data=st.data(), seed=st.integers(0, 2**20))
def test_a_layout_changes_no_value(data: st.DataObject, seed: int) -> None:
    """Of this file's own making: views hold what was placed, and NaN is around them."""
    values = torch.randn(2, 3, 2, 8, generator=torch.Generator().manual_seed(seed))
    layout = data.draw(TENSORS)
    view = layout.place(values)
    assert view.stride(3) == 1
    for axis in layout.repeated:
        values = values.narrow(axis, 0, 1)
    assert torch.equal(view, values.expand(2, 3, 2, 8))
    storage = torch.empty(0).set_(view.untyped_storage())
    assert storage.isfinite().sum() == values.numel()
