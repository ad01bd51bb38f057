"""A student and the moving average of it that it learns from: what both methods share."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from atst_fast.models.encoder import Encoder
from atst_fast.models.heads import Head


class Student(nn.Module):
    """Encoder, projector and predictor."""

    encoder: Any  # which encoder it is, and what is read from it, the method knows

    def __init__(self, encoder: Encoder, hidden: int, out: int):
        super().__init__()
        self.encoder = encoder
        self.projector = Head(encoder.dim, hidden, out)
        self.predictor = Head(out, hidden, out)

    def forward(self, read: Callable[[Any], Tensor], count: Tensor | None = None) -> Tensor:
        """Predictions ``[M, out]`` for the rows ``[M, D]`` that ``read`` takes from the encoder. ``count``: a scalar on
        the device; rows from there on are padding."""
        return self.predictor(self.projector(read(self.encoder), count), count)


class Teacher(nn.Module):
    """Encoder and projector, a copy of the student's. No graph: its weights only follow the student's."""

    def __init__(self, student: Student):
        super().__init__()
        self.encoder = copy.deepcopy(student.encoder)
        self.projector = copy.deepcopy(student.projector)
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, read: Callable[[Any], Tensor], count: Tensor | None = None) -> Tensor:
        """Targets ``[M, out]``; arguments as `Student`."""
        return self.projector(read(self.encoder), count)


class StudentTeacher(nn.Module):
    """Both networks; state-dict keys ``student.{encoder,projector,predictor}.*`` and ``teacher.{encoder,projector}.*``.

    The teacher stays in training mode with the student: it drops paths of its own, and its BatchNorm uses statistics of
    the batch. Its running statistics are its own too: ``teacher_pairs`` has parameters only.
    ``config`` holds all that it takes to build the system again: ``type(system)(**system.config)``.
    """

    def __init__(self, encoder: Encoder, hidden: int, out: int):
        super().__init__()
        self.student = Student(encoder, hidden, out)
        self.teacher = Teacher(self.student)
        self.config = encoder.config | {"hidden": hidden, "out": out}

    def teacher_pairs(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Parameters of the student that the teacher follows, and the teacher's, in the same order."""
        student = [*self.student.encoder.parameters(), *self.student.projector.parameters()]
        return student, list(self.teacher.parameters())
