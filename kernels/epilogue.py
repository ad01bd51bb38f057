"""What follows the matrix products of a block: bias and exact GELU, and branch and residual, with their gradients.

  bias_gelu   a = z Phi(z), z = h + bias;            dh = grad (Phi(z) + z phi(z)),    dbias = total(dh)
  add_branch  out = x + alpha scale (y + bias);      dy = alpha scale grad,            dbias = total(dy)

Phi and phi are the normal distribution function and its density, total is over all rows. In add_branch, `kept` says
which items of x have a branch, and scale is a factor per item of it; what has the factor 0, or no branch, is not read.

One program takes BLOCK columns of some rows: forward ROWS of them, backward (which must add up over rows) every
P-th block of ROWS rows of P programs, with its sums in registers; kernels/partial_sums.py adds up those. BLOCK divides
the width wherever the width has a large power of 2 in it (3,072: 3 x 1,024), so that no thread idles behind a mask.

Grid: (row blocks x column blocks). Bytes of N elements of 2: bias_gelu 4 N forward, 6 N backward (72,000 x 3,072: 885
MB and 1.3 GB); add_branch 6 N and 4 N.

The lower tail Phi(-|z|) is exp(-z^2 / 2) t P(t) with t = 1 / (1 + c |z|), as in csrc/epilogue (there: why, and why it
is small relative to the result too); the exponential is the density as well. P has degree 8 (2e-8 of the tail) where
the result is float32, and degree 4 (3e-5; a minimax fit too) where it is rounded to 8 or 11 bits. t is taken as
1 / sqrt(u^2), for which the GPU has one instruction. That makes 22 instructions per element forward (bfloat16, sm_90),
of which an H200 has time for 31 while its memory is busy. Everything is computed in float32.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from atst_fast.kernels.partial_sums import add_up

MOST_COLUMNS = 1024
# the warps of a persistent grid: 32 on each multiprocessor of an H200, which leaves each thread 64 registers
WARPS = 32 * 132


class Config(NamedTuple):
    """Elements that a program takes at a time, its warps; backward, how many blocks are loaded ahead, and how many
    programs there are, all blocks of columns together."""

    elements: int
    num_warps: int
    num_stages: int = 1
    programs: int = 0


FORWARD_CONFIGS = tuple(Config(elements, 4) for elements in (1024, 2048, 4096))
BACKWARD_CONFIGS = tuple(
    Config(elements, warps, stages, int(part * WARPS) // warps)
    for elements, warps, stages, part in (
        (1024, 4, 1, 1),
        (1024, 4, 2, 1),
        (1024, 4, 3, 1),
        (2048, 4, 2, 1),
        (2048, 8, 2, 1),
    )
)
FORWARD, BACKWARD = Config(2048, 4), Config(1024, 4, 2, WARPS // 4)


@triton.jit
def _normal(z, PRECISE: tl.constexpr):
    """exp(-z^2 / 2), Phi(-|z|), and |z|, which is finite."""
    b_size = tl.minimum(tl.abs(z), 1e20)
    if PRECISE:
        b_u = 1.0 + b_size * 0.268700577
        b_t = tl.rsqrt(b_u * b_u)
        b_poly = 2.943704464e-02 * b_t - 1.309046000e-01
        b_poly = b_poly * b_t + 1.814183742e-01
        b_poly = b_poly * b_t - 8.011057228e-02
        b_poly = b_poly * b_t + 1.145584956e-01
        b_poly = b_poly * b_t + 6.953150034e-02
        b_poly = b_poly * b_t + 1.018965989e-01
        b_poly = b_poly * b_t + 1.069682389e-01
        b_poly = b_poly * b_t + 1.072049364e-01
    else:
        b_u = 1.0 + b_size * 0.375
        b_t = tl.rsqrt(b_u * b_u)
        b_poly = 2.010409826e-01 - 9.098404180e-02 * b_t
        b_poly = b_poly * b_t + 8.297560968e-02
        b_poly = b_poly * b_t + 1.579196579e-01
        b_poly = b_poly * b_t + 1.490411675e-01
    b_e = tl.exp2(z * z * -0.721347520)
    return b_e, b_e * (b_t * b_poly), b_size


@triton.jit
def gelu(z, PRECISE: tl.constexpr):
    """z Phi(z)."""
    _, b_tail, b_size = _normal(z, PRECISE)
    return tl.maximum(z, 0.0) - b_size * b_tail


@triton.jit
def gelu_slope(z, PRECISE: tl.constexpr):
    """Its derivative, Phi(z) + z phi(z)."""
    b_e, b_tail, _ = _normal(z, PRECISE)
    return tl.where(z > 0, 1.0 - b_tail, b_tail) + z * (b_e * 0.398942280)


@triton.jit
def bias_gelu_fwd_kernel(
    p_h, p_bias, p_out, rows, D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, PRECISE: tl.constexpr
):
    o_row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    o_column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_column = o_column < D
    o_ = o_row[:, None] * D + o_column[None, :]
    m_ = (o_row < rows)[:, None] & m_column[None, :]
    b_bias = tl.load(p_bias + o_column, m_column, other=0.0).to(tl.float32)
    b_z = tl.load(p_h + o_, m_, other=0.0).to(tl.float32) + b_bias[None, :]
    tl.store(p_out + o_, gelu(b_z, PRECISE).to(p_out.dtype.element_ty), m_)


@triton.jit
def bias_gelu_bwd_kernel(
    p_grad, p_h, p_bias, p_dh, p_parts, rows, programs, D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    PRECISE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    i_program = tl.program_id(0)
    o_column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_column = o_column < D
    b_bias = tl.load(p_bias + o_column, m_column, other=0.0).to(tl.float32)[None, :]
    b_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    for i_block in tl.range(i_program, tl.cdiv(rows, ROWS), programs, num_stages=STAGES):
        o_row = (i_block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        o_ = o_row[:, None] * D + o_column[None, :]
        m_ = (o_row < rows)[:, None] & m_column[None, :]
        b_grad = tl.load(p_grad + o_, m_, other=0.0).to(tl.float32)
        b_z = tl.load(p_h + o_, m_, other=0.0).to(tl.float32) + b_bias
        b_dh = b_grad * gelu_slope(b_z, PRECISE)
        tl.store(p_dh + o_, b_dh.to(p_dh.dtype.element_ty), m_)
        b_sum += b_dh
    tl.store(p_parts + i_program.to(tl.int64) * D + o_column, tl.sum(b_sum, 0), m_column)


@triton.jit
def add_branch_fwd_kernel(
    p_x, p_y, p_bias, p_scale, p_place, p_out, alpha, rows, item_rows, D: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    o_row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    o_column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_row, m_column = o_row < rows, o_column < D
    o_ = o_row[:, None] * D + o_column[None, :]
    m_ = m_row[:, None] & m_column[None, :]
    o_item, o_source, b_factor, m_has = o_row // item_rows, o_row, alpha, m_row
    if p_place is not None:
        o_item = tl.load(p_place + o_item, m_row, other=-1)
        o_source, m_has = o_item * item_rows + o_row % item_rows, m_row & (o_item >= 0)
    if p_scale is not None:
        b_scale = tl.load(p_scale + o_item, m_has, other=0.0)
        m_has, b_factor = m_has & (b_scale != 0), (alpha * b_scale)[:, None]
    m_y = m_has[:, None] & m_column[None, :]
    b_y = tl.load(p_y + o_source[:, None] * D + o_column[None, :], m_y, other=0.0).to(tl.float32)
    b_y += tl.load(p_bias + o_column, m_column, other=0.0).to(tl.float32)[None, :]
    b_out = tl.load(p_x + o_, m_, other=0.0).to(tl.float32) + tl.where(m_y, b_factor * b_y, 0.0)
    tl.store(p_out + o_, b_out.to(p_out.dtype.element_ty), m_)


@triton.jit
def add_branch_bwd_kernel(
    p_grad, p_kept, p_scale, p_dy, p_parts, alpha, rows, item_rows, programs, D: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    i_program = tl.program_id(0)
    o_column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_column = o_column < D
    b_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    for i_block in tl.range(i_program, tl.cdiv(rows, ROWS), programs, num_stages=STAGES):
        o_row = (i_block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        m_row, o_source, b_factor, m_has = o_row < rows, o_row, alpha, o_row < rows
        if p_kept is not None:
            o_item = tl.load(p_kept + o_row // item_rows, m_row, other=0)
            o_source = o_item * item_rows + o_row % item_rows
        if p_scale is not None:
            b_scale = tl.load(p_scale + o_row // item_rows, m_row, other=0.0)
            m_has, b_factor = m_row & (b_scale != 0), (alpha * b_scale)[:, None]
        m_y = m_has[:, None] & m_column[None, :]
        b_dy = tl.load(p_grad + o_source[:, None] * D + o_column[None, :], m_y, other=0.0).to(tl.float32)
        b_dy *= b_factor
        o_ = o_row[:, None] * D + o_column[None, :]
        tl.store(p_dy + o_, b_dy.to(p_dy.dtype.element_ty), m_row[:, None] & m_column[None, :])
        b_sum += b_dy
    tl.store(p_parts + i_program.to(tl.int64) * D + o_column, tl.sum(b_sum, 0), m_column)


def columns_of(width: int) -> int:
    """Columns of a block: the largest power of 2 in the width; the next one above it where that is small."""
    divides = width & -width
    return min(divides if divides >= 128 else triton.next_power_of_2(width), MOST_COLUMNS)


class _Grid(NamedTuple):
    """How [rows, width] is cut up, and in backward how many programs share the rows."""

    rows: int
    item_rows: int
    width: int
    block_rows: int
    columns: int
    programs: int

    @classmethod
    def of(cls, x: Tensor, config: Config) -> "_Grid":
        rows, width = x.shape[:-1].numel(), x.shape[-1]
        columns = columns_of(width)
        block_rows = max(config.elements // columns, 1)
        across = triton.cdiv(width, columns)
        programs = min(max(config.programs // across, 1), triton.cdiv(rows, block_rows))
        items = x.shape[0] if x.dim() > 1 else 1
        return cls(rows, max(rows // max(items, 1), 1), width, block_rows, columns, programs)

    @property
    def forward(self) -> tuple[int, int]:
        return triton.cdiv(self.rows, self.block_rows), triton.cdiv(self.width, self.columns)

    @property
    def backward(self) -> tuple[int, int]:
        return self.programs, triton.cdiv(self.width, self.columns)

    def parts(self, like: Tensor) -> Tensor:
        return like.new_empty(self.programs, 1, self.width, dtype=torch.float32)


def bias_gelu(h: Tensor, bias: Tensor, *, config: Config | None = None) -> Tensor:
    """``gelu(h + bias)`` of contiguous tensors of one dtype."""
    config = config or FORWARD
    grid, out = _Grid.of(h, config), torch.empty_like(h)
    if h.numel():
        bias_gelu_fwd_kernel[grid.forward](
            h, bias, out, grid.rows, grid.width, grid.block_rows, grid.columns, h.dtype == torch.float32,
            num_warps=config.num_warps,
        )  # fmt: skip
    return out


def bias_gelu_backward(grad: Tensor, h: Tensor, bias: Tensor, *, config: Config | None = None) -> tuple[Tensor, Tensor]:
    """Gradients of h and bias."""
    config = config or BACKWARD
    grid, dh = _Grid.of(h, config), torch.empty_like(h)
    parts = grid.parts(h)
    if h.numel():
        bias_gelu_bwd_kernel[grid.backward](
            grad, h, bias, dh, parts, grid.rows, grid.programs, grid.width, grid.block_rows, grid.columns,
            h.dtype == torch.float32, config.num_stages, num_warps=config.num_warps,
        )  # fmt: skip
    return dh, *add_up(parts, bias.dtype)


def add_branch(
    x: Tensor,
    y: Tensor,
    bias: Tensor,
    alpha: float,
    kept: Tensor | None,
    scale: Tensor | None = None,
    *,
    config: Config | None = None,
) -> Tensor:
    """``x + alpha * scale * (y + bias)``, for the items ``kept`` only if those are given."""
    config = config or FORWARD
    grid, out, place = _Grid.of(x, config), torch.empty_like(x), None
    if kept is not None:
        items = torch.arange(len(kept), device=x.device)
        place = torch.full((x.shape[0],), -1, dtype=torch.int64, device=x.device).scatter_(0, kept, items)
    if x.numel():
        add_branch_fwd_kernel[grid.forward](
            x, y, bias, scale, place, out, alpha, grid.rows, grid.item_rows, grid.width, grid.block_rows, grid.columns,
            num_warps=config.num_warps,
        )  # fmt: skip
    return out


def add_branch_backward(
    grad: Tensor, alpha: float, kept: Tensor | None, scale: Tensor | None = None, *, config: Config | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of y and bias."""
    config = config or BACKWARD
    dy = grad.new_empty(grad.shape if kept is None else (len(kept), *grad.shape[1:]))
    grid = _Grid.of(dy, config)
    parts = grid.parts(grad)
    if dy.numel():
        add_branch_bwd_kernel[grid.backward](
            grad, kept, scale, dy, parts, alpha, grid.rows, grid.item_rows, grid.programs, grid.width, grid.block_rows,
            grid.columns, config.num_stages, num_warps=config.num_warps,
        )  # fmt: skip
    return dy, *add_up(parts, grad.dtype)
