"""Branch, residual and LayerNorm of the residual stream in one pass each way.

  forward    sum = x + scale (y + bias)        normed = n weight + norm_bias,   n = (sum - mean) rstd
  backward   g = d_normed weight,              dx = d_sum + rstd (g - avg(g) - n avg(g n)),       dy = scale dx
             dbias = total(dy),  dweight = total(d_normed n),  dnorm_bias = total(d_normed)

avg is over a row, total over all rows; mean and rstd = 1 / sqrt(variance + eps) are those of a row, scale is a factor
per item of so many rows. A row whose scale is 0 does not read y.

Forward: one program takes ROWS rows, whole, in registers: the variance is the mean of the centred squares, not a
difference of large sums. `sum` is rounded to its dtype before its moments are taken, so that backward, which reads it,
sees the same rows. Grid ceil(rows / ROWS).

Backward: as many programs as an H200 holds at a time, which stay: program i of P takes the blocks of ROWS rows i,
i + P, ... and keeps its share of the three totals in registers; kernels/partial_sums.py adds up the shares. No atomics,
the same bits in each run.

Bytes of N elements of 2 (bfloat16): forward 8 N with a branch (x, y, sum, normed), backward 8 N, 10 N with scale
(d_sum, d_normed, sum, dx, dy); 72,000 x 768: 442 MB, and 442 or 553 MB; some 20 float32 operations per element.

Everything is computed in float32. The idea of a fused residual and norm is common; see for instance the layer norm
kernels of Triton's tutorials and of FlashAttention.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from atst_fast.kernels.partial_sums import add_up

# the warps of a persistent grid: 24 on each multiprocessor of an H200, which leaves each thread 80 registers
WARPS = 24 * 132


class Config(NamedTuple):
    """Rows that a program takes at a time, its warps; backward, how many blocks of rows are loaded ahead, and how many
    programs there are."""

    rows: int
    num_warps: int
    num_stages: int = 1
    programs: int = 0


FORWARD_CONFIGS = tuple(Config(rows, warps) for rows, warps in ((1, 1), (1, 2), (1, 4), (2, 4)))
_CANDIDATES = ((1, 2, 1, 0.5), (1, 2, 2, 1), (1, 4, 1, 1), (1, 4, 2, 1), (1, 4, 2, 2), (1, 4, 3, 1), (2, 8, 2, 0.5))
BACKWARD_CONFIGS = tuple(
    Config(rows, warps, stages, int(part * WARPS) // warps) for rows, warps, stages, part in _CANDIDATES
)


def forward_config(width: int) -> Config:
    """By the width: a warp holds up to 1,024 elements, which is 16 bytes per load and 32 registers."""
    return Config(1, min(max(triton.next_power_of_2(width) // 1024, 1), 8))


def backward_config(width: int) -> Config:
    """By the width: 8 elements per thread, of which a thread holds six values each."""
    warps = min(max(triton.next_power_of_2(width) // 256, 1), 16)
    return Config(1, warps, 2, WARPS // warps)


@triton.jit
def add_norm_fwd_kernel(
    p_x, p_y, p_bias, p_scale, p_weight, p_norm_bias, p_sum, p_normed, p_mean, p_rstd, rows, item_rows, eps,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_column = tl.arange(0, BLOCK)
    m_row, m_column = o_row < rows, o_column < D
    o_ = o_row[:, None] * D + o_column[None, :]
    m_ = m_row[:, None] & m_column[None, :]
    b_sum = tl.load(p_x + o_, m_, other=0.0).to(tl.float32)
    if p_y is not None:
        if p_scale is not None:
            b_scale = tl.load(p_scale + o_row // item_rows, m_row, other=0.0)
            b_y = tl.load(p_y + o_, m_ & (b_scale != 0)[:, None], other=0.0).to(tl.float32)
        else:
            b_y = tl.load(p_y + o_, m_, other=0.0).to(tl.float32)
        if p_bias is not None:
            b_y += tl.load(p_bias + o_column, m_column, other=0.0).to(tl.float32)[None, :]
        if p_scale is not None:
            b_y *= b_scale[:, None]
        b_rounded = (b_sum + b_y).to(p_sum.dtype.element_ty)
        tl.store(p_sum + o_, b_rounded, m_)
        b_sum = b_rounded.to(tl.float32)
    b_mean = tl.sum(b_sum, 1) / D
    b_centred = tl.where(m_column[None, :], b_sum - b_mean[:, None], 0.0)
    b_rstd = tl.rsqrt(tl.sum(b_centred * b_centred, 1) / D + eps)
    tl.store(p_mean + o_row, b_mean, m_row)
    tl.store(p_rstd + o_row, b_rstd, m_row)
    b_normed = b_centred * b_rstd[:, None]
    if p_weight is not None:
        b_normed *= tl.load(p_weight + o_column, m_column, other=0.0).to(tl.float32)[None, :]
    if p_norm_bias is not None:
        b_normed += tl.load(p_norm_bias + o_column, m_column, other=0.0).to(tl.float32)[None, :]
    tl.store(p_normed + o_, b_normed.to(p_normed.dtype.element_ty), m_)


@triton.jit
def _pair_sum(a, b, c, d):
    return a + c, b + d


@triton.jit
def add_norm_bwd_kernel(
    p_d_sum, p_d_normed, p_sum, p_mean, p_rstd, p_scale, p_weight, p_dx, p_dy, p_parts, rows, item_rows, programs,
    D: tl.constexpr, K: tl.constexpr, BIAS: tl.constexpr, WEIGHT: tl.constexpr, NORM_BIAS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    i_program = tl.program_id(0)
    o_column = tl.arange(0, BLOCK)
    m_column = o_column < D
    if p_weight is not None:
        b_weight = tl.load(p_weight + o_column, m_column, other=0.0).to(tl.float32)[None, :]
    b_dbias = tl.zeros([ROWS, BLOCK], tl.float32)
    b_dweight = tl.zeros([ROWS, BLOCK], tl.float32)
    b_dnorm_bias = tl.zeros([ROWS, BLOCK], tl.float32)
    for i_block in tl.range(i_program, tl.cdiv(rows, ROWS), programs, num_stages=STAGES):
        o_row = (i_block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        m_row = o_row < rows
        o_ = o_row[:, None] * D + o_column[None, :]
        m_ = m_row[:, None] & m_column[None, :]
        b_grad = tl.load(p_d_normed + o_, m_, other=0.0).to(tl.float32)
        b_normal = tl.load(p_sum + o_, m_, other=0.0).to(tl.float32)
        b_mean = tl.load(p_mean + o_row, m_row, other=0.0)
        b_rstd = tl.load(p_rstd + o_row, m_row, other=0.0)
        b_normal = tl.where(m_column[None, :], (b_normal - b_mean[:, None]) * b_rstd[:, None], 0.0)
        if WEIGHT >= 0:
            b_dweight += b_grad * b_normal
        if NORM_BIAS >= 0:
            b_dnorm_bias += b_grad
        if p_weight is not None:
            b_grad *= b_weight
        b_sums = tl.reduce((b_grad, b_grad * b_normal), 1, _pair_sum)
        b_dx = b_rstd[:, None] * (b_grad - (b_sums[0] / D)[:, None] - b_normal * (b_sums[1] / D)[:, None])
        if p_d_sum is not None:
            b_dx += tl.load(p_d_sum + o_, m_, other=0.0).to(tl.float32)
        tl.store(p_dx + o_, b_dx.to(p_dx.dtype.element_ty), m_)
        if p_scale is not None:
            b_dx *= tl.load(p_scale + o_row // item_rows, m_row, other=0.0)[:, None]
            tl.store(p_dy + o_, b_dx.to(p_dy.dtype.element_ty), m_)
        if BIAS >= 0:
            b_dbias += b_dx
    o_part = i_program.to(tl.int64) * (K * D) + o_column
    if BIAS >= 0:
        tl.store(p_parts + o_part + BIAS * D, tl.sum(b_dbias, 0), m_column)
    if WEIGHT >= 0:
        tl.store(p_parts + o_part + WEIGHT * D, tl.sum(b_dweight, 0), m_column)
    if NORM_BIAS >= 0:
        tl.store(p_parts + o_part + NORM_BIAS * D, tl.sum(b_dnorm_bias, 0), m_column)


def _rows_and_width(x: Tensor) -> tuple[int, int, int]:
    """Rows, rows per item (at least 1), width."""
    rows = x.shape[:-1].numel()
    return rows, max(rows // max(x.shape[0], 1), 1), x.shape[-1]


def add_norm(
    x: Tensor,
    y: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    *,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``sum`` (empty without y), ``normed``, and float32 ``[rows]`` mean and rstd, of contiguous tensors."""
    rows, item_rows, width = _rows_and_width(x)
    config = config or forward_config(width)
    total = x.new_empty(0) if y is None else torch.empty_like(x)
    normed = torch.empty_like(x)
    mean, rstd = (x.new_empty(rows, dtype=torch.float32) for _ in range(2))
    if rows:
        add_norm_fwd_kernel[(triton.cdiv(rows, config.rows),)](
            x, y, bias, scale, weight, norm_bias, None if y is None else total, normed, mean, rstd, rows, item_rows,
            eps, width, config.rows, triton.next_power_of_2(width), num_warps=config.num_warps,
        )  # fmt: skip
    return total, normed, mean, rstd


