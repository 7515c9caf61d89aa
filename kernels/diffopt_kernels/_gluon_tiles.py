"""What Gluon kernels share: tiles of 64 queries or pixels in matrix instructions of Hopper, and barriers."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma

thread_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # its name since Triton 3.7, and before

ROWS = gl.constexpr(64)  # queries or pixels of one warpgroup, the height of one matrix instruction


@gluon.jit
def new_barriers(number: gl.constexpr, count: gl.constexpr):
    """That many barriers in shared memory, each of which waits for `count` arrivals."""
    made = gl.allocate_shared_memory(gl.int64, [number, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(number):
        mbarrier.init(made.index(i), count=count)
    return made


@gluon.constexpr_function
def accumulator(columns):
    """The layout of [ROWS, columns] float32 results of matrix products."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.constexpr_function
def operand(columns):
    """The layout of [ROWS, n] 16-bit probabilities that are multiplied into [ROWS, columns]."""
    return gl.DotOperandLayout(0, accumulator(columns), 2)


@gluon.jit
def start_scores(q_0, q_1, k_0, k_1, BLOCK: gl.constexpr, c):
    """Start q kᵀ of a tile of queries and one of keys, [ROWS, BLOCK].

    q_0 is [1, 1, ROWS, PART_0], q_1 the columns from PART_0 on, k_0 and k_1 the same of BLOCK keys; `c` holds D, PART_0
    and PART_1.
    """
    zeros = gl.zeros([ROWS, BLOCK], gl.float32, accumulator(BLOCK))
    q = q_0.reshape([ROWS, c.PART_0])
    k = k_0.reshape([BLOCK, c.PART_0])
    if c.D > 32 and c.D <= 48 and c.PART_0 == 64:  # the last quarter is zeros
        q_left, k_left = q.slice(0, 32, dim=1), k.slice(0, 32, dim=1)
        q_right, k_right = q.slice(32, 16, dim=1), k.slice(32, 16, dim=1)
        s = warpgroup_mma(q_left, k_left.permute((1, 0)), zeros, use_acc=False, is_async=True)
        return warpgroup_mma(q_right, k_right.permute((1, 0)), s, is_async=True)
    s = warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)
    if c.PART_1:
        q = q_1.reshape([ROWS, c.PART_1])
        k = k_1.reshape([BLOCK, c.PART_1])
        s = warpgroup_mma(q, k.permute((1, 0)), s, is_async=True)
    return s


@gluon.jit
def without_missing_keys(s, first_key, N_k, BLOCK: gl.constexpr):
    """Scores [ROWS, BLOCK] where keys from N_k on count -inf."""
    o_n = first_key + gl.arange(0, BLOCK, gl.SliceLayout(0, s.type.layout))
    return gl.where((o_n < N_k)[None, :], s, float("-inf"))


@gluon.jit
def as_rows_of(y, x):
    """x [ROWS] distributed over threads as the rows of y are."""
    return gl.convert_layout(x, gl.SliceLayout(1, y.type.layout))
