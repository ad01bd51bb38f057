"""The Triton kernels of frame_loss, through the public function, against the reference in float64."""

import pytest
import torch

from atst_fast import ops
from atst_fast.reference import frame_loss as reference
from tests import tolerances as tol

pytest.importorskip("triton", reason="needs triton")
from atst_fast.kernels import frame_loss as kernels


def case(ops_, rows, dim, dtype=torch.float32, count=None):
    """Student (a leaf), teacher and count; NaN in the padding."""
    student, teacher = torch.randn(2, rows, dim)
    teacher += student
    if count is not None:
        student[max(count, 0) :] = teacher[max(count, 0) :] = float("nan")
    number = None if count is None else ops_.to(torch.tensor(count))
    return ops_.to(student.to(dtype)).requires_grad_(), ops_.to(teacher.to(dtype)), number


def check(ops_, student, teacher, count, symmetric, scale=1.5):
    with ops_.poison():
        loss, sums = ops.frame_loss(student, teacher, symmetric=symmetric, count=count)
        (got,) = torch.autograd.grad(loss * scale, student)
    wide = student.detach().double().requires_grad_()
    want, want_sums = reference.frame_loss(wide, teacher.double(), count, symmetric)
    (expected,) = torch.autograd.grad(want * scale, wide)
    assert (loss.dtype, sums.dtype, got.dtype) == (torch.float32, torch.float32, student.dtype)
    assert abs(loss.item() - want.item()) <= tol.FRAME_LOSS
    torch.testing.assert_close(sums.double(), want_sums, rtol=0, atol=tol.FRAME_LOSS * len(student) ** 0.5)
    error = (got.double() - expected).abs()
    rounding = 0 if student.dtype == torch.float32 else (expected.to(student.dtype).double() - expected).abs()
    n = len(student) if count is None else count
    length = wide.detach().norm(dim=1, keepdim=True).clamp(min=1e-12)
    assert (error <= tol.FRAME_LOSS * 2 * scale / (n * length) + 2 * rounding)[:n].all()
    return loss, sums, got


@pytest.fixture(params=[None, 2], ids=["short", "long"])
def strips(request, monkeypatch):
    """Strips of one tile, as few rows have them, and of several."""
    if request.param:
        monkeypatch.setattr(kernels, "_STRIPS", request.param)


# rows, columns, count, symmetric: more than one strip and tile, nothing of it even
SIZES = [
    (38, 19, None, True), (37, 19, None, False), (70, 256, 50, True), (1, 3, None, False), (9, 1, 2, True),
    (45, 300, 33, False), (700, 16, 630, True),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows, dim, count, symmetric", SIZES)
def test_loss_and_gradient(triton_ops, strips, rows, dim, count, symmetric, dtype):
    student, teacher, number = case(triton_ops, rows, dim, dtype, count)
    _, _, gradient = check(triton_ops, student, teacher, number, symmetric)
    if count is not None:
        assert not gradient[count:].any()


def test_networks_of_two_dtypes(triton_ops):
    student, teacher, _ = case(triton_ops, 20, 33)
    check(triton_ops, student, teacher.bfloat16(), None, True)


@pytest.mark.parametrize("count", [-1, 0, 1, 5, 9])
def test_a_count_that_no_batch_has(triton_ops, count):
    student, teacher, number = case(triton_ops, 8, 5, count=count)
    with triton_ops.poison():
        loss, sums = ops.frame_loss(student, teacher, count=number)
        (gradient,) = torch.autograd.grad(loss, student)
    assert loss.isnan()
    assert not sums.any()
    assert not gradient.any()


def test_rows_of_no_length(triton_ops):
    """Those of zeros, and those shorter than what a row is divided by at least, which keep their length."""
    student, teacher, _ = case(triton_ops, 8, 5)
    with torch.no_grad():
        student[0], student[1], teacher[6] = 0, student[1] * 1e-14, 0
    check(triton_ops, student, teacher, None, True)


def test_a_full_count_changes_no_bits(triton_ops):
    """Nor does a second run."""
    student, teacher, _ = case(triton_ops, 300, 33)
    results = []
    for count in (None, None, triton_ops.to(torch.tensor(300))):
        loss, sums = ops.frame_loss(student, teacher, count=count)
        results.append([loss, sums, *torch.autograd.grad(loss, student)])
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


@pytest.mark.parametrize("config", kernels.CONFIGS, ids=str)
def test_every_configuration(triton_ops, config):
    student, teacher, count = case(triton_ops, 61, 256, count=54)
    student, one = student.detach(), triton_ops.to(torch.tensor(1.0))
    both = []
    for chosen in (config, None):
        gradient = kernels.frame_loss_backward(one, student, teacher, count, True, config=chosen)
        both.append([*kernels.frame_loss(student, teacher, count, True, config=chosen), gradient])
    for got, want in zip(*both):
        torch.testing.assert_close(got, want, rtol=tol.OTHER_ORDER, atol=tol.OTHER_ORDER)
