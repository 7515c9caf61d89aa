"""Device side of attention on Hopper GPUs, in Gluon: 16-bit tensors, no mask, any number of keys.

One program holds GROUPS warpgroups of 64 queries each, of one head of one batch row. They share the tiles of keys and
values, which travel through a ring of STAGES in shared memory (TMA); a warp of its own or warpgroup 0 keeps the ring
fed. A warpgroup turns the scores of one tile into probabilities while the tensor cores multiply those of the tile
before with their values (Shah et al., FlashAttention-3, 2024, section 3.2).

What is subtracted from the scores of a row is fixed at the beginning: the maximum of the first tile and of the one at
the warpgroup's own queries, where self-attention has its largest scores, and HEADROOM powers of two. That saves a third
of the instructions per score and is exact unless another score is 16 powers of two above, where its float16 probability
overflows and shows in the row sum; then the program starts over and follows the maximum through all tiles.
"""

from typing import NamedTuple

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

# Powers of two that float16 probabilities stay below 1 at first: scores may be as much farther above their row's first
# ones. Those 2 ** -8 below the largest lose digits for it, for which the rule has room (reports/notes/attention.md).
# bfloat16 has room above anyway.
HEADROOM = gl.constexpr(6.0)


class Config(NamedTuple):
    """What the compiler knows; `attention_hopper_kernel` says what each is."""

    D: gl.constexpr
    PART_0: gl.constexpr
    PART_1: gl.constexpr
    BLOCK_N: gl.constexpr
    STAGES: gl.constexpr
    GROUPS: gl.constexpr
    LOADER: gl.constexpr
    WHOLE_KEY_TILES: gl.constexpr
    TURNS: gl.constexpr
    TAIL: gl.constexpr


class Place(NamedTuple):
    """Where a program works."""

    i_b: gl.tensor  # batch row
    i_h: gl.tensor  # head
    i_m: gl.tensor  # first query
    n_active: gl.tensor  # warpgroups that work in this program, the first ones
    i_first: gl.tensor  # first tile of keys
    n_tiles: gl.tensor
    N_k: gl.tensor
    scale: gl.tensor  # softmax scale times log2(e)


class Memory(NamedTuple):
    """Tensor descriptors, tiles in shared memory, and the barriers that guard them."""

    q0_desc: tma.tensor_descriptor
    q1_desc: tma.tensor_descriptor
    k0_desc: tma.tensor_descriptor
    k1_desc: tma.tensor_descriptor
    v0_desc: tma.tensor_descriptor
    v1_desc: tma.tensor_descriptor
    o0_desc: tma.tensor_descriptor
    o1_desc: tma.tensor_descriptor
    q0: gl.shared_memory_descriptor  # [GROUPS, 1, 1, ROWS, PART_0]; in the end the output
    q1: gl.shared_memory_descriptor
    k0: gl.shared_memory_descriptor  # [STAGES, 1, 1, BLOCK_N, PART_0]
    k1: gl.shared_memory_descriptor
    v0: gl.shared_memory_descriptor
    v1: gl.shared_memory_descriptor
    q_ready: gl.shared_memory_descriptor
    ready: gl.shared_memory_descriptor  # per stage: its tiles have arrived
    free: gl.shared_memory_descriptor  # per stage: every warpgroup is done with them
    turns: gl.shared_memory_descriptor  # per warpgroup: it may go on
    verdict: gl.shared_memory_descriptor  # every warpgroup has said whether it must start over
    again: gl.shared_memory_descriptor  # [GROUPS, 1], 1 for yes


# --- the ring of keys and values ------------------------------------------------------------------------------------


@gluon.jit
def _tile(at, j):
    """The tile of keys that comes as number j: after the last one comes tile 0."""
    i = at.i_first + j
    return gl.where(i >= at.n_tiles, i - at.n_tiles, i)


