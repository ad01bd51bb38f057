import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from atst_fast import ops
from atst_fast.reference import epilogue as reference
from tests import tolerances as tol

SHAPES = st.lists(st.integers(0, 5), min_size=1, max_size=2)


def leaf(*shape, scale=1.0):
    return (torch.randn(*shape) * scale).requires_grad_()


def wide(t):
    return t.detach().double().requires_grad_()


def assert_rows_sum(got, terms):
    """A sum over rows, relative to what was summed."""
    terms = terms.reshape(-1, terms.shape[-1])
    bound = tol.ROW_SUM * terms.abs().sum(0) + 1e-30
    assert ((got.double() - terms.sum(0)).abs() <= bound).all()


def check_gelu(h, bias):
    y = ops.bias_gelu(h, bias)
    grad = torch.randn_like(y)
    y.backward(grad)
    h64, bias64 = wide(h), wide(bias)
    z = h64 + bias64
    want = F.gelu(z)
    want.backward(grad.double())
    size = z.detach().abs().clamp(min=1)
    assert ((y.double() - want).abs() <= tol.BIAS_GELU * size).all()
    derivative = h64.grad / grad.double()
    assert ((h.grad.double() / grad.double() - derivative).abs() <= tol.BIAS_GELU_DERIVATIVE * size).all()
    assert_rows_sum(bias.grad, h.grad.double())


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.integers(1, 70), st.sampled_from([0.1, 1.0, 4.0]), st.integers(0, 2**31))
def test_bias_gelu_of_random_shapes(leading, dim, scale, seed):
    torch.manual_seed(seed)
    check_gelu(leaf(*leading, dim, scale=scale), leaf(dim))


@pytest.mark.parametrize("rows, dim", [(500, 96), (33, 17), (1, 1)])
def test_bias_gelu_on_every_isa(isa, rows, dim):
    check_gelu(leaf(rows, dim, scale=3.0), leaf(dim))


def test_bias_gelu_over_the_whole_axis(isa):
    z = torch.linspace(-13.5, 13.5, 100001)
    got = ops.bias_gelu(z[:, None].contiguous(), torch.zeros(1))[:, 0].double()
    want = F.gelu(z.double())
    tail = (z < -1) & (z > -13)  # 0 below -13.2
    exact = z.double() * torch.special.erfc(-z.double() / 2**0.5) / 2
    assert ((got - want).abs() <= tol.BIAS_GELU * z.abs().clamp(min=1)).all()
    # the tail to more digits than 1 + erf has: the exponent z^2/2 carries a rounding of 2^-24 of itself
    relative = (got - exact).abs() / exact.abs()
    assert (relative[tail] <= 1e-6 + 2**-22 * z[tail].double().square()).all()


def test_bias_gelu_of_special_values(isa):
    nan, inf = float("nan"), float("inf")
    h = torch.tensor([[0.0, -0.0, nan, inf, 1e30, -1e30, -40.0, 40.0]])
    y = ops.bias_gelu(h, torch.zeros(8))[0]
    assert y[:2].tolist() == [0, 0]
    assert y[2].isnan()
    assert y[3] == inf
    assert torch.equal(y[4:], torch.tensor([1e30, 0, 0, 40]))
    spread = ops.bias_gelu(torch.tensor([[nan, 1.0], [1.0, 1.0]]), torch.zeros(2))
    assert spread.isnan().tolist() == [[True, False], [False, False]]


def branch_problem(items, middle, dim, kept):
    x = leaf(items, *middle, dim)
    y = leaf(items if kept is None else len(kept), *middle, dim)
    return x, y, leaf(dim)


