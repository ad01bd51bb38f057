import pytest
import torch
import torch.nn.functional as F
from torch import nn

from atst_fast import ops
from atst_fast.nn import Block, Mlp
from atst_fast.reference import mlp as reference
from tests import tolerances as tol


def leaves(rows=(3, 4), width=5, hidden=12, outer=7, dtype=torch.float32):
    shapes = (*rows, width), (hidden, width), (hidden,), (outer, hidden)
    return [(torch.randn(s, dtype=torch.float64) / s[-1] ** 0.5).to(dtype).requires_grad_() for s in shapes]


def plain(x, weight1, bias1, weight2):
    return F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2)


@pytest.mark.parametrize("rows", [(3, 4), (6,), (), (0, 2), (2, 1, 3)])
def test_against_float64(rows):
    inputs = leaves(rows)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    out, want = ops.mlp(*inputs), plain(*wide)
    assert out.shape == (*rows, 7)
    grad = torch.randn_like(out)
    found = [out, *torch.autograd.grad(out, inputs, grad)]
    for got, exact in zip(found, [want, *torch.autograd.grad(want, wide, grad.double())]):
        assert got.shape == exact.shape
        if exact.numel():
            assert (got - exact).abs().max() <= tol.MLP * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_run_plain_pytorch(dtype):
    inputs = leaves(dtype=dtype)
    out = ops.mlp(*inputs)
    assert torch.equal(out, reference.mlp(*inputs))
    assert out.dtype == dtype


def test_float64_has_gradients_of_gradients():
    assert torch.autograd.gradgradcheck(ops.mlp, leaves((2,), 2, 3, 2, torch.float64))


def test_a_gradient_of_a_gradient_is_refused():
    inputs = leaves()
    (grad,) = torch.autograd.grad(ops.mlp(*inputs).square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"atst_fast\.mlp_backward: gradients of gradients are not implemented"):
        grad.sum().backward()


def test_forward_mode_is_refused():
    x, *rest = (t.detach() for t in leaves())
    with pytest.raises(NotImplementedError, match="mlp: x has a forward-mode tangent"):
        torch.func.jvp(lambda x: ops.mlp(x, *rest), (x,), (x,))


def test_opcheck():
    x, weight1, bias1, weight2 = leaves((6,))
    values = [t.detach() for t in (x, weight1, bias1, weight2)]
    for keep in (False, True):
        torch.library.opcheck(torch.ops.atst_fast.linear_gelu, (*values[:3], keep))
        torch.library.opcheck(torch.ops.atst_fast.mlp, (*values, keep))
    torch.library.opcheck(torch.ops.atst_fast.mlp, (x, weight1, bias1, weight2, True))
    out, a, h = torch.ops.atst_fast.mlp(*values, True)
    torch.library.opcheck(torch.ops.atst_fast.linear_gelu_backward, (out, values[3], h, values[2]))
    for needs in ([True] * 4, [False, True, False, False], [False, False, False, True], [False] * 4):
        torch.library.opcheck(torch.ops.atst_fast.mlp_backward, (out, *values, a, h, needs))


def test_compile():
    inputs = leaves()
    compiled = torch.compile(lambda *a: ops.mlp(*a) * 2, fullgraph=True, backend="aot_eager")
    grad = torch.randn(3, 4, 7)
    want, got = (
        [f(*inputs), *torch.autograd.grad(f(*inputs), inputs, grad)] for f in (lambda *a: ops.mlp(*a) * 2, compiled)
    )
    assert all(torch.equal(a, b) for a, b in zip(want, got))


def test_what_no_gradient_needs_is_not_kept(monkeypatch):
    inputs = leaves()
    assert ops.mlp(*inputs).grad_fn is not None
    with torch.no_grad():
        assert torch.equal(ops.mlp(*inputs), ops.mlp(*(t.detach() for t in inputs)))
    for t in inputs[1:]:
        t.requires_grad_(False)
    ops.mlp(*inputs).sum().backward()
    assert inputs[0].grad is not None
    assert inputs[1].grad is None


def test_anything_strided_will_do():
    x, weight1, bias1, weight2 = (t.detach() for t in leaves())
    want = plain(x, weight1, bias1, weight2)
    strided = x.transpose(0, 1).contiguous().transpose(0, 1), weight1.T.contiguous().T, bias1, weight2.T.contiguous().T
    torch.testing.assert_close(ops.mlp(*strided), want, rtol=0, atol=tol.MLP * want.abs().max().item())


def test_autocast():
    inputs = leaves()
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.mlp(*inputs).dtype == torch.bfloat16


X, W, B, V = torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.zeros(5), torch.zeros(6, 5)
ERRORS = [
    ({"x": None}, TypeError, r"x must be a tensor \[..., D\]"),
    ({"x": torch.zeros(())}, ValueError, r"x must be \[..., D\] with D at least 1"),
    ({"x": X.int()}, TypeError, "x must be .* of dtype float32"),
    ({"weight1": V}, ValueError, r"weight1 must be \[H, 4\] \(the last axis of x\), got float32 \[6, 5\]"),
    ({"weight1": B}, ValueError, r"weight1 must be \[H, 4\]"),
    ({"bias1": B[:3]}, ValueError, r"bias1 must be \[5\]"),
    ({"weight2": W}, ValueError, r"weight2 must be \[O, 5\] \(the first axis of weight1\), got float32 \[5, 4\]"),
    ({"weight2": V.to("meta")}, ValueError, "weight2 must be on cpu, as x is"),
]


@pytest.mark.parametrize("changed, error, message", ERRORS)
def test_errors(changed, error, message):
    with pytest.raises(error, match="mlp: " + message):
        ops.mlp(**{"x": X, "weight1": W, "bias1": B, "weight2": V, **changed})


@pytest.mark.parametrize("why", ["hook on fc1", "hook on fc2", "tanh", "dropout", "no bias", "off"])
def test_a_block_that_is_not_fused(monkeypatch, why):
    """Layers that are more than plain, and what the operator does not compute."""
    monkeypatch.setattr(Mlp, "fused", why != "off")
    monkeypatch.setattr(ops, "mlp", None)
    block = Block(16, 2, drop=0.1 if why == "dropout" else 0.0, act_layer=nn.Tanh if why == "tanh" else nn.GELU)
    if why.startswith("hook"):
        getattr(block.mlp, why[-3:]).register_forward_hook(lambda *_: None)
    if why == "no bias":
        block.mlp.fc1.bias = None
    assert block(torch.randn(2, 3, 16), fixed_shapes=True).isfinite().all()


def test_a_fused_block_is_the_same(monkeypatch):
    block, x = Block(16, 2), torch.randn(2, 3, 16)
    want = block(x, fixed_shapes=True)
    monkeypatch.setattr(Mlp, "fused", True)
    got = block(x, fixed_shapes=True)
    torch.testing.assert_close(got, want, rtol=0, atol=tol.OTHER_ORDER)
