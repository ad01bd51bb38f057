import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from atst_fast import ops
from atst_fast.reference import batch_norm_relu as reference
from tests import tolerances as tol

PARTS = torch.ops.atst_fast


def leaf(*shape):
    return torch.randn(*shape).requires_grad_()


def wide(t):
    return t.detach().double().requires_grad_()


def check_norm(rows, dim, offset, spread, eps=1e-5):
    """Forward, gradients and running statistics against float64."""
    x = (torch.randn(rows, dim) * spread + offset * spread).requires_grad_()
    weight, bias = leaf(dim), leaf(dim)
    running = torch.randn(dim), torch.rand(dim)
    running64 = [r.double() for r in running]
    y = ops.batch_norm_relu(x, weight, bias, eps=eps, running_mean=running[0], running_var=running[1], momentum=0.3)
    grad = torch.randn_like(y)
    y.backward(grad)
    x64, weight64, bias64 = wide(x), wide(weight), wide(bias)
    want = F.relu(F.batch_norm(x64, *running64, weight64, bias64, True, 0.3, eps))
    rstd = 1 / (x64.var(0, correction=0) + eps).sqrt().detach()
    mean = x64.mean(0).detach()
    normal = (x64.detach() - mean) * rstd
    z = normal * weight64.detach() + bias64.detach()
    bound = tol.BATCH_NORM * (1 + (normal.abs() + mean.abs() * rstd) * weight64.detach().abs() + bias64.detach().abs())
    assert ((y.double() - want).abs() <= bound).all()
    # a value within rounding of 0 may be on the other side of the ReLU: its gradient is left out of both
    sure = z.abs() > bound
    y2 = ops.batch_norm_relu(x, weight, bias, eps=eps)
    got = torch.autograd.grad(y2, (x, weight, bias), grad * sure)
    expected = torch.autograd.grad(want, (x64, weight64, bias64), grad.double() * sure)
    reach = normal.abs().amax(0) + mean.abs() * rstd
    scales = rstd * weight64.detach().abs() * (1 + reach) ** 2, rows * (1 + reach), rows
    for g, e, scale in zip(got, expected, scales):
        assert ((g.double() - e).abs() <= tol.BATCH_NORM_GRAD * scale * grad.abs().max()).all()
    torch.testing.assert_close([r.double() for r in running], running64, rtol=tol.RUNNING_RTOL, atol=tol.RUNNING_ATOL)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 150), st.integers(1, 70), st.sampled_from([0, 1, 100]), st.integers(0, 2**31))
def test_batch_norm_relu_of_random_shapes(rows, dim, offset, seed):
    torch.manual_seed(seed)
    check_norm(rows, dim, offset, 3.0)


@pytest.mark.parametrize("rows, dim", [(500, 96), (35, 17), (2, 1)])
def test_batch_norm_relu_on_every_isa(isa, rows, dim):
    check_norm(rows, dim, 2, 0.01)


def test_batch_norm_relu_of_a_constant_column(isa):
    """No variance: the bias is all that is left, and the gradient of x is finite."""
    x = torch.full((40, 3), 7.25, requires_grad=True)
    y = ops.batch_norm_relu(x, torch.ones(3), torch.tensor([0.5, -0.5, 0.0]))
    y.sum().backward()
    assert torch.equal(y[0], torch.tensor([0.5, 0, 0]))
    assert torch.equal(x.grad, torch.zeros(40, 3))


def test_batch_norm_relu_keeps_a_nan_in_its_column(isa):
    x = torch.randn(40, 20)
    x[3, 5] = float("nan")
    y = ops.batch_norm_relu(x, torch.ones(20), torch.zeros(20))
    assert torch.equal(y.isnan().any(0), torch.arange(20) == 5)
    assert y[:, 5].isnan().all()


