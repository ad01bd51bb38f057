import pytest
import torch

from atst_fast import ops
from atst_fast.reference import frame_loss as reference

CALLS = torch.ops.atst_fast


def pair(rows, dim, dtype=torch.float64):
    student, teacher = torch.randn(2, rows, dim, dtype=dtype)
    return student.requires_grad_(), teacher


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("count", [None, 2, 6, 8])
def test_the_backward_operator_is_the_gradient(count, symmetric):
    student, teacher = pair(8, 5)
    with torch.no_grad():
        student[1] *= 1e-13  # shorter than what a row is divided by at least
        teacher[2] = 0
    number = None if count is None else torch.tensor(count)
    loss, _ = ops.frame_loss(student, teacher, symmetric=symmetric, count=number)
    (want,) = torch.autograd.grad(loss, student, torch.tensor(1.5).double())
    got = CALLS.frame_loss_backward(torch.tensor(1.5).double(), student.detach(), teacher, number, symmetric)
    torch.testing.assert_close(got, want)
    assert got[1].abs().max() > 1e10


@pytest.mark.parametrize("symmetric", [True, False])
def test_padding_has_no_share(symmetric):
    student, teacher = pair(9, 5)
    want = ops.frame_loss(student[:6], teacher[:6], symmetric=symmetric)
    (expected,) = torch.autograd.grad(want[0], student)
    padded, other = student.detach().clone(), teacher.clone()
    padded[6:] = other[6:] = float("nan")
    padded.requires_grad_()
    got = ops.frame_loss(padded, other, symmetric=symmetric, count=torch.tensor(6))
    torch.testing.assert_close(got, want)
    (gradient,) = torch.autograd.grad(got[0], padded)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("count", [-1, 0, 1, 5, 9])
def test_a_count_that_no_batch_has(count):
    student, teacher = pair(8, 5)
    loss, sums = ops.frame_loss(student, teacher, count=torch.tensor(count))
    assert loss.isnan()
    assert not sums.any()
    assert not torch.autograd.grad(loss, student)[0].any()
    if count == 5:
        loss, _ = ops.frame_loss(student, teacher, symmetric=False, count=torch.tensor(count))
        assert loss.isfinite()


def test_gradcheck():
    student, teacher = pair(6, 4)
    for count in (None, torch.tensor(4)):
        assert torch.autograd.gradcheck(lambda s, n=count: ops.frame_loss(s, teacher, count=n)[0], student)


def test_opcheck():
    student, teacher = pair(6, 4, torch.float32)
    for count in (None, torch.tensor(4)):
        torch.library.opcheck(CALLS.frame_loss, (student, teacher, count, True))
        arguments = torch.tensor(0.5), student.detach(), teacher, count, False
        torch.library.opcheck(CALLS.frame_loss_backward, arguments)


def test_sums():
    student, teacher = pair(6, 4)
    rows = torch.stack([student.detach(), teacher])
    rows = rows / rows.norm(dim=-1, keepdim=True)
    _, sums = reference.frame_loss(student, teacher, None, True)
    torch.testing.assert_close(sums, torch.stack([rows.sum(1), rows.square().sum(1)], 1))


X = torch.zeros(4, 3)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: ops.frame_loss(X[:3], X[:3]), r"frame_loss: student must be \[2M, D\] \(rows, columns\) with M at"),
        (lambda: ops.frame_loss(X[:0], X[:0], symmetric=False), r"frame_loss: student must be \[M, D\]"),
        (lambda: ops.frame_loss(X, X[:2]), r"frame_loss: teacher must be of student's shape \[4, 3\], got float32 \[2"),
        (lambda: ops.frame_loss(X[0], X[0]), r"frame_loss: student must be \[2M, D\]"),
        (lambda: ops.frame_loss(X, X.int()), "frame_loss: teacher must be .* of dtype float32"),
        (lambda: ops.frame_loss(X, X, count=4), r"frame_loss: count must be a tensor \[\]"),
    ],
)
def test_errors(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()
