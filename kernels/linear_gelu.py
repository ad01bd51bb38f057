"""The matrix products around a GELU, with it or its derivative on their results while those are in registers.

  linear_gelu           h = x W^T,   a = gelu(h + bias);                          h is written only where asked for
  linear_gelu_backward  dh = (grad W2) (Phi(z) + z phi(z)), z = h + bias;         dbias = total over rows of dh

One program makes BLOCK_M x BLOCK_N values of the result, BLOCK_K products at a time, some of those steps ahead of the
tensor cores. Programs that run at one time are GROUP blocks of rows by some blocks of columns, so that they share what
they read in the L2 cache. dbias: each program adds up its rows; kernels/partial_sums.py adds those up.

Grid: one axis of all blocks. At 72,000 rows, width 768 and 3,072 in bfloat16: 340 GFLOP, 0.344 ms at 989 TFLOP/s; 111
MB of x or grad and 442 MB each of a, h and dh: 0.232 ms at 4.3 TB/s. Against a product of the library and a pass of
kernels/epilogue.py it moves 442 MB less forward (h is not read again), 885 MB less where h is not kept, 885 MB less
backward (the gradient of a is neither written nor read): 0.10, 0.21 and 0.21 ms. So it pays only if the product comes
within about 15 % (forward with h) or 30 % of a library's that reaches half of the peak; not measured. What stands
against it is the GELU: 22 instructions per element are 0.15 ms of the multiprocessors' time, in which a block that is
alone lets the tensor cores rest. The first configuration leaves room for two blocks per multiprocessor, one of which
can multiply meanwhile; the larger blocks read less. No TMA: pointers run on every GPU and in the interpreter.

The GELU is that of kernels/epilogue.py, on float32 sums: forward h is not rounded before bias and GELU, backward it is
what was written. float32 products: as torch's own, in float32 or TF32. Rows past the end are read as the last one, and
not written; a K that BLOCK_K does not divide is masked. Grouping as in Triton's tutorial on matrix products.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from atst_fast.kernels.epilogue import gelu, gelu_slope
from atst_fast.kernels.partial_sums import add_up
from atst_fast.kernels.sequences import input_precision

GROUP = 8  # blocks of rows


class Config(NamedTuple):
    """Rows and columns of a block, the step along what is summed over (powers of two), warps, stages."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


CONFIGS = (
    Config(128, 128, 64, 4, 3),
    Config(128, 256, 64, 8, 3),
    Config(128, 256, 64, 8, 4),
    Config(256, 128, 64, 8, 3),
    Config(128, 128, 64, 8, 3),
)
# for rows that are no whole number of 16-byte words; for float32 products of full precision, and in TF32
ODD_CONFIGS = (Config(64, 128, 32, 8, 2),)
FULL_CONFIGS = (Config(64, 64, 32, 8, 2),)
TF32_CONFIGS = (Config(64, 64, 32, 4, 3),)


def choose(x: Tensor, outer: int) -> Config:
    """For sums over the last axis of x and a result of ``outer`` columns."""
    if x.element_size() == 4:
        return FULL_CONFIGS[0] if input_precision() == "ieee" else TF32_CONFIGS[0]
    return (ODD_CONFIGS if x.shape[-1] % 16 or outer % 16 else CONFIGS)[0]


