"""The Triton kernels of batch_norm_relu, through the public function, against float64 and against plain PyTorch."""

import pytest
import torch
import torch.nn.functional as F

from atst_fast import ops
from tests import tolerances as tol

pytest.importorskip("triton", reason="needs triton")
from atst_fast.kernels import batch_norm_relu as kernels

HALVES = [torch.bfloat16, torch.float16]


def case(ops_, rows, dim, dtype=torch.float32, parameters=torch.float32, count=None, offset=1.0):
    """x, weight, bias (leaves), the gradient of the result and count; NaN in the padding."""
    x, grad = torch.randn(rows, dim) + offset, torch.randn(rows, dim)
    if count is not None:
        x[max(count, 0) :] = grad[max(count, 0) :] = float("nan")
    leaves = [x.to(dtype), torch.randn(dim).to(parameters), torch.randn(dim).to(parameters)]
    leaves = [ops_.to(t).requires_grad_() for t in leaves]
    return leaves, ops_.to(grad.to(dtype)), None if count is None else ops_.to(torch.tensor(count))


def plain(x, weight, bias, n):
    return F.relu(F.batch_norm(x[:n], None, None, weight, bias, True))


def in_float64(leaves, grad, n):
    """What torch gives for the first n rows in float64, and where the ReLU may not go either way."""
    leaves = [t.detach().double().requires_grad_() for t in leaves]
    x, weight, bias = leaves
    want = plain(*leaves, n)
    z = F.batch_norm(x[:n], None, None, weight, bias, True).detach()
    sure = z.abs() > tol.BATCH_NORM_SIDE * (1 + weight.abs() + bias.abs()).detach()
    grad = (grad[:n] * sure).to(grad.dtype)
    return want, torch.autograd.grad(want, leaves, grad.double()), grad


def run(ops_, leaves, count, **kwargs):
    with ops_.poison():
        return ops.batch_norm_relu(*leaves, count=count, **kwargs)


def gradients(ops_, out, leaves, grad):
    """With NaN in the padding of the incoming gradient."""
    padded = torch.full_like(out, float("nan"))
    padded[: len(grad)] = grad
    with ops_.poison():
        return torch.autograd.grad(out, leaves, padded)


@pytest.fixture(params=[None, 2], ids=["short", "long"])
def strips(request, monkeypatch):
    """Strips of one tile, as few rows have them, and of several."""
    if request.param:
        monkeypatch.setattr(kernels, "_STRIPS", request.param)


# rows, columns, count: more than one strip, more than one block of columns, nothing of it even
SIZES = [(70, 130, None), (71, 67, 44), (2, 1, None), (5, 3, 2), (40, 64, 40), (37, 16, 99)]


@pytest.mark.parametrize("rows, dim, count", SIZES)
def test_float32(triton_ops, strips, rows, dim, count):
    leaves, grad, number = case(triton_ops, rows, dim, count=count)
    n = rows if count is None else min(count, rows)
    want, expected, grad = in_float64(leaves, grad, n)
    out = run(triton_ops, leaves, number)
    x, weight, bias = (t.detach().double() for t in leaves)
    rstd = 1 / (x[:n].var(0, correction=0) + 1e-5).sqrt()
    reach = ((x[:n] - x[:n].mean(0)).abs() + x[:n].mean(0).abs()) * rstd
    assert ((out[:n] - want).abs() <= tol.BATCH_NORM * (1 + reach * weight.abs() + bias.abs())).all()
    got = gradients(triton_ops, out, leaves, grad)
    assert not out[n:].any()
    assert not got[0][n:].any()
    top = reach.amax(0)
    scales = rstd * weight.abs() * (1 + top) ** 2, n * (1 + top), n
    for g, e, scale in zip(got, expected, scales):
        assert ((g - e).abs() <= tol.BATCH_NORM_GRAD * scale * grad.abs().max()).all()