def add_norm_backward(
    d_sum: Tensor | None,
    d_normed: Tensor,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    scale: Tensor | None,
    weight: Tensor | None,
    has_norm_bias: bool,
    has_bias: bool,
    *,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, y (empty without scale: that of x), bias, weight and norm_bias (empty where there is none)."""
    rows, item_rows, width = _rows_and_width(total)
    config = config or backward_config(width)
    dx, dy = torch.empty_like(total), total.new_empty(0) if scale is None else torch.empty_like(total)
    has = has_bias, weight is not None, has_norm_bias
    bias_at, weight_at, norm_bias_at = (sum(has[:i]) if has[i] else -1 for i in range(3))
    programs = min(config.programs, triton.cdiv(rows, config.rows))
    parts = total.new_empty(programs, sum(has), width, dtype=torch.float32)
    if rows:
        add_norm_bwd_kernel[(programs,)](
            d_sum, d_normed, total, mean, rstd, scale, weight, dx, None if scale is None else dy, parts, rows,
            item_rows, programs, width, sum(has), bias_at, weight_at, norm_bias_at, config.rows,
            triton.next_power_of_2(width), config.num_stages, num_warps=config.num_warps,
        )  # fmt: skip
    sums = iter(add_up(parts, total.dtype) if any(has) else [])
    dbias, dweight, dnorm_bias = (next(sums) if given else total.new_empty(0) for given in has)
    return dx, dy, dbias, dweight, dnorm_bias