@triton.jit
def _block(rows, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Which block of rows and which of columns this program makes."""
    i_program = tl.program_id(0)
    each = GROUP * tl.cdiv(N, BLOCK_N)
    first = i_program // each * GROUP
    high = tl.minimum(tl.cdiv(rows, BLOCK_M) - first, GROUP)
    return first + i_program % each % high, i_program % each // high


@triton.jit
def _product(
    p_a, p_b, i_m, i_n, rows, K, N, stride_k, stride_n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A block of a b: a ``[rows, K]``, b ``[K, N]`` with these strides."""
    o_k = tl.arange(0, BLOCK_K)
    o_n = tl.arange(0, BLOCK_N)
    o_m = tl.minimum(tl.arange(0, BLOCK_M), rows - 1 - i_m * BLOCK_M)
    o_a = o_m[:, None] * K + o_k[None, :]
    o_b = o_k[:, None] * stride_k + o_n[None, :] * stride_n
    m_n = (i_n * BLOCK_N + o_n < N)[None, :]
    p_a += tl.cast(i_m * BLOCK_M, tl.int64) * K
    p_b += tl.cast(i_n * BLOCK_N, tl.int64) * stride_n
    b_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, K, BLOCK_K):
        if EVEN_K:
            b_a = tl.load(p_a + o_a)
            if EVEN_N:
                b_b = tl.load(p_b + o_b)
            else:
                b_b = tl.load(p_b + o_b, mask=m_n, other=0.0)
        else:
            m_k = k + o_k < K
            b_a = tl.load(p_a + o_a, mask=m_k[None, :], other=0.0)
            b_b = tl.load(p_b + o_b, mask=m_k[:, None] & m_n, other=0.0)
        b_sum = tl.dot(b_a, b_b, b_sum, input_precision=PRECISION)
        p_a += BLOCK_K
        p_b += BLOCK_K * stride_k
    return b_sum


@triton.jit
def _quarters(b_block):
    """Its columns in four parts: what comes after a product would not fit the registers for all at a time."""
    b_left, b_right = _halves(b_block)
    b_0, b_1 = _halves(b_left)
    b_2, b_3 = _halves(b_right)
    return b_0, b_1, b_2, b_3


