"""bias_gelu and add_branch by their Triton kernels, against float64 and beside plain PyTorch in the same dtype."""

import pytest
import torch
import torch.nn.functional as F

from atst_fast import ops
from atst_fast.reference import epilogue as reference
from tests import tolerances as tol

HALVES = [torch.bfloat16, torch.float16]


def leaf(t, device="cpu", dtype=None):
    return t.to(device, dtype or t.dtype, copy=True).requires_grad_()


def gelu_of(call, h, bias, grad, device="cpu", dtype=None):
    """Output and gradients, in float64 on the CPU."""
    inputs = [leaf(t, device, dtype) for t in (h, bias)]
    out = call(*inputs)
    return [t.detach().double().cpu() for t in (out, *torch.autograd.grad(out, inputs, grad.to(out)))]


def plain_gelu(h, bias):
    return F.gelu(h + bias)


@pytest.mark.parametrize("shape", [(5, 7, 24), (3, 130), (1, 1), (2, 384), (0, 8)])
@pytest.mark.parametrize("size", [1.0, 4.0])
def test_bias_gelu(triton_ops, shape, size):
    h, bias, grad = torch.randn(shape) * size, torch.randn(shape[-1]), torch.randn(shape)
    with triton_ops.poison():
        out, dh, dbias = gelu_of(ops.bias_gelu, h, bias, grad, triton_ops.device)
    want = gelu_of(plain_gelu, h, bias, grad, dtype=torch.float64)
    z = (h.double() + bias).abs().clamp(min=1)
    assert ((out - want[0]).abs() <= tol.BIAS_GELU * z).all()
    assert ((dh - want[1]).abs() <= tol.BIAS_GELU_DERIVATIVE * z * grad.abs()).all()
    sums = (want[1].abs() + z * grad.abs()).flatten(0, -2).sum(0)
    assert ((dbias - want[2]).abs() <= tol.BIAS_GELU_DERIVATIVE * sums).all()


def test_bias_gelu_over_the_whole_axis(triton_ops):
    z = torch.linspace(-13.5, 13.5, 50 * 128).view(50, 128)
    got = ops.bias_gelu(triton_ops.to(z), triton_ops.to(torch.zeros(128))).cpu().double()
    exact = z.double() * torch.special.erfc(-z.double() / 2**0.5) / 2
    assert ((got - exact).abs() <= tol.BIAS_GELU * z.abs().clamp(min=1)).all()
    tail = (z < -1) & (z > -13)  # 0 below -13.2
    relative = (got - exact).abs() / exact.abs()
    # the exponent z^2 / 2 carries a rounding of 2^-24 of itself, and so does its factor log2(e)
    assert (relative[tail] <= 1e-6 + 2**-22 * z[tail].double().square()).all()


@pytest.mark.parametrize("dtype", HALVES)
def test_bias_gelu_in_halves(triton_ops, dtype):
    z = torch.cat([torch.linspace(-12, 12, 60 * 96), torch.randn(20 * 96)]).view(80, 96).to(dtype)
    bias, grad = torch.randn(96).to(dtype), torch.randn(80, 96).to(dtype)
    with triton_ops.poison():
        found = gelu_of(ops.bias_gelu, z, bias, grad, triton_ops.device)
    beside = gelu_of(plain_gelu, z, bias, grad)
    want = gelu_of(plain_gelu, z, bias, grad, dtype=torch.float64)
    for ours, theirs, exact in zip(found, beside, want):
        assert (ours - exact).abs().max() <= tol.HALF_OF_TORCH * (theirs - exact).abs().max()


