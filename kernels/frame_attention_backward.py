"""frame_attention on a GPU, backward: dqkv of a padded batch, and dq, dkv of sequences laid end to end.

    S = scale Q K^T,  P = exp(S - lse),  dP = dO V^T,  delta = rowsum(dO o O),  dS = P o (dP - delta),
    dQ = scale dS K,  dK = scale dS^T Q,  dV = P^T dO

Up to 256 queries of up to 64 columns: one program per sequence and head. Q, dO and the sum dQ stay on the chip while
tiles of keys pass, any number of them; a tile's dK and dV are complete when it leaves. So each input is read once, each
result is written once, and every sum has one order and one owner: no atomics, the same bits each run. P^T and dS^T go
through shared memory, dS goes into dQ's product from the registers. Grid: sequences (and one, see `sequence`) x heads.
Longer sequences: frame_attention_backward_tiles.

dQ's product is issued before dK's, so that the wait for the latter ends both. Were it left running into the next tile,
the compiler would make every single tensor core instruction of a Hopper GPU wait for the one before.

Keys past the length are read as zeros and their P is set to 0; dead queries are read as zeros with their gradients and
lse = inf, and add zeros: what is padded, NaN included, reaches nothing, and tiles of it cost nothing. Every row is
written, dead ones with zeros: no memory is cleared before. Impossible lengths, and queries beyond the promised longest,
give NaN.

288 clips of 250 tokens, 12 heads of 64, bfloat16: q, k, v, O, dO in and dq, dk, dv out are 8 x 111 MB = 885 MB,
0.207 ms at 4.3 TB/s; five products of 288 x 12 x 250^2 x 64 are 138 GFLOP, 0.14 ms at 989 TFLOP/s. Both derived, not
measured.

Numeric choices: products of what the tensors hold (float32: tf32 where torch's own products may), their sums, the
exponentials and delta in float32; P and dS are rounded to the tensors' dtype for their products, as PyTorch's are.

Source of the idea: the backward of FlashAttention (Dao 2023), its loops turned so that dQ stays and nothing is added up
in memory.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from atst_fast.kernels.frame_attention_backward_tiles import (
    LOG2_E,
    fill,
    frame_attention_dkv_bwd_kernel,
    frame_attention_dq_bwd_kernel,
    queries,
    weights,
)
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


class Config(NamedTuple):
    """``one_program`` per head: ``own`` queries (all there are) against ``other`` keys at a time, and with ``rounded``
    dS made of the rounded P, which takes fewer registers. Else two kernels: ``own`` queries or keys of a program
    against ``other`` of the other kind at a time. ``archs``: where (`family`) it keeps everything in registers, and
    in shared memory."""

    one_program: bool
    own: int
    other: int
    num_warps: int
    num_stages: int
    rounded: bool = False
    archs: tuple[int, ...] = (80, 86, 90, 100)


# (bytes of a value, columns of a tile): what may run, the preferred first
_CONFIGS = {
    (2, 32): (
        Config(True, 64, 64, 4, 2),
        Config(True, 128, 64, 8, 2),
        Config(True, 256, 64, 8, 2, archs=(80, 86, 90)),
        Config(True, 256, 32, 8, 2, True, (100,)),
        Config(False, 64, 64, 4, 2),
    ),
    (2, 64): (
        Config(True, 64, 64, 4, 2, archs=(90, 100)),
        Config(True, 64, 32, 4, 2, archs=(80, 86)),
        Config(True, 128, 64, 8, 2, archs=(90, 100)),
        Config(True, 128, 32, 8, 2, archs=(80, 86)),
        Config(True, 256, 64, 8, 2, archs=(90,)),
        Config(True, 256, 64, 8, 3, archs=(90,)),
        Config(True, 256, 64, 8, 2, True, (100,)),
        Config(True, 256, 32, 8, 2, True, (80, 86)),
        Config(False, 128, 64, 8, 2, archs=(90, 100)),
        Config(False, 64, 64, 4, 2, archs=(90, 100)),
        Config(False, 64, 32, 4, 2),
    ),
    (2, 128): (
        Config(True, 128, 64, 8, 2, archs=(80, 90, 100)),
        Config(False, 128, 64, 8, 2, archs=(90, 100)),
        Config(False, 64, 32, 4, 2, archs=(90, 100)),
        Config(False, 64, 32, 8, 2, archs=(80, 86)),
    ),
    (2, 256): (Config(False, 64, 32, 8, 2, archs=(80, 90, 100)), Config(False, 32, 32, 8, 2, archs=(86,))),
    (4, 64): (Config(False, 64, 32, 8, 2, archs=(90, 100)), Config(False, 32, 16, 4, 2)),
    (4, 128): (Config(False, 32, 32, 8, 2),),
    (4, 256): (Config(False, 32, 16, 8, 2, archs=(80, 90, 100)), Config(False, 16, 16, 8, 2, archs=(86,))),
}


@triton.jit(do_not_specialize=["sequences", "tokens", "rows_q", "rows_k", "num_heads", "scale"])
def frame_attention_bwd_kernel(
    p_grad,
    p_q,
    p_k,
    p_v,
    p_out,
    p_lse,
    p_dq,
    p_dk,
    p_dv,
    p_lengths,
    p_cu_q,
    p_cu_k,
    sequences,
    tokens,
    rows_q,
    rows_k,
    num_heads,
    stride_q,
    stride_kv,
    stride_o,
    stride_dq,
    stride_dkv,
    scale,
    ATTEND: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROUNDED: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program: all of one head of one sequence. Grid: sequences (and one, see `sequence`) x heads."""
    i_head = tl.program_id(0) % num_heads
    q_start, q_rows, q_live, k_start, k_rows, keys, sound = sequence(
        tl.program_id(0) // num_heads, p_lengths, p_cu_q, p_cu_k, sequences, tokens, rows_q, rows_k, ATTEND
    )
    column = i_head * HEAD_DIM
    p_dq += q_start * stride_dq + column
    p_dk += k_start * stride_dkv + column
    p_dv += k_start * stride_dkv + column
    p_k += k_start * stride_kv + column
    p_v += k_start * stride_kv + column
    q, grad, lse2, delta = queries(
        p_grad + q_start * stride_o + column,
        p_q + q_start * stride_q + column,
        p_out + q_start * stride_o + column,
        p_lse + i_head.to(tl.int64) * rows_q + q_start,
        0,
        q_live,
        stride_q,
        stride_o,
        BLOCK_Q,
        HEAD_DIM,
        BLOCK_D,
    )
    scale2 = scale * LOG2_E
    if not sound:
        scale2 = float("nan")
    keys = tl.where(q_live > 0, keys, 0)
    dq = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    for row in tl.range(0, keys, BLOCK_K, num_stages=STAGES):
        k = load_rows(p_k, row, keys, stride_kv, BLOCK_K, HEAD_DIM, BLOCK_D)
        v = load_rows(p_v, row, keys, stride_kv, BLOCK_K, HEAD_DIM, BLOCK_D)
        p = weights(q, k, lse2, scale2, row, keys, BLOCK_K, PRECISION)
        rounded = p.to(grad.dtype)
        dv = tl.dot(tl.trans(rounded), grad, input_precision=PRECISION)
        dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        if ROUNDED:
            p = rounded.to(tl.float32)
        ds = (p * (dp - delta[:, None])).to(q.dtype)
        dq = tl.dot(ds, k, dq, input_precision=PRECISION)
        dk = tl.dot(tl.trans(ds), q, input_precision=PRECISION)
        store_rows(p_dv, dv, row, k_rows, stride_dkv, BLOCK_K, HEAD_DIM, BLOCK_D)
        store_rows(p_dk, dk * scale, row, k_rows, stride_dkv, BLOCK_K, HEAD_DIM, BLOCK_D)
    store_rows(p_dq, dq * scale, 0, q_rows, stride_dq, BLOCK_Q, HEAD_DIM, BLOCK_D)
    fill(p_dq, BLOCK_Q, q_rows, q_live, stride_dq, BLOCK_K, BLOCK_K, HEAD_DIM, BLOCK_D)
    rest = tl.cdiv(keys, BLOCK_K) * BLOCK_K
    fill(p_dk, rest, k_rows, 0, stride_dkv, BLOCK_K, BLOCK_K, HEAD_DIM, BLOCK_D)
    fill(p_dv, rest, k_rows, 0, stride_dkv, BLOCK_K, BLOCK_K, HEAD_DIM, BLOCK_D)


