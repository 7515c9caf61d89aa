"""Device side of attention: forward, online softmax in base 2. Host side: attention.py.

Both kernels compute the same thing and share `_softmax_step`; they differ in how tiles reach the chip. One program
handles BLOCK_M queries of one head of one batch row and walks over all keys (Dao et al., FlashAttention-2, 2023,
algorithm 1). Head dims that are no power of two are either padded (PART_1 = 0, PART_0 >= D) or cut into two powers of
two (PART_0 + PART_1 >= D); columns from D on are read as zero. Only the pointers kernel takes a mask.
"""

import triton
import triton.language as tl


@triton.jit
def _program_position(N_q, H, BLOCK_M: tl.constexpr):
    """Which query tile, batch row and head: tiles of one head are neighbours, so its keys and values stay in L2."""
    i_program = tl.program_id(0)
    n_tiles = tl.cdiv(N_q, BLOCK_M)
    i_tile = i_program % n_tiles
    i_head = i_program // n_tiles
    return i_tile * BLOCK_M, i_head // H, i_head % H


@triton.jit
def _softmax_step(b_s, b_m, b_l, scale_log2):
    """One tile of scores [BLOCK_M, BLOCK_N] into the running maximum and sum [BLOCK_M], both in base 2.

    Returns the tile's unnormalized probabilities, the factor for what was accumulated before, and maximum and sum.
    A score of -inf is a key that does not exist; each tile holds at least one that does, so the maximum is finite.
    """
    b_m_next = tl.maximum(b_m, tl.max(b_s, 1) * scale_log2)
    b_rescale = tl.math.exp2(b_m - b_m_next)
    b_p = tl.math.exp2(b_s * scale_log2 - b_m_next[:, None])
    return b_p, b_rescale, b_m_next, b_l * b_rescale + tl.sum(b_p, 1)


@triton.jit
def _masked_softmax_step(b_s, b_m, b_l):
    """As `_softmax_step` for scores in natural units, of which a whole row may be -inf, in this tile or in all so far.

    Until a row meets its first key its maximum stays -inf; 0 is subtracted instead, so that every power is 0 and not
    the NaN of -inf - -inf. Natural units, because float32's lowest number is a common mask value: times log2(e) it
    would become -inf, and a row of nothing else would lose its (uniform) weights.
    """
    LOG2_E: tl.constexpr = 1.4426950408889634
    b_m_next = tl.maximum(b_m, tl.max(b_s, 1))
    b_shift = tl.where(b_m_next == float("-inf"), 0.0, b_m_next)
    b_rescale = tl.math.exp2((b_m - b_shift) * LOG2_E)
    b_p = tl.math.exp2((b_s - b_shift[:, None]) * LOG2_E)
    return b_p, b_rescale, b_m_next, b_l * b_rescale + tl.sum(b_p, 1)


@triton.jit
def _masked_scores(
    b_s,  # [BLOCK_M, BLOCK_N], scaled
    ptr,  # mask of the tile's first query and key; bytes (0: don't attend) or floats to add
    stride_m,  # elements from query to query and from key to key, int64
    stride_n,
    n_queries,  # that exist from there on
    n_keys,
    PER_QUERY: tl.constexpr,  # False: one row of the mask serves all queries
    KEYS_ADJACENT: tl.constexpr,  # stride_n is 1
    ALL_KEYS: tl.constexpr,  # n_keys is BLOCK_N or more
):
    """Scores with the mask applied; keys that don't exist get -inf like masked ones."""
    BLOCK_M: tl.constexpr = b_s.shape[0]
    BLOCK_N: tl.constexpr = b_s.shape[1]
    o_n = tl.arange(0, BLOCK_N)[None, :]
    p = ptr + (o_n if KEYS_ADJACENT else o_n * stride_n)  # [1, BLOCK_N]
    m = o_n < (BLOCK_N if ALL_KEYS else n_keys)
    if PER_QUERY:
        o_m = tl.arange(0, BLOCK_M)[:, None]
        p = p + o_m * stride_m  # [BLOCK_M, BLOCK_N]
        m = m & (o_m < n_queries)
    if ptr.dtype.element_ty == tl.uint8:
        return tl.where(tl.load(p, mask=m, other=0) != 0, b_s, float("-inf"))
    return b_s + tl.load(p, mask=m, other=float("-inf")).to(tl.float32)