def test_bias_gelu_in_halves_is_small_where_the_result_is(triton_ops):
    z = torch.linspace(-9, -2, 8 * 128).view(8, 128).bfloat16()
    got = ops.bias_gelu(triton_ops.to(z), triton_ops.to(torch.zeros(128, dtype=torch.bfloat16))).cpu().double()
    exact = z.double() * torch.special.erfc(-z.double() / 2**0.5) / 2
    assert ((got - exact).abs() <= tol.GELU_HALF_TAIL * exact.abs()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bias_gelu_of_special_values(triton_ops, dtype):
    nan, inf = float("nan"), float("inf")
    h = torch.tensor([[0.0, -0.0, nan, inf, 1e30, -1e30, -40.0, 40.0]], dtype=dtype)
    y = ops.bias_gelu(triton_ops.to(h), triton_ops.to(torch.zeros(8, dtype=dtype)))[0].cpu()
    assert y[:2].tolist() == [0, 0]
    assert y[2].isnan()
    assert torch.equal(y[3:], torch.tensor([inf, 1e30, 0, 0, 40], dtype=dtype))


def branch_of(call, x, y, bias, grad, device="cpu", dtype=None, **options):
    inputs = [leaf(t, device, dtype) for t in (x, y, bias)]
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    out = call(*inputs, **options)
    return [t.detach().double().cpu() for t in (out, *torch.autograd.grad(out, inputs, grad.to(out)))]


def plain_branch(x, y, bias, alpha=1.0, kept=None, scale=None):
    return reference.add_branch(x, y, bias, alpha, kept, scale)


BRANCHES = {
    "plain": {},
    "alpha": {"alpha": -0.5},
    "kept": {"alpha": 1.25, "kept": torch.tensor([3, 0])},
    "none": {"kept": torch.tensor([], dtype=torch.int64)},
    "scale": {"scale": torch.tensor([1.25, 0.0, 1.25, 0.0])},
    "both": {"alpha": 2.0, "kept": torch.tensor([2, 1, 3]), "scale": torch.tensor([0.5, 0.0, 2.0])},
}


def branch_problem(width, kept=None, **_):
    x = torch.randn(4, 5, width)
    return x, torch.randn(4 if kept is None else len(kept), 5, width), torch.randn(width), torch.randn(4, 5, width)


@pytest.mark.parametrize("width", [24, 130, 384])
@pytest.mark.parametrize("options", BRANCHES.values(), ids=BRANCHES)
def test_add_branch(triton_ops, width, options):
    problem = branch_problem(width, **options)
    with triton_ops.poison():
        found = branch_of(ops.add_branch, *problem, triton_ops.device, **options)
    want = branch_of(plain_branch, *problem, dtype=torch.float64, **options)
    sizes = plain_branch(*(t.double().abs() for t in problem[:3]), **{**options, "alpha": abs(options.get("alpha", 1))})
    assert ((found[0] - want[0]).abs() <= tol.ADD_BRANCH * sizes).all()
    assert torch.equal(found[1], want[1])
    torch.testing.assert_close(found[2], want[2], rtol=tol.ADD_BRANCH, atol=0)
    sums = want[2].abs().flatten(0, 1).sum(0)
    assert ((found[3] - want[3]).abs() <= tol.ROW_SUM * sums).all()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", ["alpha", "both"])
def test_add_branch_in_halves(triton_ops, dtype, name):
    options = BRANCHES[name]
    problem = [t.to(dtype) for t in branch_problem(96, **options)]
    with triton_ops.poison():
        found = branch_of(ops.add_branch, *problem, triton_ops.device, **options)
    beside = branch_of(plain_branch, *problem, **options)
    want = branch_of(plain_branch, *problem, dtype=torch.float64, **options)
    for ours, theirs, exact in zip(found, beside, want):
        half_ulp = torch.finfo(dtype).eps / 2 * exact.abs().max()
        assert (ours - exact).abs().max() <= tol.HALF_OF_TORCH * max((theirs - exact).abs().max(), half_ulp)


def test_add_branch_does_not_read_what_is_dropped(triton_ops):
    x, y, bias, grad = branch_problem(24)
    y[1::2] = float("nan")
    out, _, dy, dbias = branch_of(ops.add_branch, x, y, bias, grad, triton_ops.device, **BRANCHES["scale"])
    assert out.isfinite().all()
    assert torch.equal(out[1::2], x[1::2].double())
    assert not dy[1::2].any()
    assert dbias.isfinite().all()


def test_every_configuration(triton_ops):
    from atst_fast.kernels import epilogue as kernels

    h, grad, bias = (triton_ops.to(t) for t in (torch.randn(9, 256), torch.randn(9, 256), torch.randn(256)))
    scale = triton_ops.to(torch.rand(9))
    for config in kernels.FORWARD_CONFIGS:
        torch.testing.assert_close(kernels.bias_gelu(h, bias, config=config), kernels.bias_gelu(h, bias))
        got = kernels.add_branch(h, grad, bias, 0.5, None, scale, config=config)
        torch.testing.assert_close(got, kernels.add_branch(h, grad, bias, 0.5, None, scale))
    for config in kernels.BACKWARD_CONFIGS:
        for a, b in zip(
            kernels.bias_gelu_backward(grad, h, bias, config=config), kernels.bias_gelu_backward(grad, h, bias)
        ):
            torch.testing.assert_close(a, b)
        got = kernels.add_branch_backward(grad, 0.5, None, scale, config=config)
        for a, b in zip(got, kernels.add_branch_backward(grad, 0.5, None, scale)):
            torch.testing.assert_close(a, b)


def test_more_rows_than_programs(triton_ops, monkeypatch):
    from atst_fast.kernels import epilogue as kernels

    monkeypatch.setattr(kernels, "BACKWARD", kernels.BACKWARD._replace(programs=4))
    h, grad, bias = torch.randn(50, 256), torch.randn(50, 256), torch.randn(256)
    found = gelu_of(ops.bias_gelu, h, bias, grad, triton_ops.device)
    want = gelu_of(plain_gelu, h, bias, grad, dtype=torch.float64)
    torch.testing.assert_close(found, want, rtol=0, atol=tol.BIAS_GELU_DERIVATIVE * 50)
    again = gelu_of(ops.bias_gelu, h, bias, grad, triton_ops.device)
    assert all(torch.equal(a, b) for a, b in zip(found, again))


def test_opcheck(triton_ops):
    h, bias = leaf(torch.randn(3, 4, 8), triton_ops.device), leaf(torch.randn(8), triton_ops.device)
    scale = triton_ops.to(torch.tensor([0.0, 2.0, 1.0]))
    torch.library.opcheck(torch.ops.atst_fast.bias_gelu, (h, bias))
    torch.library.opcheck(torch.ops.atst_fast.add_branch, (h, h.detach(), bias, 1.5, None, scale))
    torch.library.opcheck(torch.ops.atst_fast.add_branch_backward, (h.detach(), 1.5, None, scale))


def test_columns():
    from atst_fast.kernels.epilogue import columns_of

    assert [columns_of(n) for n in (3072, 1536, 768, 384, 4096, 128, 130, 24, 1)] == [
        1024, 512, 256, 128, 1024, 128, 256, 32, 1,
    ]  # fmt: skip


@pytest.mark.parametrize("programs, count, width", [(300, 3, 40), (1, 1, 5), (129, 2, 16)])
def test_partial_sums(triton_ops, programs, count, width):
    from atst_fast.kernels.partial_sums import add_up

    parts = torch.randn(programs, count, width)
    with triton_ops.poison():
        sums = add_up(triton_ops.to(parts), torch.float32)
    assert len(sums) == count
    for got, terms in zip(sums, parts.double().unbind(1)):
        assert ((got.cpu() - terms.sum(0)).abs() <= tol.ROW_SUM * terms.abs().sum(0)).all()
