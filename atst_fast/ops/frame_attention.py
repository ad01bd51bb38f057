"""Attention over the frames of a batch of clips, on the packed output of the qkv layer."""

import math
from typing import Literal

import torch
from torch import Tensor

from atst_fast.ops import _checks
from atst_fast.ops._registry import differentiable_once, register, takes_halves
from atst_fast.reference import frame_attention as reference

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_MAX_HEAD_DIM = 256


def frame_attention(
    qkv: Tensor,
    num_heads: int,
    *,
    lengths: Tensor | None = None,
    scale: float | None = None,
    padded_queries: Literal["zero", "attend"] = "zero",
) -> Tensor:
    """Softmax attention of every token of a clip over the valid tokens of that clip; no attention matrix in memory.

    Args:
        qkv: ``[B, L, 3*H*Dh]`` as the linear layer leaves it (queries, keys, values; heads within each), any row
            stride. float32, bfloat16 or float16; float64 runs the PyTorch reference. Scores, softmax and sums are
            float32; a GPU multiplies halves as they are, and float32 as torch.set_float32_matmul_precision says.
        num_heads: H, dividing the width; Dh at most 256.
        lengths: int64 or int32 ``[B]``, valid tokens from 0 to L, or None for all. Keys at or past it are never read.
            On a GPU nothing waits to look at them: a clip of an impossible length is NaN.
        scale: of the scores, by default ``Dh ** -0.5``.
        padded_queries: "zero": rows at or past the length are zero and cost nothing. "attend": they attend to the
            valid keys, as with audiossl's additive mask of -10000 on the keys.

    Returns:
        ``[B, L, H*Dh]`` in the dtype of qkv; a clip of length 0 gives zeros (audiossl: an average over the padding).

    Differentiable in qkv; the backward keeps one float per row and head. Deterministic, forward and backward, with
    nothing to ask for: the bits depend neither on the number of threads nor on the other clips. Largest error against
    float64, float32 input of unit variance: 2e-6 forward; gradients 1e-5 of the largest one; bfloat16 and float16: at
    most twice that of plain PyTorch in the same dtype. Matches audiossl/modules/transformer.py (Attention).

    Raises:
        TypeError: another type or dtype. ValueError: a shape, length, head count, head dimension or mode that does not
        fit.
    """
    op = "frame_attention"
    _checks.tensor(op, "qkv", qkv, "[B, L, 3*H*Dh] (clips, tokens, width)", dim=3, dtypes=_DTYPES)
    head_dim = _head_dim(op, "qkv", qkv, 3, num_heads)
    if padded_queries not in ("zero", "attend"):
        _checks.fail(op, "padded_queries", "'zero' or 'attend'", padded_queries)
    if lengths is not None:
        lengths = _check_lengths(op, lengths, qkv)
    args = (lengths, num_heads, _scale(op, scale, head_dim), padded_queries == "attend")
    if qkv.dtype == torch.float64:
        return reference.frame_attention(qkv, *args)[0]
    out, _ = torch.ops.atst_fast.frame_attention(_rows(_native(qkv)), *args)
    return out.to(qkv.dtype)


