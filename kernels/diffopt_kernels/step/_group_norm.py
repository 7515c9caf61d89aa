"""Device side of group_norm: x is [B, P, C] in memory, P pixels of adjacent channels. Host side: group_norm.py.

If there is a second tensor, x has the first C_X channels of [B, P, C], and the second the others, each adjacent in its
own memory; groups, and a program's columns, may lie on both sides of the border.

A program works on whole groups: one or GROUPS of CPG channels each, padded to COLS columns, and loads LOADS tiles
[PIXELS, COLS] at once. A tile gives each thread one vector, so a thread has the same place in all tiles: mean and
squared deviations are taken within a thread, LOADS values at a time from registers, and merged by Chan et al., 1979.
Nothing cancels, wherever the values lie and whichever comes first, and threads meet only after the last pixel.

What depends on the image's size or the batch is known when a kernel runs, not when it is compiled, and is not
specialized, so that a new size compiles nothing. What loads need, C, C_X and stride_shift, is the model's.
"""

import triton
import triton.language as tl

_SIZES = ["P", "G", "CHUNK", "CPG", "GROUPS", "UNITS"]


@triton.jit
def _columns(i_block, C, n_c, COLS: tl.constexpr):
    """Channels of the program's columns, n_c of each program, and which of them exist."""
    o_c = tl.arange(0, COLS)
    i_c = i_block * n_c
    return i_c + o_c, (o_c < n_c) & (i_c + o_c < C)


@triton.jit
def _tiles(
    x_ptr,
    second_ptr,
    i_p,  # of all pixels of all images, in int64
    n,
    C,
    C_X,
    o_c,
    m_c,
    PIXELS: tl.constexpr,
    LOADS: tl.constexpr,
    FULL: tl.constexpr,
):
    """Of n pixels from i_p on, the first LOADS tiles [PIXELS, COLS], as they are in memory; zeros after the last pixel.

    A tuple, not one tensor of three dimensions: which of these threads would divide depends on Triton's version.
    """
    o_p = tl.arange(0, PIXELS)[:, None]
    p = x_ptr + i_p * C_X
    stride = C_X
    o = o_c[None, :]
    if second_ptr is not None:  # each column reads from where it lies: one load either way
        m_x = o < C_X
        p = tl.where(m_x, p, second_ptr + i_p * (C - C_X))
        stride = tl.where(m_x, C_X, C - C_X)
        o = tl.where(m_x, o, o - C_X)
    o += o_p * stride
    tiles = ()
    for i in tl.static_range(LOADS):
        m = m_c[None, :] if FULL else (o_p < n - i * PIXELS) & m_c[None, :]
        tiles += (tl.load(p + i * PIXELS * stride + o, mask=m, other=0.0),)
    return tiles


@triton.jit
def _channels(p, o, o_c, m_c, PIXELS: tl.constexpr):
    """A vector [C] at offset o for each pixel of a tile, [PIXELS, COLS] as it is in memory; zeros if there is none.

    Whoever loads early converts late: that waits for what is loaded.
    """
    if p is None:
        b = tl.zeros((PIXELS, o_c.shape[0]), tl.float32)
    else:
        b = tl.load(p + o + tl.zeros((PIXELS, 1), tl.int32) + o_c[None, :], mask=m_c[None, :], other=0.0)
    return b


