"""One step of ATST-Frame pretraining."""

from typing import NamedTuple

from torch import Tensor

from atst_fast.models import ATSTFrame
from atst_fast.optim import AdamWEMA, param_groups
from atst_fast.train.front_end import FrontEndBatch
from atst_fast.train.schedule import Rates, Schedules


class StepResult(NamedTuple):
    """Scalars on the device of the model, so that nobody waits for them before they are logged."""

    loss: Tensor
    std_student: Tensor
    std_teacher: Tensor
    rates: Rates


def make_optimizer(model: ATSTFrame, schedules: Schedules) -> AdamWEMA:
    """AdamW as the official code runs it, which also moves the teacher; group 0 is the one that is decayed."""
    groups = param_groups(model.student, schedules.weight_decay)
    teacher: dict[Tensor, Tensor] = dict(zip(*model.teacher_pairs()))
    return AdamWEMA(groups, lr=schedules.lr, betas=(0.9, 0.999), eps=1e-6, form="hf", teacher=teacher)


def train_step(
    model: ATSTFrame, optimizer: AdamWEMA, schedules: Schedules, batch: FrontEndBatch, step: int
) -> StepResult:
    """Step ``step`` (counted from 0) on two views of a batch: loss, gradients, AdamW, teacher.

    The rates are those of ``schedules`` at ``step``; the teacher's momentum is already that of the step after, as in
    the official trainer, where the teacher moves when the step counter has gone on.
    """
    rates = schedules(step)
    for group in optimizer.param_groups:
        group["lr"] = rates.lr
    optimizer.param_groups[0]["weight_decay"] = rates.weight_decay
    optimizer.zero_grad(set_to_none=True)
    out = model(batch.view1, batch.view2, batch.lengths, batch.mask)
    out.loss.backward()
    optimizer.step(momentum=rates.momentum)
    return StepResult(out.loss.detach(), out.std_student, out.std_teacher, rates)
