"""Device side of products on Hopper GPUs, in Gluon: rows, or 3×3 neighbourhoods of pixels, times a weight.

Programs stay and take one tile of the output after another. A warp of its own fills a ring of STAGES in shared memory
(TMA), as far ahead of the products as the ring is deep and into the next tile as well. Each of GROUPS warpgroups
multiplies its 64 pixels with the tile's columns. These are two parts because 160 of them are no power of two, or
because GEGLU wants those of hidden and of gate. A step is 64 channels of x, in a convolution those of one neighbour:
what lies beyond the image arrives as zeros. Sums start from the bias and are rounded once, with the residual or GEGLU
in them.

In a convolution of an image of twice the size, whose pixels are each other's copies in blocks of 2×2, a pixel's nine
neighbours are four pixels of the small image. Which, and with which sums of weights, depends on the pixel's place in
its block, its corner: the columns of all four corners lie behind each other, a tile belongs to one of them.

Where tiles are too few for the GPU, SPLIT gives each a share of the steps; the sums are left as they are then, and
`convolution_sums_kernel` adds them up.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from diffopt_kernels._gluon_tiles import ROWS, accumulator, new_barriers, thread_barrier

DEPTH = gl.constexpr(64)  # channels of one step: 128 bytes, as wide as a swizzled row of shared memory can be
_BAND = gl.constexpr(16)  # rows of tiles that are taken column by column, so that programs share what they read


class Config(NamedTuple):
    """What the compiler knows; the kernels say what each is. NEIGHBOURS is 9, of an upsampled image 4, for rows 1."""

    PART_0: gl.constexpr
    PART_1: gl.constexpr
    HIGH: gl.constexpr
    WIDE: gl.constexpr
    STAGES: gl.constexpr
    GROUPS: gl.constexpr
    NEIGHBOURS: gl.constexpr
    STRIDE: gl.constexpr
    GATED: gl.constexpr
    SPLIT: gl.constexpr


class Sizes(NamedTuple):
    """Of the whole product."""

    B: gl.tensor
    H: gl.tensor
    W: gl.tensor
    C: gl.tensor
    N: gl.tensor
    n_down: gl.tensor  # tiles, one below the other
    n_across: gl.tensor
    n_depth: gl.tensor  # steps of one neighbour
    n_steps: gl.tensor
    n_shares: gl.tensor  # of the steps of one tile
    per_share: gl.tensor  # steps
    has_residual: gl.tensor


class Memory(NamedTuple):
    """Tensor descriptors and pointers, tiles in shared memory, and the barriers that guard them."""

    x_desc: tma.tensor_descriptor
    w0_desc: tma.tensor_descriptor
    w1_desc: tma.tensor_descriptor
    out0_desc: tma.tensor_descriptor
    out1_desc: tma.tensor_descriptor
    bias_ptr: gl.tensor
    residual_ptr: gl.tensor
    sums_ptr: gl.tensor
    x: gl.shared_memory_descriptor  # [STAGES * GROUPS, *block of x_desc]
    w0: gl.shared_memory_descriptor  # [STAGES, PART_0, DEPTH]
    w1: gl.shared_memory_descriptor
    out0: gl.shared_memory_descriptor  # [GROUPS, *block of out0_desc]
    out1: gl.shared_memory_descriptor
    ready: gl.shared_memory_descriptor  # per stage: its tiles have arrived
    free: gl.shared_memory_descriptor  # per stage: every warpgroup is done with them


# --- places ---------------------------------------------------------------------------------------------------------


@gluon.jit
def _tile(i_program, sizes):
    """Row and column of a program's tile; bands of _BAND rows are taken column by column."""
    i = i_program % (sizes.n_down * sizes.n_across)
    of_band = _BAND * sizes.n_across
    first = i // of_band * _BAND
    height = gl.minimum(sizes.n_down - first, _BAND)
    within = i % of_band
    return first + within % height, within // height


@gluon.jit
def _columns(i_across, sizes, c):
    """First weight row of both parts."""
    if c.GATED:
        first = i_across * c.PART_0
        second = first + sizes.N
    else:
        first = i_across * (c.PART_0 + c.PART_1)
        second = first + c.PART_0
    return first, second


