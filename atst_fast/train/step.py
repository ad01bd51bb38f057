"""One step of pretraining."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from atst_fast.models import FrameLoss, StudentTeacher
from atst_fast.optim import AdamWEMA, param_groups
from atst_fast.train.front_end import ClipBatch, FrontEndBatch
from atst_fast.train.schedule import Rates, Schedules


class StepResult(NamedTuple):
    """Scalars on the device of the model, so that nobody waits for them before they are logged."""

    loss: Tensor
    std_student: Tensor
    std_teacher: Tensor
    rates: Rates


def make_optimizer(
    model: StudentTeacher, schedules: Schedules, shadows: Mapping[Tensor, Tensor] | None = None
) -> AdamWEMA:
    """AdamW as the official code runs it, which also moves the teacher; group 0 is the one that is decayed.

    ``shadows``: the bfloat16 copies that compute, see `atst_fast.train.precision.working_copy`.
    """
    groups = param_groups(model.student, schedules.weight_decay)
    teacher: dict[Tensor, Tensor] = dict(zip(*model.teacher_pairs()))
    betas, eps = (0.9, 0.999), 1e-6
    return AdamWEMA(groups, lr=schedules.lr, betas=betas, eps=eps, form="hf", teacher=teacher, shadows=shadows)


def set_rates(optimizer: AdamWEMA, rates: Rates) -> None:
    """What the next step of an optimizer of `make_optimizer` uses."""
    for group in optimizer.param_groups:
        group["lr"] = rates.lr
    optimizer.param_groups[0]["weight_decay"] = rates.weight_decay
    optimizer.momentum = rates.momentum


def update(model: StudentTeacher, optimizer: AdamWEMA, batch: FrontEndBatch | ClipBatch) -> FrameLoss:
    """Loss, gradients, AdamW, teacher, at the rates that the optimizer has. On a GPU nothing in it waits for the device
    or depends on values there, so that a CUDA graph can hold it."""
    optimizer.zero_grad(set_to_none=True)
    out = model(*batch)
    out.loss.backward()
    optimizer.step()
    return out._replace(loss=out.loss.detach())


def train_step(
    model: StudentTeacher,
    optimizer: AdamWEMA,
    schedules: Schedules,
    batch: FrontEndBatch | ClipBatch,
    step: int,
) -> StepResult:
    """Step ``step`` (counted from 0) on two views of a batch: loss, gradients, AdamW, teacher.

    ``model`` is what computes: the working copy in bf16. The rates are those of ``schedules`` at ``step``; the
    teacher's momentum is already that of the step after, as in the official trainer, where the teacher moves when the
    step counter has gone on.
    """
    rates = schedules(step)
    set_rates(optimizer, rates)
    return StepResult(*update(model, optimizer, batch), rates)
