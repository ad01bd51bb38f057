"""add_norm by its Triton kernels, against the reference in float64 and beside plain PyTorch in the same dtype."""

import pytest
import torch
import torch.nn.functional as F

from atst_fast import ops
from atst_fast.reference import add_norm as reference
from tests import tolerances as tol

# items, rows of each, width
SHAPES = [(3, 5, 24), (1, 1, 1), (5, 7, 100), (4, 1, 768), (2, 0, 8), (0, 3, 8)]
HALVES = [torch.bfloat16, torch.float16]


def problem(items, rows, width, dtype=torch.float32, *, branch=True, scaled=True, affine=True):
    """Arguments of ops.add_norm by name."""
    shape = (items, rows, width)
    given = {"x": torch.randn(shape) * 2 + 0.5}
    if branch:
        given |= {"y": torch.randn(shape), "bias": torch.randn(width)}
    if affine:
        given |= {"weight": torch.randn(width) + 1, "norm_bias": torch.randn(width)}
    given = {name: t.to(dtype) for name, t in given.items()}
    if branch and scaled:
        given["scale"] = (torch.rand(items) < 0.6).float() / 0.6
    return given


def leaves(given, device, dtype=None):
    """Copies on a device, in a dtype; those that have a gradient ask for it."""
    copies = {}
    for name, t in given.items():
        t = t.to(device, t.dtype if dtype is None or name == "scale" else dtype, copy=True)
        copies[name] = t if name == "scale" else t.requires_grad_()
    return copies


def plain(x, y=None, bias=None, scale=None, weight=None, norm_bias=None, eps=1e-6):
    """The same in calls of torch, each rounding to the dtype."""
    total = x
    if y is not None:
        y = y if bias is None else y + bias
        total = x + (y if scale is None else y * scale.to(y.dtype).view(-1, *[1] * (y.dim() - 1)))
    return total, F.layer_norm(total, total.shape[-1:], weight, norm_bias, eps)


def results(call, given, grads):
    """Outputs and gradients of everything, in float64 on the CPU; ``grads`` of None are of outputs not used."""
    outputs = call(**given)
    used = [(out, grad.to(out)) for out, grad in zip(outputs, grads) if grad is not None]
    names = [n for n, t in given.items() if t.requires_grad]
    got = torch.autograd.grad([o for o, _ in used], [given[n] for n in names], [g for _, g in used], allow_unused=True)
    found = {"sum": outputs[0], "normed": outputs[1]} | {f"d{n}": g for n, g in zip(names, got) if g is not None}
    return {name: t.detach().double().cpu() for name, t in found.items()}


def errors(found, want):
    """Largest error of each, of its largest value."""
    assert found.keys() == want.keys()
    sizes = {name: t.abs().amax().clamp(min=1e-3) if t.numel() else torch.ones(()) for name, t in want.items()}
    return {n: ((found[n] - t).abs().amax() / sizes[n]).item() if t.numel() else 0.0 for n, t in want.items()}


def run(triton_ops, given, grads):
    with triton_ops.poison():
        return results(ops.add_norm, leaves(given, triton_ops.device), grads)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", [{}, {"branch": False}, {"scaled": False}, {"affine": False}], ids=str)
def test_float32(triton_ops, shape, kind):
    given = problem(*shape, **kind)
    grads = torch.randn(2, *shape)
    found = run(triton_ops, given, grads)
    want = results(ops.add_norm, leaves(given, "cpu", torch.float64), grads)
    assert max(errors(found, want).values()) <= tol.ADD_NORM


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape, scaled", [((3, 5, 24), True), ((3, 3, 200), False)])
def test_halves(triton_ops, dtype, shape, scaled):
    given = problem(*shape, dtype, scaled=scaled)
    grads = torch.randn(2, *shape).to(dtype)
    want = results(ops.add_norm, leaves(given, "cpu", torch.float64), grads)
    found, beside = (
        errors(run(triton_ops, given, grads), want),
        errors(results(plain, leaves(given, "cpu"), grads), want),
    )
    step = torch.finfo(dtype).eps
    wrong = {n: (e, beside[n]) for n, e in found.items() if e > tol.HALF_OF_TORCH * max(beside[n], step / 2)}
    assert not wrong


@pytest.mark.parametrize("used", [(True, False), (False, True)])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_gradient_that_nobody_sent(triton_ops, used, scaled):
    given = problem(3, 4, 24, scaled=scaled)
    grads = [torch.randn(3, 4, 24) if use else None for use in used]
    want = results(ops.add_norm, leaves(given, "cpu", torch.float64), grads)
    assert max(errors(run(triton_ops, given, grads), want).values()) <= tol.ADD_NORM


def test_a_dropped_branch_is_not_read(triton_ops):
    given = problem(4, 3, 24)
    given["scale"] = torch.tensor([0.0, 1.25, 0.0, 1.25])
    given["y"][::2] = float("nan")
    found = run(triton_ops, given, torch.randn(2, 4, 3, 24))
    assert all(t.isfinite().all() for t in found.values())
    assert torch.equal(found["sum"][::2], given["x"][::2].double())
    assert not found["dy"][::2].any()
    assert torch.equal(found["dy"][1::2], (found["dx"][1::2].float() * 1.25).double())


@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_moments_of_rows_far_from_zero(triton_ops, offset):
    """A variance from centred squares: the mean's size does not reach it."""
    x = torch.randn(6, 2, 64) + offset
    with triton_ops.poison():
        _, normed = ops.add_norm(triton_ops.to(x))
    want = F.layer_norm(x.double(), (64,), eps=1e-6)
    assert (normed.cpu().double() - want).abs().max() <= tol.ADD_NORM * (3 + offset)


