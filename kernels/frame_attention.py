"""frame_attention on a GPU, forward, for sequences of a padded batch and for sequences laid end to end.

    S = scale Q K^T (keys of the same sequence),  P = exp(S - max S),  O = P V / sum P,  lse = max S + log sum P

A clip of ATST-Frame has 250 tokens: the keys and values of a head (64 KB) fit on the chip, and a row of S fits in the
registers. `_all_keys`: one program takes a sequence and head, reads K and V once and walks over tiles of queries; each
row's maximum is known before its first exponential, so that nothing is rescaled, and 64 x 256 scores for 250 x 250
waste 5 %. One program per tile of queries instead would fetch K and V from the L2 cache four times, 288 KB per head
where the memory moves 128 KB, and the L2 is not four times as fast; so only a batch too small to fill the GPU is cut
that way. While one program computes, another of the same multiprocessor loads: 64 KB each, and the next queries come
by cp.async under the softmax of these. Up to half of the keys take half of the products.

`_key_tiles`: longer sequences and wide heads, one program per tile of queries, keys by tiles in an online softmax
(Milakov and Gimelshein 2018; Dao et al., FlashAttention, 2022); the next keys come under the products of these.

Bytes: qkv read and out written once, (3 + 1) rows H Dh, and 4 per row and head for lse; 4 rows keys H Dh flops, of
which the exponentials are rows keys H. Products take the dtype of the inputs, all else is float32: the scale is folded
into exp2's argument, weights are rounded to the inputs' dtype after they were summed. Rows of dead queries are zeros
with lse -inf, and are not computed; keys past the length are not read. A row's bits depend on neither tiles nor grid.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from atst_fast.kernels.sequences import (
    architecture,
    family,
    input_precision,
    load_rows,
    near,
    padded,
    rows_of,
    sequence,
    store_rows,
)

_LOG2_E = 1.4426950408889634
# heads of all sequences from which on there are programs enough without cutting a head into tiles
_MANY = 512


class Config(NamedTuple):
    """Tiles of ``block_q`` queries by ``block_k`` keys; ``single_pass``: these are all the keys of a sequence.
    ``archs``: the architectures (`family`) on which it keeps everything in registers."""

    block_q: int
    block_k: int
    single_pass: bool
    num_warps: int
    num_stages: int
    archs: tuple[int, ...] = (80, 86, 90, 100)


# (how products are taken, columns of a tile): what may run, the preferred first
_CONFIGS = {
    ("half", 32): (
        Config(64, 64, True, 4, 2),
        Config(64, 128, True, 4, 2),
        Config(128, 128, True, 8, 2, (80, 86, 90)),
        Config(128, 64, False, 8, 3),
        Config(128, 128, False, 8, 2),
        Config(64, 64, False, 4, 2, (90, 100)),
    ),
    ("half", 64): (
        Config(64, 64, True, 4, 2),
        Config(64, 128, True, 4, 2),
        Config(128, 128, True, 8, 2),
        Config(64, 256, True, 4, 2, (90, 100)),
        Config(128, 64, False, 8, 3),
        Config(128, 128, False, 8, 2),
        Config(64, 64, False, 4, 2),
        Config(64, 64, False, 4, 3, (80, 86, 90)),
    ),
    ("half", 128): (
        Config(64, 64, True, 4, 2),
        Config(64, 128, True, 4, 2, (80, 86, 90)),
        Config(128, 64, False, 8, 2, (80, 86, 90)),
        Config(128, 64, False, 8, 3, (90,)),
        Config(64, 64, False, 8, 2),
    ),
    ("half", 256): (
        Config(64, 32, False, 8, 2, (80, 86, 90)),
        Config(64, 32, False, 8, 1),
        Config(32, 32, False, 4, 2),
    ),
    ("ieee", 64): (Config(64, 32, False, 8, 2), Config(32, 32, False, 4, 1)),
    ("ieee", 128): (Config(64, 32, False, 8, 2),),
    ("ieee", 256): (Config(16, 16, False, 8, 1),),
    ("tf32", 64): (Config(64, 32, False, 8, 2), Config(32, 32, False, 4, 1)),
    ("tf32", 128): (Config(64, 32, False, 8, 1), Config(64, 32, False, 8, 2, (80, 86, 90))),
    ("tf32", 256): (Config(16, 16, False, 8, 1), Config(32, 16, False, 8, 2)),
}
CONFIGS = tuple(dict.fromkeys(config for configs in _CONFIGS.values() for config in configs))


@triton.jit
def _mask(s, first, keys, BLOCK_K: tl.constexpr):
    return tl.where((first + tl.arange(0, BLOCK_K) < keys)[None, :], s, float("-inf"))


@triton.jit
def _finish(p_out, p_lse, acc, m, total, row, q_live, stride, BLOCK_Q: tl.constexpr, HEAD_DIM, BLOCK_D):
    """Write a tile: acc / total, and the natural logarithm of sum exp from the maximum ``m`` in powers of two."""
    store_rows(p_out, acc * (1.0 / total)[:, None], row, q_live, stride, BLOCK_Q, HEAD_DIM, BLOCK_D)
    o_q = row + tl.arange(0, BLOCK_Q)
    tl.store(p_lse + o_q, (m + tl.log2(total)) * 0.6931471805599453, mask=o_q < q_live)


@triton.jit
def _all_keys(
    p_q,
    p_k,
    p_v,
    p_out,
    p_lse,
    i_tile,
    tiles,
    q_live,
    keys,
    stride_q,
    stride_kv,
    stride_out,
    scale,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    b_k = load_rows(p_k, 0, keys, stride_kv, BLOCK_K, HEAD_DIM, BLOCK_D)
    b_v = load_rows(p_v, 0, keys, stride_kv, BLOCK_K, HEAD_DIM, BLOCK_D)
    for row in tl.range(i_tile * BLOCK_Q, q_live, tiles * BLOCK_Q, num_stages=STAGES):
        b_q = load_rows(p_q, row, q_live, stride_q, BLOCK_Q, HEAD_DIM, BLOCK_D)
        s = _mask(tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION), 0, keys, BLOCK_K)
        m = tl.max(s, 1) * scale
        p = tl.exp2(s * scale - m[:, None])
        acc = tl.dot(p.to(b_v.dtype), b_v, input_precision=PRECISION)
        _finish(p_out, p_lse, acc, m, tl.sum(p, 1), row, q_live, stride_out, BLOCK_Q, HEAD_DIM, BLOCK_D)


@triton.jit
def _key_tiles(
    p_q,
    p_k,
    p_v,
    p_out,
    p_lse,
    i_tile,
    tiles,
    q_live,
    keys,
    stride_q,
    stride_kv,
    stride_out,
    scale,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    for row in tl.range(i_tile * BLOCK_Q, q_live, tiles * BLOCK_Q, num_stages=1):
        b_q = load_rows(p_q, row, q_live, stride_q, BLOCK_Q, HEAD_DIM, BLOCK_D)
        m = tl.full([BLOCK_Q], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_Q], tl.float32)
        acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
        for first in tl.range(0, keys, BLOCK_K, num_stages=STAGES):
            b_k = load_rows(p_k, first, keys, stride_kv, BLOCK_K, HEAD_DIM, BLOCK_D)
            s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
            if first + BLOCK_K > keys:
                s = _mask(s, first, keys, BLOCK_K)
            highest = tl.maximum(m, tl.max(s, 1) * scale)
            p = tl.exp2(s * scale - highest[:, None])
            shrink = tl.exp2(m - highest)
            b_v = load_rows(p_v, first, keys, stride_kv, BLOCK_K, HEAD_DIM, BLOCK_D)
            acc = tl.dot(p.to(b_v.dtype), b_v, acc * shrink[:, None], input_precision=PRECISION)
            total = total * shrink + tl.sum(p, 1)
            m = highest
        _finish(p_out, p_lse, acc, m, total, row, q_live, stride_out, BLOCK_Q, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=["sequences", "tokens", "rows_q", "rows_k", "num_heads", "tiles", "scale"])
def frame_attention_fwd_kernel(
    p_q,
    p_k,
    p_v,
    p_out,
    p_lse,
    p_lengths,
    p_cu_q,
    p_cu_k,
    sequences,
    tokens,
    rows_q,
    rows_k,
    num_heads,
    tiles,
    stride_q,
    stride_kv,
    stride_out,
    scale,
    ATTEND: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SINGLE_PASS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    i_tile = tl.program_id(0) % tiles
    i_head = tl.program_id(0) // tiles % num_heads
    i_sequence = tl.program_id(0) // tiles // num_heads
    q_start, q_rows, q_live, k_start, _, keys, sound = sequence(
        i_sequence, p_lengths, p_cu_q, p_cu_k, sequences, tokens, rows_q, rows_k, ATTEND
    )
    column = i_head * HEAD_DIM
    p_q += q_start * stride_q + column
    p_k += k_start * stride_kv + column
    p_v += k_start * stride_kv + column
    p_out += q_start * stride_out + column
    p_lse += i_head.to(tl.int64) * rows_q + q_start
    zeros = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for row in tl.range(q_live + i_tile * BLOCK_Q, q_rows, tiles * BLOCK_Q, num_stages=1):
        store_rows(p_out, zeros, row, q_rows, stride_out, BLOCK_Q, HEAD_DIM, BLOCK_D)
        o_q = row + tl.arange(0, BLOCK_Q)
        tl.store(p_lse + o_q, tl.full([BLOCK_Q], float("-inf"), tl.float32), mask=o_q < q_rows)
    if SINGLE_PASS:
        sound = sound & (keys <= BLOCK_K)
    scale = tl.where(sound, scale, float("nan"))
    # fmt: off
    args = (p_q, p_k, p_v, p_out, p_lse, i_tile, tiles, q_live, keys, stride_q, stride_kv, stride_out, scale)
    # fmt: on
    HALF: tl.constexpr = BLOCK_K // 2
    if not SINGLE_PASS:
        _key_tiles(*args, BLOCK_Q, BLOCK_K, HEAD_DIM, BLOCK_D, PRECISION, STAGES)
    elif HALF >= 16 and keys <= HALF:
        _all_keys(*args, BLOCK_Q, HALF, HEAD_DIM, BLOCK_D, PRECISION, STAGES)
    else:
        _all_keys(*args, BLOCK_Q, BLOCK_K, HEAD_DIM, BLOCK_D, PRECISION, STAGES)


def candidates(head_dim: int, dtype: torch.dtype, max_keys: int, arch: int) -> list[Config]:
    """The configurations for such heads and sequences of up to ``max_keys`` keys, the preferred first."""
    how = "half" if dtype.itemsize == 2 else input_precision()
    columns = next(n for n in (32, 64, 128, 256) if n >= head_dim and (how, n) in _CONFIGS)
    return [c for c in _CONFIGS[how, columns] if takes(c, max_keys, arch)]


def takes(config: Config, max_keys: int, arch: int) -> bool:
    """Whether a configuration is one for that architecture and sequences of up to ``max_keys`` keys."""
    return family(arch) in config.archs and (max_keys <= config.block_k or not config.single_pass)


def frame_attention(
    qkv: Tensor,
    lengths: Tensor | None,
    num_heads: int,
    scale: float,
    attend_padded: bool,
    *,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    batch, tokens, width = qkv.shape
    out = qkv.new_empty(batch, tokens, width // 3)
    lse = qkv.new_empty(num_heads, batch * tokens, dtype=torch.float32)
    q, k, v = rows_of(qkv).split(width // 3, 1)
    shape = batch, tokens, tokens, tokens
    _launch(q, k, v, out, lse, lengths, None, None, shape, num_heads, scale, attend_padded, config)
    return out, lse


def frame_attention_packed(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_heads: int,
    scale: float,
    *,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    out, lse = q.new_empty(q.shape), q.new_empty(num_heads, q.shape[0], dtype=torch.float32)
    k, v = kv.split(q.shape[1], 1)
    shape = cu_seqlens_q.shape[0] - 1, 0, max_seqlen_q, max_seqlen_k
    _launch(q, k, v, out, lse, None, cu_seqlens_q, cu_seqlens_k, shape, num_heads, scale, False, config)
    return out, lse


def _launch(q, k, v, out, lse, lengths, cu_q, cu_k, shape, num_heads, scale, attend_padded, config):
    if out.numel() == 0:
        return
    sequences, tokens, max_q, max_k = shape
    q, k, v = map(near, (q, k, v))
    head_dim = q.shape[1] // num_heads
    config = config or candidates(head_dim, q.dtype, max_k, architecture())[0]
    tiles = max(triton.cdiv(max_q, config.block_q), 1)
    if config.single_pass and sequences * num_heads >= _MANY:
        tiles = 1
    programs = tiles * num_heads * (sequences if cu_q is None else sequences + 1)
    frame_attention_fwd_kernel[(programs,)](
        q,
        k,
        v,
        out,
        lse,
        lengths,
        cu_q,
        cu_k,
        sequences,
        tokens,
        q.shape[0],
        k.shape[0],
        num_heads,
        tiles,
        q.stride(0),
        k.stride(0),
        num_heads * head_dim,
        scale * _LOG2_E,
        ATTEND=attend_padded,
        BLOCK_Q=config.block_q,
        BLOCK_K=config.block_k,
        SINGLE_PASS=config.single_pass,
        HEAD_DIM=head_dim,
        BLOCK_D=padded(head_dim),
        PRECISION=input_precision(),
        STAGES=config.num_stages,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
