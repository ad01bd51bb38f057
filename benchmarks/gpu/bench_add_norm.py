"""The residual stream between two matrix products: bias, stochastic depth, residual and LayerNorm.

In bfloat16 at the rows of a training step: both views of 144 clips of 250 tokens, of which one clip in twenty drops its
branch. Beside it the same in calls of torch, and these compiled.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from atst_fast import ops
from benchmarks.gpu import timing

SIZES = {"tiny": (4, 9, 48), "small": (288, 250, 384), "base": (288, 250, 768)}  # clips, tokens, width


def in_torch(x, y, bias, scale, weight, norm_bias):
    total = x + (y + bias) * scale.to(y.dtype)[:, None, None]
    return total, F.layer_norm(total, total.shape[-1:], weight, norm_bias, 1e-6)


PROVIDERS = {"atst_fast": ops.add_norm, "torch": in_torch, "torch_compiled": in_torch}


def make_inputs(size, device, dtype=torch.bfloat16):
    clips, tokens, width = SIZES[size]
    shapes = (clips, tokens, width), (clips, tokens, width), (width,), (width,), (width,)
    x, y, *rows = (torch.randn(s, device=device).to(dtype).requires_grad_() for s in shapes)
    scale = (torch.arange(clips, device=device) % 20 > 0) / 0.95
    return [x, y, rows[0], scale, *rows[1:]]


def make(f, provider, way, inputs):
    """The forward pass alone, or the backward pass of one that was made before."""
    call = timing.compiled(f) if provider == "torch_compiled" else f
    if way == "forward":
        return partial(call, *inputs)
    outputs = call(*inputs)
    leaves, grads = [t for t in inputs if t.requires_grad], [torch.randn_like(out) for out in outputs]
    return lambda: torch.autograd.grad(outputs, leaves, grads, retain_graph=True)


@pytest.mark.benchmark(group="add_norm")
@pytest.mark.parametrize("way", ["forward", "backward"])
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("size", SIZES)
def test_add_norm(measure, size, provider, way):
    inputs = make_inputs(size, "cuda")
    # x, y, sum, normed; both gradients, sum, dx, dy
    moved = (4 if way == "forward" else 5) * inputs[0].numel() * inputs[0].element_size()
    measure(make(PROVIDERS[provider], provider, way, inputs), bytes=moved)
