"""The loss of ATST-Frame, and how spread out the two networks' outputs are."""

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


class FrameLoss(NamedTuple):
    """``loss``, a scalar to call backward on; ``std_student`` and ``std_teacher``, scalars without a graph: the mean
    over dimensions of the standard deviation of the normalised outputs (about 1/sqrt(out) when healthy, 0.001 after a
    collapse)."""

    loss: Tensor
    std_student: Tensor
    std_teacher: Tensor


def frame_loss(student: Tensor, teacher: Tensor, *, symmetric: bool = True) -> FrameLoss:
    """Squared distance of normalised outputs, averaged over rows: ``2 - 2 * mean(cos(student, teacher))``.

    ``student`` and ``teacher`` are ``[M, D]``; with ``symmetric``, ``[2M, D]`` with the rows of view 1 first, and the
    student's rows of one view are compared with the teacher's of the other. Differentiable in ``student``. Float16 and
    bfloat16 are computed in float32. Upstream: ``ByolLoss`` in ``audiossl/methods/atstframe/byol.py``.
    Raises ValueError for shapes that do not fit, no rows, or with ``symmetric`` an odd number of them.
    """
    if student.shape != teacher.shape or student.dim() != 2 or not len(student) or (symmetric and len(student) % 2):
        rows = "2M" if symmetric else "M"
        got = f"{list(student.shape)} and {list(teacher.shape)}"
        raise ValueError(f"frame_loss: student and teacher must both be [{rows}, D] with M at least 1, got {got}")
    student, teacher = (F.normalize(_at_least_float32(x), dim=-1) for x in (student, teacher.detach()))
    std_student, std_teacher = _spread(student.detach(), teacher)
    if symmetric:
        teacher = teacher.roll(len(teacher) // 2, 0)
    loss = 2 - 2 * (student * teacher).sum(-1).mean()
    return FrameLoss(loss, std_student, std_teacher)


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _spread(*outputs: Tensor) -> list[Tensor]:
    """Standard deviations over the rows of all processes, from one reduction of their sums."""
    sums = torch.stack([torch.stack([x.sum(0), x.square().sum(0)]) for x in outputs])
    count = torch.full_like(sums[:1, :1], len(outputs[0]))
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        packed = torch.cat([sums.flatten(), count.flatten()[:1]])
        dist.all_reduce(packed)
        sums, count = packed[:-1].view_as(sums), packed[-1]
    total, squares = sums.unbind(1)
    n = count.flatten()[0]
    variance = squares / (n - 1) - total.square() / (n * (n - 1))
    return list((variance + 1e-6).sqrt().mean(1))