def frame_attention_packed(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    num_heads: int,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """The same over sequences laid end to end, with queries and keys of different numbers.

    Args:
        q: ``[Mq, H*Dh]``; kv: ``[Mk, 2*H*Dh]`` (keys, values), same dtype; any row strides.
        cu_seqlens_q, cu_seqlens_k: int32 or int64 ``[S + 1]``, ascending from 0 to at most Mq and Mk: sequence s is the
            rows ``cu_seqlens[s]`` to ``cu_seqlens[s + 1]``. A sequence without keys gives zeros, and so do the rows
            past the last offset, which belong to no sequence.
        max_seqlen_q, max_seqlen_k: at least the queries and keys of the longest sequence, by default Mq and Mk. They
            size what a GPU launches, which never waits to read the offsets; the numbers do not depend on them, unless
            they are too small: then they may be NaN.
        num_heads, scale: as in `frame_attention`; dtypes, errors and accuracy too.

    Returns ``[Mq, H*Dh]``. Differentiable in q and kv.
    """
    op = "frame_attention_packed"
    _checks.tensor(op, "q", q, "[Mq, H*Dh] (rows, width)", dim=2, dtypes=_DTYPES)
    _checks.tensor(op, "kv", kv, "[Mk, 2*H*Dh] (rows, width)", dim=2, dtypes=(q.dtype,))
    head_dim = _head_dim(op, "q", q, 1, num_heads)
    if kv.shape[1] != 2 * q.shape[1]:
        _checks.fail(op, "kv", f"[Mk, {2 * q.shape[1]}], twice as wide as q", kv)
    cu_seqlens_q = _check_offsets(op, "cu_seqlens_q", cu_seqlens_q, q, "q")
    cu_seqlens_k = _check_offsets(op, "cu_seqlens_k", cu_seqlens_k, kv, "kv")
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        _checks.fail(op, "cu_seqlens_k", f"as long as cu_seqlens_q ({cu_seqlens_q.shape[0]})", cu_seqlens_k)
    max_seqlen_q = _check_longest(op, "max_seqlen_q", max_seqlen_q, cu_seqlens_q, q)
    max_seqlen_k = _check_longest(op, "max_seqlen_k", max_seqlen_k, cu_seqlens_k, kv)
    args = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, num_heads, _scale(op, scale, head_dim))
    if q.dtype == torch.float64:
        return reference.frame_attention_packed(q, kv, *args)[0]
    out, _ = torch.ops.atst_fast.frame_attention_packed(_rows(_native(q)), _rows(_native(kv)), *args)
    return out.to(q.dtype)


def _native(x: Tensor) -> Tensor:
    return x if takes_halves(x) else x.float()


def _rows(x: Tensor) -> Tensor:
    """``x`` itself if its values lie in rows of one stride, else a copy."""
    one_stride = x.dim() == 2 or x.shape[0] <= 1 or x.stride(0) == x.shape[1] * x.stride(1)
    # a clone: where an axis has one element, contiguous() leaves whatever stride it has
    return x if x.stride(-1) == 1 and one_stride else x.clone(memory_format=torch.contiguous_format)


def _head_dim(op: str, name: str, x: Tensor, parts: int, num_heads: int) -> int:
    if not isinstance(num_heads, int) or num_heads < 1:
        _checks.fail(op, "num_heads", "an integer of at least 1", num_heads)
    if x.shape[-1] == 0 or x.shape[-1] % (parts * num_heads):
        _checks.fail(op, name, f"as wide as a multiple of {parts} x num_heads ({num_heads})", x)
    head_dim = x.shape[-1] // parts // num_heads
    if head_dim > _MAX_HEAD_DIM:
        _checks.fail(op, name, f"of a head dimension of at most {_MAX_HEAD_DIM} (here {head_dim})", x)
    return head_dim


def _scale(op: str, scale: float | None, head_dim: int) -> float:
    scale = head_dim**-0.5 if scale is None else scale
    _checks.number(op, "scale", scale, "positive and finite", math.ulp(0.0), _checks.FINITE)
    return float(scale)


def _check_lengths(op: str, lengths: Tensor, qkv: Tensor) -> Tensor:
    batch, tokens = qkv.shape[:2]
    expected = _checks.Later("[B] = [{}], the valid tokens of each clip", batch)
    _checks.tensor(op, "lengths", lengths, expected, dim=1, dtypes=(torch.int64, torch.int32))
    if lengths.shape[0] != batch:
        _checks.fail(op, "lengths", expected, lengths)
    _checks.same_device(op, "qkv", qkv, lengths=lengths)
    if _checks.readable(lengths):
        for clip, n in enumerate(lengths.tolist()):
            if not 0 <= n <= tokens:
                raise ValueError(f"{op}: lengths[{clip}] must be from 0 to L = {tokens} tokens, got {n}")
    return lengths.to(torch.int64).contiguous()


