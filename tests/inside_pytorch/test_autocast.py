"""Autocast: what a module returns and how far that is from float32, and float32 gradients, front end and loss."""

import pytest
import torch
from torch import nn

from atst_fast import ops
from tests.inside_pytorch.cases import FRONT_ENDS, NAMES, first, inputs, loss, make
from tests.tolerances import AUTOCAST_GRADIENT_RTOL, AUTOCAST_HEADS_RTOL, AUTOCAST_RTOL

# What ends in a linear layer has the dtype of autocast, as in torch; what ends in the residual stream, a LayerNorm, the
# loss or the mel does not.
HALF = {"FrameAttention", "Mlp"}


def run(module, args, dtype=None):
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        return first(module(*args))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_result(name, dtype):
    module, args = make(name).train(), inputs(name)
    got, want = run(module, args, dtype), run(module, args)
    assert got.dtype == (dtype if name in HALF else torch.float32)
    error = (got.float() - want).abs().max() / want.abs().max()
    assert error <= AUTOCAST_RTOL[str(dtype).removeprefix("torch.")], error


@pytest.mark.parametrize("name", [n for n in NAMES if n not in FRONT_ENDS])
def test_gradients(name):
    """float32, near those without autocast, and the same whether backward runs inside or outside of it."""
    module, args = make(name).train(), inputs(name)
    parameters = [p for p in module.parameters() if p.requires_grad]

    def gradients(dtype, inside=False):
        out = run(module, args, dtype)
        with torch.autocast("cpu", torch.float16, enabled=inside):
            return torch.autograd.grad(loss(out), parameters, allow_unused=True)

    plain, outside, inside = gradients(None), gradients(torch.float16), gradients(torch.float16, inside=True)
    error = total = 0.0
    for want, a, b in zip(plain, outside, inside):
        if want is not None:
            assert a.dtype == torch.float32
            assert torch.equal(a, b)
            error, total = error + (a - want).square().sum(), total + want.square().sum()
    limit = AUTOCAST_HEADS_RTOL if name.startswith("ATST") else AUTOCAST_GRADIENT_RTOL
    assert (error / total).sqrt() <= limit, (error / total).sqrt()


@pytest.mark.parametrize("name", FRONT_ENDS)
def test_front_end_is_exact(name):
    module, args = make(name), inputs(name)
    assert torch.equal(run(module, args, torch.bfloat16), run(module, args))


@pytest.mark.parametrize("op", [ops.bias_gelu, lambda h, bias: ops.add_branch(h.float(), h, bias)])
def test_epilogues_take_the_product_in_half_and_the_bias_in_float32(op):
    """As a linear layer under autocast leaves them."""
    h, bias = torch.randn(4, 8).bfloat16().requires_grad_(), nn.Parameter(torch.randn(8))
    out = op(h, bias)
    out.float().sum().backward()
    assert (h.grad.dtype, bias.grad.dtype) == (torch.bfloat16, torch.float32)
    want = op(h.detach().float(), bias.detach())
    assert (out.float() - want).abs().max() <= AUTOCAST_RTOL["bfloat16"] * want.abs().max()
