"""Masked frame attention with its matrix written out, and the same over packed sequences of different lengths."""

import torch
from torch import Tensor


def frame_attention(
    qkv: Tensor, lengths: Tensor | None, num_heads: int, scale: float, attend_padded: bool
) -> tuple[Tensor, Tensor]:
    """``[B, L, 3*H*Dh]`` to (``[B, L, H*Dh]``, log-sum-exp ``[H, B*L]``): keys at or past the length have no weight;
    queries there give zeros, or attend to the valid keys with ``attend_padded``; length 0 gives zeros."""
    batch, tokens, width = qkv.shape
    q, k, v = qkv.reshape(batch, tokens, 3, num_heads, width // 3 // num_heads).permute(2, 0, 3, 1, 4)
    if lengths is not None:
        padded = torch.arange(tokens, device=qkv.device) >= lengths[:, None]
        # what is never read may be anything, and 0 times NaN is NaN: in the result and in the gradients of the others
        k, v = (x.masked_fill(padded[:, None, :, None], 0.0) for x in (k, v))
        q = q if attend_padded else q.masked_fill(padded[:, None, :, None], 0.0)
    scores = scale * (q @ k.transpose(-1, -2))
    dead = torch.zeros(batch, tokens, dtype=torch.bool, device=qkv.device)
    if lengths is not None:
        scores = scores.masked_fill(padded[:, None, None, :], float("-inf"))
        dead = (lengths == 0)[:, None].expand(batch, tokens) if attend_padded else padded
    dead = dead[:, None, :, None]
    lse = torch.logsumexp(scores.masked_fill(dead, float("-inf")), -1)
    weights = torch.softmax(scores.masked_fill(dead, 0.0), -1)
    out = (weights @ v).masked_fill(dead, 0.0)
    return out.transpose(1, 2).flatten(2), _wide(lse.transpose(0, 1).flatten(1))


def frame_attention_packed(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_heads: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """``q [Mq, H*Dh]`` and ``kv [Mk, 2*H*Dh]`` to (``[Mq, H*Dh]``, log-sum-exp ``[H, Mq]``): sequence b is the rows
    ``cu_seqlens[b]`` to ``cu_seqlens[b + 1]`` of each; without keys, and in rows of no sequence, the result is 0."""
    out, lse = [q[:0]], [q.new_empty(num_heads, 0)]
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for b in range(len(starts_q) - 1):
        rows = q[starts_q[b] : starts_q[b + 1]].unflatten(1, (num_heads, -1)).transpose(0, 1)
        k, v = kv[starts_k[b] : starts_k[b + 1]].unflatten(1, (2, num_heads, -1)).permute(1, 2, 0, 3)
        scores = scale * (rows @ k.transpose(1, 2))
        out.append((torch.softmax(scores, -1) @ v).transpose(0, 1).flatten(1))
        lse.append(torch.logsumexp(scores, -1))
    rest = q[starts_q[-1] :]
    out.append(torch.zeros_like(rest))
    lse.append(rest.new_full((num_heads, rest.shape[0]), float("-inf")))
    return torch.cat(out), _wide(torch.cat(lse, 1))


def frame_attention_backward(grad, qkv, out, lse, lengths, num_heads, scale, attend_padded) -> Tensor:
    """Gradient of ``qkv`` by way of the forward; ``out`` and ``lse`` are not needed."""
    (result,) = _vjp(lambda x: frame_attention(x, lengths, num_heads, scale, attend_padded)[0], grad, qkv)
    return result


def frame_attention_packed_backward(
    grad, q, kv, out, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, num_heads, scale
) -> tuple[Tensor, Tensor]:
    """Gradients of ``q`` and ``kv`` by way of the forward."""
    args = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, num_heads, scale)
    grad_q, grad_kv = _vjp(lambda a, b: frame_attention_packed(a, b, *args)[0], grad, q, kv)
    return grad_q, grad_kv


def _wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x if x.dtype == torch.float64 else x.float()


def _vjp(function, grad: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.func.vjp(function, *inputs)[1](grad)
