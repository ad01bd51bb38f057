"""The loss of ATST-Frame, and how spread out the two networks' outputs are."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from atst_fast import ops


class FrameLoss(NamedTuple):
    """``loss``, a scalar to call backward on; ``std_student`` and ``std_teacher``, scalars without a graph: the mean
    over dimensions of the standard deviation of the normalised outputs (about 1/sqrt(out) when healthy, 0.001 after a
    collapse).

    ``torch.export.save`` has no public way to learn of a named tuple: what is to be written must return a plain one, as
    a module does whose forward is ``return tuple(self.system(*args))``."""

    loss: Tensor
    std_student: Tensor
    std_teacher: Tensor


def frame_loss(student: Tensor, teacher: Tensor, *, symmetric: bool = True, count: Tensor | None = None) -> FrameLoss:
    """Squared distance of normalised outputs, averaged over rows: ``2 - 2 * mean(cos(student, teacher))``.

    ``student`` and ``teacher`` are ``[M, D]``; with ``symmetric``, ``[2M, D]`` with the rows of view 1 first, and the
    student's rows of one view are compared with the teacher's of the other. ``count`` is an int64 scalar on their
    device, which no host reads: rows from there on are padding, and one that no batch has makes all three NaN.
    Differentiable in ``student``; see ``ops.frame_loss`` for dtypes and errors. The deviations are over the rows of all
    processes of ``torch.distributed``. Upstream: ``ByolLoss`` in ``audiossl/methods/atstframe/byol.py``.
    Raises ValueError for shapes that do not fit, no rows, or with ``symmetric`` and no count an odd number of them.
    """
    loss, sums = ops.frame_loss(student, teacher, symmetric=symmetric, count=count)
    if count is None:
        rows = torch.full_like(sums[0, 0, :1], student.shape[0])
    else:
        rows = torch.where(loss.isnan(), loss, count).to(sums.dtype)[None]
    return FrameLoss(loss, *_spread(sums, rows.detach()))


def _spread(sums: Tensor, rows: Tensor) -> list[Tensor]:
    """Standard deviations over the rows of all processes, from one reduction of their sums and numbers of rows."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        packed = torch.cat([sums.flatten(), rows])
        dist.all_reduce(packed)
        sums, rows = packed[:-1].view_as(sums), packed[-1:]
    total, squares = sums.unbind(1)
    variance = squares / (rows - 1) - total.square() / (rows * (rows - 1))
    return list((variance + 1e-6).sqrt().mean(1))
