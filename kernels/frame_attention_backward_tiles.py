"""The backward of frame_attention by tiles, in two kernels, for longer sequences than `frame_attention_backward` keeps
on the chip (its header has the maths); and what both share.

A program of the first owns a tile of queries: delta from O and dO, then dQ from all keys. A program of the second owns
a tile of keys: dK and dV from all queries, with S^T instead of S, whose registers are then an operand of dV's and dK's
product as they lie. Grid: sequences (and one, see `sequence`) x heads x tiles, tiles fastest: they share what they
read.

Flops: 6 + 8 per pair of query and key and column, where one kernel needs 10: S and dP are made twice, so that each sum
has one owner. Bytes: q, dO, O, dq and k, v, dk, dv once, and k, v per tile of queries and q, dO per tile of keys from
the L2 cache; delta, 4 per row and head, written and read.
"""

import triton
import triton.language as tl

from atst_fast.kernels.sequences import load_rows, sequence, store_rows

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def fill(p, first, rows, live, stride, step, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows that no product is for, a tile every ``step`` rows: zeros; NaN if they should have had one."""
    for row in tl.range(first, rows, step, num_stages=1):
        dead = (row + tl.arange(0, BLOCK) >= live)[:, None] & (tl.arange(0, BLOCK_D) >= 0)[None, :]
        store_rows(p, tl.where(dead, 0.0, float("nan")), row, rows, stride, BLOCK, HEAD_DIM, BLOCK_D)


@triton.jit
def queries(p_grad, p_q, p_out, p_lse, row, live, stride_q, stride_o, BLOCK_Q: tl.constexpr, HEAD_DIM, BLOCK_D):
    """A tile of queries: q, the gradient, log-sum-exp in powers of two (inf where dead) and delta."""
    q = load_rows(p_q, row, live, stride_q, BLOCK_Q, HEAD_DIM, BLOCK_D)
    grad = load_rows(p_grad, row, live, stride_o, BLOCK_Q, HEAD_DIM, BLOCK_D)
    out = load_rows(p_out, row, live, stride_o, BLOCK_Q, HEAD_DIM, BLOCK_D)
    o_q = row + tl.arange(0, BLOCK_Q)
    lse2 = tl.load(p_lse + o_q, mask=o_q < live, other=float("inf")) * LOG2_E
    return q, grad, lse2, tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)


@triton.jit
def weights(q, k, lse2, scale2, first, keys, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr):
    """P of a tile of queries and one of keys, float32."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    p = tl.exp2(s * scale2 - lse2[:, None])
    if first + BLOCK_K > keys:
        p = tl.where((first + tl.arange(0, BLOCK_K) < keys)[None, :], p, 0.0)
    return p


@triton.jit(do_not_specialize=["sequences", "tokens", "rows_q", "rows_k", "num_heads", "tiles", "scale"])
def frame_attention_dq_bwd_kernel(
    p_grad,
    p_q,
    p_k,
    p_v,
    p_out,
    p_lse,
    p_delta,
    p_dq,
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
    stride_o,
    stride_dq,
    scale,
    ATTEND: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program: dq and delta of a tile of queries of one head. Grid: sequences (and one) x heads x tiles."""
    i_tile = tl.program_id(0) % tiles
    i_head = tl.program_id(0) // tiles % num_heads
    q_start, q_rows, q_live, k_start, _, keys, sound = sequence(
        tl.program_id(0) // tiles // num_heads, p_lengths, p_cu_q, p_cu_k, sequences, tokens, rows_q, rows_k, ATTEND
    )
    column = i_head * HEAD_DIM
    p_dq += q_start * stride_dq + column
    p_k += k_start * stride_kv + column
    p_v += k_start * stride_kv + column
    own = i_tile * BLOCK_Q
    at = i_head.to(tl.int64) * rows_q + q_start
    q, grad, lse2, delta = queries(
        p_grad + q_start * stride_o + column,
        p_q + q_start * stride_q + column,
        p_out + q_start * stride_o + column,
        p_lse + at,
        own,
        q_live,
        stride_q,
        stride_o,
        BLOCK_Q,
        HEAD_DIM,
        BLOCK_D,
    )
    o_q = own + tl.arange(0, BLOCK_Q)
    tl.store(p_delta + at + o_q, delta, mask=o_q < q_live)
    scale2 = scale * LOG2_E
    if not sound:
        scale2 = float("nan")
    keys = tl.where(own < q_live, keys, 0)
    dq = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    for row in tl.range(0, keys, BLOCK_K, num_stages=STAGES):
        k = load_rows(p_k, row, keys, stride_kv, BLOCK_K, HEAD_DIM, BLOCK_D)
        v = load_rows(p_v, row, keys, stride_kv, BLOCK_K, HEAD_DIM, BLOCK_D)
        p = weights(q, k, lse2, scale2, row, keys, BLOCK_K, PRECISION)
        dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        ds = (p * (dp - delta[:, None])).to(q.dtype)
        dq = tl.dot(ds, k, dq, input_precision=PRECISION)
    store_rows(p_dq, dq * scale, own, q_rows, stride_dq, BLOCK_Q, HEAD_DIM, BLOCK_D)
    fill(p_dq, own + tiles * BLOCK_Q, q_rows, q_live, stride_dq, tiles * BLOCK_Q, BLOCK_Q, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=["sequences", "tokens", "rows_q", "rows_k", "num_heads", "tiles", "scale"])
def frame_attention_dkv_bwd_kernel(
    p_grad,
    p_q,
    p_k,
    p_v,
    p_lse,
    p_delta,
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
    tiles,
    stride_q,
    stride_kv,
    stride_o,
    stride_dkv,
    scale,
    ATTEND: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program: dk and dv of a tile of keys of one head. Grid: sequences (and one) x heads x tiles."""
    i_tile = tl.program_id(0) % tiles
    i_head = tl.program_id(0) // tiles % num_heads
    q_start, _, q_live, k_start, k_rows, keys, sound = sequence(
        tl.program_id(0) // tiles // num_heads, p_lengths, p_cu_q, p_cu_k, sequences, tokens, rows_q, rows_k, ATTEND
    )
    column = i_head * HEAD_DIM
    p_q += q_start * stride_q + column
    p_grad += q_start * stride_o + column
    p_lse += i_head.to(tl.int64) * rows_q + q_start
    p_delta += i_head.to(tl.int64) * rows_q + q_start
    p_dk += k_start * stride_dkv + column
    p_dv += k_start * stride_dkv + column
    own = i_tile * BLOCK_K
    k = load_rows(p_k + k_start * stride_kv + column, own, keys, stride_kv, BLOCK_K, HEAD_DIM, BLOCK_D)
    v = load_rows(p_v + k_start * stride_kv + column, own, keys, stride_kv, BLOCK_K, HEAD_DIM, BLOCK_D)
    scale2 = scale * LOG2_E
    if not sound:
        scale2 = float("nan")
    q_live = tl.where(own < keys, q_live, 0)
    dk = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    for row in tl.range(0, q_live, BLOCK_Q, num_stages=STAGES):
        q = load_rows(p_q, row, q_live, stride_q, BLOCK_Q, HEAD_DIM, BLOCK_D)
        grad = load_rows(p_grad, row, q_live, stride_o, BLOCK_Q, HEAD_DIM, BLOCK_D)
        o_q = row + tl.arange(0, BLOCK_Q)
        lse2 = tl.load(p_lse + o_q, mask=o_q < q_live, other=float("inf")) * LOG2_E
        delta = tl.load(p_delta + o_q, mask=o_q < q_live, other=0.0)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        p = tl.exp2(s * scale2 - lse2[None, :])
        dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
        ds = (p * (dp - delta[None, :])).to(q.dtype)
        dk = tl.dot(ds, q, dk, input_precision=PRECISION)
    # a dead key's row of P is not 0, and depends on no other row
    dead = (own + tl.arange(0, BLOCK_K) >= keys)[:, None]
    dv = tl.where(dead, 0.0, dv)
    dk = tl.where(dead, 0.0, dk * scale)
    store_rows(p_dv, dv, own, k_rows, stride_dkv, BLOCK_K, HEAD_DIM, BLOCK_D)
    store_rows(p_dk, dk, own, k_rows, stride_dkv, BLOCK_K, HEAD_DIM, BLOCK_D)
    fill(p_dk, own + tiles * BLOCK_K, k_rows, keys, stride_dkv, tiles * BLOCK_K, BLOCK_K, HEAD_DIM, BLOCK_D)
    fill(p_dv, own + tiles * BLOCK_K, k_rows, keys, stride_dkv, tiles * BLOCK_K, BLOCK_K, HEAD_DIM, BLOCK_D)