@gluon.jit
def _corner(first, sizes, c):
    """Row and column of an output pixel in its block of 2×2, and the output's column, of a weight row."""
    if c.NEIGHBOURS == 4:
        i = first // sizes.N
        return i // 2, i % 2, first % sizes.N
    return first * 0, first * 0, first


@gluon.jit
def _steps(i_program, sizes):
    """First step of a program's share, and the end."""
    first = i_program // (sizes.n_down * sizes.n_across) * sizes.per_share
    return first, gl.minimum(first + sizes.per_share, sizes.n_steps)


@gluon.jit
def _box(i, sizes, c):
    """Image, first row and first column of the i-th box of HIGH × WIDE pixels."""
    across = gl.cdiv(sizes.W, c.WIDE)
    of_image = across * gl.cdiv(sizes.H, c.HIGH)
    within = i % of_image
    return i // of_image, within // across * c.HIGH, within % across * c.WIDE


@gluon.jit
def _offsets(box, first, sizes, PART: gl.constexpr, c):
    """Of a box's outputs for the weight rows from `first` on, in the contiguous output, and which of them exist."""
    i_image, row, column = box
    layout: gl.constexpr = accumulator(PART)
    o_p = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    row += o_p // c.WIDE
    column += o_p % c.WIDE
    exists = (i_image < sizes.B) & (row < sizes.H) & (column < sizes.W)
    o_n = gl.arange(0, PART, gl.SliceLayout(0, layout))
    if c.NEIGHBOURS == 4:
        below, right, first = _corner(first, sizes, c)
        pixels = (i_image * 2 * sizes.H + 2 * row + below) * 2 * sizes.W + 2 * column + right
    else:
        pixels = (i_image * sizes.H + row) * sizes.W + column
    offsets = pixels[:, None] * sizes.N + first + o_n[None, :]
    return offsets, exists[:, None] & (o_n >= 0)[None, :]


# --- loads ----------------------------------------------------------------------------------------------------------


