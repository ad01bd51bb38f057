"""The second pass of a sum over rows: partial sums, one set per program of the first pass, added in a fixed order.

  out_k[j] = parts[0, k, j] + parts[1, k, j] + ...        k < K <= 3

One program adds up COLUMNS columns of one k. It reads ROWS partial sums at a time, keeps ROWS running sums per column
and adds those up at the end: an order that depends on the shapes alone, so that the bits are the same in each run.

Grid (ceil(D / COLUMNS), K). Bytes: 4 P K D read, which the first pass has just left in the L2 cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 128, 16


@triton.jit
def partial_sums_kernel(
    p_parts, p_out0, p_out1, p_out2, programs, K: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    i_k = tl.program_id(1)
    o_column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    m_column = o_column < D
    b_sum = tl.zeros([ROWS, COLUMNS], tl.float32)
    for i_first in range(0, programs, ROWS):
        o_part = i_first + tl.arange(0, ROWS)
        o_ = o_part.to(tl.int64)[:, None] * (K * D) + i_k * D + o_column[None, :]
        b_sum += tl.load(p_parts + o_, (o_part < programs)[:, None] & m_column[None, :], other=0.0)
    b_total = tl.sum(b_sum, 0)
    tl.store(p_out0 + o_column, b_total, m_column & (i_k == 0))
    if K > 1:
        tl.store(p_out1 + o_column, b_total, m_column & (i_k == 1))
    if K > 2:
        tl.store(p_out2 + o_column, b_total, m_column & (i_k == 2))


def add_up(parts: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The K sums ``[D]`` over the programs of float32 ``parts`` ``[P, K, D]``, in that dtype."""
    programs, count, width = parts.shape
    sums = [parts.new_empty(width, dtype=dtype) for _ in range(count)]
    places = [*sums, None, None][:3]
    grid = (triton.cdiv(width, COLUMNS), count)
    partial_sums_kernel[grid](parts, *places, programs, count, width, ROWS, COLUMNS, num_warps=4)
    return sums
