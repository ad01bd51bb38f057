"""The rows of a sequence in q and in k, v: of a padded batch and of sequences laid end to end, in one form."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_FAR = 2**31 // 256  # of the longest tile


def padded(head_dim: int) -> int:
    """The columns of a tile: a power of two that the tensor cores take."""
    return max(16, triton.next_power_of_2(head_dim))


def input_precision() -> str:
    """What a product of float32 tiles may be rounded to, as torch's own products: tl.dot's input_precision."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def architecture() -> int:
    """What Triton compiles for, 90 for compute capability 9.0; the interpreter counts as one."""
    return 90 if triton.knobs.runtime.interpret else triton.runtime.driver.active.get_current_target().arch


def family(arch: int) -> int:
    """The architecture whose configurations a GPU takes: 80, 90 or 100, or 86 for what computes as 80 but has 99 KB of
    shared memory to a block instead of 163 KB (86, 89 and 120)."""
    if arch >= 120 or arch in (86, 88, 89):
        return 86
    return min(arch // 10 * 10, 100)


def rows_of(x: Tensor) -> Tensor:
    """``[B, L, W]`` as ``[B*L, W]``, for rows of one stride whatever an axis of one element says of its own."""
    batch, tokens, width = x.shape
    return x.as_strided((batch * tokens, width), (x.stride(1) if tokens > 1 else x.stride(0), 1))


def near(x: Tensor) -> Tensor:
    """``x``, or a copy of it where its rows lie so far apart that a tile's offsets would not fit in 32 bits."""
    return x if x.stride(0) < _FAR else x.contiguous()


@triton.jit
def sequence(i_sequence, p_lengths, p_cu_q, p_cu_k, sequences, tokens, rows_q, rows_k, ATTEND: tl.constexpr):
    """Rows of sequence ``i_sequence``: (q_start int64, q_rows, q_live, k_start int64, k_rows, keys, sound).

    Rows of q from ``q_live`` to ``q_rows`` are zero in the result and get no gradient, and so do rows of k and v from
    ``keys`` to ``k_rows``: nothing there is read. ``sound`` is False where a length is not from 0 to ``tokens``; no
    host looks at it, so the kernel answers with NaN.

    Padded batch (``p_cu_q`` None): ``p_lengths`` int64 ``[sequences]`` or None for ``tokens`` everywhere; queries past
    the length are live with ATTEND. End to end: ``p_cu_q``, ``p_cu_k`` int64 ``[sequences + 1]``; one sequence more,
    ``i_sequence = sequences``, is the rows past the last offset, all of them dead. Offsets are clamped to the rows.
    """
    if p_cu_q is None:
        q_start = i_sequence.to(tl.int64) * tokens
        k_start = q_start
        q_rows = tokens
        k_rows = tokens
        keys = tokens
        sound = True
        if p_lengths is not None:
            length = tl.load(p_lengths + i_sequence)
            sound = (length >= 0) & (length <= tokens)
            keys = tl.where(sound, length, tokens).to(tl.int32)
        q_live = keys
        if ATTEND:
            q_live = tl.where(keys > 0, tokens, 0)
    else:
        inside = i_sequence < sequences
        q_start = tl.minimum(tl.maximum(tl.load(p_cu_q + i_sequence), 0), rows_q)
        k_start = tl.minimum(tl.maximum(tl.load(p_cu_k + i_sequence), 0), rows_k)
        q_end = tl.load(p_cu_q + i_sequence + 1, mask=inside, other=0)
        k_end = tl.load(p_cu_k + i_sequence + 1, mask=inside, other=0)
        q_end = tl.where(inside, tl.minimum(q_end, rows_q), rows_q)
        k_end = tl.where(inside, tl.minimum(k_end, rows_k), rows_k)
        q_rows = tl.maximum(q_end - q_start, 0).to(tl.int32)
        k_rows = tl.maximum(k_end - k_start, 0).to(tl.int32)
        keys = tl.where(inside, k_rows, 0)
        q_live = tl.where(keys > 0, q_rows, 0)
        sound = True
    return q_start, q_rows, q_live, k_start, k_rows, keys, sound


@triton.jit
def load_rows(p, row, rows, stride, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """``[BLOCK, BLOCK_D]`` values of rows ``row`` to ``row + BLOCK`` of a sequence and head that starts at ``p``; zeros
    at and past ``rows`` and past HEAD_DIM."""
    o_row = tl.arange(0, BLOCK)
    o_d = tl.arange(0, BLOCK_D)
    p_tile = p + tl.cast(row, tl.int64) * stride + (o_row[:, None] * stride + o_d[None, :])
    mask = (row + o_row < rows)[:, None]
    if BLOCK_D != HEAD_DIM:
        mask = mask & (o_d < HEAD_DIM)[None, :]
    return tl.load(p_tile, mask=mask, other=0.0)


@triton.jit
def store_rows(p, values, row, rows, stride, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """The same places written, in the type of what ``p`` points to."""
    o_row = tl.arange(0, BLOCK)
    o_d = tl.arange(0, BLOCK_D)
    p_tile = p + tl.cast(row, tl.int64) * stride + (o_row[:, None] * stride + o_d[None, :])
    mask = (row + o_row < rows)[:, None]
    if BLOCK_D != HEAD_DIM:
        mask = mask & (o_d < HEAD_DIM)[None, :]
    tl.store(p_tile, values.to(p.dtype.element_ty), mask=mask)
