"""Device side of layer_norm, geglu, bias_add and upsample: one pass each over tiles of rows and columns.

How many rows there are is not specialized: a new size or batch compiles nothing.
"""

import triton
import triton.language as tl


@triton.jit
def _tiles(p, m, o_c, C: tl.constexpr, TILES: tl.constexpr):
    """Tiles [ROWS, COLS] that cover rows of C columns from p [ROWS, 1] on, as they are in memory; zeros elsewhere.

    Loaded all at once. Whoever converts them early waits for them early.
    """
    tiles = ()
    for i in tl.static_range(TILES):
        o = i * o_c.shape[1] + o_c
        tiles += (tl.load(p + o, mask=m & (o < C), other=0.0),)
    return tiles


@triton.jit(do_not_specialize=["M"])
def layer_norm_kernel(
    x_ptr,  # [M, C], rows stride_x apart
    residual_ptr,  # [M, C], contiguous, or None
    x_bias_ptr,  # [C], added to x, or None
    sum_ptr,  # [M, C], contiguous, or None without a residual
    sum_bias_ptr,  # [C], added to the sum that is stored, or None
    out_ptr,  # [M, C], contiguous
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    eps,
    stride_x,
    M,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    TILES: tl.constexpr,  # of COLS columns, at least C together
):
    """LayerNorm of ROWS rows of x + x_bias + residual, from the sum before it is rounded.

    Vectors of channels are loaded for each row, so that a thread has those of its columns: threads meet in two sums.
    """
    o_m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    o_c = tl.arange(0, COLS)[None, :]
    m = o_m < M
    every = tl.zeros((ROWS, 1), tl.int32)
    tiles = _tiles(x_ptr + o_m * stride_x, m, o_c, C, TILES)
    if residual_ptr is not None:
        residuals = _tiles(residual_ptr + o_m * C, m, o_c, C, TILES)
    if x_bias_ptr is not None:
        x_biases = _tiles(x_bias_ptr + every, m, o_c, C, TILES)
    if sum_bias_ptr is not None:
        sum_biases = _tiles(sum_bias_ptr + every, m, o_c, C, TILES)

    sums = ()
    b_s = tl.zeros((ROWS, COLS), tl.float32)
    for i in tl.static_range(TILES):
        b_x = tiles[i].to(tl.float32)
        if x_bias_ptr is not None:
            b_x += x_biases[i].to(tl.float32)
        if residual_ptr is not None:
            b_x += residuals[i].to(tl.float32)
            b_sum = b_x
            if sum_bias_ptr is not None:
                b_sum += sum_biases[i].to(tl.float32)
            o = i * COLS + o_c
            tl.store(sum_ptr + o_m * C + o, b_sum.to(sum_ptr.dtype.element_ty), mask=m & (o < C))
        sums += (b_x,)
        b_s += b_x
    # On their way while rows are summed up; earlier, they would take the registers of further programs.
    weights = _tiles(weight_ptr + every, m, o_c, C, TILES)
    biases = _tiles(bias_ptr + every, m, o_c, C, TILES)
    b_mean = tl.sum(b_s, 1, keep_dims=True) / C  # [ROWS, 1]
    # Far from zero the mean is rounded coarsely; what it is off by is the mean of what is left.
    b_s = tl.zeros((ROWS, COLS), tl.float32)
    b_squares = tl.zeros((ROWS, COLS), tl.float32)
    for i in tl.static_range(TILES):
        b_d = tl.where(i * COLS + o_c < C, sums[i] - b_mean, 0.0)
        b_s += b_d
        b_squares += b_d * b_d
    b_off = tl.sum(b_s, 1, keep_dims=True) / C
    b_variance = tl.maximum(tl.sum(b_squares, 1, keep_dims=True) / C - b_off * b_off, 0.0)
    b_rstd = 1.0 / tl.sqrt(b_variance + eps)
    for i in tl.static_range(TILES):
        b_y = (sums[i] - b_mean - b_off) * b_rstd * weights[i].to(tl.float32) + biases[i].to(tl.float32)
        o = i * COLS + o_c
        tl.store(out_ptr + o_m * C + o, b_y.to(out_ptr.dtype.element_ty), mask=m & (o < C))


