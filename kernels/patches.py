"""Patches of a spectrogram as a matrix product reads them, and the order in which masked ones come last."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_ORDER_BLOCK = 4096


class Geometry(NamedTuple):
    """Tokens of a clip, and of them those of one column of frames."""

    tokens: int
    patch_rows: int

    @classmethod
    def of(cls, mel: Tensor, patch: list[int], stride: list[int]) -> "Geometry":
        rows, columns = (
            0 if size < p else (size - p) // step + 1 for size, p, step in zip(mel.shape[2:], patch, stride)
        )
        return cls(rows * columns, rows)


def precision() -> str:
    """Of the products of float32: as torch's own."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


@triton.jit
def order_kernel(p_mask, p_order, p_count, rows, tokens, BLOCK: tl.constexpr):
    """Rows of the flat ``[B*L]`` batch, those that are not masked first and ascending, the masked ones descending.

    One program places one clip, behind what it counts in all clips before it: at most 72 KB of mask for 288 clips of
    250 tokens, out of the L2 cache. A stable partition in one launch, with nothing to wait for.
    """
    i_clip = tl.program_id(0)
    begin = i_clip * tokens
    o_row = tl.arange(0, BLOCK)
    b_masked = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, begin, BLOCK):
        b_masked += tl.load(p_mask + start + o_row, mask=start + o_row < begin, other=0).to(tl.int32)
    masked = tl.sum(b_masked, axis=0)
    live = begin - masked
    for start in range(0, tokens, BLOCK):
        o_token = start + o_row
        m_token = o_token < tokens
        m_live = m_token & (tl.load(p_mask + begin + o_token, mask=m_token, other=1) == 0)
        b_seen = tl.cumsum(m_live.to(tl.int32), axis=0)  # live ones up to and with each token of this block
        b_place = tl.where(m_live, live + b_seen - 1, rows - 1 - (masked + o_row - b_seen))
        tl.store(p_order + b_place, begin + o_token, mask=m_token)
        found = tl.sum(m_live.to(tl.int32), axis=0)
        live += found
        masked += tl.minimum(tokens - start, BLOCK) - found
    if i_clip == tl.num_programs(0) - 1:
        tl.store(p_count, live)


def order_of(mask: Tensor) -> tuple[Tensor, Tensor]:
    """``(order int32 [B*L], count int32 scalar)`` of a bool mask ``[B, L]``: see ``order_kernel``."""
    order, count = (mask.new_empty(size, dtype=torch.int32) for size in ((mask.numel(),), ()))
    order_kernel[(mask.shape[0],)](
        mask.contiguous().view(torch.uint8), order, count, mask.numel(), mask.shape[1], BLOCK=_ORDER_BLOCK, num_warps=8
    )
    return order, count


@triton.jit
def patch_offsets(
    row,
    frame,
    tokens,
    patch_rows,
    stride_clip,
    stride_bin,
    stride_frame,
    STEP_BINS: tl.constexpr,
    STEP_FRAMES: tl.constexpr,
):
    """Where the patch of a row of the flat batch has its first bin and that frame (int64, of the same shape)."""
    token = row % tokens
    column = token // patch_rows
    first_bin = (token - column * patch_rows) * STEP_BINS
    time = (column * STEP_FRAMES + frame).to(tl.int64)
    return (row // tokens).to(tl.int64) * stride_clip + first_bin.to(tl.int64) * stride_bin + time * stride_frame


@triton.jit
def load_patches(
    p_mel, o_start, m_start, first_bin, stride_bin, BINS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_BINS: tl.constexpr, BLOCK_FRAMES: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """``[BLOCK_ROWS, BLOCK_BINS * BLOCK_FRAMES]``: those bins and frames of each patch, zeros where ``m_start`` is
    False and past the patch's bins.

    ``o_start``, ``m_start`` ``[BLOCK_ROWS * BLOCK_FRAMES]``: where each frame of each patch starts, and whether it is
    read. Loaded bin by bin, so that the threads of a warp read neighbouring frames; turned to patch by patch after the
    conversion to the product's type.
    """
    o_bin = first_bin + tl.arange(0, BLOCK_BINS)
    p_block = p_mel + o_bin.to(tl.int64)[:, None] * stride_bin + o_start[None, :]
    b = tl.load(p_block, mask=(o_bin < BINS)[:, None] & m_start[None, :], other=0.0).to(dtype)
    # As integers, because Triton fails where it turns shared memory in place of registers for a matrix product.
    bits: tl.constexpr = tl.core.get_int_dtype(dtype.primitive_bitwidth, True)
    b = tl.reshape(b.to(bits, bitcast=True), (BLOCK_BINS, BLOCK_ROWS, BLOCK_FRAMES))
    b = tl.reshape(tl.permute(b, (1, 0, 2)), (BLOCK_ROWS, BLOCK_BINS * BLOCK_FRAMES))
    return b.to(dtype, bitcast=True)