@triton.jit
def _halves(b_block):
    return tl.split(tl.permute(tl.reshape(b_block, [b_block.shape[0], 2, b_block.shape[1] // 2]), [0, 2, 1]))


@triton.jit
def _places(b_block, i_m, column, rows, N):
    """Of a block that begins in that column: its columns, its places in ``[rows, N]``, and which of both there are."""
    o_row = i_m * b_block.shape[0] + tl.arange(0, b_block.shape[0])
    o_column = column + tl.arange(0, b_block.shape[1])
    m_column = o_column < N
    m_ = (o_row < rows)[:, None] & m_column[None, :]
    return o_column, m_column, o_row.to(tl.int64)[:, None] * N + o_column[None, :], m_


@triton.jit
def _finish_forward(b_h, p_bias, p_a, p_h, i_m, column, rows, N, PRECISE: tl.constexpr):
    """h and a in the columns from ``column``."""
    o_column, m_column, o_, m_ = _places(b_h, i_m, column, rows, N)
    if p_h is not None:
        tl.store(p_h + o_, b_h.to(p_h.dtype.element_ty), m_)
    b_bias = tl.load(p_bias + o_column, m_column, other=0.0).to(tl.float32)
    tl.store(p_a + o_, gelu(b_h + b_bias[None, :], PRECISE).to(p_a.dtype.element_ty), m_)


@triton.jit
def linear_gelu_fwd_kernel(
    p_x, p_weight, p_bias, p_a, p_h, rows, K, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    QUARTER: tl.constexpr = BLOCK_N // 4
    i_m, i_n = _block(rows, N, BLOCK_M, BLOCK_N, GROUP)
    b_h = _product(p_x, p_weight, i_m, i_n, rows, K, N, 1, K, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_N, EVEN_K, PRECISION)
    b_0, b_1, b_2, b_3 = _quarters(b_h)
    first = i_n * BLOCK_N
    _finish_forward(b_0, p_bias, p_a, p_h, i_m, first, rows, N, PRECISE)
    _finish_forward(b_1, p_bias, p_a, p_h, i_m, first + QUARTER, rows, N, PRECISE)
    _finish_forward(b_2, p_bias, p_a, p_h, i_m, first + 2 * QUARTER, rows, N, PRECISE)
    _finish_forward(b_3, p_bias, p_a, p_h, i_m, first + 3 * QUARTER, rows, N, PRECISE)


@triton.jit
def _finish_backward(b_da, p_h, p_bias, p_dh, p_parts, i_m, column, rows, N, PRECISE: tl.constexpr):
    """dh in the columns from ``column``, and their sums."""
    o_column, m_column, o_, m_ = _places(b_da, i_m, column, rows, N)
    b_bias = tl.load(p_bias + o_column, m_column, other=0.0).to(tl.float32)
    b_z = tl.load(p_h + o_, m_, other=0.0).to(tl.float32) + b_bias[None, :]
    b_dh = b_da * gelu_slope(b_z, PRECISE)
    tl.store(p_dh + o_, b_dh.to(p_dh.dtype.element_ty), m_)
    b_dbias = tl.sum(tl.where(m_, b_dh, 0.0), 0)
    tl.store(p_parts + i_m.to(tl.int64) * N + o_column, b_dbias, m_column)


@triton.jit
def linear_gelu_bwd_kernel(
    p_grad, p_weight, p_h, p_bias, p_dh, p_parts, rows, K, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    PRECISE: tl.constexpr,
):  # fmt: skip
    QUARTER: tl.constexpr = BLOCK_N // 4
    i_m, i_n = _block(rows, N, BLOCK_M, BLOCK_N, GROUP)
    b_da = _product(p_grad, p_weight, i_m, i_n, rows, K, N, N, 1, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_N, EVEN_K, PRECISION)
    b_0, b_1, b_2, b_3 = _quarters(b_da)
    first = i_n * BLOCK_N
    _finish_backward(b_0, p_h, p_bias, p_dh, p_parts, i_m, first, rows, N, PRECISE)
    _finish_backward(b_1, p_h, p_bias, p_dh, p_parts, i_m, first + QUARTER, rows, N, PRECISE)
    _finish_backward(b_2, p_h, p_bias, p_dh, p_parts, i_m, first + 2 * QUARTER, rows, N, PRECISE)
    _finish_backward(b_3, p_h, p_bias, p_dh, p_parts, i_m, first + 3 * QUARTER, rows, N, PRECISE)


def _launch(kernel, tensors: tuple[Tensor | None, ...], rows: int, inner: int, outer: int, config: Config) -> None:
    """``kernel`` for a result ``[rows, outer]`` of sums over ``inner``, the last axis of the first tensor."""
    block_m, block_n, block_k, num_warps, num_stages = config
    kernel[(triton.cdiv(rows, block_m) * triton.cdiv(outer, block_n),)](
        *tensors, rows, inner, outer, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, GROUP=GROUP,
        EVEN_N=outer % block_n == 0, EVEN_K=inner % block_k == 0, PRECISION=input_precision(),
        PRECISE=tensors[0].dtype == torch.float32, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip


def linear_gelu(
    x: Tensor, weight: Tensor, bias: Tensor, keep_h: bool, *, config: Config | None = None
) -> tuple[Tensor, Tensor]:
    """``gelu(x W^T + bias)`` of contiguous tensors of one dtype, and ``x W^T``, which is empty unless kept."""
    (rows, inner), outer = x.shape, weight.shape[0]
    a = x.new_empty(rows, outer)
    h = torch.empty_like(a) if keep_h else x.new_empty(0)
    if a.numel():
        tensors = x, weight, bias, a, h if keep_h else None
        _launch(linear_gelu_fwd_kernel, tensors, rows, inner, outer, config or choose(x, outer))
    return a, h


def linear_gelu_backward(
    grad: Tensor, weight2: Tensor, h: Tensor, bias: Tensor, *, config: Config | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of h and bias by that of ``gelu(h + bias) weight2^T``; all contiguous and of one dtype."""
    (rows, inner), outer = grad.shape, h.shape[1]
    config = config or choose(grad, outer)
    dh = torch.empty_like(h)
    parts = h.new_empty(triton.cdiv(rows, config.block_m), 1, outer, dtype=torch.float32)
    if h.numel():
        _launch(linear_gelu_bwd_kernel, (grad, weight2, h, bias, dh, parts), rows, inner, outer, config)
    return dh, *add_up(parts, bias.dtype)