@gluon.jit
def _stage(step, c):
    """Stage of a step, counted over all passes, and the parity of its round."""
    return step % c.STAGES, (step // c.STAGES) & 1


@gluon.jit
def _load_queries(mem, at, c):
    bytes_of_tile: gl.constexpr = mem.q0_desc.block_type.nbytes + (mem.q1_desc.block_type.nbytes if c.PART_1 else 0)
    mbarrier.expect(mem.q_ready, c.GROUPS * bytes_of_tile)
    for w in gl.static_range(c.GROUPS):
        row = at.i_m + w * ROWS
        tma.async_copy_global_to_shared(mem.q0_desc, [at.i_b, at.i_h, row, 0], mem.q_ready, mem.q0.index(w))
        if c.PART_1:
            tma.async_copy_global_to_shared(mem.q1_desc, [at.i_b, at.i_h, row, c.PART_0], mem.q_ready, mem.q1.index(w))


@gluon.jit
def _load_step(mem, at, first_step, j, c):
    """Send for step j of a pass: keys of tile j and values of tile j - 1, so that step n_tiles brings values only."""
    bytes_of_tile: gl.constexpr = mem.k0_desc.block_type.nbytes + (mem.k1_desc.block_type.nbytes if c.PART_1 else 0)
    stage, parity = _stage(first_step + j, c)
    mbarrier.wait(mem.free.index(stage), parity ^ 1)
    ready = mem.ready.index(stage)
    has_keys = j < at.n_tiles
    has_values = j > 0
    mbarrier.expect(ready, bytes_of_tile, pred=has_keys != has_values)
    mbarrier.expect(ready, 2 * bytes_of_tile, pred=has_keys & has_values)
    row = _tile(at, j) * c.BLOCK_N
    tma.async_copy_global_to_shared(mem.k0_desc, [at.i_b, at.i_h, row, 0], ready, mem.k0.index(stage), pred=has_keys)
    if c.PART_1:
        k1 = mem.k1.index(stage)
        tma.async_copy_global_to_shared(mem.k1_desc, [at.i_b, at.i_h, row, c.PART_0], ready, k1, pred=has_keys)
    row = _tile(at, j - 1) * c.BLOCK_N
    tma.async_copy_global_to_shared(mem.v0_desc, [at.i_b, at.i_h, row, 0], ready, mem.v0.index(stage), pred=has_values)
    if c.PART_1:
        v1 = mem.v1.index(stage)
        tma.async_copy_global_to_shared(mem.v1_desc, [at.i_b, at.i_h, row, c.PART_0], ready, v1, pred=has_values)


# --- products -------------------------------------------------------------------------------------------------------


@gluon.jit
def _scores(mem, i_group, stage, c):
    """Start q kᵀ of one warpgroup and one tile, [ROWS, BLOCK_N]."""
    q0, q1 = mem.q0.index(i_group), mem.q1.index(i_group)
    return start_scores(q0, q1, mem.k0.index(stage), mem.k1.index(stage), c.BLOCK_N, c)


@gluon.jit
def _accumulate(p, mem, stage, acc0, acc1, c):
    """Start acc += p v of one tile; p [ROWS, BLOCK_N] in 16 bits, acc0 and acc1 the columns of both parts."""
    v0 = mem.v0.index(stage).reshape([c.BLOCK_N, c.PART_0])
    acc0 = warpgroup_mma(gl.convert_layout(p, operand(c.PART_0)), v0, acc0, is_async=True)
    if c.PART_1:
        v1 = mem.v1.index(stage).reshape([c.BLOCK_N, c.PART_1])
        acc1 = warpgroup_mma(gl.convert_layout(p, operand(c.PART_1)), v1, acc1, is_async=True)
    return acc0, acc1


@gluon.jit
def _finish(acc0, acc1, c):
    """Wait for everything in flight; the accumulators can be read then."""
    if c.PART_1:
        acc0, acc1 = warpgroup_mma_wait(0, deps=[acc0, acc1])
    else:
        acc0 = warpgroup_mma_wait(0, deps=[acc0])
    return acc0, acc1


# --- softmax --------------------------------------------------------------------------------------------------------


@gluon.jit
def _without_missing_keys(s, at, j, c):
    """Scores of keys that do not exist become -inf."""
    if not c.WHOLE_KEY_TILES:
        tile = _tile(at, j)
        if tile == at.n_tiles - 1:
            s = without_missing_keys(s, tile * c.BLOCK_N, at.N_k, c.BLOCK_N)
    return s


@gluon.jit
def _partial_sums(p, c):
    """Row sums over the columns a thread holds, [ROWS, 8]: what threads hold of a row is added up once, in the end."""
    return gl.sum(gl.reshape(p, [ROWS, c.BLOCK_N // 8, 8]), 1)


# --- one pass over the keys -----------------------------------------------------------------------------------------


@gluon.jit
def _take_turn(mem, step, i_group: gl.constexpr, c):
    """Wait until the warpgroup before has had its turn; warpgroup 0 waits for the last one's in the step before."""
    mbarrier.wait(mem.turns.index(i_group), (step & 1) ^ (1 if i_group == 0 else 0))


@gluon.jit
def _pass_turn(mem, at, i_group: gl.constexpr, c):
    if c.TAIL and i_group + 1 == c.TAIL:  # the last one, in a program of the tail
        mbarrier.arrive(mem.turns.index(gl.where(at.n_active == c.TAIL, 0, i_group + 1)), count=1)
    else:
        mbarrier.arrive(mem.turns.index((i_group + 1) % c.GROUPS), count=1)


@gluon.jit
def _leave(mem, at, stage, i_group: gl.constexpr, c):
    """This warpgroup is done with a stage; warpgroup 0 says so for those that do not work, too."""
    mbarrier.arrive(mem.free.index(stage), count=1)
    if c.TAIL and i_group == 0:
        mbarrier.arrive(mem.free.index(stage), count=c.GROUPS - c.TAIL, pred=at.n_active == c.TAIL)


@gluon.jit
def _one_tile(mem, at, first_step, first_turn, j, p, acc0, acc1, i_group: gl.constexpr, c):
    """Products of step j: scores of tile j and, meanwhile, probabilities of tile j - 1 times values, still running."""
    stage, parity = _stage(first_step + j, c)
    mbarrier.wait(mem.ready.index(stage), parity)
    if c.TURNS == "products":
        _take_turn(mem, first_turn + j - 1, i_group, c)
    s = _scores(mem, i_group, stage, c)
    acc0, acc1 = _accumulate(p, mem, stage, acc0, acc1, c)
    if i_group == 0 and not c.LOADER:  # noqa: SIM102
        if j + c.STAGES - 2 <= at.n_tiles:  # the stage was left in step j - 2
            _load_step(mem, at, first_step, j + c.STAGES - 2, c)
    if c.TURNS == "products":
        _pass_turn(mem, at, i_group, c)
    s = warpgroup_mma_wait(2 if c.PART_1 else 1, deps=[s])
    return _without_missing_keys(s, at, j, c), acc0, acc1


@gluon.jit
def _own_maximum(mem, at, first_step, i_group: gl.constexpr, c):
    """Largest scaled scores [ROWS] of the tile at this warpgroup's own queries, or the nearest of those under way."""
    wanted: gl.constexpr = i_group * ROWS // c.BLOCK_N
    j = gl.minimum(wanted if wanted < c.STAGES - 2 else c.STAGES - 2, at.n_tiles - 1)
    stage, parity = _stage(first_step + j, c)
    mbarrier.wait(mem.ready.index(stage), parity)
    s = warpgroup_mma_wait(0, deps=[_scores(mem, i_group, stage, c)])
    return gl.max(_without_missing_keys(s, at, j, c), 1) * at.scale


@gluon.jit
def _one_pass(mem, at, first_step, first_turn, FOLLOW: gl.constexpr, i_group: gl.constexpr, c):
    """All tiles once: accumulators [ROWS, part] and row sums [ROWS].

    With FOLLOW the maximum follows the scores. Without, it stays as at the beginning, and a row sum beyond the range of
    16 bits says that this was not good enough.
    """
    dtype: gl.constexpr = mem.q0_desc.dtype
    if i_group == 0 and not c.LOADER:
        for j in gl.static_range(c.STAGES - 1):
            if j <= at.n_tiles:
                _load_step(mem, at, first_step, j, c)
    stage, parity = _stage(first_step, c)
    mbarrier.wait(mem.ready.index(stage), parity)
    s = warpgroup_mma_wait(0, deps=[_scores(mem, i_group, stage, c)])
    s = _without_missing_keys(s, at, 0, c)
    m = gl.max(s, 1) * at.scale
    if not FOLLOW and i_group * ROWS >= c.BLOCK_N:
        m = gl.maximum(m, _own_maximum(mem, at, first_step, i_group, c))
    if not FOLLOW and dtype == gl.float16:
        m += HEADROOM
    _leave(mem, at, stage, i_group, c)  # not before: with one tile it is also the own one
    p = gl.exp2(s * at.scale - m[:, None])
    sums = _partial_sums(p, c)
    p = p.to(dtype)
    width_1: gl.constexpr = c.PART_1 if c.PART_1 else 16
    acc0 = warpgroup_mma_init(gl.zeros([ROWS, c.PART_0], gl.float32, accumulator(c.PART_0)))
    acc1 = warpgroup_mma_init(gl.zeros([ROWS, width_1], gl.float32, accumulator(width_1)))

    for j in range(1, at.n_tiles):
        s, acc0, acc1 = _one_tile(mem, at, first_step, first_turn, j, p, acc0, acc1, i_group, c)
        if FOLLOW:
            m_next = gl.maximum(m, gl.max(s, 1) * at.scale)
            rescale = gl.exp2(m - m_next)
            m = m_next
            sums = sums * as_rows_of(sums, rescale)[:, None]
        if c.TURNS == "softmax":
            _take_turn(mem, first_turn + j - 1, i_group, c)
        p = gl.exp2(s * at.scale - m[:, None])
        sums += _partial_sums(p, c)
        p = p.to(dtype)
        if c.TURNS == "softmax":
            _pass_turn(mem, at, i_group, c)
        a0, a1 = _finish(acc0, acc1, c)
        if FOLLOW:
            a0 = a0 * as_rows_of(a0, rescale)[:, None]
            if c.PART_1:
                a1 = a1 * as_rows_of(a1, rescale)[:, None]
        acc0 = warpgroup_mma_init(a0)
        if c.PART_1:
            acc1 = warpgroup_mma_init(a1)
        _leave(mem, at, (first_step + j) % c.STAGES, i_group, c)

    stage, parity = _stage(first_step + at.n_tiles, c)
    mbarrier.wait(mem.ready.index(stage), parity)
    acc0, acc1 = _accumulate(p, mem, stage, acc0, acc1, c)
    a0, a1 = _finish(acc0, acc1, c)
    _leave(mem, at, stage, i_group, c)
    if c.PART_1 == 0:
        a1 = a0
    return a0, a1, as_rows_of(a0, gl.sum(sums, 1))


@gluon.jit
def _any_again(mem, warps: gl.constexpr, c):
    """Whether any warpgroup must start over, once all have said so."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [warps], [0])
    mbarrier.wait(mem.verdict, 0)
    found = gl.max(mem.again.index(0).load(layout), 0)
    for w in gl.static_range(1, c.GROUPS):
        found = gl.maximum(found, gl.max(mem.again.index(w).load(layout), 0))
    return found > 0


@gluon.jit
def _must_start_over(sums, mem, i_group: gl.constexpr, c):
    """Whether a row sum of any warpgroup is beyond what 16-bit probabilities can add up to; NaN counts as such."""
    limit: gl.constexpr = 65504.0 if mem.q0_desc.dtype == gl.float16 else 3.0e38
    _say(1 - gl.min((sums <= limit).to(gl.int32), 0), mem, i_group)
    return _any_again(mem, 4, c)


@gluon.jit
def _say(again, mem, i_group: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    mem.again.index(i_group).store(gl.full([1], again, gl.int32, layout))
    mbarrier.arrive(mem.verdict, count=1)


@gluon.jit
def _loader(mem, at, c):
    """Everything the loading warp does."""
    _load_queries(mem, at, c)
    for j in range(at.n_tiles + 1):
        _load_step(mem, at, 0, j, c)
    if _any_again(mem, 1, c):
        for j in range(at.n_tiles + 1):
            _load_step(mem, at, at.n_tiles + 1, j, c)


@gluon.jit
def _warpgroup(mem, at, i_group: gl.constexpr, c):
    """Everything one warpgroup does: its work, or nothing where the program is of the tail and has none for it."""
    if c.TAIL and i_group >= c.TAIL:
        if i_group < at.n_active:
            _work(mem, at, i_group, c)
        else:
            _say(0, mem, i_group)
    else:
        _work(mem, at, i_group, c)


@gluon.jit
def _work(mem, at, i_group: gl.constexpr, c):
    dtype: gl.constexpr = mem.q0_desc.dtype
    if i_group == 0 and not c.LOADER:
        _load_queries(mem, at, c)
    mbarrier.wait(mem.q_ready, 0)
    a0, a1, sums = _one_pass(mem, at, 0, 0, False, i_group, c)
    if _must_start_over(sums, mem, i_group, c):
        a0, a1, sums = _one_pass(mem, at, at.n_tiles + 1, at.n_tiles - 1, True, i_group, c)
    row = at.i_m + i_group * ROWS
    inverse = 1.0 / sums
    o0 = mem.q0.index(i_group)
    o0.reshape([ROWS, c.PART_0]).store((a0 * inverse[:, None]).to(dtype))
    if c.PART_1:
        o1 = mem.q1.index(i_group)
        o1.reshape([ROWS, c.PART_1]).store((a1 * as_rows_of(a1, inverse)[:, None]).to(dtype))
    fence_async_shared()
    thread_barrier()
    tma.async_copy_shared_to_global(mem.o0_desc, [at.i_b, at.i_h, row, 0], o0)
    if c.PART_1:
        tma.async_copy_shared_to_global(mem.o1_desc, [at.i_b, at.i_h, row, c.PART_0], o1)
    tma.store_wait(0)


# --- the kernel -----------------------------------------------------------------------------------------------------


@gluon.jit
def _position(N_q, n_heads, full_programs, c):
    """Head, first tile of queries and working warpgroups of this program; full programs of all heads come first."""
    i_program = gl.program_id(0)
    i_head = i_program // full_programs
    i_tile = (i_program % full_programs) * c.GROUPS
    n_active = i_program * 0 + c.GROUPS
    if c.TAIL:
        i_program -= full_programs * n_heads
        if i_program >= 0:
            n_programs = gl.cdiv(gl.cdiv(N_q, ROWS) - full_programs * c.GROUPS, c.TAIL)
            i_head = i_program // n_programs
            i_tile = full_programs * c.GROUPS + (i_program % n_programs) * c.TAIL
            n_active = i_program * 0 + c.TAIL
    return i_head, i_tile, n_active


@gluon.jit
def _attention(
    q0_desc,
    q1_desc,
    k0_desc,
    k1_desc,
    v0_desc,
    v1_desc,
    o0_desc,
    o1_desc,
    scale_log2,
    N_q,
    N_k,
    H,
    n_heads,
    full_programs,
    REGISTERS,
    c,
):
    """The kernel's body; its arguments are explained there."""
    dtype: gl.constexpr = q0_desc.dtype
    i_head, i_tile, n_active = _position(N_q, n_heads, full_programs, c)
    i_m = i_tile * ROWS
    n_tiles = gl.cdiv(N_k, c.BLOCK_N)
    i_first = gl.where(N_q == N_k, i_m // c.BLOCK_N, 0)
    at = Place(i_head // H, i_head % H, i_m, n_active, i_first, n_tiles, N_k, scale_log2)

    q0 = gl.allocate_shared_memory(dtype, [c.GROUPS, 1, 1, ROWS, c.PART_0], q0_desc.layout)
    k0 = gl.allocate_shared_memory(dtype, [c.STAGES, 1, 1, c.BLOCK_N, c.PART_0], k0_desc.layout)
    v0 = gl.allocate_shared_memory(dtype, [c.STAGES, 1, 1, c.BLOCK_N, c.PART_0], v0_desc.layout)
    if c.PART_1:
        q1 = gl.allocate_shared_memory(dtype, [c.GROUPS, 1, 1, ROWS, c.PART_1], q1_desc.layout)
        k1 = gl.allocate_shared_memory(dtype, [c.STAGES, 1, 1, c.BLOCK_N, c.PART_1], k1_desc.layout)
        v1 = gl.allocate_shared_memory(dtype, [c.STAGES, 1, 1, c.BLOCK_N, c.PART_1], v1_desc.layout)
    else:
        q1, k1, v1 = q0, k0, v0
    ready = new_barriers(c.STAGES, 1)
    # Barriers that nobody waits for would share their memory with what the compiler reduces in; where two programs
    # shared a multiprocessor, one in a hundred that had to start over then did not (reports/notes/attention.md).
    turns = ready if c.TURNS == "nothing" else new_barriers(c.GROUPS, 1)
    mem = Memory(
        *(q0_desc, q1_desc, k0_desc, k1_desc, v0_desc, v1_desc, o0_desc, o1_desc),
        *(q0, q1, k0, k1, v0, v1),
        q_ready=new_barriers(1, 1).index(0),
        ready=ready,
        free=new_barriers(c.STAGES, c.GROUPS),
        turns=turns,
        verdict=new_barriers(1, c.GROUPS).index(0),
        again=gl.allocate_shared_memory(gl.int32, [c.GROUPS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0])),
    )
    fence_async_shared()
    thread_barrier()
    if c.GROUPS == 1 and not c.LOADER:
        _warpgroup(mem, at, 0, c)
    elif c.GROUPS == 1 and c.LOADER:
        gl.warp_specialize([(_warpgroup, (mem, at, 0, c)), (_loader, (mem, at, c))], [1], [24])
    elif c.GROUPS == 2 and not c.LOADER:
        gl.warp_specialize([(_warpgroup, (mem, at, 0, c)), (_warpgroup, (mem, at, 1, c))], [4], [REGISTERS])
    elif c.GROUPS == 2 and c.LOADER:
        gl.warp_specialize(
            [(_warpgroup, (mem, at, 0, c)), (_warpgroup, (mem, at, 1, c)), (_loader, (mem, at, c))],
            [4, 1],
            [REGISTERS, 24],
        )
    elif c.GROUPS == 4 and not c.LOADER:
        gl.warp_specialize(
            [
                (_warpgroup, (mem, at, 0, c)),
                (_warpgroup, (mem, at, 1, c)),
                (_warpgroup, (mem, at, 2, c)),
                (_warpgroup, (mem, at, 3, c)),
            ],
            [4, 4, 4],
            [REGISTERS, REGISTERS, REGISTERS],
        )
    elif c.GROUPS == 4 and c.LOADER:
        gl.warp_specialize(
            [
                (_warpgroup, (mem, at, 0, c)),
                (_warpgroup, (mem, at, 1, c)),
                (_warpgroup, (mem, at, 2, c)),
                (_warpgroup, (mem, at, 3, c)),
                (_loader, (mem, at, c)),
            ],
            [4, 4, 4, 1],
            [REGISTERS, REGISTERS, REGISTERS, 24],
        )
    else:
        gl.static_assert(False, "GROUPS must be 1, 2 or 4")


@gluon.jit(do_not_specialize=["N_q", "N_k", "H", "n_heads", "full_programs"])
def attention_hopper_kernel(
    q0_desc,  # [B, H, N_q, D] in tiles [1, 1, 64, PART_0]
    q1_desc,  # the same in tiles of PART_1 columns; q0_desc again if PART_1 is 0
    k0_desc,  # [B, H, N_k, D] in tiles [1, 1, BLOCK_N, PART_0]
    k1_desc,
    v0_desc,  # [B, H, N_k, D] in tiles [1, 1, BLOCK_N, PART_0]
    v1_desc,
    o0_desc,  # [B, H, N_q, D] in tiles [1, 1, 64, PART_0]
    o1_desc,
    scale_log2,  # softmax scale times log2(e)
    N_q,
    N_k,
    H,
    n_heads,  # of all batch rows
    full_programs,  # of one head, with GROUPS tiles of queries each; those after them have TAIL
    D: gl.constexpr,
    PART_0: gl.constexpr,  # powers of two that cover D; PART_1 may be 0
    PART_1: gl.constexpr,
    BLOCK_N: gl.constexpr,  # keys of one tile
    STAGES: gl.constexpr,  # of the ring, at least 3
    GROUPS: gl.constexpr,  # warpgroups: 1, 2 or 4
    LOADER: gl.constexpr,  # whether a warp of its own feeds the ring, instead of warpgroup 0
    REGISTERS: gl.constexpr,  # per thread of warpgroups 1 and up
    WHOLE_KEY_TILES: gl.constexpr,  # N_k is a multiple of BLOCK_N
    TAIL: gl.constexpr,  # warpgroups that work in the programs after the full ones; 0 where there are none
    TURNS: gl.constexpr,  # what warpgroups do one after another: "products", "softmax" or "nothing"
):
    """Attention with asynchronous products; launched with 4 warps, warpgroups beyond the first come on top."""
    _attention(
        *(q0_desc, q1_desc, k0_desc, k1_desc, v0_desc, v1_desc, o0_desc, o1_desc),
        *(scale_log2, N_q, N_k, H, n_heads, full_programs, REGISTERS),
        Config(D, PART_0, PART_1, BLOCK_N, STAGES, GROUPS, LOADER, WHOLE_KEY_TILES, TURNS, TAIL),
    )
