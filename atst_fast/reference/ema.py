"""Reference of the teacher update and of AdamW with the teacher update, one tensor after the other."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def ema_update_(teacher: Sequence[Tensor], student: Sequence[Tensor], momentum: float | Tensor) -> None:
    """``teacher <- momentum * teacher + (1 - momentum) * student``, in float32 at least, rounded once to its dtype."""
    for t, s in zip(teacher, student):
        wide = torch.promote_types(torch.promote_types(t.dtype, s.dtype), torch.float32)
        t.copy_(t.to(wide) * momentum + s.to(wide) * (1 - momentum))


def grad_norm(grads: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of all elements of all tensors together, float64, a tensor without axes."""
    return torch.stack([g.double().square().sum() for g in grads]).sum().sqrt()


def adamw_ema_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    teachers: Sequence[Tensor],
    student_shadows: Sequence[Tensor],
    teacher_shadows: Sequence[Tensor],
    hyper: Tensor,
    group_sizes: Sequence[int],
    momentum: Tensor,
    grad_scale: Tensor | None,
    hf: bool,
) -> None:
    """One AdamW step per parameter, then the teacher update and the copies.

    What an entry without elements stands for does not exist: no ``steps`` entry means no AdamW step, no teacher means
    no teacher update, and so on; for teachers and shadows, an empty list stands for such entries.
    ``hyper`` is ``[groups, 5]``: lr, weight_decay, beta1, beta2, eps of the next ``group_sizes[g]`` parameters.
    """
    rows = [row for row, size in zip(hyper.tolist(), group_sizes) for _ in range(size)]
    for i, (p, row) in enumerate(zip(params, rows)):
        if steps[i].numel():
            g = grads[i].to(p.dtype)
            if grad_scale is not None:
                g = g * grad_scale
            (adamw_hf_ if hf else adamw_torch_)(p, g, exp_avgs[i], exp_avg_sqs[i], steps[i], *row)
        if teachers and teachers[i].numel():
            ema_update_([teachers[i]], [p], momentum)
        if student_shadows and student_shadows[i].numel():
            student_shadows[i].copy_(p)
        if teacher_shadows and teacher_shadows[i].numel():
            teacher_shadows[i].copy_(teachers[i])


def adamw_torch_(p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: Tensor, *hyper: float) -> None:
    """torch.optim.AdamW: decay first; epsilon joins the square root after its bias correction."""
    lr, wd, beta1, beta2, eps = hyper
    step += 1
    t = step.item()
    p.mul_(1 - lr * wd)
    m.mul_(beta1).add_(g, alpha=1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    denominator = v.sqrt().div_(math.sqrt(1 - beta2**t)).add_(eps)
    p.addcdiv_(m, denominator, value=-lr / (1 - beta1**t))


def adamw_hf_(p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: Tensor, *hyper: float) -> None:
    """transformers.optimization.AdamW: epsilon joins the uncorrected square root; decay last, on the updated value."""
    lr, wd, beta1, beta2, eps = hyper
    step += 1
    t = step.item()
    m.mul_(beta1).add_(g, alpha=1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    p.addcdiv_(m, v.sqrt().add_(eps), value=-lr * math.sqrt(1 - beta2**t) / (1 - beta1**t))
    p.add_(p, alpha=-lr * wd)
