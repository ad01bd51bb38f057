"""Gradients of patch_embed. With g the gradient of the result, over the rows that are not masked:
dweight = g^T @ patches and dbias = sum g; over the masked ones dmask_embed = sum g; over the clips dpos[t] = sum g.

Three launches after that of the order (kernels/patches.py), each with sums of a fixed order:

1. patch_embed_bwd_sums_kernel: one program adds BLOCK_TOKENS tokens and BLOCK_WIDTH columns over its share of the
   clips, masked rows apart from the others: dpos, dbias and dmask_embed in one pass over g.
2. patch_embed_bwd_kernel: one program keeps BLOCK_WIDTH rows and BLOCK_K columns of dweight on the chip and adds its
   share of the rows that are not masked, BLOCK_TOKENS at a time. So the grid is (rows and columns of dweight, parts).
3. patch_embed_bwd_add_kernel: what the programs have, float32, added over the parts.

Bytes for 288 clips of 250 tokens, base in bfloat16, half masked: 111 MB of g, 55 MB of it again for the product, 37 MB
of mel, 35 MB of parts written and read: 238 MB, 55 us at 4.3 TB/s. Products: 14 GFLOP. Each of the 3 blocks of columns
reads its patches, 111 MB, and each of the 2 halves of a patch its g, 111 MB: the second time from the L2 cache, mostly.
The gradient of mel, which no training of an encoder asks for, is torch's product and fold.
Numbers: everything is added up in float32, the product in the weight's type as forward.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from atst_fast.kernels.patches import Geometry, load_patches, order_of, patch_offsets, precision
from atst_fast.kernels.sequences import architecture, family


class Config(NamedTuple):
    """Rows of a product, rows and columns of dweight (powers of two); programs of a launch; warps and stages."""

    block_tokens: int
    block_width: int
    block_k: int
    programs: int
    num_warps: int
    num_stages: int


CONFIGS = (
    Config(64, 256, 128, 132, 8, 2),
    Config(64, 256, 128, 132, 8, 3),
    Config(32, 256, 128, 132, 8, 3),
    Config(64, 128, 128, 264, 4, 3),
    Config(32, 128, 256, 132, 8, 3),
)
# where products have their sums in registers piece by piece, before Hopper and in RTX Blackwell
SMALL_CONFIGS = (Config(64, 128, 128, 132, 8, 3), Config(32, 128, 128, 264, 8, 3))
FULL_CONFIGS = (Config(32, 64, 64, 528, 8, 2),)

# tokens, columns, programs and warps of the sums; values and warps of the last addition
_SUMS = (16, 256, 512, 4)
_ADD = (512, 4)


def choose(weight: Tensor) -> Config:
    """By dtype and GPU."""
    if weight.element_size() == 4:
        return FULL_CONFIGS[0]
    return CONFIGS[0] if family(architecture()) in (90, 100) else SMALL_CONFIGS[0]


@triton.jit
def patch_embed_bwd_sums_kernel(
    p_grad, p_mask, p_dpos, p_dbias, p_dmask, clips, tokens, width, share,
    BLOCK_TOKENS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    i_tokens, i_width, i_share = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_token = i_tokens * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    o_column = i_width * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    m_token, m_column = o_token < tokens, o_column < width
    mask = m_token[:, None] & m_column[None, :]
    o_block = o_token[:, None] * width + o_column[None, :]
    b_live = tl.zeros((BLOCK_TOKENS, BLOCK_WIDTH), tl.float32)
    b_masked = tl.zeros((BLOCK_TOKENS, BLOCK_WIDTH), tl.float32)
    for clip in range(i_share * share, tl.minimum(i_share * share + share, clips)):
        p_clip = p_grad + tl.cast(clip, tl.int64) * tokens * width
        b_grad = tl.load(p_clip + o_block, mask=mask, other=0.0).to(tl.float32)
        if p_mask is None:
            b_live += b_grad
        else:
            m_masked = (tl.load(p_mask + tl.cast(clip, tl.int64) * tokens + o_token, mask=m_token, other=0) != 0)[
                :, None
            ]
            b_live += tl.where(m_masked, 0.0, b_grad)
            b_masked += tl.where(m_masked, b_grad, 0.0)
    if p_dpos is not None:
        tl.store(p_dpos + i_share.to(tl.int64) * tokens * width + o_block, b_live + b_masked, mask=mask)
    o_sum = (i_share * tl.num_programs(0) + i_tokens) * width + o_column
    tl.store(p_dbias + o_sum, tl.sum(b_live, axis=0), mask=m_column)
    if p_mask is not None:
        tl.store(p_dmask + o_sum, tl.sum(b_masked, axis=0), mask=m_column)


@triton.jit
def patch_embed_bwd_kernel(
    p_grad, p_mel, p_order, p_count, p_dweight, rows, tokens, patch_rows, width, stride_clip, stride_bin, stride_frame,
    BINS: tl.constexpr, FRAMES: tl.constexpr, STEP_BINS: tl.constexpr, STEP_FRAMES: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_BINS: tl.constexpr, BLOCK_FRAMES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    ALONG: tl.constexpr = (FRAMES + BLOCK_FRAMES - 1) // BLOCK_FRAMES
    i_width, i_piece, i_part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    bin, frame = i_piece // ALONG * BLOCK_BINS, i_piece % ALONG * BLOCK_FRAMES
    o_column = i_width * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    m_column = o_column < width
    o_tile = tl.arange(0, BLOCK_TOKENS)
    o_spread = tl.arange(0, BLOCK_TOKENS * BLOCK_FRAMES) // BLOCK_FRAMES
    o_frame = frame + tl.arange(0, BLOCK_TOKENS * BLOCK_FRAMES) % BLOCK_FRAMES
    live = rows
    if p_order is not None:
        live = tl.load(p_count)
    b_sum = tl.zeros((BLOCK_WIDTH, BLOCK_BINS * BLOCK_FRAMES), tl.float32)
    for first in range(i_part * BLOCK_TOKENS, live, tl.num_programs(2) * BLOCK_TOKENS):
        m_row, m_patch = first + o_tile < live, first + o_spread < live
        o_row, o_patch = first + o_tile, first + o_spread
        if p_order is not None:
            o_row = tl.load(p_order + o_row, mask=m_row, other=0)
            o_patch = tl.load(p_order + o_patch, mask=m_patch, other=0)
        o_start = patch_offsets(
            o_patch, o_frame, tokens, patch_rows, stride_clip, stride_bin, stride_frame, STEP_BINS, STEP_FRAMES
        )
        p_block = p_grad + o_row.to(tl.int64)[:, None] * width + o_column[None, :]
        b_grad = tl.load(p_block, mask=m_row[:, None] & m_column[None, :], other=0.0)
        b_patch = load_patches(
            p_mel, o_start, m_patch & (o_frame < FRAMES), bin, stride_bin, BINS, BLOCK_TOKENS, BLOCK_BINS, BLOCK_FRAMES,
            p_grad.dtype.element_ty,
        )  # fmt: skip
        b_sum = tl.dot(tl.trans(b_grad), b_patch, b_sum, input_precision=PRECISION)
    o_k = tl.arange(0, BLOCK_BINS * BLOCK_FRAMES)
    o_bin, o_in = bin + o_k // BLOCK_FRAMES, frame + o_k % BLOCK_FRAMES
    if BLOCK_FRAMES == FRAMES:
        o_value = bin * FRAMES + o_k
    else:
        o_value = o_bin * FRAMES + o_in
    mask = m_column[:, None] & ((o_bin < BINS) & (o_in < FRAMES))[None, :]
    o_out = (i_part.to(tl.int64) * width + o_column[:, None]) * (BINS * FRAMES) + o_value[None, :]
    tl.store(p_dweight + o_out, b_sum, mask=mask)


@triton.jit
def _add_parts(p_parts, p_out, i_block, parts, size, BLOCK: tl.constexpr):
    o = i_block * BLOCK + tl.arange(0, BLOCK)
    b_sum = tl.zeros((BLOCK,), tl.float32)
    for part in range(parts):
        b_sum += tl.load(p_parts + tl.cast(part, tl.int64) * size + o, mask=o < size, other=0.0)
    tl.store(p_out + o, b_sum.to(p_out.dtype.element_ty), mask=o < size)


@triton.jit
def patch_embed_bwd_add_kernel(
    p_weight_parts, p_dweight, weight_parts, weight_size, p_pos_parts, p_dpos, pos_parts, pos_size,
    p_bias_parts, p_dbias, p_mask_parts, p_dmask, row_parts, width, BLOCK: tl.constexpr,
):  # fmt: skip
    """The parts of all gradients added up: the programs share them out one after the other."""
    i_block = tl.program_id(0)
    weight_blocks, row_blocks = tl.cdiv(weight_size, BLOCK), tl.cdiv(width, BLOCK)
    if i_block < weight_blocks:
        _add_parts(p_weight_parts, p_dweight, i_block, weight_parts, weight_size, BLOCK)
    elif i_block < weight_blocks + row_blocks:
        _add_parts(p_bias_parts, p_dbias, i_block - weight_blocks, row_parts, width, BLOCK)
        if p_dmask is not None:
            _add_parts(p_mask_parts, p_dmask, i_block - weight_blocks, row_parts, width, BLOCK)
    elif p_dpos is not None:
        _add_parts(p_pos_parts, p_dpos, i_block - weight_blocks - row_blocks, pos_parts, pos_size, BLOCK)


def patch_embed_backward(
    grad: Tensor,
    mel: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    pos_rows: int,
    needs_mel: bool,
    patch: list[int],
    stride: list[int],
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of weight, bias, mask_embed, pos_embed and mel, as the operator; those not asked for are empty."""
    geometry, width = Geometry.of(mel, patch, stride), weight.shape[0]
    dweight, dbias = torch.empty_like(weight), weight.new_empty(width)
    dmask = weight.new_zeros(width) if mask is None else weight.new_empty(width)
    dpos = weight.new_empty(pos_rows, width) if pos_rows else weight.new_empty(0)
    dmel = _mel_gradient(grad, mel, weight, mask, geometry, patch, stride) if needs_mel else mel.new_empty(0)
    if grad.numel() == 0:
        return *(d.zero_() for d in (dweight, dbias, dmask, dpos)), dmel
    dpos[geometry.tokens :].zero_()
    pos_parts, bias_parts, mask_parts = _sums(grad, mask, pos_rows > 0)
    weight_parts = _products(grad, mel, weight, mask, geometry, patch, stride, config or choose(weight))
    block, warps = _ADD
    sizes = (weight.numel(), width, geometry.tokens * width if pos_rows else 0)
    patch_embed_bwd_add_kernel[(sum(triton.cdiv(size, block) for size in sizes),)](
        weight_parts, dweight, len(weight_parts), weight.numel(),
        pos_parts, dpos if pos_rows else None, 0 if pos_parts is None else len(pos_parts), sizes[2],
        bias_parts, dbias, mask_parts, None if mask is None else dmask, len(bias_parts), width,
        BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return dweight, dbias, dmask, dpos, dmel


def _sums(grad: Tensor, mask: Tensor | None, positions: bool) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Parts of dpos, of dbias and of dmask_embed."""
    clips, tokens, width = grad.shape
    block_tokens, block_width, programs, warps = _SUMS
    blocks = triton.cdiv(tokens, block_tokens), triton.cdiv(width, block_width)
    share = triton.cdiv(clips, max(programs // (blocks[0] * blocks[1]), 1))
    shares = triton.cdiv(clips, share)
    dpos = grad.new_empty(shares, tokens, width, dtype=torch.float32) if positions else None
    dbias = grad.new_empty(shares * blocks[0], width, dtype=torch.float32)
    dmask = None if mask is None else torch.empty_like(dbias)
    patch_embed_bwd_sums_kernel[(*blocks, shares)](
        grad, None if mask is None else mask.view(torch.uint8), dpos, dbias, dmask, clips, tokens, width, share,
        BLOCK_TOKENS=block_tokens, BLOCK_WIDTH=min(block_width, triton.next_power_of_2(width)), num_warps=warps,
    )  # fmt: skip
    return dpos, dbias, dmask


def _products(grad, mel, weight, mask, geometry: Geometry, patch, stride, config: Config) -> Tensor:
    """Parts of dweight."""
    rows, (width, values) = grad.shape[0] * grad.shape[1], weight.shape
    order, count = (None, None) if mask is None else order_of(mask)
    block_frames = min(triton.next_power_of_2(patch[1]), config.block_k)
    block_bins = config.block_k // block_frames
    pieces = triton.cdiv(patch[0], block_bins) * triton.cdiv(patch[1], block_frames)
    blocks = triton.cdiv(width, config.block_width)
    parts = max(1, min(config.programs // (blocks * pieces), triton.cdiv(rows, config.block_tokens)))
    dweight = grad.new_empty(parts, width, values, dtype=torch.float32)
    patch_embed_bwd_kernel[(blocks, pieces, parts)](
        grad, mel, order, count, dweight, rows, *geometry, width, mel.stride(0), mel.stride(2), mel.stride(3),
        BINS=patch[0], FRAMES=patch[1], STEP_BINS=stride[0], STEP_FRAMES=stride[1],
        BLOCK_TOKENS=config.block_tokens, BLOCK_WIDTH=config.block_width, BLOCK_BINS=block_bins,
        BLOCK_FRAMES=block_frames, PRECISION=precision(), num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return dweight


def _mel_gradient(grad, mel, weight, mask, geometry: Geometry, patch, stride) -> Tensor:
    """Each patch's gradient added to the samples that it was cut from."""
    tokens, patch_rows = geometry
    if grad.numel() == 0:
        return mel.new_zeros(mel.shape)
    if mask is not None:
        grad = grad.masked_fill(mask[:, :, None], 0)
    dpatch = (grad @ weight).float().unflatten(1, (tokens // patch_rows, patch_rows))
    columns = dpatch.transpose(1, 2).flatten(1, 2).transpose(1, 2)  # as fold wants them: row by row of patches
    covered = [(n - 1) * step + p for n, step, p in zip((patch_rows, tokens // patch_rows), stride, patch)]
    dmel = torch.nn.functional.fold(columns, covered, patch, stride=stride)
    return torch.nn.functional.pad(dmel, (0, mel.shape[3] - covered[1], 0, mel.shape[2] - covered[0])).to(mel.dtype)