@triton.jit
def _with_tiles(
    b_mean,
    b_m2,
    i_p,  # pixels, a multiple of PIXELS, that each place has met
    x_ptr,
    second_ptr,
    i_all,  # the first of the tiles' pixels, of all pixels of all images, in int64
    n,  # pixels from there on
    C,
    C_X,
    o_c,
    m_c,
    PIXELS: tl.constexpr,
    LOADS: tl.constexpr,
    FULL: tl.constexpr,  # whether n is at least LOADS * PIXELS
):
    """Mean and squared deviations with those of LOADS more tiles."""
    o_p = tl.arange(0, PIXELS)[:, None]
    tiles = _tiles(x_ptr, second_ptr, i_all, n, C, C_X, o_c, m_c, PIXELS, LOADS, FULL)
    b_new = tl.zeros_like(b_mean)  # mean of these tiles
    for i in tl.static_range(LOADS):
        b_new += tiles[i].to(tl.float32)
    b_n = tl.full((1, 1), LOADS, tl.float32) if FULL else tl.minimum(_met(n, PIXELS), LOADS).to(tl.float32)
    b_new *= tl.div_rn(1.0, tl.maximum(b_n, 1.0))
    for i in tl.static_range(LOADS):
        b_d = tiles[i].to(tl.float32) - b_new
        b_m2 += b_d * b_d if FULL else tl.where(o_p < n - i * PIXELS, b_d * b_d, 0.0)
    before = tl.cast(i_p // PIXELS, tl.float32)  # so many values each place has had
    b_share = tl.where(before > 0.0, b_n / tl.maximum(before + b_n, 1.0), 1.0)  # of the first tiles exactly 1
    b_apart = b_new - b_mean
    b_mean += b_apart * b_share
    b_m2 += b_apart * b_apart * (b_share * before)
    return b_mean, b_m2


@triton.jit
def _thread_moments(
    x_ptr,
    second_ptr,
    i_first,  # of all pixels of all images, in int64
    n,  # pixels
    C,
    C_X,
    o_c,
    m_c,
    PIXELS: tl.constexpr,
    LOADS: tl.constexpr,
):
    """Mean and squared deviations, [PIXELS, COLS] both, of each place in n pixels' tiles.

    Only the last tiles, if they are not full, are looked at pixel by pixel.
    """
    b_mean = tl.zeros((PIXELS, o_c.shape[0]), tl.float32)
    b_m2 = tl.zeros((PIXELS, o_c.shape[0]), tl.float32)
    n_full = n // (LOADS * PIXELS) * (LOADS * PIXELS)
    for i_p in range(0, n_full, LOADS * PIXELS):
        i_all = i_first + i_p
        b_mean, b_m2 = _with_tiles(
            b_mean, b_m2, i_p, x_ptr, second_ptr, i_all, n - i_p, C, C_X, o_c, m_c, PIXELS, LOADS, True
        )
    if n_full < n:
        i_all = i_first + n_full
        b_mean, b_m2 = _with_tiles(
            b_mean, b_m2, n_full, x_ptr, second_ptr, i_all, n - n_full, C, C_X, o_c, m_c, PIXELS, LOADS, False
        )
    return b_mean, b_m2


@triton.jit
def _met(n, PIXELS: tl.constexpr):
    """How many of n pixels each place of a tile meets, [PIXELS, 1]."""
    return tl.maximum(n + PIXELS - 1 - tl.arange(0, PIXELS)[:, None], 0) // PIXELS


@triton.jit
def _group_moments(b_mean, b_m2, n, CPG, GROUPS_PAD: tl.constexpr):
    """Mean and squared deviations [GROUPS_PAD] of groups, from those of the places of n pixels' tiles."""
    b_n = _met(n, b_mean.shape[0]).to(tl.float32)
    b_mean_c = tl.sum(b_mean * tl.div_rn(b_n, tl.cast(n, tl.float32)), 0)[None, :]  # [1, COLS]
    b_apart = b_mean - b_mean_c
    b_m2_c = tl.sum(b_m2 + b_apart * b_apart * b_n, 0)[None, :]
    o_c = tl.arange(0, b_mean.shape[1])[None, :] - tl.arange(0, GROUPS_PAD)[:, None] * CPG  # within each group
    m = (o_c >= 0) & (o_c < CPG)
    b_mean_g = tl.div_rn(tl.sum(tl.where(m, b_mean_c, 0.0), 1), tl.cast(CPG, tl.float32))
    b_apart_c = b_mean_c - b_mean_g[:, None]  # [GROUPS_PAD, COLS]
    return b_mean_g, tl.sum(tl.where(m, b_m2_c + b_apart_c * b_apart_c * n, 0.0), 1)


@triton.jit
def _per_column(b_g, CPG, COLS: tl.constexpr):
    """Values [1, COLS] of the columns' groups [GROUPS_PAD]; padding has the last group's."""
    return tl.gather(b_g, tl.minimum(tl.arange(0, COLS) // CPG, b_g.shape[0] - 1), 0)[None, :]


@triton.jit
def _store(
    out_ptr,
    joined_ptr,
    i_p,  # of all pixels of all images, in int64
    tiles,
    n,
    C,
    o_c,
    m_c,
    b_moved,
    b_scale,
    b_bias,
    PIXELS: tl.constexpr,
    STORES: tl.constexpr,
    SILU: tl.constexpr,
):
    """Of n pixels, move, scale, move again and activate the first tiles; the three are [PIXELS, COLS].

    Where joined_ptr is one, the tiles go there as they are.
    """
    o_p = tl.arange(0, PIXELS)[:, None]
    o = o_p * C + o_c[None, :]
    for i in tl.static_range(STORES):
        b_y = (tiles[i].to(tl.float32) + b_moved) * b_scale + b_bias.to(tl.float32)
        if SILU:
            b_y = b_y / (1.0 + tl.exp2(b_y * -1.4426950408889634))  # by -log2(e): exp2 needs no range checks
        m = (o_p < n - i * PIXELS) & m_c[None, :]
        tl.store(out_ptr + i_p * C + i * PIXELS * C + o, b_y.to(out_ptr.dtype.element_ty), mask=m)
        if joined_ptr is not None:
            tl.store(joined_ptr + i_p * C + i * PIXELS * C + o, tiles[i], mask=m)


@triton.jit(do_not_specialize=["P", "CHUNK"])
def group_norm_whole_kernel(
    x_ptr,  # [B, P, C_X]
    second_ptr,  # [B, P, C - C_X] or None
    out_ptr,  # [B, P, C]
    joined_ptr,  # [B, P, C] or None: x and second side by side
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    shift_ptr,  # [B, C] or None
    channel_bias_ptr,  # [C] or None
    stride_shift,
    eps,
    P,
    C,
    C_X,  # C if there is no second tensor
    CHUNK,  # pixels that one program writes
    CPG: tl.constexpr,
    COLS: tl.constexpr,
    PIXELS: tl.constexpr,
    LOADS: tl.constexpr,
    STORES: tl.constexpr,  # tiles that are stored at once
    SILU: tl.constexpr,
):
    """Each program takes the moments of one group over all pixels, and normalizes one chunk of them."""
    i_block = tl.program_id(0)
    i_b = tl.program_id(2).to(tl.int64)
    o_c, m_c = _columns(i_block, C, CPG, COLS)
    b_w = _channels(weight_ptr, 0, o_c, m_c, PIXELS)
    b_b = _channels(bias_ptr, 0, o_c, m_c, PIXELS)
    b_shift = _channels(shift_ptr, i_b * stride_shift, o_c, m_c, PIXELS)
    b_channel_bias = _channels(channel_bias_ptr, 0, o_c, m_c, PIXELS)
    b_mean, b_m2 = _thread_moments(x_ptr, second_ptr, i_b * P, P, C, C_X, o_c, m_c, PIXELS, LOADS)
    b_added = b_shift.to(tl.float32) + b_channel_bias.to(tl.float32)
    b_mean, b_m2 = _group_moments(b_mean + b_added, b_m2, P, CPG, 1)
    b_moved = b_added - _per_column(b_mean, CPG, COLS)
    b_scale = b_w.to(tl.float32) * _per_column(1.0 / tl.sqrt(b_m2 / (1.0 * P * CPG) + eps), CPG, COLS)

    i_first = tl.program_id(1) * CHUNK
    i_end = tl.minimum(P, i_first + CHUNK)
    for i_p in range(i_first, i_end, STORES * PIXELS):
        i_all = i_b * P + i_p
        n = i_end - i_p
        tiles = _tiles(x_ptr, second_ptr, i_all, n, C, C_X, o_c, m_c, PIXELS, STORES, False)
        _store(out_ptr, joined_ptr, i_all, tiles, n, C, o_c, m_c, b_moved, b_scale, b_b, PIXELS, STORES, SILU)


@triton.jit(do_not_specialize=_SIZES)
def group_norm_moments_kernel(
    x_ptr,  # [B, P, C_X]
    second_ptr,  # [B, P, C - C_X] or None
    moments_ptr,  # [B, 2, G, CHUNKS] in float32: mean, sum of squared deviations
    shift_ptr,  # [B, C] or None
    channel_bias_ptr,  # [C] or None
    stride_shift,
    P,
    C,
    C_X,  # C if there is no second tensor
    G,
    CHUNK,  # pixels of one program
    CPG,
    GROUPS,
    UNITS,  # GROUPS * CPG / UNIT
    UNIT: tl.constexpr,  # adjacent channels, aligned, that one load may take
    GROUPS_PAD: tl.constexpr,
    COLS: tl.constexpr,
    PIXELS: tl.constexpr,
    LOADS: tl.constexpr,
):
    """Mean and squared deviations of a few groups over one chunk of pixels."""
    i_block = tl.program_id(0)
    i_chunk = tl.program_id(1)
    n_chunks = tl.num_programs(1)
    i_b = tl.program_id(2).to(tl.int64)
    o_c, m_c = _columns(i_block, C, UNITS * UNIT, COLS)
    b_shift = _channels(shift_ptr, i_b * stride_shift, o_c, m_c, PIXELS)
    b_channel_bias = _channels(channel_bias_ptr, 0, o_c, m_c, PIXELS)
    i_first = i_chunk * CHUNK
    n = tl.minimum(P - i_first, CHUNK)
    b_mean, b_m2 = _thread_moments(x_ptr, second_ptr, i_b * P + i_first, n, C, C_X, o_c, m_c, PIXELS, LOADS)
    b_added = b_shift.to(tl.float32) + b_channel_bias.to(tl.float32)
    b_mean, b_m2 = _group_moments(b_mean + b_added, b_m2, n, CPG, GROUPS_PAD)
    o_g = tl.arange(0, GROUPS_PAD)
    i_g = i_block * GROUPS + o_g
    m_g = (o_g < GROUPS) & (i_g < G)
    p_k = moments_ptr + (i_b * 2 * G + i_g) * n_chunks + i_chunk
    tl.store(p_k, b_mean, mask=m_g)
    tl.store(p_k + G * n_chunks, b_m2, mask=m_g)


@triton.jit(do_not_specialize=[*_SIZES, "CHUNKS"])
def group_norm_apply_kernel(
    x_ptr,  # [B, P, C_X]
    second_ptr,  # [B, P, C - C_X] or None
    out_ptr,  # [B, P, C]
    joined_ptr,  # [B, P, C] or None: x and second side by side
    moments_ptr,  # [B, 2, G, CHUNKS]
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    shift_ptr,  # [B, C] or None
    channel_bias_ptr,  # [C] or None
    stride_shift,
    eps,
    P,
    C,
    C_X,  # C if there is no second tensor
    G,
    CHUNK,  # pixels of one chunk
    CHUNKS,
    CPG,
    GROUPS,
    UNITS,  # GROUPS * CPG / UNIT
    UNIT: tl.constexpr,  # adjacent channels, aligned, that one load may take
    GROUPS_PAD: tl.constexpr,
    COLS: tl.constexpr,
    PIXELS: tl.constexpr,
    STORES: tl.constexpr,
    CHUNKS_PAD: tl.constexpr,
    SILU: tl.constexpr,
):
    """Merge the chunks' moments and normalize STORES tiles."""
    i_block = tl.program_id(0)
    i_b = tl.program_id(2).to(tl.int64)
    o_c, m_c = _columns(i_block, C, UNITS * UNIT, COLS)
    i_p = tl.program_id(1) * (STORES * PIXELS)
    i_all = i_b * P + i_p
    # First of all, so that the tiles are on their way while moments are merged.
    tiles = _tiles(x_ptr, second_ptr, i_all, P - i_p, C, C_X, o_c, m_c, PIXELS, STORES, False)
    b_w = _channels(weight_ptr, 0, o_c, m_c, PIXELS)
    b_b = _channels(bias_ptr, 0, o_c, m_c, PIXELS)
    b_shift = _channels(shift_ptr, i_b * stride_shift, o_c, m_c, PIXELS)
    b_channel_bias = _channels(channel_bias_ptr, 0, o_c, m_c, PIXELS)

    o_g = tl.arange(0, GROUPS_PAD)[:, None]
    o_k = tl.arange(0, CHUNKS_PAD)[None, :]
    m_k = (o_k < CHUNKS) & (o_g < GROUPS) & (i_block * GROUPS + o_g < G)
    p_k = moments_ptr + (i_b * 2 * G + i_block * GROUPS + o_g) * CHUNKS + o_k
    b_k_mean = tl.load(p_k, mask=m_k, other=0.0)  # [GROUPS_PAD, CHUNKS_PAD]
    b_k_m2 = tl.load(p_k + G * CHUNKS, mask=m_k, other=0.0)
    b_n = tl.maximum(tl.minimum(P - o_k * CHUNK, CHUNK), 0).to(tl.float32)
    b_mean = tl.sum(b_k_mean * tl.div_rn(b_n, tl.cast(P, tl.float32)), 1)  # [GROUPS_PAD]
    b_apart = b_k_mean - b_mean[:, None]
    b_m2 = tl.sum(b_k_m2 + b_apart * b_apart * (b_n * CPG), 1)
    b_added = b_shift.to(tl.float32) + b_channel_bias.to(tl.float32)
    b_moved = b_added - _per_column(b_mean, CPG, COLS)
    b_scale = b_w.to(tl.float32) * _per_column(1.0 / tl.sqrt(b_m2 / (1.0 * P * CPG) + eps), CPG, COLS)
    _store(out_ptr, joined_ptr, i_all, tiles, P - i_p, C, o_c, m_c, b_moved, b_scale, b_b, PIXELS, STORES, SILU)
