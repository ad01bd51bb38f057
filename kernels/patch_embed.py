"""patch_embed: out[r] = (masked[r] ? mask_embed : weight @ patch[r] + bias) + pos_embed[r % L], in one kernel.

One program makes BLOCK_TOKENS rows of the result: their patches are read once, stay on the chip, and pass through the
layer BLOCK_WIDTH columns at a time. Patches of more than BLOCK_K values are read again for every block of columns, in
pieces. Grid: blocks of rows, masked rows last in `order`, so that a block of masked rows has no product; such blocks
alternate with the others, because they write while those compute.

Bytes for 288 clips of 250 tokens, base in bfloat16 out of float32 mel: 74 MB of mel (half of it if half is masked) and
111 MB of result: 43 us at 4.3 TB/s (34 us). Products: 28.3 GFLOP, 29 us at 989 TFLOP/s (14 us). Every program reads the
weight, 0.39 MB, from the L2 cache: 221 MB with 128 rows to a program. `order` takes another launch.
Numbers: mel is rounded to the weight's type, the product and what is added to it are float32, rounded once. float32
weights: as torch's float32 products, in float32 or TF32.
"""

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from atst_fast.kernels.patches import Geometry, load_patches, order_of, patch_offsets, precision
from atst_fast.kernels.sequences import architecture, family


class Config(NamedTuple):
    """Rows and columns of a product, how many values of a patch it takes at a time (powers of two), warps, stages."""

    block_tokens: int
    block_width: int
    block_k: int
    num_warps: int
    num_stages: int


CONFIGS = (
    Config(128, 128, 256, 8, 2),
    Config(128, 64, 256, 8, 2),
    Config(64, 64, 256, 4, 2),
    Config(64, 128, 256, 8, 2),
    Config(128, 64, 256, 8, 1),
)
# where a block has 99 KB of shared memory
SMALL_CONFIG = CONFIGS[2]
# for patches that are read in pieces; for float32 products of full precision, and in TF32
PIECES_CONFIGS = (Config(64, 64, 32, 8, 2),)
FULL_CONFIGS = (Config(32, 64, 32, 8, 2),)
TF32_CONFIGS = (Config(64, 64, 32, 8, 2),)


def choose(weight: Tensor, patch: Sequence[int] = (64, 4)) -> Config:
    """By the products' precision, by whether a patch is read as one, and by the GPU's shared memory."""
    if weight.element_size() == 4:
        return FULL_CONFIGS[0] if precision() == "ieee" else TF32_CONFIGS[0]
    if patch[0] * triton.next_power_of_2(patch[1]) > CONFIGS[0].block_k:
        return PIECES_CONFIGS[0]
    return SMALL_CONFIG if family(architecture()) == 86 else CONFIGS[0]


@triton.jit
def _weights(
    p_weight, o_column, width, first_bin, first_frame, BINS: tl.constexpr, FRAMES: tl.constexpr,
    BLOCK_BINS: tl.constexpr, BLOCK_FRAMES: tl.constexpr,
):  # fmt: skip
    """``[BLOCK_BINS * BLOCK_FRAMES, columns]`` of the weight for the same places of a patch as ``load_patches``."""
    o_k = tl.arange(0, BLOCK_BINS * BLOCK_FRAMES)
    if BLOCK_FRAMES == FRAMES:
        o_value = first_bin * FRAMES + o_k
        m_value = o_value < BINS * FRAMES
    else:
        o_bin = first_bin + o_k // BLOCK_FRAMES
        o_frame = first_frame + o_k % BLOCK_FRAMES
        o_value = o_bin * FRAMES + o_frame
        m_value = (o_bin < BINS) & (o_frame < FRAMES)
    m_column = (o_column < width)[None, :]
    if BLOCK_FRAMES == FRAMES and BINS % BLOCK_BINS == 0:
        return tl.load(p_weight + o_column[None, :] * (BINS * FRAMES) + o_value[:, None], mask=m_column, other=0.0)
    mask = m_value[:, None] & m_column
    return tl.load(p_weight + o_column[None, :] * (BINS * FRAMES) + o_value[:, None], mask=mask, other=0.0)


@triton.jit
def _finish(
    b_acc, m_live, p_bias, p_mask_embed, p_pos, p_out, o_row, o_token, m_row, o_column, width, HAS_MASK: tl.constexpr
):
    """Bias, mask token and position, and the result written."""
    m_column = o_column < width
    if p_bias is not None:
        b_acc += tl.load(p_bias + o_column, mask=m_column, other=0.0).to(tl.float32)[None, :]
    if HAS_MASK:
        b_token = tl.load(p_mask_embed + o_column, mask=m_column, other=0.0).to(tl.float32)
        b_acc = tl.where(m_live[:, None], b_acc, b_token[None, :])
    mask = m_row[:, None] & m_column[None, :]
    if p_pos is not None:
        b_acc += tl.load(p_pos + o_token[:, None] * width + o_column[None, :], mask=mask, other=0.0).to(tl.float32)
    p_block = p_out + o_row.to(tl.int64)[:, None] * width + o_column[None, :]
    tl.store(p_block, b_acc.to(p_out.dtype.element_ty), mask=mask)


