"""The MLP by its Triton kernels, against float64 and beside plain PyTorch in the same dtype."""

import pytest
import torch
import torch.nn.functional as F

from atst_fast import ops
from atst_fast.nn import Block, Mlp
from tests import tolerances as tol

# rows, width, hidden, outer: a single one of everything, less and more than a block, several blocks of each
SHAPES = [(1, 1, 1, 1), (5, 24, 40, 12), (130, 64, 64, 32), (70, 100, 130, 33), (0, 8, 16, 8)]


def plain(x, weight1, bias1, weight2):
    return F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2)


def problem(rows, width, hidden, outer, leading=()):
    x, weight1 = torch.randn(*leading, rows, width), torch.randn(hidden, width) / width**0.5
    return x, weight1, torch.randn(hidden), torch.randn(outer, hidden) / hidden**0.5, torch.randn(*leading, rows, outer)


def results(call, x, weight1, bias1, weight2, grad, device="cpu", dtype=None):
    """Output and gradients, in float64 on the CPU."""
    inputs = [t.to(device, dtype or t.dtype, copy=True).requires_grad_() for t in (x, weight1, bias1, weight2)]
    out = call(*inputs)
    return [t.detach().double().cpu() for t in (out, *torch.autograd.grad(out, inputs, grad.to(out)))]


@pytest.mark.parametrize("shape", SHAPES)
def test_float32(triton_ops, shape):
    given = problem(*shape)
    with triton_ops.poison():
        found = results(ops.mlp, *given, triton_ops.device)
    for got, want in zip(found, results(plain, *given, dtype=torch.float64)):
        assert got.shape == want.shape
        assert ((got - want).abs() <= tol.MLP * want.abs().amax() if want.numel() else got == want).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(130, 64, 256, 64), (70, 100, 130, 33)])
def test_halves(triton_ops, shape, dtype):
    given = [t.to(dtype) for t in problem(*shape)]
    with triton_ops.poison():
        found = results(ops.mlp, *given, triton_ops.device)
    beside, want = results(plain, *given), results(plain, *given, dtype=torch.float64)
    for ours, theirs, exact in zip(found, beside, want):
        assert (ours - exact).abs().max() <= tol.HALF_OF_TORCH * (theirs - exact).abs().max()


def test_every_configuration_of_several_blocks(triton_ops, monkeypatch):
    from atst_fast.kernels import linear_gelu as kernels

    monkeypatch.setattr(kernels, "GROUP", 2)
    x, weight1, bias1, weight2, grad = (triton_ops.to(t.bfloat16()) for t in problem(260, 128, 264, 64))
    a, h = kernels.linear_gelu(x, weight1, bias1, True)
    want = torch.ops.atst_fast.bias_gelu((x.float() @ weight1.float().T), bias1.float())
    assert (a.float() - want).abs().max() <= tol.HALF_OF_TORCH * 2**-8 * want.abs().max()
    gradients = kernels.linear_gelu_backward(grad, weight2, h, bias1)
    for config in {config[:3]: config for config in kernels.CONFIGS}.values():
        for got, want in zip(kernels.linear_gelu(x, weight1, bias1, True, config=config), (a, h)):
            torch.testing.assert_close(got, want)
        for got, want in zip(kernels.linear_gelu_backward(grad, weight2, h, bias1, config=config), gradients):
            torch.testing.assert_close(got, want)


def test_bits_and_what_is_kept(triton_ops):
    """The same bits each time, whether h is kept or not."""
    given = problem(70, 24, 40, 12)
    one, other = (results(ops.mlp, *given, triton_ops.device) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, other))
    x, weight1, bias1, weight2, _ = (triton_ops.to(t) for t in given)
    out, a, h = torch.ops.atst_fast.mlp(x, weight1, bias1, weight2, False)
    assert torch.equal(out.cpu().double(), one[0])
    assert a.numel() == h.numel() == 0
    _, a, h = torch.ops.atst_fast.mlp(x, weight1, bias1, weight2, True)
    assert a.shape == h.shape == (70, 40)


@pytest.mark.parametrize("frozen", [(0,), (1, 2), (0, 1, 2), (3,)])
def test_gradients_of_some(triton_ops, frozen):
    given = problem(9, 24, 40, 12)
    want = results(ops.mlp, *given, triton_ops.device)[1:]
    inputs = [triton_ops.to(t) for t in given[:4]]
    for i, t in enumerate(inputs):
        t.requires_grad_(i not in frozen)
    ops.mlp(*inputs).backward(triton_ops.to(given[4]))
    for i, (t, grad) in enumerate(zip(inputs, want)):
        assert t.grad is None if i in frozen else torch.equal(t.grad.double().cpu(), grad)


def test_opcheck(triton_ops):
    x, weight1, bias1, weight2, grad = (triton_ops.to(t) for t in problem(5, 8, 16, 8))
    for keep in (False, True):
        torch.library.opcheck(torch.ops.atst_fast.linear_gelu, (x, weight1, bias1, keep))
        torch.library.opcheck(torch.ops.atst_fast.mlp, (x, weight1, bias1, weight2, keep))
    _, h = torch.ops.atst_fast.linear_gelu(x, weight1, bias1, True)
    torch.library.opcheck(torch.ops.atst_fast.linear_gelu_backward, (grad, weight2, h, bias1))


def test_a_fused_block(triton_ops, monkeypatch):
    """Fused and not: one block, with all gradients."""
    block, x = Block(32, 2, 2.0, drop_path=0.5).to(triton_ops.device), triton_ops.to(torch.randn(3, 5, 32))
    torch.nn.init.normal_(block.mlp.fc1.bias)
    draws, grad, found = torch.tensor([[0.9, 0.2, 0.8], [0.7, 0.9, 0.1]]), triton_ops.to(torch.randn(3, 5, 32)), []
    called, kernel = [], ops.mlp
    monkeypatch.setattr(ops, "mlp", lambda *a: called.append(1) or kernel(*a))
    for fused in (False, True):
        monkeypatch.setattr(Mlp, "fused", fused)
        leaves = [x.clone().requires_grad_(), *block.parameters()]
        out = block(leaves[0], draws=draws, fixed_shapes=True)
        found.append([out, *torch.autograd.grad(out, leaves, grad)])
    assert called == [1]
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=0, atol=tol.NETWORK_RTOL * b.abs().max().item())
