"""Kernels and arguments that tests of the launcher run: pointers, descriptors, Gluon, specialized integers."""

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from diffopt_kernels.attention_prepared import prepared_attention
from diffopt_kernels.candidates import attention_candidates
from diffopt_kernels.launcher import Pointer, Tiles


@triton.jit
def scaled_copy(out_ptr, x_ptr, scale, n, stride, absent, BLOCK: tl.constexpr, offset=7):
    """out[i] = x[i * stride + offset] * scale; `stride` and `offset` are specialized by value, `absent` is None."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = o < n
    tl.store(out_ptr + o, (tl.load(x_ptr + o * stride + offset, mask=m) * scale).to(out_ptr.dtype.element_ty), mask=m)


@triton.jit
def tile_copy(x_desc, absent, out_ptr, n, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The first tile of each of n slices."""
    i = tl.program_id(0)
    if i < n:
        b = x_desc.load([i, 0, 0]).reshape(ROWS, COLUMNS)
        o = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        tl.store(out_ptr + i * ROWS * COLUMNS + o, b)


@gluon.jit
def gluon_tile_copy(x_desc, out_desc):
    """One tile through shared memory."""
    tile = gl.allocate_shared_memory(x_desc.dtype, x_desc.block_type.shape, x_desc.layout)
    bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(bar, count=1)
    mbarrier.expect(bar, x_desc.block_type.nbytes)
    i = gl.program_id(0)
    tma.async_copy_global_to_shared(x_desc, [i * x_desc.block_type.shape[0], 0], bar, tile)
    mbarrier.wait(bar, 0)
    mbarrier.invalidate(bar)
    tma.async_copy_shared_to_global(out_desc, [i * x_desc.block_type.shape[0], 0], tile)
    tma.store_wait(0)


def cases() -> dict:
    """Name to (kernel, grid, arguments, tensors)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 48, 64, generator=generator).half()
    out = torch.zeros(6, 48, 64, dtype=torch.float16)
    scalars = {"out_ptr": Pointer(0), "x_ptr": Pointer(1), "scale": 0.375, "absent": None, "BLOCK": 256}
    layout = gl.NVMMASharedLayout.get_default_for([16, 64], gl.float16)
    tiles = (16, 64)
    return {
        "pointers": (scaled_copy, (4,), {**scalars, "n": 1000, "stride": 1, "num_warps": 4}, (out, x)),
        "integers by value": (scaled_copy, (2, 1), {**scalars, "n": 500, "stride": 16, "offset": 3}, (out, x)),
        "64-bit integers": (scaled_copy, (1,), {**scalars, "n": 1 << 40, "stride": 3}, (out, x)),
        "unaligned": (scaled_copy, (4,), {**scalars, "n": 1000, "stride": 2}, (out, x.flatten()[1:])),
        "descriptors": (
            tile_copy,
            (6,),
            {
                "x_desc": Tiles(1, tuple(x.shape), x.stride(), (1, *tiles)),
                "absent": None,
                "out_ptr": Pointer(0),
                "n": 6,
                "ROWS": 16,
                "COLUMNS": 64,
                "num_warps": 4,
            },
            (out, x),
        ),
        "gluon": (
            gluon_tile_copy,
            (18,),
            {
                "x_desc": Tiles(1, (288, 64), (64, 1), tiles, layout),
                "out_desc": Tiles(0, (288, 64), (64, 1), tiles, layout),
                "num_warps": 4,
            },
            (out, x),
        ),
    }


def attention_cases() -> dict:
    """The same for attention's own kernels, on tensors of a GPU that is not there."""
    chosen = {}
    for launch in attention_candidates([40]):
        if not launch.float32 and launch.takes(64):
            chosen.setdefault(launch.kernel, launch)
    q, k, v = (torch.randn(2, n, 3, 40, dtype=torch.float16) for n in (300, 64, 64))
    found = {}
    for kernel, launch in chosen.items():
        prepared = prepared_attention(q, k, v, 0.2, launch, None)
        found[f"attention {kernel}"] = (prepared.kernel, (7, 1, 1), prepared.arguments, (q, k, v, torch.empty_like(q)))
    mask = torch.rand(2, 1, 1, 64) > 0.5
    masked = prepared_attention(q, k, v, 0.2, chosen["pointers"], mask.expand(2, 3, 300, 64))
    tensors = (q, k, v, torch.empty_like(q), mask.view(torch.uint8))
    found["attention with a mask"] = (masked.kernel, (7,), masked.arguments, tensors)
    return found