def _check_offsets(op: str, name: str, offsets: Tensor, rows: Tensor, rows_name: str) -> Tensor:
    expected = _checks.Later("[S + 1] ascending from 0 to at most the {} rows of {}", rows.shape[0], rows_name)
    _checks.tensor(op, name, offsets, expected, dim=1, dtypes=(torch.int64, torch.int32))
    _checks.same_device(op, rows_name, rows, **{name: offsets})
    if _checks.readable(offsets):
        values = offsets.tolist()
        if not values or values[0] != 0 or values[-1] > rows.shape[0] or values != sorted(values):
            raise ValueError(f"{op}: {name} must be {expected}, got {values}")
    return offsets.to(torch.int64).contiguous()


def _check_longest(op: str, name: str, longest: int | None, offsets: Tensor, rows: Tensor) -> int:
    if longest is None:
        return rows.shape[0]
    if not _checks.is_integer(longest) or longest < 0:
        _checks.fail(op, name, "an integer of at least 0, or None", longest)
    if _checks.readable(offsets):
        actual = int(offsets.diff().max()) if offsets.shape[0] > 1 else 0
        if actual > longest:
            _checks.fail(op, name, f"at least the {actual} rows of the longest sequence", longest)
    return longest


register("frame_attention", triton="frame_attention", CUDA=reference.frame_attention)
register("frame_attention_backward", triton="frame_attention_backward", CUDA=reference.frame_attention_backward)
register("frame_attention_packed", triton="frame_attention", CUDA=reference.frame_attention_packed)
register(
    "frame_attention_packed_backward",
    triton="frame_attention_backward",
    CUDA=reference.frame_attention_packed_backward,
)


@torch.library.register_fake("atst_fast::frame_attention")
def _(qkv, lengths, num_heads, scale, attend_padded):
    batch, tokens, width = qkv.shape
    return qkv.new_empty(batch, tokens, width // 3), qkv.new_empty(num_heads, batch * tokens, dtype=torch.float32)


@torch.library.register_fake("atst_fast::frame_attention_backward")
def _(grad, qkv, out, lse, lengths, num_heads, scale, attend_padded):
    return qkv.new_empty(qkv.shape)


@torch.library.register_fake("atst_fast::frame_attention_packed")
def _(q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, num_heads, scale):
    return q.new_empty(q.shape), q.new_empty(num_heads, q.shape[0], dtype=torch.float32)


@torch.library.register_fake("atst_fast::frame_attention_packed_backward")
def _(grad, q, kv, out, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, num_heads, scale):
    return q.new_empty(q.shape), kv.new_empty(kv.shape)


def _save(ctx, inputs, output):
    qkv, lengths, ctx.num_heads, ctx.scale, ctx.attend_padded = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(qkv, out, lse, lengths)


def _backward(ctx, grad, _):
    grad_qkv = torch.ops.atst_fast.frame_attention_backward(
        grad.contiguous(), *ctx.saved_tensors, ctx.num_heads, ctx.scale, ctx.attend_padded
    )
    return grad_qkv, None, None, None, None


def _save_packed(ctx, inputs, output):
    q, kv, cu_seqlens_q, cu_seqlens_k, *ctx.numbers = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, kv, out, lse, cu_seqlens_q, cu_seqlens_k)


def _backward_packed(ctx, grad, _):
    grad_q, grad_kv = torch.ops.atst_fast.frame_attention_packed_backward(
        grad.contiguous(), *ctx.saved_tensors, *ctx.numbers
    )
    return grad_q, grad_kv, None, None, None, None, None, None


torch.library.register_autograd("atst_fast::frame_attention", _backward, setup_context=_save)
torch.library.register_autograd("atst_fast::frame_attention_packed", _backward_packed, setup_context=_save_packed)
differentiable_once("frame_attention_backward")
differentiable_once("frame_attention_packed_backward")
