"""ATST-Frame: a student that predicts, from masked audio, what its own moving average says of the whole."""

import copy

import torch
from torch import Tensor, nn

from atst_fast.models.frame_encoder import FrameEncoder
from atst_fast.models.heads import Head
from atst_fast.models.loss import FrameLoss, frame_loss
from atst_fast.ops import _checks

_NAME = "ATSTFrame"


class Student(nn.Module):
    """Encoder, projector and predictor."""

    def __init__(self, encoder: FrameEncoder, hidden: int, out: int):
        super().__init__()
        self.encoder = encoder
        self.projector = Head(encoder.dim, hidden, out)
        self.predictor = Head(out, hidden, out)

    def forward(self, mel: Tensor, lengths: Tensor | None, mask: Tensor) -> Tensor:
        """Predictions ``[M, out]`` for the masked tokens, which it sees as the mask token."""
        return self.predictor(self.projector(self.encoder.masked_tokens(mel, lengths, mask, replace=True)))


class Teacher(nn.Module):
    """Encoder and projector, a copy of the student's. No graph: its weights only follow the student's."""

    def __init__(self, student: Student):
        super().__init__()
        self.encoder = copy.deepcopy(student.encoder)
        self.projector = copy.deepcopy(student.projector)
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, mel: Tensor, lengths: Tensor | None, mask: Tensor) -> Tensor:
        """Targets ``[M, out]`` at the masked tokens, from input that is not masked."""
        return self.projector(self.encoder.masked_tokens(mel, lengths, mask, replace=False))


class ATSTFrame(nn.Module):
    """Both networks of ATST-Frame; state-dict keys ``student.{encoder,projector,predictor}.*`` and
    ``teacher.{encoder,projector}.*`` as audiossl's ``FrameATST`` (``audiossl/methods/atstframe/model.py``).

    Args: ``arch`` and further keywords as ``FrameEncoder``; ``hidden`` and ``out`` widths of the heads; ``symmetric``:
    both networks see both views, and each view is predicted from the other. Otherwise the teacher sees view 1 and the
    student view 2.

    The teacher stays in training mode with the student: it drops paths of its own, and its BatchNorm uses statistics of
    the batch. Its running statistics are its own too: ``teacher_pairs`` has parameters only.
    """

    def __init__(self, arch="small", *, hidden: int = 4096, out: int = 256, symmetric: bool = True, **encoder):
        super().__init__()
        self.symmetric = symmetric
        self.student = Student(FrameEncoder(arch, **encoder), hidden, out)
        self.teacher = Teacher(self.student)
        self.config = self.student.encoder.config | {"hidden": hidden, "out": out, "symmetric": symmetric}

    def forward(self, view1: Tensor, view2: Tensor, lengths: Tensor | None, mask: Tensor) -> FrameLoss:
        """The loss of one batch, and both networks' output deviation.

        Args:
            view1, view2: mel ``[B, 1, n_mels, T]`` of the same clips.
            lengths: valid frames int64 ``[B]``, or None: all. mask: bool ``[B, L]``, shared by both views. Both belong
                on the CPU (see ``FrameEncoder``).

        Raises ``ValueError`` where no token is masked and valid: there is nothing to learn from.
        """
        return frame_loss(*self.outputs(view1, view2, lengths, mask), symmetric=self.symmetric)

    def outputs(self, view1: Tensor, view2: Tensor, lengths: Tensor | None, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Student's and teacher's outputs ``[2M, out]`` (view 1 first), or ``[M, out]`` when not symmetric."""
        if view1.shape != view2.shape:
            _checks.fail(_NAME, "view2", f"of view1's shape {list(view1.shape)}", view2)
        if self.symmetric:
            view1 = view2 = torch.cat([view1, view2])
            lengths = None if lengths is None else lengths.repeat(2)
            mask = mask.repeat(2, 1)
        teacher = self.teacher(view1, lengths, mask)
        return self.student(view2, lengths, mask), teacher

    def teacher_pairs(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Parameters of the student that the teacher follows, and the teacher's, in the same order."""
        student = [*self.student.encoder.parameters(), *self.student.projector.parameters()]
        return student, list(self.teacher.parameters())
