"""Device side of summed_weights: nine weights to sixteen sums."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["N"])
def summed_weights_kernel(
    weight_ptr,  # [N, 3, 3, C]
    out_ptr,  # [4, N, 2, 2, C]: corner, column, row and column of the pixel that is seen
    N,
    C,
    BLOCK: tl.constexpr,
):
    """The sums of BLOCK channels of one output column.

    In the upper row of a block a pixel sees its own row twice, by the middle and the lower weights, and the one above
    by the upper ones; in the lower row its own by the upper and the middle ones. Columns likewise.
    """
    i_n = tl.program_id(0).to(tl.int64)
    o_c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m = o_c < C
    for below in tl.static_range(2):
        for right in tl.static_range(2):
            for row in tl.static_range(2):
                for column in tl.static_range(2):
                    b = tl.zeros([BLOCK], tl.float32)
                    for i in tl.static_range(3):
                        for j in tl.static_range(3):
                            if (i + 1 - below) // 2 == row and (j + 1 - right) // 2 == column:
                                o = (i_n * 9 + i * 3 + j) * C + o_c
                                b += tl.load(weight_ptr + o, mask=m, other=0.0).to(tl.float32)
                    o = (((below * 2 + right) * N + i_n) * 4 + row * 2 + column) * C + o_c
                    tl.store(out_ptr + o, b.to(out_ptr.dtype.element_ty), mask=m)