def check_branch(items, middle, dim, alpha, kept):
    x, y, bias = branch_problem(items, middle, dim, kept)
    kept = None if kept is None else torch.tensor(kept, dtype=torch.int64)
    out = ops.add_branch(x, y, bias, alpha=alpha, kept=kept)
    want = reference.add_branch(wide(x), wide(y), wide(bias), alpha, kept)
    terms = reference.add_branch(x.double().abs(), y.double().abs(), bias.double().abs(), abs(alpha), kept)
    assert ((out.double() - want).abs() <= tol.ADD_BRANCH * terms).all()
    grad = torch.randn_like(out)
    out.backward(grad)
    dy, _ = reference.add_branch_backward(grad.double(), alpha, kept)
    assert torch.equal(x.grad, grad)
    torch.testing.assert_close(y.grad.double(), dy, rtol=tol.ADD_BRANCH, atol=0)
    assert_rows_sum(bias.grad, dy)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 6), st.lists(st.integers(0, 40), max_size=2), st.integers(1, 40),
    st.sampled_from([1.0, 1 / 0.9, -0.5]), st.integers(0, 2**31), st.booleans(),
)  # fmt: skip
def test_add_branch_of_random_shapes(items, middle, dim, alpha, seed, all_kept):
    torch.manual_seed(seed)
    kept = None if all_kept else torch.randperm(items)[: items // 2].tolist()
    check_branch(items, middle, dim, alpha, kept)


@pytest.mark.parametrize("kept", [None, [], [0, 2], [2, 0, 1]])
def test_add_branch_on_every_isa(isa, kept):
    check_branch(3, (45,), 24, 1.25, kept)


@pytest.mark.parametrize("count", [1, 2])
def test_bits_do_not_depend_on_threads(threads, count):
    h, bias, grad = torch.randn(3, 400, 50).unbind()
    results = []
    for n in (1, count):
        threads(n)
        results.append(torch.ops.atst_fast.bias_gelu_backward(grad, h, bias[0].contiguous()))
        results[-1] += torch.ops.atst_fast.add_branch_backward(grad, 1.5, None)
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_outputs_are_written_in_full(isa):
    """Fresh memory is filled with NaN by torch's deterministic mode; none of it may remain."""
    h, bias, grad, kept = torch.randn(37, 19), torch.randn(19), torch.randn(37, 19), torch.tensor([3, 1])
    calls = torch.ops.atst_fast
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        results = [calls.bias_gelu(h, bias), *calls.bias_gelu_backward(grad, h, bias)]
        results += [calls.add_branch(h, h, bias, 2.0, None), calls.add_branch(h, h[:2].contiguous(), bias, 2.0, kept)]
        results += [*calls.add_branch_backward(grad, 2.0, None), *calls.add_branch_backward(grad, 2.0, kept)]
    finally:
        torch.use_deterministic_algorithms(False)
    for t in results:
        assert t.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_run_plain_pytorch(dtype):
    x, y, bias = torch.randn(3, 4, 5, dtype=dtype).unbind()
    torch.testing.assert_close(ops.bias_gelu(x, bias[0]), F.gelu(x + bias[0]))
    torch.testing.assert_close(ops.add_branch(x, y, bias[0], alpha=2.0), x + 2 * (y + bias[0]))
    mixed = ops.add_branch(x.float(), y, bias[0].float(), alpha=2.0)
    assert mixed.dtype == torch.float32


def test_gradcheck_of_the_reference():
    h, y, bias = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((3, 2, 4), (2, 2, 4), (4,)))
    assert torch.autograd.gradcheck(ops.bias_gelu, (h, bias))
    kept = torch.tensor([2, 0])
    assert torch.autograd.gradcheck(lambda *a: ops.add_branch(*a, alpha=1.5, kept=kept), (h, y, bias))
    grad = torch.randn(3, 2, 4, dtype=torch.float64)
    want = torch.autograd.grad(reference.bias_gelu(h, bias), (h, bias), grad)
    for got, expected in zip(reference.bias_gelu_backward(grad, h, bias), want):
        torch.testing.assert_close(got, expected)


def test_opcheck():
    h, bias = leaf(3, 4, 5), leaf(5)
    torch.library.opcheck(torch.ops.atst_fast.bias_gelu, (h, bias))
    torch.library.opcheck(torch.ops.atst_fast.bias_gelu_backward, (h.detach(), h.detach(), bias.detach()))
    torch.library.opcheck(torch.ops.atst_fast.add_branch, (h, leaf(3, 4, 5), bias, 1.5, None))
    torch.library.opcheck(torch.ops.atst_fast.add_branch, (h, leaf(2, 4, 5), bias, 1.5, torch.tensor([2, 0])))
    torch.library.opcheck(torch.ops.atst_fast.add_branch_backward, (h.detach(), 1.5, torch.tensor([1])))


def test_anything_strided_will_do():
    h, bias = torch.randn(5, 8).t()[::2], torch.randn(10)[::2]
    torch.testing.assert_close(ops.bias_gelu(h, bias), F.gelu(h + bias))
    torch.testing.assert_close(ops.add_branch(h, h, bias), 2 * h + bias)


X, B = torch.zeros(2, 3, 4), torch.zeros(4)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: ops.bias_gelu(None, B), r"bias_gelu: h must be a tensor \[..., D\]"),
        (lambda: ops.bias_gelu(torch.zeros(()), B), r"bias_gelu: h must be \[..., D\] with D at least 1"),
        (lambda: ops.bias_gelu(X, B[:3]), r"bias_gelu: bias must be \[4\] \(the last axis of h\)"),
        (lambda: ops.bias_gelu(X.int(), B), "bias_gelu: h must be .* of dtype float32"),
        (lambda: ops.add_branch(X, X[:1], B), r"add_branch: y must be of shape \[2, 3, 4\]"),
        (lambda: ops.add_branch(X, X, B, kept=torch.tensor([0])), r"add_branch: y must be of shape \[1, 3, 4\]"),
        (lambda: ops.add_branch(X, X, X), r"add_branch: bias must be \[4\]"),
        (lambda: ops.add_branch(B, B, B, kept=torch.tensor([0])), r"add_branch: x must be \[N, ..., D\] when kept"),
        (lambda: ops.add_branch(X, X, B, kept=torch.tensor([0.0, 1])), "add_branch: kept must be .* of dtype int64"),
    ],
)
def test_errors(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kept", [[0, 2], [1, 1], [-1, 0]])
def test_errors_of_values(kept, dtype):
    x = X.to(dtype)
    with pytest.raises(ValueError, match=r"kept must name items from 0 to 1, each at most once, got \["):
        ops.add_branch(x, x, B.to(dtype), kept=torch.tensor(kept))


@pytest.mark.parametrize("kept, message", [([0, 2], "kept.1. = 2 is not from 0 to 1"), ([1, 1], "name an item twice")])
def test_errors_of_a_direct_call(kept, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.atst_fast.add_branch(X, X, B, 1.0, torch.tensor(kept))
