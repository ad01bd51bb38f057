"""The loss of ATST-Frame over rows of two networks' outputs [R, D], its diagnostics, and its gradient.

    s = student_i / max(|student_i|, 1e-12), t likewise of the teacher's row of the other view
    loss = 2 - 2 / n * sum_i s.t        sums = sum_i (s, s^2, t, t^2), per column
    dstudent_i = -2 / n * (t - (s.t) s) / |student_i|        (without the projection where |student_i| < 1e-12)

n = R, or `count`, a number on the device; rows at or past it are padding. Row i of view 1 goes with row i + n/2. Every
row is the partner of one row, so the teacher's sums need no pass of their own, and the backward pass, which has both
rows at hand anyway, takes the lengths anew in place of reading them.

One program works on a strip of rows, ROWS at a time, whole rows in registers (a warp has a row of 256). Bytes, with b =
bytes of a value: 2 R D b read forward; 2 R D b read and R D b written backward. 36,000 x 256 in bfloat16 are 18 MB: at
4.3 TB/s 9 and 13 us are the floor. Some 16 operations per pair of values.

Numbers: float32 between load and store. Sums are added per place of the tile, then over the tile, then over strips,
always in this order, without atomics; strips are cut from R alone.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Config(NamedTuple):
    """``values`` of a tile: as many rows as they fill; and how many tiles are on their way (``stages``)."""

    values: int
    num_warps: int
    stages: int


CONFIGS = (
    Config(2048, 8, 2),
    Config(2048, 8, 1),
    Config(2048, 4, 1),
    Config(1024, 4, 2),
    Config(1024, 4, 1),
    Config(4096, 8, 1),
)
_STRIPS = 512  # at most
_MERGED_COLUMNS = 16  # per program
_LEAST = tl.constexpr(1e-12)  # length of a row, as in torch's normalize


def choose(student: Tensor) -> Config:
    """Some 16 bytes per thread, network and tile of halves, four blocks on a multiprocessor."""
    return CONFIGS[0]


@triton.jit
def _rows(p_count, R, SYMMETRIC: tl.constexpr):
    """The rows that count, and whether a batch can have that many."""
    if p_count is None:
        return R, True
    else:
        n = tl.load(p_count)
        fits = (n >= 2) & (n <= R)
        if SYMMETRIC:
            fits = fits & (n % 2 == 0)
        return tl.where(fits, n, 0).to(tl.int32), fits


@triton.jit
def _load(p_x, o_r, o_d, m, D):
    return tl.load(p_x + o_r.to(tl.int64)[:, None] * D + o_d[None], mask=m, other=0.0).to(tl.float32)


@triton.jit
def _pair(p_student, p_teacher, o_r, o_d, n, D, SYMMETRIC: tl.constexpr):
    """Rows of the student and their partners, one over their lengths, and both lengths' part of the cosine."""
    m = (o_r < n)[:, None] & (o_d < D)[None]
    o_t = o_r
    if SYMMETRIC:
        o_t = tl.where(o_r < n // 2, o_r + n // 2, o_r - n // 2)
    b_s = _load(p_student, o_r, o_d, m, D)
    b_t = _load(p_teacher, o_t, o_d, m, D)
    length = tl.sqrt(tl.sum(b_s * b_s, 1))
    r_s = 1 / tl.maximum(length, _LEAST)
    r_t = 1 / tl.maximum(tl.sqrt(tl.sum(b_t * b_t, 1)), _LEAST)
    b_s *= r_s[:, None]
    b_t *= r_t[:, None]
    return b_s, b_t, length, r_s, tl.sum(b_s * b_t, 1)


@triton.jit
def frame_loss_fwd_kernel(
    p_student, p_teacher, p_count, p_part, p_cosines, R, D, strip,
    SYMMETRIC: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr
):  # fmt: skip
    """part [strips, 4, D] and cosines [strips] of one strip."""
    i_strip = tl.program_id(0)
    o_d, o_r = tl.arange(0, BLOCK_D), tl.arange(0, ROWS)
    n, _fits = _rows(p_count, R, SYMMETRIC)
    first = i_strip * strip
    b_student = tl.zeros((ROWS, BLOCK_D), tl.float32)
    b_student2 = tl.zeros((ROWS, BLOCK_D), tl.float32)
    b_teacher = tl.zeros((ROWS, BLOCK_D), tl.float32)
    b_teacher2 = tl.zeros((ROWS, BLOCK_D), tl.float32)
    b_cosine = tl.zeros((ROWS,), tl.float32)
    for r in tl.range(first, tl.minimum(first + strip, n), ROWS, num_stages=STAGES):
        # a strip is a multiple of ROWS long: what lies beyond its end lies beyond n
        b_s, b_t, _length, _r, cosine = _pair(p_student, p_teacher, r + o_r, o_d, n, D, SYMMETRIC)
        b_student += b_s
        b_student2 += b_s * b_s
        b_teacher += b_t
        b_teacher2 += b_t * b_t
        b_cosine += cosine
    p_part += i_strip.to(tl.int64) * 4 * D + o_d
    tl.store(p_part, tl.sum(b_student, 0), mask=o_d < D)
    tl.store(p_part + D, tl.sum(b_student2, 0), mask=o_d < D)
    tl.store(p_part + 2 * D, tl.sum(b_teacher, 0), mask=o_d < D)
    tl.store(p_part + 3 * D, tl.sum(b_teacher2, 0), mask=o_d < D)
    tl.store(p_cosines + i_strip, tl.sum(b_cosine))


@triton.jit
def frame_loss_sum_kernel(
    p_part, p_cosines, p_count, p_loss, p_sums, R, W, strips,
    SYMMETRIC: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_W: tl.constexpr
):  # fmt: skip
    """The sums [W] over all strips; the first program also has the loss."""
    i_w = tl.program_id(0)
    o_w, o_s = i_w * BLOCK_W + tl.arange(0, BLOCK_W), tl.arange(0, BLOCK_S)
    m = (o_s < strips)[:, None] & (o_w < W)[None]
    b_part = tl.load(p_part + o_s.to(tl.int64)[:, None] * W + o_w[None], mask=m, other=0.0)
    tl.store(p_sums + o_w, tl.sum(b_part, 0), mask=o_w < W)
    if i_w == 0:
        n, fits = _rows(p_count, R, SYMMETRIC)
        cosine = tl.sum(tl.load(p_cosines + o_s, mask=o_s < strips, other=0.0))
        loss = 2 - 2 * cosine / tl.maximum(n, 1).to(tl.float32)
        tl.store(p_loss, tl.where(fits, loss, float("nan")))


@triton.jit
def frame_loss_bwd_kernel(
    p_grad, p_student, p_teacher, p_count, p_dstudent, R, D,
    SYMMETRIC: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """dstudent of ROWS rows."""
    o_r, o_d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    n, _fits = _rows(p_count, R, SYMMETRIC)
    b_s, b_t, length, r_s, cosine = _pair(p_student, p_teacher, o_r, o_d, n, D, SYMMETRIC)
    cosine = tl.where(length >= _LEAST, cosine, 0.0)
    factor = -2 * tl.load(p_grad).to(tl.float32) / tl.maximum(n, 1).to(tl.float32) * r_s
    # of padding both rows are zeros
    b_ds = (factor[:, None] * (b_t - cosine[:, None] * b_s)).to(p_dstudent.dtype.element_ty)
    p = p_dstudent + o_r.to(tl.int64)[:, None] * D + o_d[None]
    tl.store(p, b_ds, mask=(o_r < R)[:, None] & (o_d < D)[None])


def _tile(x: Tensor, config: Config) -> tuple[int, int]:
    """Rows and columns of a tile."""
    columns = triton.next_power_of_2(x.shape[1])
    return max(config.values // columns, 1), columns


def frame_loss(
    student: Tensor, teacher: Tensor, count: Tensor | None, symmetric: bool, *, config: Config | None = None
) -> tuple[Tensor, Tensor]:
    config = config or choose(student)
    rows, dim = student.shape
    tile, columns = _tile(student, config)
    strip = triton.cdiv(triton.cdiv(rows, _STRIPS), tile) * tile
    strips = triton.cdiv(rows, strip)
    part = student.new_empty(strips, 2, 2, dim, dtype=torch.float32)
    cosines = student.new_empty(strips, dtype=torch.float32)
    frame_loss_fwd_kernel[(strips,)](
        student, teacher, count, part, cosines, rows, dim, strip,
        SYMMETRIC=symmetric, ROWS=tile, BLOCK_D=columns, STAGES=config.stages, num_warps=config.num_warps,
    )  # fmt: skip
    loss, sums = part.new_empty(()), part.new_empty(2, 2, dim)
    frame_loss_sum_kernel[(triton.cdiv(4 * dim, _MERGED_COLUMNS),)](
        part, cosines, count, loss, sums, rows, 4 * dim, strips,
        SYMMETRIC=symmetric, BLOCK_S=triton.next_power_of_2(strips), BLOCK_W=_MERGED_COLUMNS, num_warps=4,
    )  # fmt: skip
    return loss, sums


def frame_loss_backward(
    grad: Tensor, student: Tensor, teacher: Tensor, count: Tensor | None, symmetric: bool,
    *, config: Config | None = None,
) -> Tensor:  # fmt: skip
    config = config or choose(student)
    tile, columns = _tile(student, config)
    dstudent = torch.empty_like(student)
    frame_loss_bwd_kernel[(triton.cdiv(student.shape[0], tile),)](
        grad, student, teacher, count, dstudent, *student.shape,
        SYMMETRIC=symmetric, ROWS=tile, BLOCK_D=columns, num_warps=config.num_warps,
    )  # fmt: skip
    return dstudent