@gluon.jit
def _load_step(mem, sizes, boxes, first, second, k, step, c):
    """Send for step k of a tile, which is the program's step-th."""
    bytes_of_step: gl.constexpr = (
        c.GROUPS * mem.x_desc.block_type.nbytes
        + mem.w0_desc.block_type.nbytes
        + (mem.w1_desc.block_type.nbytes if c.PART_1 else 0)
    )
    stage = step % c.STAGES
    mbarrier.wait(mem.free.index(stage), ((step // c.STAGES) & 1) ^ 1)
    ready = mem.ready.index(stage)
    mbarrier.expect(ready, bytes_of_step)
    neighbour = k // sizes.n_depth
    channel = k % sizes.n_depth * DEPTH
    for w in gl.static_range(c.GROUPS):
        i_image, row, column = _box(boxes + w, sizes, c)
        x = mem.x.index(stage * c.GROUPS + w)
        if c.STRIDE == 2:  # an output's middle pixel is the first of its block of 2×2, the ones before are of others
            below, right = neighbour // 3 + 1, neighbour % 3 + 1
            row += below // 2 - 1
            column += right // 2 - 1
            place = [i_image, row, below % 2, column, right % 2 * sizes.C + channel]
            tma.async_copy_global_to_shared(mem.x_desc, place, ready, x)
        else:
            if c.NEIGHBOURS == 9:
                row += neighbour // 3 - 1
                column += neighbour % 3 - 1
            elif c.NEIGHBOURS == 4:
                below, right, _ = _corner(first, sizes, c)
                row += neighbour // 2 - 1 + below
                column += neighbour % 2 - 1 + right
            tma.async_copy_global_to_shared(mem.x_desc, [i_image, row, column, channel], ready, x)
    tma.async_copy_global_to_shared(mem.w0_desc, [first, k * DEPTH], ready, mem.w0.index(stage))
    if c.PART_1:
        tma.async_copy_global_to_shared(mem.w1_desc, [second, k * DEPTH], ready, mem.w1.index(stage))


@gluon.jit
def _loader(mem, sizes, c):
    """Everything the loading warp does."""
    step = gl.program_id(0) * 0
    for i in range(gl.program_id(0), sizes.n_down * sizes.n_across * sizes.n_shares, gl.num_programs(0)):
        i_down, i_across = _tile(i, sizes)
        first, second = _columns(i_across, sizes, c)
        begin, end = _steps(i, sizes)
        for k in range(begin, end):
            _load_step(mem, sizes, i_down * c.GROUPS, first, second, k, step, c)
            step += 1


# --- products -------------------------------------------------------------------------------------------------------


@gluon.jit
def _started(mem, sizes, first, PART: gl.constexpr, c):
    """Accumulators [ROWS, PART] that hold the bias for weight rows from `first` on, or zeros where sums are left."""
    layout: gl.constexpr = accumulator(PART)
    sums = gl.zeros([ROWS, PART], gl.float32, layout)
    if not c.SPLIT:
        _, _, first = _corner(first, sizes, c)
        sums += gl.load(mem.bias_ptr + first + gl.arange(0, PART, gl.SliceLayout(0, layout))).to(gl.float32)[None, :]
    return warpgroup_mma_init(sums)


@gluon.jit
def _sums(mem, sizes, i, step, first, second, i_group: gl.constexpr, c):
    """Both parts of a warpgroup's sums of a program's i-th tile, and the program's step after it."""
    acc0 = _started(mem, sizes, first, c.PART_0, c)
    acc1 = acc0
    if c.PART_1:
        acc1 = _started(mem, sizes, second, c.PART_1, c)
    begin, end = _steps(i, sizes)
    for k in range(begin, end):
        stage = step % c.STAGES
        mbarrier.wait(mem.ready.index(stage), (step // c.STAGES) & 1)
        x = mem.x.index(stage * c.GROUPS + i_group).reshape([ROWS, DEPTH])
        acc0 = warpgroup_mma(x, mem.w0.index(stage).permute((1, 0)), acc0, is_async=True)
        if c.PART_1:
            acc1 = warpgroup_mma(x, mem.w1.index(stage).permute((1, 0)), acc1, is_async=True)
            a0, a1 = warpgroup_mma_wait(2, deps=[acc0, acc1])  # the step before is done
            acc1 = warpgroup_mma_init(a1)
        else:
            a0 = warpgroup_mma_wait(1, deps=[acc0])
        acc0 = warpgroup_mma_init(a0)
        mbarrier.arrive(mem.free.index((step + c.STAGES - 1) % c.STAGES), count=1, pred=k > begin)
        step += 1
    if c.PART_1:
        a0, a1 = warpgroup_mma_wait(0, deps=[acc0, acc1])
    else:
        a0 = warpgroup_mma_wait(0, deps=[acc0])
        a1 = a0
    mbarrier.arrive(mem.free.index((step + c.STAGES - 1) % c.STAGES), count=1)
    return a0, a1, step


# --- outputs --------------------------------------------------------------------------------------------------------


@gluon.jit
def _gelu(g):
    """g Φ(g) without a branch: Φ(-|g|) is 2 to the power of a polynomial, within 4e-6 of itself."""
    a = gl.abs(g)
    power = a * -1.79365725e-06 + 6.09085873e-05
    power = power * a - 0.000926066656
    power = power * a + 0.00849391613
    power = power * a - 0.0539381951
    power = power * a - 0.45848012
    power = power * a - 1.15124702
    power = power * a - 0.99999547
    return gl.maximum(g, 0.0) - a * gl.exp2(power)


@gluon.jit
def _with_residual(sums, mem, sizes, box, first, PART: gl.constexpr, c):
    if c.NEIGHBOURS == 9:  # noqa: SIM102  (Triton 3.6 fails at a branch that it finds dead late)
        if sizes.has_residual:
            offsets, exists = _offsets(box, first, sizes, PART, c)
            sums += gl.load(mem.residual_ptr + offsets, mask=exists, other=0.0).to(gl.float32)
    return sums


@gluon.jit
def _leave_sums(sums, mem, sizes, i_share, box, first, PART: gl.constexpr, c):
    """Write sums [ROWS, PART] of a share of the steps as they are."""
    offsets, exists = _offsets(box, first, sizes, PART, c)
    pixels = sizes.B * sizes.H * sizes.W * (4 if c.NEIGHBOURS == 4 else 1)
    of_share = mem.sums_ptr + i_share.to(gl.int64) * (pixels * sizes.N)
    gl.store(of_share + offsets, sums, mask=exists)


@gluon.jit
def _write(a0, a1, mem, sizes, box, first, second, i_group: gl.constexpr, c):
    """Send a warpgroup's outputs on their way."""
    dtype: gl.constexpr = mem.x_desc.dtype
    out0 = mem.out0.index(i_group)
    tma.store_wait(0)  # of the tile before, which leaves from the same place
    thread_barrier()
    out0.reshape([ROWS, c.PART_0]).store(a0.to(dtype))
    if c.PART_1 and not c.GATED:
        out1 = mem.out1.index(i_group)
        out1.reshape([ROWS, c.PART_1]).store(a1.to(dtype))
    fence_async_shared()
    thread_barrier()
    _send(mem.out0_desc, out0, sizes, box, first, c)
    if c.PART_1 and not c.GATED:
        _send(mem.out1_desc, out1, sizes, box, second, c)


@gluon.jit
def _send(out_desc, out, sizes, box, first, c):
    """Copy a tile of outputs for the weight rows from `first` on to its place."""
    i_image, row, column = box
    if c.NEIGHBOURS == 4:
        below, right, first = _corner(first, sizes, c)
        tma.async_copy_shared_to_global(out_desc, [i_image, row, below, column, right * sizes.N + first], out)
    else:
        tma.async_copy_shared_to_global(out_desc, [i_image, row, column, first], out)


@gluon.jit
def _warpgroup(mem, sizes, i_group: gl.constexpr, c):
    """Everything one warpgroup does."""
    step = gl.program_id(0) * 0
    n_tiles = sizes.n_down * sizes.n_across
    for i in range(gl.program_id(0), n_tiles * sizes.n_shares, gl.num_programs(0)):
        i_down, i_across = _tile(i, sizes)
        first, second = _columns(i_across, sizes, c)
        box = _box(i_down * c.GROUPS + i_group, sizes, c)
        a0, a1, step = _sums(mem, sizes, i, step, first, second, i_group, c)
        if c.SPLIT:
            _leave_sums(a0, mem, sizes, i // n_tiles, box, first, c.PART_0, c)
            if c.PART_1:
                _leave_sums(a1, mem, sizes, i // n_tiles, box, second, c.PART_1, c)
        else:
            if c.GATED:
                a0 *= _gelu(a1)
            else:
                a0 = _with_residual(a0, mem, sizes, box, first, c.PART_0, c)
                if c.PART_1:
                    a1 = _with_residual(a1, mem, sizes, box, second, c.PART_1, c)
            _write(a0, a1, mem, sizes, box, first, second, i_group, c)
    tma.store_wait(0)


# --- the kernel -----------------------------------------------------------------------------------------------------


@gluon.jit
def _product(
    x_desc,
    w0_desc,
    w1_desc,
    out0_desc,
    out1_desc,
    bias_ptr,
    residual_ptr,
    sums_ptr,
    B,
    H,
    W,
    C,
    N,
    n_shares,
    has_residual,
    REGISTERS,
    c,
):
    """The kernel's body; its arguments are explained there."""
    dtype: gl.constexpr = x_desc.dtype
    columns: gl.constexpr = c.PART_0 if c.GATED else c.PART_0 + c.PART_1
    n_boxes = B * gl.cdiv(H, c.HIGH) * gl.cdiv(W, c.WIDE)
    n_depth = gl.cdiv(C, DEPTH)
    n_steps = n_depth * c.NEIGHBOURS
    sizes = Sizes(
        *(B, H, W, C, N, gl.cdiv(n_boxes, c.GROUPS), N // columns * (4 if c.NEIGHBOURS == 4 else 1)),
        *(n_depth, n_steps, n_shares, gl.cdiv(n_steps, n_shares), has_residual),
    )
    x = gl.allocate_shared_memory(dtype, [c.STAGES * c.GROUPS] + x_desc.block_shape, x_desc.layout)  # noqa: RUF005
    w0 = gl.allocate_shared_memory(dtype, [c.STAGES, c.PART_0, DEPTH], w0_desc.layout)
    w1, out0, out1 = w0, x, x
    if c.PART_1:
        w1 = gl.allocate_shared_memory(dtype, [c.STAGES, c.PART_1, DEPTH], w1_desc.layout)
    if not c.SPLIT:
        out0 = gl.allocate_shared_memory(dtype, [c.GROUPS] + out0_desc.block_shape, out0_desc.layout)  # noqa: RUF005
        if c.PART_1 and not c.GATED:
            out1 = gl.allocate_shared_memory(dtype, [c.GROUPS] + out1_desc.block_shape, out1_desc.layout)  # noqa: RUF005
    mem = Memory(
        *(x_desc, w0_desc, w1_desc, out0_desc, out1_desc, bias_ptr, residual_ptr, sums_ptr),
        *(x, w0, w1, out0, out1),
        ready=new_barriers(c.STAGES, 1),
        free=new_barriers(c.STAGES, c.GROUPS),
    )
    fence_async_shared()
    thread_barrier()
    gl.static_assert(c.GROUPS == 2)
    gl.warp_specialize(
        [(_warpgroup, (mem, sizes, 0, c)), (_warpgroup, (mem, sizes, 1, c)), (_loader, (mem, sizes, c))],
        [4, 1],
        [REGISTERS, 24],
    )


@gluon.jit(do_not_specialize=["B", "H", "W", "n_shares", "has_residual"])
def convolution_kernel(
    x_desc,  # [B, H, W, C] in tiles [1, HIGH, WIDE, DEPTH]; STRIDE 2: [B, H, 2, W, 2 C] in [1, HIGH, 1, WIDE, DEPTH]
    w0_desc,  # [N, 9 C] in tiles [PART_0, DEPTH]
    w1_desc,  # the same in tiles of PART_1 rows; of 16 if PART_1 is 0
    out0_desc,  # [B, H, W, N] in tiles [1, HIGH, WIDE, PART_0]
    out1_desc,  # the same in tiles of PART_1 columns; of 16 if PART_1 is 0
    bias_ptr,  # [N]
    residual_ptr,  # [B, H, W, N], contiguous; something else without a residual
    sums_ptr,  # float32 [n_shares, B, H, W, N], contiguous; something else without SPLIT
    B,
    H,  # of the output
    W,
    C,
    N,  # a multiple of a tile's columns
    n_shares,  # of the steps of a tile; 1 without SPLIT
    has_residual,  # 1, or 0; 0 with SPLIT
    PART_0: gl.constexpr,  # columns of both parts of a tile, powers of two; PART_1 may be 0
    PART_1: gl.constexpr,
    HIGH: gl.constexpr,  # pixels of one warpgroup, a box: HIGH * WIDE is 64
    WIDE: gl.constexpr,
    STAGES: gl.constexpr,  # of the ring
    GROUPS: gl.constexpr,  # warpgroups: 2
    STRIDE: gl.constexpr,  # 1, or 2: H and W are half of the image's
    SPLIT: gl.constexpr,  # leave the sums of shares
    REGISTERS: gl.constexpr,  # per thread of the second warpgroup
):
    """3×3 convolution with a border of zeros, bias and residual; launched with 4 warps, other warps come on top."""
    _product(
        *(x_desc, w0_desc, w1_desc, out0_desc, out1_desc, bias_ptr, residual_ptr, sums_ptr),
        *(B, H, W, C, N, n_shares, has_residual, REGISTERS),
        Config(PART_0, PART_1, HIGH, WIDE, STAGES, GROUPS, 9, STRIDE, False, SPLIT),
    )


@gluon.jit(do_not_specialize=["B", "H", "W", "n_shares"])
def upsampled_convolution_kernel(
    x_desc,  # [B, H, W, C] in tiles [1, HIGH, WIDE, DEPTH]
    w0_desc,  # [4 N, 4 C], corner by corner, in tiles [PART_0, DEPTH]
    w1_desc,  # the same in tiles of PART_1 rows; of 16 if PART_1 is 0
    out0_desc,  # [B, H, 2, W, 2 N] in tiles [1, HIGH, 1, WIDE, PART_0]
    out1_desc,  # the same in tiles of PART_1 columns; of 16 if PART_1 is 0
    bias_ptr,  # [N]
    sums_ptr,  # float32 [n_shares, B, 2 H, 2 W, N], contiguous; something else without SPLIT
    B,
    H,
    W,
    C,
    N,  # a multiple of a tile's columns
    n_shares,  # of the steps of a tile; 1 without SPLIT
    PART_0: gl.constexpr,  # this and all that follow: as of convolution_kernel
    PART_1: gl.constexpr,
    HIGH: gl.constexpr,
    WIDE: gl.constexpr,
    STAGES: gl.constexpr,
    GROUPS: gl.constexpr,
    SPLIT: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    """The same of x at twice its size, out [B, 2 H, 2 W, N], without a residual."""
    _product(
        *(x_desc, w0_desc, w1_desc, out0_desc, out1_desc, bias_ptr, bias_ptr, sums_ptr),
        *(B, H, W, C, N, n_shares, 0, REGISTERS),
        Config(PART_0, PART_1, HIGH, WIDE, STAGES, GROUPS, 4, 1, False, SPLIT),
    )


@gluon.jit(do_not_specialize=["M"])
def geglu_product_kernel(
    x_desc,  # [1, 1, M, C] in tiles [1, 1, 64, DEPTH]
    w0_desc,  # [2 N, C] in tiles [PART_0, DEPTH]: rows of hidden, then of gate
    w1_desc,
    out0_desc,  # [1, 1, M, N] in tiles [1, 1, 64, PART_0]
    bias_ptr,  # [2 N]
    M,
    C,
    N,  # a multiple of PART_0
    PART_0: gl.constexpr,  # columns of a tile of the output, a power of two
    STAGES: gl.constexpr,  # of the ring
    GROUPS: gl.constexpr,  # warpgroups: 2
    REGISTERS: gl.constexpr,  # per thread of the second warpgroup
):
    """hidden · gelu(gate) of x wᵀ + bias, exact (erf) GELU; launched with 4 warps, other warps come on top."""
    _product(
        *(x_desc, w0_desc, w1_desc, out0_desc, out0_desc, bias_ptr, bias_ptr, bias_ptr),
        *(1, 1, M, C, N, 1, 0, REGISTERS),
        Config(PART_0, PART_0, 1, 64, STAGES, GROUPS, 1, 1, True, False),
    )


@triton.jit(do_not_specialize=["count", "n_shares"])
def convolution_sums_kernel(
    sums_ptr,  # float32 [n_shares, count, N]
    bias_ptr,  # [N]
    residual_ptr,  # [count, N], or None
    out_ptr,  # [count, N]
    count,  # pixels
    N,  # a multiple of COLS
    n_shares,
    SHARES: tl.constexpr,  # at least n_shares; a loop that is unrolled has all its loads on their way at once
    ROWS: tl.constexpr,  # of a program's tile
    COLS: tl.constexpr,
    WIDE: tl.constexpr,  # whether offsets take 64 bits
):
    """The sum of all shares, bias and residual, rounded once."""
    i_program = tl.program_id(0).to(tl.int64 if WIDE else tl.int32)
    across = N // COLS
    o_p = i_program // across * ROWS + tl.arange(0, ROWS)
    o_n = i_program % across * COLS + tl.arange(0, COLS)
    o = o_p[:, None] * N + o_n[None, :]
    m = (o_p < count)[:, None] & (o_n >= 0)[None, :]
    b = tl.load(bias_ptr + o_n).to(tl.float32)[None, :] + tl.zeros([ROWS, COLS], tl.float32)
    share = count.to(i_program.dtype) * N
    for i in tl.static_range(SHARES):
        b += tl.load(sums_ptr + i * share + o, mask=m & (i < n_shares), other=0.0)
    if residual_ptr is not None:
        b += tl.load(residual_ptr + o, mask=m, other=0.0).to(tl.float32)
    tl.store(out_ptr + o, b.to(out_ptr.dtype.element_ty), mask=m)