def test_every_configuration(triton_ops):
    from atst_fast.kernels import add_norm as kernels

    given = problem(3, 1, 40)
    args = [triton_ops.to(given[n]) for n in ("x", "y", "bias", "scale", "weight", "norm_bias")]
    grads = triton_ops.to(torch.randn(2, 3, 1, 40))
    first = kernels.add_norm(*args, 1e-6)
    rest = (*first[2:], args[3], args[4], True, True)
    back = kernels.add_norm_backward(*grads, first[0], *rest)
    for config in kernels.FORWARD_CONFIGS:
        for a, b in zip(kernels.add_norm(*args, 1e-6, config=config), first):
            torch.testing.assert_close(a, b, rtol=tol.ADD_NORM, atol=tol.ADD_NORM)
    for config in kernels.BACKWARD_CONFIGS:
        for a, b in zip(kernels.add_norm_backward(*grads, first[0], *rest, config=config), back):
            torch.testing.assert_close(a, b, rtol=tol.ADD_NORM, atol=tol.ADD_NORM * b.abs().max().item())


def test_more_rows_than_programs(triton_ops, monkeypatch):
    """Every program takes several blocks of rows, and the sums over rows are those of all of them; the same bits
    again."""
    from atst_fast.kernels import add_norm as kernels

    monkeypatch.setattr(kernels, "backward_config", lambda width: kernels.Config(1, 1, 2, 3))
    given, grads = problem(5, 4, 40), torch.randn(2, 5, 4, 40)
    want = results(ops.add_norm, leaves(given, "cpu", torch.float64), grads)
    found = run(triton_ops, given, grads)
    assert max(errors(found, want).values()) <= tol.ADD_NORM
    again = run(triton_ops, given, grads)
    assert all(torch.equal(t, again[name]) for name, t in found.items())


def test_opcheck(triton_ops):
    given = leaves(problem(2, 2, 24), triton_ops.device)
    args = [given.get(n) for n in ("x", "y", "bias", "scale", "weight", "norm_bias")]
    torch.library.opcheck(torch.ops.atst_fast.add_norm, (*args, 1e-6))
    detached = [None if t is None else t.detach() for t in args]
    total, normed, mean, rstd = torch.ops.atst_fast.add_norm(*detached, 1e-6)
    backward = (None, normed, total, mean, rstd, detached[3], detached[4], True, True)
    torch.library.opcheck(torch.ops.atst_fast.add_norm_backward, backward)


def test_compile(triton_ops):
    given = problem(3, 4, 24)
    call = torch.compile(
        lambda **a: sum(t.square().sum() for t in ops.add_norm(**a)), fullgraph=True, backend="aot_eager"
    )
    ours, theirs = leaves(given, triton_ops.device), leaves(given, triton_ops.device)
    call(**ours).backward()
    sum(t.square().sum() for t in ops.add_norm(**theirs)).backward()
    for name in set(given) - {"scale"}:
        torch.testing.assert_close(ours[name].grad, theirs[name].grad)


def test_the_reference_has_these_gradients():
    given = leaves(problem(2, 2, 4, torch.float64), "cpu")
    order = ("x", "y", "bias", "scale", "weight", "norm_bias")
    inputs = [given[n] for n in order]
    differentiable = lambda *a: reference.add_norm(*a, 1e-3)[:2]  # noqa: E731
    assert torch.autograd.gradcheck(differentiable, inputs)
    total, normed, mean, rstd = reference.add_norm(*inputs, 1e-3)
    grads = torch.randn(2, 2, 2, 4, dtype=torch.float64)
    want = torch.autograd.grad((total, normed), [t for n, t in given.items() if n != "scale"], grads.unbind())
    got = reference.add_norm_backward(
        *grads, total.detach(), mean.detach(), rstd.detach(), given["scale"], given["weight"], True, True
    )
    named = dict(zip([n for n in given if n != "scale"], want))
    for name, t in zip(("x", "y", "bias", "weight", "norm_bias"), got):
        torch.testing.assert_close(t, named[name])


X, ROW = torch.zeros(2, 3, 4), torch.zeros(4)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: ops.add_norm(None), r"add_norm: x must be a tensor \[N, ..., D\]"),
        (lambda: ops.add_norm(ROW), r"add_norm: x must be \[N, ..., D\] with at least 2 axes"),
        (lambda: ops.add_norm(X.int()), "add_norm: x must be .* of dtype float32"),
        (lambda: ops.add_norm(X, X[:1]), r"add_norm: y must be of shape \[2, 3, 4\], as x"),
        (lambda: ops.add_norm(X, X, ROW[:3]), r"add_norm: bias must be \[4\] \(the last axis of x\)"),
        (lambda: ops.add_norm(X, X, ROW, torch.ones(3)), r"add_norm: scale must be \[2\] \(the items of x\)"),
        (lambda: ops.add_norm(X, X, ROW, torch.ones(2).double()), "add_norm: scale must be .* of dtype float32"),
        (lambda: ops.add_norm(X, None, ROW), "add_norm: y must be a tensor where bias or scale is given"),
        (lambda: ops.add_norm(X, weight=X), r"add_norm: weight must be \[4\]"),
        (lambda: ops.add_norm(X, norm_bias=ROW[1:]), r"add_norm: norm_bias must be \[4\]"),
        (lambda: ops.add_norm(X, eps=-1), "add_norm: eps must be at least 0 and finite, got int -1"),
    ],
)
def test_errors(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()
