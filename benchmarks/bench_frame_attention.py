"""Attention of one layer over packed qkv, 250 tokens (10 s), forward and backward."""

import pytest
import torch
import torch.nn.functional as F

from atst_fast import ops

# clips (two views each), heads, tokens; "ragged" has valid lengths from 60 to 250
SIZES = {"tiny": (2, 2, 20), "small": (8, 6, 250), "base": (4, 12, 250), "small ragged": (8, 6, 250)}


def split(qkv, heads):
    batch, tokens, width = qkv.shape
    return qkv.view(batch, tokens, 3, heads, width // 3 // heads).permute(2, 0, 3, 1, 4)


def naive(qkv, heads, lengths):
    """The official layer: attention matrix in memory, -10000 added on padded keys."""
    q, k, v = split(qkv, heads)
    scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
    if lengths is not None:
        padded = torch.arange(qkv.shape[1]) >= lengths[:, None]
        scores = scores + (padded * -10000.0)[:, None, None, :]
    return (scores.softmax(-1) @ v).transpose(1, 2).reshape(*qkv.shape[:2], -1)


def sdpa(qkv, heads, lengths):
    q, k, v = split(qkv, heads)
    mask = None if lengths is None else (torch.arange(qkv.shape[1]) < lengths[:, None])[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(*qkv.shape[:2], -1)


PROVIDERS = {
    "atst_fast": lambda qkv, heads, lengths: ops.frame_attention(qkv, heads, lengths=lengths),
    "sdpa": sdpa,
    "naive": naive,
}


@pytest.mark.benchmark(group="frame_attention")
@pytest.mark.parametrize("way", ["forward", "backward"])
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("size", SIZES)
def test_frame_attention(benchmark, provider, size, way):
    batch, heads, tokens = SIZES[size]
    lengths = torch.linspace(60, tokens, batch).long() if "ragged" in size else None
    qkv = torch.randn(batch, tokens, 3 * heads * 64, requires_grad=True)
    grad = torch.randn(batch, tokens, heads * 64)
    attend = PROVIDERS[provider]
    pairs = batch * tokens**2 if lengths is None else int((lengths**2).sum())
    products = 2 if way == "forward" else 5
    benchmark.extra_info.update(flops=products * 2 * pairs * heads * 64)
    if way == "forward":
        with torch.no_grad():
            benchmark(attend, qkv, heads, lengths)
    else:
        out = attend(qkv, heads, lengths)
        benchmark(lambda: torch.autograd.grad(out, qkv, grad, retain_graph=True))
