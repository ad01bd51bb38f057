"""What follows the matrix products of a block: bias and GELU, and bias and residual; and GELU with its products.

In bfloat16 at the rows of a training step: both views of 144 clips of 250 tokens. Beside it the same in calls of torch,
and these compiled.
"""

import pytest
import torch
import torch.nn.functional as F

from atst_fast import ops
from benchmarks.gpu import timing

SIZES = {"tiny": (4, 9, 48), "small": (288, 250, 384), "base": (288, 250, 768)}  # clips, tokens, width


def torch_gelu(h, bias):
    return F.gelu(h + bias)


def torch_branch(x, y, bias, scale):
    return x + (y + bias) * scale.to(y.dtype)[:, None, None]


def our_branch(x, y, bias, scale):
    return ops.add_branch(x, y, bias, scale=scale)


def unfused_mlp(x, weight1, bias1, weight2):
    return F.linear(ops.bias_gelu(F.linear(x, weight1), bias1), weight2)


def torch_mlp(x, weight1, bias1, weight2):
    return F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2)


GELUS = {"atst_fast": ops.bias_gelu, "torch": torch_gelu, "torch_compiled": torch_gelu}
MLPS = {"atst_fast": ops.mlp, "atst_fast_unfused": unfused_mlp, "torch": torch_mlp, "torch_compiled": torch_mlp}
BRANCHES = {"atst_fast": our_branch, "torch": torch_branch, "torch_compiled": torch_branch}


def make_inputs(size, device, *, branch, dtype=torch.bfloat16):
    clips, tokens, width = SIZES[size]
    width *= 1 if branch else 4
    shapes = [(clips, tokens, width)] * (2 if branch else 1) + [(width,)]
    inputs = [torch.randn(s, device=device).to(dtype).requires_grad_() for s in shapes]
    return [*inputs, (torch.arange(clips, device=device) % 20 > 0) / 0.95] if branch else inputs


def make_mlp_inputs(size, device, *, dtype=torch.bfloat16):
    clips, tokens, width = SIZES[size]
    shapes = (clips, tokens, width), (4 * width, width), (4 * width,), (width, 4 * width)
    return [(torch.randn(s, device=device) / s[-1] ** 0.5).to(dtype).requires_grad_() for s in shapes]


def make_mlp(f, provider, way, inputs):
    """The forward pass, of "teacher" without a graph, of "student" with one; or "step": that and the backward pass."""
    call = timing.compiled(f) if provider == "torch_compiled" else f
    if way == "teacher":
        return lambda: torch.no_grad()(call)(*inputs)
    if way == "student":
        return lambda: call(*inputs)
    grad = torch.randn_like(inputs[0])
    return lambda: torch.autograd.grad(call(*inputs), inputs, grad)


def make(f, provider, way, inputs):
    """The forward pass alone (which keeps nothing), or the backward pass of one that was made before."""
    call = timing.compiled(f) if provider == "torch_compiled" else f
    if way == "forward":
        return lambda: torch.no_grad()(call)(*inputs)
    out = call(*inputs)
    leaves, grad = [t for t in inputs if t.requires_grad], torch.randn_like(out)
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)


@pytest.mark.benchmark(group="bias_gelu")
@pytest.mark.parametrize("way", ["forward", "backward"])
@pytest.mark.parametrize("provider", GELUS)
@pytest.mark.parametrize("size", SIZES)
def test_bias_gelu(measure, size, provider, way):
    inputs = make_inputs(size, "cuda", branch=False)
    moved = (2 if way == "forward" else 3) * inputs[0].numel() * inputs[0].element_size()
    measure(make(GELUS[provider], provider, way, inputs), bytes=moved)


@pytest.mark.benchmark(group="add_branch")
@pytest.mark.parametrize("way", ["forward", "backward"])
@pytest.mark.parametrize("provider", BRANCHES)
@pytest.mark.parametrize("size", SIZES)
def test_add_branch(measure, size, provider, way):
    inputs = make_inputs(size, "cuda", branch=True)
    moved = (3 if way == "forward" else 2) * inputs[0].numel() * inputs[0].element_size()
    measure(make(BRANCHES[provider], provider, way, inputs), bytes=moved)


@pytest.mark.benchmark(group="mlp")
@pytest.mark.parametrize("way", ["teacher", "student", "step"])
@pytest.mark.parametrize("provider", MLPS)
@pytest.mark.parametrize("size", SIZES)
def test_mlp(measure, size, provider, way):
    inputs = make_mlp_inputs(size, "cuda")
    products = 2 * inputs[0].numel() * len(inputs[1])
    measure(make_mlp(MLPS[provider], provider, way, inputs), flops=products * (6 if way == "step" else 2))