@triton.jit(do_not_specialize=["M"])
def geglu_kernel(
    x_ptr,  # [M, 2 D], rows stride_x apart: hidden, gate
    out_ptr,  # [M, D], contiguous
    stride_x,
    M,
    D,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """hidden times the exact GELU of the gate, one tile [ROWS, COLS]."""
    o_m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    o_c = tl.program_id(1) * COLS + tl.arange(0, COLS)[None, :]
    m = (o_m < M) & (o_c < D)
    p_x = x_ptr + o_m * stride_x + o_c
    b_hidden = tl.load(p_x, mask=m, other=0.0).to(tl.float32)
    b_gate = tl.load(p_x + D, mask=m, other=0.0).to(tl.float32)
    b_y = b_hidden * (b_gate * 0.5 * (1.0 + tl.erf(b_gate * 0.7071067811865476)))
    tl.store(out_ptr + o_m * D + o_c, b_y.to(out_ptr.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["M"])
def bias_add_kernel(
    x_ptr,  # [M, C]
    residual_ptr,  # [M, C] or None
    bias_ptr,  # [C]
    out_ptr,  # [M, C]
    M,
    C,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    TILES: tl.constexpr,
):
    """x + bias + residual, TILES tiles [ROWS, COLS] below each other, rounded once."""
    n_c = tl.cdiv(C, COLS)  # neighbours in memory are worked on at the same time
    i_m = (tl.program_id(0) // n_c).to(tl.int64) * (TILES * ROWS)
    o_m = tl.arange(0, ROWS)[:, None]
    o_c = (tl.program_id(0) % n_c) * COLS + tl.arange(0, COLS)[None, :]
    m_c = o_c < C
    tiles, residuals = (), ()
    for i in tl.static_range(TILES):
        o = (i_m + i * ROWS + o_m) * C + o_c
        m = (i_m + i * ROWS + o_m < M) & m_c
        tiles += (tl.load(x_ptr + o, mask=m, other=0.0),)
        if residual_ptr is not None:
            residuals += (tl.load(residual_ptr + o, mask=m, other=0.0),)
    b_bias = tl.load(bias_ptr + tl.zeros((ROWS, 1), tl.int32) + o_c, mask=m_c, other=0.0).to(tl.float32)
    for i in tl.static_range(TILES):
        b = tiles[i].to(tl.float32) + b_bias
        if residual_ptr is not None:
            b += residuals[i].to(tl.float32)
        o = (i_m + i * ROWS + o_m) * C + o_c
        m = (i_m + i * ROWS + o_m < M) & m_c
        tl.store(out_ptr + o, b.to(out_ptr.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["W"])
def upsample_kernel(
    x_ptr,  # [LINES, W, C]
    out_ptr,  # [LINES, 2, W, 2, C]
    W,
    C,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """ROWS pixels of one line, COLS channels of each, to the two pixels of two lines that each becomes."""
    n_c, n_w = tl.cdiv(C, COLS), tl.cdiv(W, ROWS)
    i_w = tl.program_id(0) // n_c
    i_line = (i_w // n_w).to(tl.int64)
    o_w = (i_w % n_w) * ROWS + tl.arange(0, ROWS)[:, None]
    o_c = (tl.program_id(0) % n_c) * COLS + tl.arange(0, COLS)[None, :]
    m = (o_w < W) & (o_c < C)
    b = tl.load(x_ptr + (i_line * W + o_w) * C + o_c, mask=m)  # [ROWS, COLS]
    for i in tl.static_range(2):
        p_out = out_ptr + ((2 * i_line + i) * 2 * W + 2 * o_w) * C + o_c
        tl.store(p_out, b, mask=m)
        tl.store(p_out + C, b, mask=m)