@triton.jit
def _store_part(o_ptr, b_acc, b_l, i_m, i_b, i_h, N_q, H, FIRST: tl.constexpr, PART: tl.constexpr, D: tl.constexpr):
    """Columns FIRST to FIRST + PART of the output tile; o is [B, N_q, H, D], contiguous."""
    o_m = i_m + tl.arange(0, b_acc.shape[0])
    o_d = FIRST + tl.arange(0, PART)
    row = (i_b.to(tl.int64) * N_q + o_m) * H + i_h  # [BLOCK_M]
    p_o = o_ptr + row[:, None] * D + o_d[None, :]
    m_o = o_m[:, None] < N_q
    if FIRST + PART > D:
        m_o = m_o & (o_d[None, :] < D)
    tl.store(p_o, (b_acc / b_l[:, None]).to(o_ptr.dtype.element_ty), mask=m_o)


@triton.jit
def _load_part(
    ptr,  # first row of the tile, column 0 of the head
    stride_n,  # elements from row to row, int64
    n_rows,  # rows that exist from there on
    FIRST: tl.constexpr,
    PART: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    ALL_ROWS: tl.constexpr,
):
    """Columns FIRST to FIRST + PART of ROWS rows, as [ROWS, PART]; what does not exist is zero."""
    o_n = tl.arange(0, ROWS)
    o_d = FIRST + tl.arange(0, PART)
    p = ptr + o_n[:, None] * stride_n + o_d[None, :]
    if ALL_ROWS:
        if FIRST + PART > D:
            return tl.load(p, mask=(o_d < D)[None, :], other=0.0)
        return tl.load(p)
    m = (o_n < n_rows)[:, None]
    if FIRST + PART > D:
        m = m & (o_d < D)[None, :]
    return tl.load(p, mask=m, other=0.0)


