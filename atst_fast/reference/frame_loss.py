"""Reference of the loss of ATST-Frame."""

import torch
import torch.nn.functional as F
from torch import Tensor

_EPS = 1e-12  # the least norm of F.normalize


def frame_loss(student: Tensor, teacher: Tensor, count: Tensor | None, symmetric: bool) -> tuple[Tensor, Tensor]:
    """``2 - 2 * mean(cos(student, teacher))`` over the rows before ``count``, and over the same rows the sums of each
    network's normalised outputs and of their squares: ``[2, 2, D]`` (network, power, column)."""
    student, teacher = _wide(student), _wide(teacher.detach())
    if count is not None:
        student, teacher = (x.where(_valid(x, count, symmetric), 0) for x in (student, teacher))
    student, teacher = (F.normalize(x, dim=-1) for x in (student, teacher))
    sums = torch.stack([torch.stack([x.sum(0), x.square().sum(0)]) for x in (student.detach(), teacher)])
    if symmetric:
        teacher = teacher.roll(teacher.shape[0] // 2, 0) if count is None else teacher[_partner(teacher, count)]
    cosines = (student * teacher).sum(-1)
    return 2 - 2 * (cosines.mean() if count is None else cosines.sum() / _rows(student, count, symmetric)), sums


def frame_loss_backward(
    grad: Tensor, student: Tensor, teacher: Tensor, count: Tensor | None, symmetric: bool
) -> Tensor:
    """Gradient of the student's outputs; zeros from ``count`` on, and all of them where it fits no batch."""
    s, t = _wide(student), _wide(teacher)
    n, valid = s.new_full((), s.shape[0]), None
    if count is not None:
        n, valid = _rows(s, count, symmetric), _valid(s, count, symmetric)
        s, t = s.where(valid, 0), t.where(valid, 0)
    if symmetric:
        t = t.roll(t.shape[0] // 2, 0) if count is None else t[_partner(t, count)]
    norm = s.norm(dim=-1, keepdim=True)
    s, t = s / norm.clamp(min=_EPS), F.normalize(t, dim=-1)
    # below the least norm a row is only scaled: its length counts too
    along = (s * t).sum(-1, keepdim=True) * (norm >= _EPS)
    ds = -2 * grad / n * (t - along * s) / norm.clamp(min=_EPS)
    return (ds if valid is None else ds.where(valid, 0)).to(student.dtype)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _fits(x: Tensor, count: Tensor, symmetric: bool) -> Tensor:
    """Whether a batch can have that many rows; -1 says that it had more than there was room for."""
    return (count >= 2) & (count <= x.shape[0]) & ((count % 2 == 0) | (not symmetric))


def _rows(x: Tensor, count: Tensor, symmetric: bool) -> Tensor:
    """``count``, or NaN."""
    return torch.where(_fits(x, count, symmetric), count.to(x.dtype), float("nan"))


def _valid(x: Tensor, count: Tensor, symmetric: bool) -> Tensor:
    """Bool ``[R, 1]``: which rows count."""
    row = torch.arange(x.shape[0], device=x.device)[:, None]
    return (row < count) & _fits(x, count, symmetric)


def _partner(x: Tensor, count: Tensor) -> Tensor:
    """The row of the other view; any for the padding."""
    row, half = torch.arange(x.shape[0], device=x.device), count // 2
    return torch.where(row < half, row + half, row - half).clamp(0, x.shape[0] - 1)