def candidates(head_dim: int, dtype: torch.dtype, max_q: int, arch: int) -> list[Config]:
    """The configurations for such heads and sequences of up to ``max_q`` queries, the preferred first."""
    tile = dtype.itemsize, min(n for size, n in _CONFIGS if size == dtype.itemsize and n >= head_dim)
    return [c for c in _CONFIGS[tile] if family(arch) in c.archs and (max_q <= c.own or not c.one_program)]


def frame_attention_backward(
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    lengths: Tensor | None,
    num_heads: int,
    scale: float,
    attend_padded: bool,
    *,
    config: Config | None = None,
) -> Tensor:
    batch, tokens, width = qkv.shape
    dqkv = qkv.new_empty(qkv.shape)
    q, k, v = rows_of(qkv).split(width // 3, 1)
    results = dqkv.view(-1, width).split(width // 3, 1)
    grad, out = (x.contiguous().view(-1, width // 3) for x in (grad, out))
    shape = lengths, None, None, batch, tokens, tokens, tokens
    _launch(grad, q, k, v, out, lse, results, shape, num_heads, scale, attend_padded, config)
    return dqkv


def frame_attention_packed_backward(
    grad: Tensor,
    q: Tensor,
    kv: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_heads: int,
    scale: float,
    *,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    dq, dkv = q.new_empty(q.shape), kv.new_empty(kv.shape)
    k, v = kv.split(q.shape[1], 1)
    results = dq, *dkv.split(q.shape[1], 1)
    shape = None, cu_seqlens_q, cu_seqlens_k, cu_seqlens_q.shape[0] - 1, 0, max_seqlen_q, max_seqlen_k
    _launch(grad.contiguous(), q, k, v, out.contiguous(), lse, results, shape, num_heads, scale, False, config)
    return dq, dkv


def _launch(grad, q, k, v, out, lse, results, shape, num_heads, scale, attend, config):
    lengths, cu_q, cu_k, sequences, tokens, max_q, max_k = shape
    dq, dk, dv = results
    if dq.numel() == 0 and dk.numel() == 0:
        return
    q, k, v = map(near, (q, k, v))
    head_dim = q.shape[1] // num_heads
    config = config or candidates(head_dim, q.dtype, max_q, architecture())[0]
    heads = num_heads * (sequences if cu_q is None else sequences + 1)
    strides = q.stride(0), k.stride(0), grad.stride(0)
    sizes = lengths, cu_q, cu_k, sequences, tokens, q.shape[0], k.shape[0], num_heads
    options = {
        "ATTEND": attend,
        "HEAD_DIM": head_dim,
        "BLOCK_D": padded(head_dim),
        "PRECISION": input_precision(),
        "STAGES": config.num_stages,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    if config.one_program:
        blocks = {"BLOCK_Q": config.own, "BLOCK_K": config.other, "ROUNDED": config.rounded}
        frame_attention_bwd_kernel[(heads,)](
            grad,
            q,
            k,
            v,
            out,
            lse,
            dq,
            dk,
            dv,
            *sizes,
            *strides,
            dq.stride(0),
            dk.stride(0),
            scale,
            **blocks,
            **options,
        )
        return
    delta = lse.new_empty(lse.shape)
    tiles = max(triton.cdiv(max_q, config.own), 1)
    blocks = {"BLOCK_Q": config.own, "BLOCK_K": config.other}
    frame_attention_dq_bwd_kernel[(heads * tiles,)](
        grad, q, k, v, out, lse, delta, dq, *sizes, tiles, *strides, dq.stride(0), scale, **blocks, **options
    )
    tiles = max(triton.cdiv(max_k, config.own), 1)
    blocks = {"BLOCK_Q": config.other, "BLOCK_K": config.own}
    frame_attention_dkv_bwd_kernel[(heads * tiles,)](
        grad, q, k, v, lse, delta, dk, dv, *sizes, tiles, *strides, dk.stride(0), scale, **blocks, **options
    )
