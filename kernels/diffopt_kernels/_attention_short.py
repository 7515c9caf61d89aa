"""Device side of attention over few keys on Hopper GPUs, in Gluon: 16-bit tensors, no mask, at most 256 keys.

All keys and values of a head stay in shared memory, and a program takes several tiles of 64 queries, one after another:
the next tiles' queries are on their way while one is worked on. Every key is there at once, so this is softmax as it is
defined, without a running maximum. The keys lie in two tiles, BLOCK_A and BLOCK_B, so that 77 of them cost 80.
"""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from diffopt_kernels._gluon_tiles import (
    ROWS,
    accumulator,
    as_rows_of,
    new_barriers,
    operand,
    start_scores,
    thread_barrier,
    without_missing_keys,
)

_KEYS, _VALUES = gl.constexpr(2), gl.constexpr(3)  # barriers; 0 and 1 are those of the two buffers of queries


class Config(NamedTuple):
    """What the compiler knows; `attention_short_kernel` says what each is."""

    D: gl.constexpr
    PART_0: gl.constexpr
    PART_1: gl.constexpr
    BLOCK_A: gl.constexpr
    BLOCK_B: gl.constexpr
    EVERY_KEY_EXISTS: gl.constexpr


@gluon.jit
def _tiles(desc_0, desc_1, number: gl.constexpr, c):
    """Shared memory for `number` tiles, [number, 1, 1, rows, part]; of one part twice if there is only one."""
    tiles_0 = gl.allocate_shared_memory(desc_0.dtype, [number] + desc_0.block_shape, desc_0.layout)  # noqa: RUF005
    tiles_1 = tiles_0
    if c.PART_1:
        tiles_1 = gl.allocate_shared_memory(desc_1.dtype, [number] + desc_1.block_shape, desc_1.layout)  # noqa: RUF005
    return tiles_0, tiles_1


@gluon.jit
def _fetch(desc_0, desc_1, tile_0, tile_1, i_b, i_h, row, barrier, pred, c):
    """Send for both parts of a tile whose first row is `row`; the barrier must expect them."""
    tma.async_copy_global_to_shared(desc_0, [i_b, i_h, row, 0], barrier, tile_0, pred=pred)
    if c.PART_1:
        tma.async_copy_global_to_shared(desc_1, [i_b, i_h, row, c.PART_0], barrier, tile_1, pred=pred)


@gluon.jit
def _times_values(p, v, acc, BLOCK: gl.constexpr, COLUMNS: gl.constexpr, first: gl.constexpr):
    """Start acc (+)= p v; p [ROWS, BLOCK] in 16 bits, acc [ROWS, COLUMNS]."""
    values = v.reshape([BLOCK, COLUMNS])
    return warpgroup_mma(gl.convert_layout(p, operand(COLUMNS)), values, acc, use_acc=not first, is_async=True)


