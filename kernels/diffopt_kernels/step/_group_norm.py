"""Device side of group_norm: x is [B, P, C] in memory, P pixels of adjacent channels. Host side: group_norm.py.

A program works on whole groups: GROUPS of CPG channels each, padded to COLS columns. Mean and squared deviations are
taken from values in registers, tile by tile, and merged by Chan et al., 1979, so nothing cancels.
"""

import triton
import triton.language as tl


@triton.jit
def _group_of_column(CPG: tl.constexpr, COLS: tl.constexpr, GROUPS_PAD: tl.constexpr):
    """[GROUPS_PAD, COLS], true where a column belongs to a group."""
    o_g = tl.arange(0, GROUPS_PAD)[:, None]
    o_c = tl.arange(0, COLS)[None, :]
    return o_c // CPG == o_g


@triton.jit
def _per_group(b_c, CPG: tl.constexpr, GROUPS_PAD: tl.constexpr):
    """Sums [GROUPS_PAD] of columns [COLS] over their groups."""
    m = _group_of_column(CPG, b_c.shape[0], GROUPS_PAD)
    return tl.sum(tl.where(m, b_c[None, :], 0.0), 1)


@triton.jit
def _per_column(b_g, CPG: tl.constexpr, COLS: tl.constexpr):
    """Values [COLS] of the columns' groups [GROUPS_PAD]."""
    m = _group_of_column(CPG, COLS, b_g.shape[0])
    return tl.sum(tl.where(m, b_g[:, None], 0.0), 0)


@triton.jit
def _columns(i_block, C, CPG: tl.constexpr, GROUPS: tl.constexpr, COLS: tl.constexpr):
    """Channels of the program's columns, and which of them exist."""
    o_c = tl.arange(0, COLS)
    i_c = i_block * (GROUPS * CPG)
    return i_c + o_c, (o_c < GROUPS * CPG) & (i_c + o_c < C)