@pytest.mark.parametrize("parameters", [torch.float32, None], ids=["float32", "same"])
@pytest.mark.parametrize("dtype", HALVES)
def test_halves_are_as_exact_as_in_torch(triton_ops, dtype, parameters):
    parameters = parameters or dtype
    leaves, grad, number = case(triton_ops, 70, 33, dtype, parameters, count=61)
    want, expected, grad = in_float64(leaves, grad, 61)
    out = run(triton_ops, leaves, number)
    got = gradients(triton_ops, out, leaves, grad)
    assert [out.dtype, *(g.dtype for g in got)] == [dtype, dtype, parameters, parameters]
    peer = plain(*leaves, 61)
    theirs = torch.autograd.grad(peer, leaves, grad)
    for a, b, e in zip([out[:61], *got], [peer, *theirs], [want, *expected]):
        error, torchs = ((t.double() - e).abs().max() for t in (a, b))
        assert error <= tol.HALF_OF_TORCH * torchs + tol.HALF_SUM * e.abs().max()


def test_a_mean_far_from_zero(triton_ops, strips):
    """Sums of squares about zero would leave nothing of the variance."""
    leaves, _, _ = case(triton_ops, 300, 5, offset=1000.0)
    moments = torch.ops.atst_fast.column_moments(leaves[0].detach(), None)
    x = leaves[0].detach().double()
    torch.testing.assert_close(moments[1].double(), x.mean(0), rtol=tol.MOMENT_RTOL, atol=0)
    torch.testing.assert_close(moments[2].double(), x.var(0, correction=0), rtol=tol.VARIANCE_RTOL, atol=0)


@pytest.mark.parametrize("count", [None, 30])
def test_running_statistics(triton_ops, count):
    leaves, _, number = case(triton_ops, 45, 19, torch.bfloat16, torch.bfloat16, count)
    n = count or 45
    running = triton_ops.to(torch.rand(2, 19))
    want = running.double()
    run(triton_ops, leaves, number, running_mean=running[0], running_var=running[1], momentum=0.3)
    F.batch_norm(leaves[0].detach()[:n].double(), want[0], want[1], training=True, momentum=0.3)
    torch.testing.assert_close(running.double(), want, rtol=tol.RUNNING_RTOL, atol=tol.RUNNING_ATOL)


@pytest.mark.parametrize("count", [-1, 0, 1])
def test_too_few_rows_have_no_statistics(triton_ops, count):
    leaves, grad, number = case(triton_ops, 35, 5, count=count)
    running = triton_ops.to(torch.rand(2, 5))
    before = running.clone()
    out = run(triton_ops, leaves, number, running_mean=running[0], running_var=running[1])
    assert out[:1].isnan().all() == (count == 1)
    assert not out[1:].any()
    assert torch.equal(running, before)
    got = gradients(triton_ops, out, leaves, grad[: max(count, 0)])
    assert not got[0][1:].any()
    assert count == 1 or not any(g.any() for g in got)


def test_a_constant_column_and_a_nan(triton_ops):
    x = torch.full((40, 3), 7.25)
    x[7, 2] = float("nan")
    x = triton_ops.to(x).requires_grad_()
    y = run(triton_ops, [x, *triton_ops.to(torch.tensor([[1.0, 1, 1], [0.5, -0.5, 0]]))], None)
    (dx,) = torch.autograd.grad(y[:, :2].sum(), x)
    assert torch.equal(y[:, :2], y.new_tensor([[0.5, 0]]).expand(40, 2))
    assert y[:, 2].isnan().all()
    assert not dx[:, :2].any()


def test_a_full_count_changes_no_bits(triton_ops):
    """Nor does a second run."""
    leaves, grad, _ = case(triton_ops, 70, 33)
    results = []
    for count in (None, None, triton_ops.to(torch.tensor(70))):
        out = run(triton_ops, leaves, count)
        results.append([out, *gradients(triton_ops, out, leaves, grad)])
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


@pytest.mark.parametrize("config", kernels.CONFIGS, ids=str)
def test_every_configuration(triton_ops, config):
    (x, weight, bias), grad, count = case(triton_ops, 70, 66, count=50)
    x, weight, bias = x.detach(), weight.detach(), bias.detach()
    both = []
    for chosen in (config, None):
        rest = {"config": chosen}
        moments = kernels.column_moments(x, count, **rest)
        args = weight, bias, count, 1e-5
        out = kernels.batch_norm_relu_apply(x, moments, *args, **rest)
        sums = kernels.batch_norm_relu_sums(grad, x, moments, *args, **rest)
        both.append([moments, out, sums, kernels.batch_norm_relu_input_grad(grad, x, moments, sums, *args, **rest)])
    for got, want in zip(*both):
        torch.testing.assert_close(got, want, rtol=tol.OTHER_ORDER, atol=tol.OTHER_ORDER)