@triton.jit
def patch_embed_fwd_kernel(
    p_mel, p_weight, p_bias, p_mask_embed, p_pos, p_order, p_count, p_out, rows, tokens, patch_rows, width,
    stride_clip, stride_bin, stride_frame, BINS: tl.constexpr, FRAMES: tl.constexpr, STEP_BINS: tl.constexpr,
    STEP_FRAMES: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_BINS: tl.constexpr,
    BLOCK_FRAMES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    HAS_MASK: tl.constexpr = p_order is not None
    WHOLE: tl.constexpr = BLOCK_BINS >= BINS and BLOCK_FRAMES >= FRAMES
    ALONG: tl.constexpr = (FRAMES + BLOCK_FRAMES - 1) // BLOCK_FRAMES
    PIECES: tl.constexpr = (BINS + BLOCK_BINS - 1) // BLOCK_BINS * ALONG
    i_block = tl.program_id(0)
    live = rows
    if HAS_MASK:
        i_block = tl.where(i_block % 2 == 0, i_block // 2, tl.num_programs(0) - 1 - i_block // 2)
        live = tl.load(p_count)
    o_place = i_block * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    o_spread = i_block * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS * BLOCK_FRAMES) // BLOCK_FRAMES
    o_frame = tl.arange(0, BLOCK_TOKENS * BLOCK_FRAMES) % BLOCK_FRAMES
    m_row = o_place < rows
    m_live = o_place < live
    o_row = o_place
    o_patch = o_spread
    if HAS_MASK:
        o_row = tl.load(p_order + o_place, mask=m_row, other=0)
        o_patch = tl.load(p_order + o_spread, mask=o_spread < live, other=0)
    o_token = o_row % tokens
    o_start = patch_offsets(
        o_patch, o_frame, tokens, patch_rows, stride_clip, stride_bin, stride_frame, STEP_BINS, STEP_FRAMES
    )
    m_start = o_spread < live
    dtype: tl.constexpr = p_weight.dtype.element_ty
    if i_block * BLOCK_TOKENS < live:
        if WHOLE:
            b_patch = load_patches(
                p_mel, o_start, m_start & (o_frame < FRAMES), 0, stride_bin, BINS, BLOCK_TOKENS, BLOCK_BINS,
                BLOCK_FRAMES, dtype,
            )  # fmt: skip
            for column in range(0, width, BLOCK_WIDTH):
                o_column = column + tl.arange(0, BLOCK_WIDTH)
                b_weight = _weights(p_weight, o_column, width, 0, 0, BINS, FRAMES, BLOCK_BINS, BLOCK_FRAMES)
                b_acc = tl.dot(b_patch, b_weight, input_precision=PRECISION)
                _finish(
                    b_acc, m_live, p_bias, p_mask_embed, p_pos, p_out, o_row, o_token, m_row, o_column, width, HAS_MASK
                )
        else:
            for column in range(0, width, BLOCK_WIDTH):
                o_column = column + tl.arange(0, BLOCK_WIDTH)
                b_acc = tl.zeros((BLOCK_TOKENS, BLOCK_WIDTH), tl.float32)
                for piece in range(PIECES):
                    bin = piece // ALONG * BLOCK_BINS
                    frame = piece % ALONG * BLOCK_FRAMES
                    b_patch = load_patches(
                        p_mel, o_start + tl.cast(frame, tl.int64) * stride_frame, m_start & (frame + o_frame < FRAMES),
                        bin, stride_bin, BINS, BLOCK_TOKENS, BLOCK_BINS, BLOCK_FRAMES, dtype,
                    )  # fmt: skip
                    b_weight = _weights(
                        p_weight, o_column, width, bin, frame, BINS, FRAMES, BLOCK_BINS, BLOCK_FRAMES
                    )  # fmt: skip
                    b_acc = tl.dot(b_patch, b_weight, b_acc, input_precision=PRECISION)
                _finish(
                    b_acc, m_live, p_bias, p_mask_embed, p_pos, p_out, o_row, o_token, m_row, o_column, width, HAS_MASK
                )
    else:
        for column in range(0, width, BLOCK_WIDTH):
            o_column = column + tl.arange(0, BLOCK_WIDTH)
            b_acc = tl.zeros((BLOCK_TOKENS, BLOCK_WIDTH), tl.float32)
            _finish(b_acc, m_live, p_bias, p_mask_embed, p_pos, p_out, o_row, o_token, m_row, o_column, width, HAS_MASK)


def patch_embed(
    mel: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    mask_embed: Tensor | None,
    pos_embed: Tensor | None,
    patch: list[int],
    stride: list[int],
    config: Config | None = None,
) -> Tensor:
    """``[B, 1, F, T]`` to ``[B, L, D]`` in the type of weight, as the operator; mel with any strides."""
    tokens, patch_rows = Geometry.of(mel, patch, stride)
    clips, width = mel.shape[0], weight.shape[0]
    out = weight.new_empty(clips, tokens, width)
    if out.numel() == 0:
        return out
    config = config or choose(weight, patch)
    order, count = (None, None) if mask is None else order_of(mask)
    block_frames = min(triton.next_power_of_2(patch[1]), config.block_k)
    patch_embed_fwd_kernel[(triton.cdiv(clips * tokens, config.block_tokens),)](
        mel, weight, bias, mask_embed, pos_embed, order, count, out, clips * tokens, tokens, patch_rows, width,
        mel.stride(0), mel.stride(2), mel.stride(3),
        BINS=patch[0], FRAMES=patch[1], STEP_BINS=stride[0], STEP_FRAMES=stride[1],
        BLOCK_TOKENS=config.block_tokens, BLOCK_WIDTH=config.block_width,
        BLOCK_BINS=config.block_k // block_frames, BLOCK_FRAMES=block_frames,
        PRECISION=precision(), num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out