@pytest.mark.parametrize("count", [1, 2])
def test_bits_do_not_depend_on_threads(threads, count):
    x, grad, weight = torch.randn(400, 50), torch.randn(400, 50), torch.randn(50)
    results = []
    for n in (1, count):
        threads(n)
        out, *moments = PARTS.batch_norm_relu(x, weight, weight, 1e-5)
        results.append((out, *moments, *PARTS.batch_norm_relu_backward(grad, x, *moments, weight, weight, 1e-5)))
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_outputs_are_written_in_full(isa):
    """Fresh memory is filled with NaN by torch's deterministic mode; none of it may remain."""
    x, bias, grad = torch.randn(37, 19), torch.randn(19), torch.randn(37, 19)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        out, *moments = PARTS.batch_norm_relu(x, bias, bias, 1e-5)
        results = [out, *moments, *PARTS.batch_norm_relu_backward(grad, x, *moments, bias, bias, 1e-5)]
    finally:
        torch.use_deterministic_algorithms(False)
    for t in results:
        assert t.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_run_plain_pytorch(dtype):
    x, _, bias = torch.randn(3, 4, 5, dtype=dtype).unbind()
    running, plain = torch.zeros(2, 5, dtype=dtype), torch.zeros(2, 5, dtype=dtype)
    got = ops.batch_norm_relu(x, bias[0], bias[1], running_mean=running[0], running_var=running[1])
    torch.testing.assert_close(got, F.relu(F.batch_norm(x, plain[0], plain[1], bias[0], bias[1], training=True)))
    assert torch.equal(running, plain)


def test_half_precision_beside_float32_statistics():
    """As in bfloat16 training, where the running statistics are those of the float32 model."""
    x, weight, bias = (torch.randn(*shape).bfloat16().requires_grad_() for shape in ((50, 8), (8,), (8,)))
    running, wide_running = (torch.zeros(8), torch.ones(8)), (torch.zeros(8), torch.ones(8))
    y = ops.batch_norm_relu(x, weight, bias, running_mean=running[0], running_var=running[1])
    y.sum().backward()
    assert {t.dtype for t in (y, x.grad, weight.grad, bias.grad)} == {torch.bfloat16}
    ops.batch_norm_relu(
        x.float(), weight.float(), bias.float(), running_mean=wide_running[0], running_var=wide_running[1]
    )
    torch.testing.assert_close(running, wide_running)


def float64(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def test_gradcheck_of_the_reference():
    x, weight, bias = float64(5, 4), float64(4), float64(4)
    assert torch.autograd.gradcheck(ops.batch_norm_relu, (x, weight, bias))
    out, *moments = reference.batch_norm_relu(x, weight, bias, 1e-3)
    grad = torch.randn(5, 4, dtype=torch.float64)
    want = torch.autograd.grad(out, (x, weight, bias), grad)
    for got, expected in zip(reference.batch_norm_relu_backward(grad, x, *moments, weight, bias, 1e-3), want):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("count", [2, 5, 7, 9])
def test_padding_has_no_share(count):
    """In float64, by the parts: the same as the rows before it alone, running statistics and gradients too."""
    x, weight, bias = float64(7, 4), float64(4), float64(4)
    running, alone = torch.rand(2, 2, 4, dtype=torch.float64).repeat(2, 1, 1, 1).unbind()
    alone = alone.clone()
    n = min(count, 7)
    kwargs = {"count": torch.tensor(count)}
    padded = x.detach().clone()
    padded[n:] = float("nan")
    padded.requires_grad_()
    out = ops.batch_norm_relu(padded, weight, bias, running_mean=running[0, 0], running_var=running[0, 1], **kwargs)
    want = F.relu(F.batch_norm(x[:n], alone[0, 0], alone[0, 1], weight, bias, True))
    torch.testing.assert_close(out[:n], want)
    assert torch.equal(out[n:], torch.zeros_like(out[n:]))
    torch.testing.assert_close(running, alone)
    grad = torch.randn_like(out)
    got = torch.autograd.grad(out, (padded, weight, bias), grad.index_fill(0, torch.arange(n, 7), float("nan")))
    expected = torch.autograd.grad(want, (x, weight, bias), grad[:n])
    assert all(map(torch.equal, (got[0][n:], expected[0][n:]), (torch.zeros_like(x[n:]),) * 2))
    for g, e in zip(got, expected):
        torch.testing.assert_close(g, e)
    assert torch.autograd.gradcheck(lambda *a: ops.batch_norm_relu(*a, **kwargs), (x, weight, bias))


@pytest.mark.parametrize("count", [-1, 0, 1])
def test_too_few_rows_have_no_statistics(count):
    x, weight, bias, running = leaf(5, 4), leaf(4), leaf(4), torch.rand(2, 4)
    before = running.clone()
    kwargs = {"running_mean": running[0], "running_var": running[1], "count": torch.tensor(count)}
    out = ops.batch_norm_relu(x, weight, bias, **kwargs)
    assert out[:1].isnan().all() == (count == 1)
    assert torch.equal(out[1:], torch.zeros(4, 4))
    assert torch.equal(running, before)
    if count < 1:
        assert all(not g.any() for g in torch.autograd.grad(out.sum(), (x, weight, bias)))


def test_half_precision_that_is_padded():
    """On a CPU by the parts, in float32."""
    x, weight, bias = torch.randn(9, 5).bfloat16(), torch.randn(5).bfloat16(), torch.randn(5)
    got = ops.batch_norm_relu(x, weight, bias, count=torch.tensor(8, dtype=torch.int32))
    want = ops.batch_norm_relu(x[:8].float(), weight.float(), bias)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got[:8], want.bfloat16())


