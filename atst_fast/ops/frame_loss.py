"""The loss of ATST-Frame and the sums that its diagnostics are made of."""

import torch
from torch import Tensor

from atst_fast.ops import _checks
from atst_fast.ops._registry import differentiable_once, register, takes_halves
from atst_fast.reference import frame_loss as reference

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def frame_loss(
    student: Tensor, teacher: Tensor, *, symmetric: bool = True, count: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``2 - 2 * mean(cos(student, teacher))`` over rows, and column sums of the normalised rows, in one pass.

    Args:
        student, teacher: ``[R, D]``. On a GPU float32, bfloat16 and float16 run the kernel; float64, and everything on
            a CPU, plain PyTorch. Rows are divided by their length, by 1e-12 if that is less.
        symmetric: the rows are those of view 1, then as many of view 2; a row of the student is compared with the
            teacher's of the other view, R/2 rows away.
        count: int64 or int32 scalar on the device of student, which is not read on the host: rows at or past it are
            padding, whatever they hold; with ``symmetric`` the other view is count/2 rows away. A count that no batch
            has (less than 2, more than R, odd with ``symmetric``) makes the loss NaN, its gradient and the sums 0.

    Returns the loss, a scalar, and ``[2, 2, D]``: of student and teacher, the sums over rows of the normalised values
    and of their squares. Both are float32, or float64 if student is. The loss is differentiable in student, whose
    gradient is 0 in the padding; teacher is a constant. The bits do not depend on the run. Error against float64 of
    float32: at most 2e-6, and 2e-6 of ``2 / (rows * length of the row)`` of the gradient; of bfloat16 and float16 the
    same, for they are computed in float32, and the rounding of the gradient.
    Matches ``ByolLoss`` in audiossl/methods/atstframe/byol.py.

    Raises:
        TypeError: not a tensor, another dtype. ValueError: shapes or devices that do not fit, no rows, or with
        ``symmetric`` an odd number of them and no count.
    """
    op = "frame_loss"
    even = symmetric and count is None
    expected = f"[{'2M' if even else 'M'}, D] (rows, columns) with M at least 1"
    for name, x in (("student", student), ("teacher", teacher)):
        _checks.tensor(op, name, x, expected, dim=2, dtypes=_DTYPES)
    if student.shape[0] < 1 or student.shape[1] < 1 or (even and student.shape[0] % 2):
        _checks.fail(op, "student", expected, student)
    if teacher.shape != student.shape:
        _checks.fail(op, "teacher", f"of student's shape {list(student.shape)}", teacher)
    _checks.same_device(op, "student", student, teacher=teacher)
    _checks.count(op, count, "student", student)
    if not takes_halves(student) or torch.float64 in (student.dtype, teacher.dtype):
        return reference.frame_loss(student, teacher, count, symmetric)
    return torch.ops.atst_fast.frame_loss(student.contiguous(), teacher.detach().contiguous(), count, symmetric)


@torch.library.register_fake("atst_fast::frame_loss")
def _(student, teacher, count, symmetric):
    dtype = torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32
    return student.new_empty((), dtype=dtype), student.new_empty(2, 2, student.shape[1], dtype=dtype)


@torch.library.register_fake("atst_fast::frame_loss_backward")
def _(grad, student, teacher, count, symmetric):
    return torch.empty_like(student)


def _save(ctx, inputs, output):
    student, teacher, count, ctx.symmetric = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(student, teacher, count)


def _backward(ctx, grad, _):
    return torch.ops.atst_fast.frame_loss_backward(grad, *ctx.saved_tensors, ctx.symmetric), None, None, None


torch.library.register_autograd("atst_fast::frame_loss", _backward, setup_context=_save)
for _op in ("frame_loss", "frame_loss_backward"):
    register(_op, triton="frame_loss", CPU=getattr(reference, _op), CUDA=getattr(reference, _op))
differentiable_once("frame_loss_backward")
