import pytest
import torch

from atst_fast.models import frame_loss
from benchmarks import official


def test_extremes():
    x = torch.randn(6, 8)
    assert frame_loss(x, x, symmetric=False).loss.item() == pytest.approx(0, abs=1e-6)
    assert frame_loss(x, -x, symmetric=False).loss.item() == pytest.approx(4, abs=1e-6)
    assert frame_loss(x, x.roll(3, 0)).loss.item() == pytest.approx(0, abs=1e-6)
    assert frame_loss(x, 100 * x.roll(3, 0)).loss.item() == pytest.approx(0, abs=1e-6)


def test_spread_of_healthy_and_collapsed_outputs():
    healthy = frame_loss(torch.randn(4000, 64), torch.ones(4000, 64))
    assert healthy.std_student.item() == pytest.approx(64**-0.5, rel=0.02)
    assert healthy.std_teacher.item() == pytest.approx(1e-3, rel=0.1)
    student = torch.randn(10, 8)
    want = torch.nn.functional.normalize(student, dim=-1).var(0).add(1e-6).sqrt().mean()
    assert frame_loss(student, student).std_student.item() == pytest.approx(want.item(), rel=1e-5)


@pytest.mark.parametrize("symmetric", [True, False])
def test_equals_the_plain_structure(symmetric):
    student, teacher = torch.randn(2, 12, 8, dtype=torch.float64)
    student.requires_grad_()
    got = frame_loss(student, teacher, symmetric=symmetric)
    if symmetric:
        (s1, s2), (t1, t2) = student.chunk(2), teacher.chunk(2)
        want = (official.distance(t1, s2) + official.distance(t2, s1)) / 2
    else:
        want = official.distance(teacher, student)
    torch.testing.assert_close(got.loss, want)
    grads = [torch.autograd.grad(loss, student)[0] for loss in (got.loss, want)]
    torch.testing.assert_close(*grads)
    assert not got.std_student.requires_grad
    assert not got.std_teacher.requires_grad


def test_a_row_of_zeros_stays_finite():
    student = torch.zeros(2, 4, requires_grad=True)
    out = frame_loss(student, torch.zeros(2, 4))
    out.loss.backward()
    assert out.loss.item() == 2
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("count", [-1, 0, 3, 10])
def test_a_count_that_no_batch_has_leaves_no_number(count):
    """Too many for the rows, none, or not those of two views: a collapse would look the same but for this."""
    assert all(x.isnan() for x in frame_loss(*torch.randn(2, 8, 4), count=torch.tensor(count)))


@pytest.mark.parametrize("rows, others, symmetric", [(6, 1, False), (3, 3, True), (0, 0, True), (0, 0, False)])
def test_rows_that_do_not_pair_are_refused(rows, others, symmetric):
    message = "teacher must be of student's shape" if others != rows and rows else r"student must be \[2?M, D\]"
    with pytest.raises(ValueError, match=f"frame_loss: {message}"):
        frame_loss(torch.zeros(rows, 4), torch.zeros(others, 4), symmetric=symmetric)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    student, teacher = torch.randn(2, 12, 8, dtype=dtype)
    got = frame_loss(student, teacher)
    assert got.loss.dtype == torch.float32
    torch.testing.assert_close(got.loss, frame_loss(student.float(), teacher.float()).loss)


def test_gradcheck():
    student = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(4, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: frame_loss(s, teacher).loss, student)
