"""A new size or batch compiles no kernel: what Triton would compile for UNets, counted without a GPU.

On an H100 the first SD1.5 picture of a new size took 34 s, 62 variants of kernels at 0.55 s each (2026-11-26).
"""

import collections

import kernel_variants
import pytest
import torch

from diffopt.bench.random_configs import SD15, SDXL, RandomModelConfig
from diffopt_kernels.launcher import Pointer
from diffopt_kernels.step import _rows
from diffopt_kernels.step.products import (
    SAME,
    STRIDED,
    UPSAMPLED,
    Form,
    box_of,
    boxes_of,
    convolution_launch,
    prepared_addition,
)

FIRST = {
    "group_norm_whole_kernel": 17,
    "group_norm_moments_kernel": 3,
    "group_norm_apply_kernel": 4,
    "layer_norm_kernel": 9,
    "thin_convolution_gather_kernel": 1,
    "thin_convolution_shift_kernel": 1,
}
"""Variants of SD1.5's first picture, beside those of `bias_add` and what products leave over."""


def added(
    patch: pytest.MonkeyPatch, config: RandomModelConfig, calls: list[tuple[int, int, int]], *, products: bool
) -> list[collections.Counter[str]]:
    """By kernel, how many variants each call, (batch, width, height), adds to those before it."""
    counts = []
    with kernel_variants.noted_launches(patch, products=products) as found:
        unet = kernel_variants.unet_on_meta(config)
        for call in calls:
            before = frozenset(found)
            kernel_variants.run(unet, *call)
            counts.append(collections.Counter(name for name, *_ in found - before))
    return counts


@pytest.mark.parametrize("products", [True, False], ids=["products", "no products"])
def test_new_sizes_of_sd15_compile_nothing(products: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [(512, 512), (640, 448), (448, 704), (768, 512), (576, 1024), (768, 768)]
    first, *others = added(monkeypatch, SD15, [(2, *size) for size in sizes], products=products)
    rest = {"bias_add_kernel": 3} if products else {"bias_add_kernel": 6, "upsample_kernel": 2, "geglu_kernel": 1}
    assert first == FIRST | rest
    assert not any(others), dict(zip(sizes[1:], others, strict=True))


def test_new_sizes_of_sdxl_compile_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [(1024, 1024), (832, 1216), (1152, 896), (1536, 640)]
    first, *others = added(monkeypatch, SDXL, [(2, *size) for size in sizes], products=True)
    assert first.total() == 24
    assert not any(others), dict(zip(sizes[1:], others, strict=True))


def test_new_batches_compile_a_handful_of_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """From some size on, the second convolution's norm adds the bias of the first, which is cuDNN's then."""
    _, *others = added(monkeypatch, SD15, [(batch, 512, 512) for batch in (2, 1, 4, 8, 16)], products=True)
    assert [counts.total() for counts in others] == [0, 0, 2, 1]
    assert {name[:10] for counts in others for name in counts} == {"group_norm"}


def products_of_sd15(width: int, height: int) -> tuple[set[tuple], set[tuple]]:
    """What Hopper's convolutions, and the sums of their shares, compile for a picture with guidance on an H100."""
    found, sums = set(), set()

    def convolve(channels: int, columns: int, high: int, wide: int, form: Form = SAME) -> None:
        grid = form.grid(high, wide)
        steps = form.neighbours * channels // 64
        launch = convolution_launch(boxes_of(2, *grid) * form.corners, columns, steps, 132)
        found.add((launch.parts, launch.programs, launch.shares > 1, box_of(*grid), form))
        if launch.shares > 1:
            count = 2 * grid[0] * grid[1] * form.corners
            arguments = prepared_addition(count, columns, launch.shares, False, torch.device("meta")).arguments
            sums.add(tuple(arguments[name] for name in ("SHARES", "ROWS", "COLS", "WIDE")))

    levels = (320, 640, 1280, 1280)
    sizes = [(height // 8, width // 8)]
    for _ in levels[1:]:
        sizes.append(tuple(-(-side // 2) for side in sizes[-1]))
    x, skips = 320, [320]
    for i, columns in enumerate(levels):
        for _ in range(2):
            convolve(x, columns, *sizes[i])
            convolve(columns, columns, *sizes[i])
            x = columns
            skips.append(x)
        if i < 3:
            skips.append(x)
            if not any(side % 2 for side in sizes[i]):
                convolve(x, x, *sizes[i], STRIDED)
    for i in reversed(range(4)):
        for _ in range(3):
            convolve(x + skips.pop(), levels[i], *sizes[i])
            convolve(levels[i], levels[i], *sizes[i])
            x = levels[i]
        if i:
            convolve(x, x, *sizes[i], UPSAMPLED)
    return found, sums


def test_new_proportions_compile_a_handful_of_products() -> None:
    """Boxes of pixels and tiles are chosen by size; what a size of the same kinds needs is there already."""
    seen, seen_sums = products_of_sd15(512, 512)
    assert len(seen) <= 8
    assert len(seen_sums) <= 5  # with and without a residual these are twice as many
    added, added_sums = [], []
    for size in ((640, 448), (448, 704), (768, 512), (576, 1024), (512, 768), (768, 768), (1024, 1024)):
        needed, sums = products_of_sd15(*size)
        added.append(len(needed - seen))
        added_sums.append(len(sums - seen_sums))
        seen, seen_sums = seen | needed, seen_sums | sums
    assert sum(added_sums) <= 2, added_sums
    assert max(added) <= 7, added
    assert added[2] == added[4] == added[6] == 0, added


def test_variants_are_told_apart_as_triton_does() -> None:
    x = torch.empty(64, 64, dtype=torch.float16, device="meta")

    def variant(tensor: torch.Tensor = x, **changed):
        names = [parameter.name for parameter in kernel_variants._parameters(_rows.bias_add_kernel)]
        arguments = {name: Pointer(0) for name in names if name.endswith("_ptr")}
        arguments |= {"M": 64, "C": 64, "ROWS": 16, "COLS": 64, "TILES": 4, "num_warps": 4, **changed}
        return kernel_variants.variant_of_launch(_rows.bias_add_kernel, arguments, (tensor,))

    same = [variant(), variant(M=1), variant(M=65), variant(C=128), variant(x[8:])]
    others = [
        *(variant(C=1), variant(C=65), variant(M=2**31), variant(ROWS=8), variant(num_warps=8)),
        *(variant(residual_ptr=None), variant(x[:, 1:]), variant(x.float())),
    ]
    assert len(set(same)) == 1
    assert len({*same, *others}) == 1 + len(others)