def test_opcheck():
    x, bias, count = leaf(6, 5), leaf(5), torch.tensor(4)
    torch.library.opcheck(PARTS.batch_norm_relu, (x, bias, bias, 1e-5))
    x, bias = x.detach(), bias.detach()
    torch.library.opcheck(PARTS.batch_norm_relu_backward, (x, x * 2, *torch.rand(4, 5).unbind(), 1e-5))
    for number in (count, None):
        moments, rest = torch.rand(3, 5) + 2, (bias, bias, number, 1e-5)
        torch.library.opcheck(PARTS.column_moments, (x, number))
        torch.library.opcheck(PARTS.batch_norm_relu_apply, (x, moments, *rest))
        torch.library.opcheck(PARTS.batch_norm_relu_sums, (x, x, moments, *rest))
        torch.library.opcheck(PARTS.batch_norm_relu_input_grad, (x, x, moments, moments[:2], *rest))


def test_compiles_in_one_graph():
    call = torch.compile(lambda *a: ops.batch_norm_relu(*a[:3], count=a[3]), fullgraph=True, backend="aot_eager")
    inputs, count = [leaf(6, 5), leaf(5), leaf(5)], torch.tensor(4)
    results = []
    for f in (call, lambda *a: ops.batch_norm_relu(*a[:3], count=a[3])):
        out = f(*inputs, count)
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    for got, want in zip(*results):
        torch.testing.assert_close(got, want)


def test_anything_strided_will_do():
    x, bias = torch.randn(5, 8).t()[::2], torch.randn(10)[::2]
    want = F.relu(F.batch_norm(x, None, None, bias, bias, True))
    torch.testing.assert_close(ops.batch_norm_relu(x, bias, bias), want)
    torch.testing.assert_close(ops.batch_norm_relu(x, bias, bias, count=torch.tensor(4)), want)


X, B = torch.zeros(2, 3, 4), torch.zeros(4)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: ops.batch_norm_relu(X, B, B), r"batch_norm_relu: x must be \[M, D\] with at least 2 rows"),
        (lambda: ops.batch_norm_relu(X[0, :1], B, B), r"batch_norm_relu: x must be \[M, D\] with at least 2 rows"),
        (lambda: ops.batch_norm_relu(X[0], B[:2], B), r"batch_norm_relu: weight must be \[4\] \(the last axis of x\)"),
        (lambda: ops.batch_norm_relu(X[0], None, B), r"batch_norm_relu: weight must be a tensor \[4\]"),
        (lambda: ops.batch_norm_relu(X[0], B, B, running_var=X), r"batch_norm_relu: running_var must be \[4\]"),
        (lambda: ops.batch_norm_relu(X[0], B, B, eps=-1), "batch_norm_relu: eps must be from 0 to inf, got int -1"),
        (lambda: ops.batch_norm_relu(X[0], B, B, momentum=2), "batch_norm_relu: momentum must be from 0 to 1"),
        (lambda: ops.batch_norm_relu(X[0], B, B, count=3), r"batch_norm_relu: count must be a tensor \[\]"),
        (lambda: ops.batch_norm_relu(X[0], B, B, count=B[0]), r"count must be \[\].* of dtype int64 or int32"),
        (
            lambda: ops.batch_norm_relu(X[0], B, B, count=torch.tensor([3])),
            r"count must be \[\] \(how many rows of x are valid\)",
        ),
        (lambda: ops.batch_norm_relu(X[0, :0], B, B, count=torch.tensor(0)), "x must be .* with at least 1 row,"),
    ],
)
def test_errors(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()