@triton.jit
def _scores(b_q, b_k):
    """Products of queries [BLOCK_M, PART] and keys [BLOCK_N, PART], as [BLOCK_M, BLOCK_N] in float32.

    A float32 dot adds up its PART terms one after another. In runs of 32, summed afterwards, the rounding errors of
    160 terms stay at the level of PyTorch's (measured: in one chain the largest was up to 2.6 times math's).
    """
    RUN: tl.constexpr = 32
    PART: tl.constexpr = b_q.shape[1]
    if b_q.dtype == tl.float32 and PART > RUN:
        b_q3 = b_q.reshape(b_q.shape[0], PART // RUN, RUN).permute(1, 0, 2)
        b_k3 = b_k.reshape(b_k.shape[0], PART // RUN, RUN).permute(1, 2, 0)
        return tl.sum(tl.dot(b_q3, b_k3, input_precision="ieee"), 0)
    return tl.dot(b_q, tl.trans(b_k), input_precision="ieee")


_NOT_SPECIALIZED = [
    *("N_q", "N_k", "H"),
    *("stride_qb", "stride_qn", "stride_qh"),
    *("stride_kb", "stride_kn", "stride_kh"),
    *("stride_vb", "stride_vn", "stride_vh"),
    *("stride_mb", "stride_mh", "stride_mm", "stride_mn"),
]


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def attention_pointers_kernel(
    q_ptr,  # [B, N_q, H, D]
    k_ptr,  # [B, N_k, H, D]
    v_ptr,  # [B, N_k, H, D]
    o_ptr,  # [B, N_q, H, D], contiguous
    scale,  # softmax scale, times log2(e) where there is no mask
    N_q,
    N_k,
    H,
    stride_qb,  # strides count units of UNIT elements, so that the compiler sees what they are multiples of
    stride_qn,
    stride_qh,
    stride_kb,
    stride_kn,
    stride_kh,
    stride_vb,
    stride_vn,
    stride_vh,
    UNIT: tl.constexpr,
    D: tl.constexpr,
    PART_0: tl.constexpr,
    PART_1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WHOLE_KEY_TILES: tl.constexpr,  # N_k is a multiple of BLOCK_N: no key mask
    mask_ptr=None,  # [B, H, N_q, N_k] by strides in elements, of which any may be 0; see _masked_scores
    stride_mb=0,
    stride_mh=0,
    stride_mm=0,
    stride_mn=0,
    MASK_PER_QUERY: tl.constexpr = False,
    MASK_KEYS_ADJACENT: tl.constexpr = False,
):
    """Attention through plain pointer loads: every GPU, every stride and alignment, with or without a mask."""
    i_m, i_b, i_h = _program_position(N_q, H, BLOCK_M)
    i_b64 = i_b.to(tl.int64)
    i_h64 = i_h.to(tl.int64)
    row_q = stride_qn.to(tl.int64) * UNIT
    row_k = stride_kn.to(tl.int64) * UNIT
    row_v = stride_vn.to(tl.int64) * UNIT
    p_q = q_ptr + (i_b64 * stride_qb + i_h64 * stride_qh) * UNIT + i_m * row_q
    p_k = k_ptr + (i_b64 * stride_kb + i_h64 * stride_kh) * UNIT
    p_v = v_ptr + (i_b64 * stride_vb + i_h64 * stride_vh) * UNIT

    if mask_ptr is not None:
        row_mask = stride_mm.to(tl.int64)
        column_mask = stride_mn.to(tl.int64)
        p_mask = mask_ptr + i_b64 * stride_mb + i_h64 * stride_mh + i_m * row_mask

    b_q0 = _load_part(p_q, row_q, N_q - i_m, 0, PART_0, D, BLOCK_M, False)
    b_acc0 = tl.zeros([BLOCK_M, PART_0], tl.float32)
    if PART_1:
        b_q1 = _load_part(p_q, row_q, N_q - i_m, PART_0, PART_1, D, BLOCK_M, False)
        b_acc1 = tl.zeros([BLOCK_M, PART_1], tl.float32)
    b_m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_l = tl.zeros([BLOCK_M], tl.float32)

    for i_n in range(0, N_k, BLOCK_N):
        n_keys = N_k - i_n
        # [BLOCK_M, BLOCK_N]
        b_k0 = _load_part(p_k + i_n * row_k, row_k, n_keys, 0, PART_0, D, BLOCK_N, WHOLE_KEY_TILES)
        b_s = _scores(b_q0, b_k0)
        if PART_1:
            b_k1 = _load_part(p_k + i_n * row_k, row_k, n_keys, PART_0, PART_1, D, BLOCK_N, WHOLE_KEY_TILES)
            b_s += _scores(b_q1, b_k1)
        if mask_ptr is not None:
            b_s = _masked_scores(
                b_s * scale,
                p_mask + i_n * column_mask,
                row_mask,
                column_mask,
                N_q - i_m,
                n_keys,
                MASK_PER_QUERY,
                MASK_KEYS_ADJACENT,
                WHOLE_KEY_TILES,
            )
            b_p, b_rescale, b_m, b_l = _masked_softmax_step(b_s, b_m, b_l)
        else:
            if not WHOLE_KEY_TILES:
                b_s = tl.where((tl.arange(0, BLOCK_N) < n_keys)[None, :], b_s, float("-inf"))
            b_p, b_rescale, b_m, b_l = _softmax_step(b_s, b_m, b_l, scale)
        b_v0 = _load_part(p_v + i_n * row_v, row_v, n_keys, 0, PART_0, D, BLOCK_N, WHOLE_KEY_TILES)
        b_p = b_p.to(b_v0.dtype)
        b_acc0 = tl.dot(b_p, b_v0, b_acc0 * b_rescale[:, None], input_precision="ieee")
        if PART_1:
            b_v1 = _load_part(p_v + i_n * row_v, row_v, n_keys, PART_0, PART_1, D, BLOCK_N, WHOLE_KEY_TILES)
            b_acc1 = tl.dot(b_p, b_v1, b_acc1 * b_rescale[:, None], input_precision="ieee")

    if mask_ptr is not None:  # no key at all: zeros, as PyTorch's SDPA
        b_l = tl.where(b_l == 0.0, 1.0, b_l)
    _store_part(o_ptr, b_acc0, b_l, i_m, i_b, i_h, N_q, H, 0, PART_0, D)
    if PART_1:
        _store_part(o_ptr, b_acc1, b_l, i_m, i_b, i_h, N_q, H, PART_0, PART_1, D)


@triton.jit(do_not_specialize=["N_q", "N_k", "H"])
def attention_descriptors_kernel(
    q0_desc,  # [B, H, N_q, D] in tiles [1, 1, BLOCK_M, PART_0]
    q1_desc,  # the same in tiles of PART_1 columns, or None
    k0_desc,  # [B, H, N_k, D] in tiles [1, 1, BLOCK_N, PART_0]
    k1_desc,
    v0_desc,  # [B, H, N_k, D] in tiles [1, 1, BLOCK_N, PART_0]
    v1_desc,
    o_ptr,  # [B, N_q, H, D], contiguous
    scale_log2,  # softmax scale times log2(e)
    N_q,
    N_k,
    H,
    D: tl.constexpr,
    PART_0: tl.constexpr,
    PART_1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WHOLE_KEY_TILES: tl.constexpr,
):
    """Attention through tensor descriptors (TMA, Hopper and newer); no mask. What does not exist reads as zero."""
    i_m, i_b, i_h = _program_position(N_q, H, BLOCK_M)

    b_q0 = q0_desc.load([i_b, i_h, i_m, 0]).reshape(BLOCK_M, PART_0)
    b_acc0 = tl.zeros([BLOCK_M, PART_0], tl.float32)
    if PART_1:
        b_q1 = q1_desc.load([i_b, i_h, i_m, PART_0]).reshape(BLOCK_M, PART_1)
        b_acc1 = tl.zeros([BLOCK_M, PART_1], tl.float32)
    b_m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_l = tl.zeros([BLOCK_M], tl.float32)

    for i_n in range(0, N_k, BLOCK_N):
        # [BLOCK_M, BLOCK_N]
        b_k0 = k0_desc.load([i_b, i_h, i_n, 0]).reshape(BLOCK_N, PART_0)
        b_s = tl.dot(b_q0, tl.trans(b_k0))
        if PART_1:
            b_k1 = k1_desc.load([i_b, i_h, i_n, PART_0]).reshape(BLOCK_N, PART_1)
            b_s = tl.dot(b_q1, tl.trans(b_k1), b_s)
        if not WHOLE_KEY_TILES:
            b_s = tl.where((tl.arange(0, BLOCK_N) < N_k - i_n)[None, :], b_s, float("-inf"))
        b_p, b_rescale, b_m, b_l = _softmax_step(b_s, b_m, b_l, scale_log2)
        b_v0 = v0_desc.load([i_b, i_h, i_n, 0]).reshape(BLOCK_N, PART_0)
        b_p = b_p.to(b_v0.dtype)
        b_acc0 = tl.dot(b_p, b_v0, b_acc0 * b_rescale[:, None])
        if PART_1:
            b_v1 = v1_desc.load([i_b, i_h, i_n, PART_0]).reshape(BLOCK_N, PART_1)
            b_acc1 = tl.dot(b_p, b_v1, b_acc1 * b_rescale[:, None])

    _store_part(o_ptr, b_acc0, b_l, i_m, i_b, i_h, N_q, H, 0, PART_0, D)
    if PART_1:
        _store_part(o_ptr, b_acc1, b_l, i_m, i_b, i_h, N_q, H, PART_0, PART_1, D)
