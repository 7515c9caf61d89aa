"""Device side of 3×3 convolutions with few channels in or out: one pass over the image, plain loads, any GPU.

Few channels in: the 9 C values around each pixel are gathered into a row, which is multiplied with the weight at once.
Few channels out: each pixel, of a border around the tile, too, is multiplied with the weights of all 9 neighbours that
could need it, 16 columns for each channel out; what belongs together is then picked from the rows of those neighbours.
So a pixel is read about once, not nine times.
"""

import triton
import triton.language as tl


@triton.jit
def _dot(b_x, b_w, b_acc):
    """b_acc [M, N] plus the product of b_x [M, K] and b_w [N, K].

    A float32 dot adds up its terms one after another; in runs of 32, summed afterwards, errors stay small.
    """
    RUN: tl.constexpr = 32
    K: tl.constexpr = b_x.shape[1]
    if b_x.dtype == tl.float32 and K >= RUN:
        b_x3 = b_x.reshape(b_x.shape[0], K // RUN, RUN).permute(1, 0, 2)
        b_w3 = b_w.reshape(b_w.shape[0], K // RUN, RUN).permute(1, 2, 0)
        return b_acc + tl.sum(tl.dot(b_x3, b_w3, input_precision="ieee"), 0)
    return tl.dot(b_x, tl.trans(b_w), b_acc, input_precision="ieee")


@triton.jit(do_not_specialize=["M", "H", "W", "stride_b", "stride_h", "BLOCKS"])
def thin_convolution_gather_kernel(
    x_ptr,  # [B, C, H, W] with any strides
    weight_ptr,  # [N, 3, 3, C]
    bias_ptr,  # [N]
    out_ptr,  # [M, N], M pixels
    M,
    H,
    W,
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    BLOCKS,  # of columns, which a program takes one after another; None for one, which needs fewer registers
    C: tl.constexpr,
    N: tl.constexpr,
    PIXELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,  # at least 9 C
):
    """Few channels in: PIXELS pixels, and BLOCKS * COLUMNS channels out."""
    o_p = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    o_k = tl.arange(0, DEPTH)
    row = o_p // W % H
    column = o_p % W
    i_neighbour = o_k // C
    down = i_neighbour // 3 - 1
    right = i_neighbour % 3 - 1
    m_row = (row[:, None] + down[None, :] >= 0) & (row[:, None] + down[None, :] < H)
    m_column = (column[:, None] + right[None, :] >= 0) & (column[:, None] + right[None, :] < W)
    m = m_row & m_column & (o_p < M)[:, None] & (o_k < 9 * C)[None, :]
    o_x = o_p // (H * W) * stride_b + row * stride_h + column * stride_w
    o_around = o_k % C * stride_c + down * stride_h + right * stride_w
    b_x = tl.load(x_ptr + (o_x[:, None] + o_around[None, :]), mask=m, other=0.0)  # [PIXELS, DEPTH]
    n_blocks = 1 if BLOCKS is None else BLOCKS
    for i in range(n_blocks):
        o_n = (tl.program_id(1) * n_blocks + i) * COLUMNS + tl.arange(0, COLUMNS)
        m_w = (o_n < N)[:, None] & (o_k < 9 * C)[None, :]
        b_w = tl.load(weight_ptr + o_n[:, None] * (9 * C) + o_k[None, :], mask=m_w, other=0.0)  # [COLUMNS, DEPTH]
        b = _dot(b_x, b_w, tl.zeros([PIXELS, COLUMNS], tl.float32))
        b += tl.load(bias_ptr + o_n, mask=o_n < N, other=0.0).to(tl.float32)[None, :]
        p = out_ptr + (o_p[:, None] * N + o_n[None, :])
        tl.store(p, b.to(out_ptr.dtype.element_ty), mask=(o_p < M)[:, None] & (o_n < N)[None, :])


@triton.jit(do_not_specialize=["H", "W"])
def thin_convolution_shift_kernel(
    x_ptr,  # [B, H, W, C]
    weight_ptr,  # [N, 3, 3, C]
    bias_ptr,  # [N]
    out_ptr,  # [B, H, W, N]
    H,
    W,
    C: tl.constexpr,
    N: tl.constexpr,
    N_PAD: tl.constexpr,  # the next power of two
    HIGH: tl.constexpr,  # pixels of a tile, with a border of one around what it makes; powers of two
    WIDE: tl.constexpr,
    DEPTH: tl.constexpr,  # channels of one step
):
    """Few channels out: (HIGH - 2) × (WIDE - 2) pixels."""
    PIXELS: tl.constexpr = HIGH * WIDE
    NEIGHBOURS: tl.constexpr = 16  # columns of one channel out, 9 of them used
    n_across = tl.cdiv(W, WIDE - 2)
    n_down = tl.cdiv(H, HIGH - 2)
    i_tile = tl.program_id(0) % (n_across * n_down)
    i_image = tl.program_id(0) // (n_across * n_down)
    o_p = tl.arange(0, PIXELS)
    row = i_tile // n_across * (HIGH - 2) - 1 + o_p // WIDE
    column = i_tile % n_across * (WIDE - 2) - 1 + o_p % WIDE
    m_p = (row >= 0) & (row < H) & (column >= 0) & (column < W)
    o_pixel = (i_image * H + row) * W + column
    o_j = tl.arange(0, N_PAD * NEIGHBOURS)
    i_neighbour = o_j % NEIGHBOURS
    i_n = o_j // NEIGHBOURS
    m_j = (i_neighbour < 9) & (i_n < N)

    b_acc = tl.zeros([PIXELS, N_PAD * NEIGHBOURS], tl.float32)
    for i_c in range(0, C, DEPTH):
        o_c = i_c + tl.arange(0, DEPTH)
        m_c = (o_c < C)[None, :]
        b_x = tl.load(x_ptr + (o_pixel * C)[:, None] + o_c[None, :], mask=m_p[:, None] & m_c, other=0.0)
        o_w = ((i_n * 9 + i_neighbour) * C)[:, None] + o_c[None, :]
        b_w = tl.load(weight_ptr + o_w, mask=m_j[:, None] & m_c, other=0.0)  # [N_PAD * NEIGHBOURS, DEPTH]
        b_acc = _dot(b_x, b_w, b_acc)

    shift = (i_neighbour // 3 - 1) * WIDE + i_neighbour % 3 - 1
    source = tl.minimum(tl.maximum(o_p[:, None] + shift[None, :], 0), PIXELS - 1)
    b_near = tl.where(m_j[None, :], tl.gather(b_acc, source, 0), 0.0)
    b = tl.sum(b_near.reshape(PIXELS, N_PAD, NEIGHBOURS), 2)  # [PIXELS, N_PAD]
    o_n = tl.arange(0, N_PAD)
    b += tl.load(bias_ptr + o_n, mask=o_n < N, other=0.0).to(tl.float32)[None, :]
    inner_row = (o_p // WIDE >= 1) & (o_p // WIDE <= HIGH - 2)
    inner = inner_row & (o_p % WIDE >= 1) & (o_p % WIDE <= WIDE - 2) & m_p
    p = out_ptr + ((o_pixel * N)[:, None] + o_n[None, :])
    tl.store(p, b.to(out_ptr.dtype.element_ty), mask=inner[:, None] & (o_n < N)[None, :])
