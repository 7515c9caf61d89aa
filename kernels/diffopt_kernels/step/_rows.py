"""Device side of layer_norm, geglu and bias_add: tiles of whole rows or of rows and columns, one pass each."""

import triton
import triton.language as tl


@triton.jit
def layer_norm_kernel(
    x_ptr,  # [M, C], rows stride_x apart
    residual_ptr,  # [M, C], contiguous, or None
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
    COLS: tl.constexpr,  # at least C
):
    """LayerNorm of ROWS rows of x + residual, from the sum before it is rounded."""
    o_m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    o_c = tl.arange(0, COLS)[None, :]
    m_c = o_c < C
    m = (o_m < M) & m_c
    o = o_m * C + o_c
    b_x = tl.load(x_ptr + o_m * stride_x + o_c, mask=m, other=0.0).to(tl.float32)  # [ROWS, COLS]
    if residual_ptr is not None:
        b_x += tl.load(residual_ptr + o, mask=m, other=0.0).to(tl.float32)
        b_sum = b_x
        if sum_bias_ptr is not None:
            b_sum += tl.load(sum_bias_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
        tl.store(sum_ptr + o, b_sum.to(sum_ptr.dtype.element_ty), mask=m)
    b_mean = tl.sum(b_x, 1) / C
    b_d = tl.where(m, b_x - b_mean[:, None], 0.0)
    b_rstd = 1.0 / tl.sqrt(tl.sum(b_d * b_d, 1) / C + eps)
    b_w = tl.load(weight_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_b = tl.load(bias_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_y = b_d * b_rstd[:, None] * b_w + b_b
    tl.store(out_ptr + o, b_y.to(out_ptr.dtype.element_ty), mask=m)


@triton.jit
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


@triton.jit
def bias_add_kernel(
    x_ptr,  # [M, C]
    residual_ptr,  # [M, C]
    bias_ptr,  # [C]
    out_ptr,  # [M, C]
    M,
    C,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """x + bias + residual, one tile [ROWS, COLS], rounded once."""
    o_m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    o_c = tl.program_id(1) * COLS + tl.arange(0, COLS)[None, :]
    m = (o_m < M) & (o_c < C)
    o = o_m * C + o_c
    b = tl.load(x_ptr + o, mask=m, other=0.0).to(tl.float32) + tl.load(residual_ptr + o, mask=m, other=0.0).to(
        tl.float32
    )
    b += tl.load(bias_ptr + o_c, mask=o_c < C, other=0.0).to(tl.float32)
    tl.store(out_ptr + o, b.to(out_ptr.dtype.element_ty), mask=m)