@triton.jit
def _added(shift_ptr, channel_bias_ptr, i_b, stride_shift, o_c, m_c, COLS: tl.constexpr):
    """What is added to every pixel, [COLS] in float32."""
    b = tl.zeros((COLS,), tl.float32)
    if shift_ptr is not None:
        b += tl.load(shift_ptr + i_b * stride_shift + o_c, mask=m_c, other=0.0).to(tl.float32)
    if channel_bias_ptr is not None:
        b += tl.load(channel_bias_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
    return b


@triton.jit
def _finished(b_d, b_rstd, weight_ptr, bias_ptr, o_c, m_c, SILU: tl.constexpr):
    """Deviations [PIXELS, COLS] scaled, shifted and activated."""
    b_w = tl.load(weight_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_b = tl.load(bias_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_y = b_d * (b_rstd * b_w)[None, :] + b_b[None, :]
    if SILU:
        b_y = b_y * tl.sigmoid(b_y)
    return b_y


@triton.jit
def group_norm_whole_kernel(
    x_ptr,  # [B, P, C]
    out_ptr,  # [B, P, C]
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    shift_ptr,  # [B, C] or None
    channel_bias_ptr,  # [C] or None
    stride_shift,
    eps,
    P,
    C,
    CPG: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUPS_PAD: tl.constexpr,
    COLS: tl.constexpr,
    PIXELS: tl.constexpr,  # at least P
    SILU: tl.constexpr,
):
    """All pixels of a few groups of one row of the batch in one tile."""
    i_block = tl.program_id(0)
    i_b = tl.program_id(1).to(tl.int64)
    o_c, m_c = _columns(i_block, C, CPG, GROUPS, COLS)
    o_p = tl.arange(0, PIXELS)
    o = i_b * P * C + o_p[:, None] * C + o_c[None, :]
    m = (o_p < P)[:, None] & m_c[None, :]
    b_x = tl.load(x_ptr + o, mask=m, other=0.0).to(tl.float32)  # [PIXELS, COLS]
    b_x += _added(shift_ptr, channel_bias_ptr, i_b, stride_shift, o_c, m_c, COLS)[None, :]
    b_x = tl.where(m, b_x, 0.0)
    n = 1.0 * P * CPG
    b_mean = _per_column(_per_group(tl.sum(b_x, 0), CPG, GROUPS_PAD) / n, CPG, COLS)
    b_d = tl.where(m, b_x - b_mean[None, :], 0.0)
    b_var = _per_column(_per_group(tl.sum(b_d * b_d, 0), CPG, GROUPS_PAD) / n, CPG, COLS)
    b_y = _finished(b_d, 1.0 / tl.sqrt(b_var + eps), weight_ptr, bias_ptr, o_c, m_c, SILU)
    tl.store(out_ptr + o, b_y.to(out_ptr.dtype.element_ty), mask=m)


@triton.jit
def group_norm_moments_kernel(
    x_ptr,  # [B, P, C]
    moments_ptr,  # [B, 2, CHUNKS, G] in float32: mean, sum of squared deviations
    shift_ptr,  # [B, C] or None
    channel_bias_ptr,  # [C] or None
    stride_shift,
    P,
    C,
    G,
    CHUNK,  # pixels of one program, a multiple of PIXELS
    CPG: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUPS_PAD: tl.constexpr,
    COLS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """Mean and squared deviations of a few groups over one chunk of pixels."""
    i_block = tl.program_id(0)
    i_chunk = tl.program_id(1)
    n_chunks = tl.num_programs(1)
    i_b = tl.program_id(2).to(tl.int64)
    o_c, m_c = _columns(i_block, C, CPG, GROUPS, COLS)
    b_added = _added(shift_ptr, channel_bias_ptr, i_b, stride_shift, o_c, m_c, COLS)
    b_mean = tl.zeros((GROUPS_PAD,), tl.float32)
    b_m2 = tl.zeros((GROUPS_PAD,), tl.float32)
    n_before = 0.0
    i_end = tl.minimum(P, (i_chunk + 1) * CHUNK)
    for i_p in range(i_chunk * CHUNK, i_end, PIXELS):
        o_p = i_p + tl.arange(0, PIXELS)
        m = (o_p < i_end)[:, None] & m_c[None, :]
        b_x = tl.load(x_ptr + i_b * P * C + o_p[:, None] * C + o_c[None, :], mask=m, other=0.0).to(tl.float32)
        b_x = tl.where(m, b_x + b_added[None, :], 0.0)  # [PIXELS, COLS]
        n = 1.0 * tl.minimum(i_end - i_p, PIXELS) * CPG
        b_tile_mean = _per_group(tl.sum(b_x, 0), CPG, GROUPS_PAD) / n
        b_d = tl.where(m, b_x - _per_column(b_tile_mean, CPG, COLS)[None, :], 0.0)
        b_tile_m2 = _per_group(tl.sum(b_d * b_d, 0), CPG, GROUPS_PAD)
        b_apart = b_tile_mean - b_mean
        n_after = n_before + n
        b_mean += b_apart * (n / n_after)
        b_m2 += b_tile_m2 + b_apart * b_apart * (n_before * n / n_after)
        n_before = n_after
    o_g = tl.arange(0, GROUPS_PAD)
    i_g = i_block * GROUPS + o_g
    m_g = (o_g < GROUPS) & (i_g < G)
    o = (i_b * 2 * n_chunks + i_chunk) * G + i_g
    tl.store(moments_ptr + o, b_mean, mask=m_g)
    tl.store(moments_ptr + o + n_chunks * G, b_m2, mask=m_g)


@triton.jit
def group_norm_apply_kernel(
    x_ptr,  # [B, P, C]
    out_ptr,  # [B, P, C]
    moments_ptr,  # [B, 2, CHUNKS, G]
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    shift_ptr,  # [B, C] or None
    channel_bias_ptr,  # [C] or None
    stride_shift,
    eps,
    P,
    C,
    G,
    CHUNK,  # pixels of one chunk
    n_chunks,
    CPG: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUPS_PAD: tl.constexpr,
    COLS: tl.constexpr,
    PIXELS: tl.constexpr,
    CHUNKS_PAD: tl.constexpr,
    SILU: tl.constexpr,
):
    """Merge the chunks' moments and normalize one tile [PIXELS, COLS]."""
    i_block = tl.program_id(0)
    i_b = tl.program_id(2).to(tl.int64)
    o_c, m_c = _columns(i_block, C, CPG, GROUPS, COLS)
    o_g = tl.arange(0, GROUPS_PAD)
    i_g = i_block * GROUPS + o_g
    o_k = tl.arange(0, CHUNKS_PAD)
    m_k = (o_k < n_chunks)[:, None] & ((o_g < GROUPS) & (i_g < G))[None, :]
    p_k = moments_ptr + (i_b * 2 * n_chunks + o_k[:, None]) * G + i_g[None, :]
    b_k_mean = tl.load(p_k, mask=m_k, other=0.0)  # [CHUNKS_PAD, GROUPS_PAD]
    b_k_m2 = tl.load(p_k + n_chunks * G, mask=m_k, other=0.0)
    b_n = (1.0 * tl.maximum(tl.minimum(P - o_k * CHUNK, CHUNK), 0) * CPG)[:, None]
    n = 1.0 * P * CPG
    b_mean = tl.sum(b_k_mean * b_n, 0) / n  # [GROUPS_PAD]
    b_apart = tl.where(m_k, b_k_mean - b_mean[None, :], 0.0)
    b_var = tl.sum(b_k_m2 + b_apart * b_apart * b_n, 0) / n
    b_mean_c = _per_column(b_mean, CPG, COLS)
    b_rstd_c = _per_column(1.0 / tl.sqrt(b_var + eps), CPG, COLS)

    o_p = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    o = i_b * P * C + o_p[:, None] * C + o_c[None, :]
    m = (o_p < P)[:, None] & m_c[None, :]
    b_x = tl.load(x_ptr + o, mask=m, other=0.0).to(tl.float32)
    b_x += (_added(shift_ptr, channel_bias_ptr, i_b, stride_shift, o_c, m_c, COLS) - b_mean_c)[None, :]
    b_y = _finished(b_x, b_rstd_c, weight_ptr, bias_ptr, o_c, m_c, SILU)
    tl.store(out_ptr + o, b_y.to(out_ptr.dtype.element_ty), mask=m)