@gluon.jit
def _attention(
    q0_desc, q1_desc, ka0_desc, ka1_desc, kb0_desc, kb1_desc, va0_desc, va1_desc, vb0_desc, vb1_desc, o0_desc, o1_desc,
    scale, N_q, N_k, H, query_tiles, c,
):  # fmt: skip
    """The kernel's body; its arguments are explained there."""
    dtype: gl.constexpr = q0_desc.dtype
    row_bytes: gl.constexpr = 2 * (c.PART_0 + c.PART_1)
    n_tiles = gl.cdiv(N_q, ROWS)
    n_programs = gl.cdiv(n_tiles, query_tiles)
    i_head = gl.program_id(0) // n_programs
    i_b, i_h = i_head // H, i_head % H
    i_first = (gl.program_id(0) % n_programs) * query_tiles
    n_mine = gl.minimum(query_tiles, n_tiles - i_first)

    q0, q1 = _tiles(q0_desc, q1_desc, 2, c)
    o0, o1 = _tiles(o0_desc, o1_desc, 1, c)
    ka0, ka1 = _tiles(ka0_desc, ka1_desc, 1, c)
    va0, va1 = _tiles(va0_desc, va1_desc, 1, c)
    kb0, kb1, vb0, vb1 = ka0, ka1, va0, va1
    if c.BLOCK_B:
        kb0, kb1 = _tiles(kb0_desc, kb1_desc, 1, c)
        vb0, vb1 = _tiles(vb0_desc, vb1_desc, 1, c)
    barriers = new_barriers(4, 1)
    fence_async_shared()
    thread_barrier()

    mbarrier.expect(barriers.index(_KEYS), row_bytes * (c.BLOCK_A + c.BLOCK_B))
    _fetch(ka0_desc, ka1_desc, ka0.index(0), ka1.index(0), i_b, i_h, 0, barriers.index(_KEYS), True, c)
    if c.BLOCK_B:
        _fetch(kb0_desc, kb1_desc, kb0.index(0), kb1.index(0), i_b, i_h, c.BLOCK_A, barriers.index(_KEYS), True, c)
    for i in gl.static_range(2):
        exists = i < n_mine
        mbarrier.expect(barriers.index(i), row_bytes * ROWS, pred=exists)
        row = (i_first + i) * ROWS
        _fetch(q0_desc, q1_desc, q0.index(i), q1.index(i), i_b, i_h, row, barriers.index(i), exists, c)
    mbarrier.expect(barriers.index(_VALUES), row_bytes * (c.BLOCK_A + c.BLOCK_B))
    _fetch(va0_desc, va1_desc, va0.index(0), va1.index(0), i_b, i_h, 0, barriers.index(_VALUES), True, c)
    if c.BLOCK_B:
        _fetch(vb0_desc, vb1_desc, vb0.index(0), vb1.index(0), i_b, i_h, c.BLOCK_A, barriers.index(_VALUES), True, c)

    mbarrier.wait(barriers.index(_KEYS), 0)
    for i in range(n_mine):
        buffer = i & 1
        row = (i_first + i) * ROWS
        mbarrier.wait(barriers.index(buffer), (i // 2) & 1)
        s_a = start_scores(q0.index(buffer), q1.index(buffer), ka0.index(0), ka1.index(0), c.BLOCK_A, c)
        if c.BLOCK_B:
            s_b = start_scores(q0.index(buffer), q1.index(buffer), kb0.index(0), kb1.index(0), c.BLOCK_B, c)
            s_a, s_b = warpgroup_mma_wait(0, deps=[s_a, s_b])
            if not c.EVERY_KEY_EXISTS:
                if N_k < c.BLOCK_A:
                    s_a = without_missing_keys(s_a, 0, N_k, c.BLOCK_A)
                s_b = without_missing_keys(s_b, c.BLOCK_A, N_k, c.BLOCK_B)
            m = gl.maximum(gl.max(s_a, 1), as_rows_of(s_a, gl.max(s_b, 1))) * scale
            p_b = gl.exp2(s_b * scale - as_rows_of(s_b, m)[:, None])
        else:
            s_a = warpgroup_mma_wait(0, deps=[s_a])
            if not c.EVERY_KEY_EXISTS:
                s_a = without_missing_keys(s_a, 0, N_k, c.BLOCK_A)
            m = gl.max(s_a, 1) * scale
        thread_barrier()  # no warp reads this buffer of queries any more
        wanted = i + 2 < n_mine
        mbarrier.expect(barriers.index(buffer), row_bytes * ROWS, pred=wanted)
        next_row = row + 2 * ROWS
        _fetch(
            q0_desc, q1_desc, q0.index(buffer), q1.index(buffer), i_b, i_h, next_row, barriers.index(buffer), wanted, c
        )
        p_a = gl.exp2(s_a * scale - m[:, None])
        sums = gl.sum(p_a, 1)
        if c.BLOCK_B:
            sums += as_rows_of(s_a, gl.sum(p_b, 1))
        if i == 0:
            mbarrier.wait(barriers.index(_VALUES), 0)
        acc0 = _times_values(p_a.to(dtype), va0.index(0), _zeros(c.PART_0), c.BLOCK_A, c.PART_0, True)
        if c.PART_1:
            acc1 = _times_values(p_a.to(dtype), va1.index(0), _zeros(c.PART_1), c.BLOCK_A, c.PART_1, True)
        if c.BLOCK_B:
            acc0 = _times_values(p_b.to(dtype), vb0.index(0), acc0, c.BLOCK_B, c.PART_0, False)
            if c.PART_1:
                acc1 = _times_values(p_b.to(dtype), vb1.index(0), acc1, c.BLOCK_B, c.PART_1, False)
        inverse = 1.0 / sums
        tma.store_wait(0)  # the output tile before this one has been read
        thread_barrier()
        if c.PART_1:
            a0, a1 = warpgroup_mma_wait(0, deps=[acc0, acc1])
            o1.index(0).reshape([ROWS, c.PART_1]).store((a1 * as_rows_of(a1, inverse)[:, None]).to(dtype))
        else:
            a0 = warpgroup_mma_wait(0, deps=[acc0])
        o0.index(0).reshape([ROWS, c.PART_0]).store((a0 * as_rows_of(a0, inverse)[:, None]).to(dtype))
        fence_async_shared()
        thread_barrier()
        tma.async_copy_shared_to_global(o0_desc, [i_b, i_h, row, 0], o0.index(0))
        if c.PART_1:
            tma.async_copy_shared_to_global(o1_desc, [i_b, i_h, row, c.PART_0], o1.index(0))
    tma.store_wait(0)


@gluon.jit
def _zeros(COLUMNS: gl.constexpr):
    return gl.zeros([ROWS, COLUMNS], gl.float32, accumulator(COLUMNS))


@gluon.jit(do_not_specialize=["N_q", "N_k", "H", "query_tiles"])
def attention_short_kernel(
    q0_desc,  # [B, H, N_q, D] in tiles [1, 1, 64, PART_0]
    q1_desc,  # the same in tiles of PART_1 columns; q0_desc again if PART_1 is 0
    ka0_desc,  # [B, H, N_k, D] in tiles [1, 1, BLOCK_A, PART_0]
    ka1_desc,
    kb0_desc,  # the same in tiles of BLOCK_B rows; ka0_desc again if BLOCK_B is 0
    kb1_desc,
    va0_desc,
    va1_desc,
    vb0_desc,
    vb1_desc,
    o0_desc,  # [B, H, N_q, D] in tiles [1, 1, 64, PART_0]
    o1_desc,
    scale_log2,  # softmax scale times log2(e)
    N_q,
    N_k,
    H,
    query_tiles,  # of one program
    D: gl.constexpr,
    PART_0: gl.constexpr,  # powers of two that cover D; PART_1 may be 0
    PART_1: gl.constexpr,
    BLOCK_A: gl.constexpr,  # powers of two that cover all keys; BLOCK_B may be 0
    BLOCK_B: gl.constexpr,
    EVERY_KEY_EXISTS: gl.constexpr,  # N_k is BLOCK_A + BLOCK_B
):
    """Attention with keys and values resident; one warpgroup, several programs on a multiprocessor."""
    _attention(
        *(q0_desc, q1_desc, ka0_desc, ka1_desc, kb0_desc, kb1_desc),
        *(va0_desc, va1_desc, vb0_desc, vb1_desc, o0_desc, o1_desc),
        *(scale_log2, N_q, N_k, H, query_tiles),
        Config(D, PART_0, PART_1, BLOCK_A, BLOCK_B, EVERY_KEY_EXISTS),
    )
