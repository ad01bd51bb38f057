"""ATST-Frame: a student that predicts, from masked audio, what its own moving average says of the whole."""

import copy

import torch
from torch import Tensor, nn

from atst_fast.models.frame_encoder import FrameEncoder
from atst_fast.models.heads import Head
from atst_fast.models.loss import FrameLoss, frame_loss
from atst_fast.nn import FixedRows
from atst_fast.ops import _checks

_NAME = "ATSTFrame"


class Student(nn.Module):
    """Encoder, projector and predictor."""

    def __init__(self, encoder: FrameEncoder, hidden: int, out: int):
        super().__init__()
        self.encoder = encoder
        self.projector = Head(encoder.dim, hidden, out)
        self.predictor = Head(out, hidden, out)

    def forward(self, mel: Tensor, lengths: Tensor | None, mask: Tensor, *, select: FixedRows | None = None) -> Tensor:
        """Predictions ``[M, out]`` for the masked tokens, which it sees as the mask token; ``select`` and its padding:
        ``FrameEncoder.masked_tokens``."""
        select = select or self.encoder.select(mel, lengths, mask)
        count = None if select is None else select.count
        x = self.encoder.masked_tokens(mel, lengths, mask, replace=True, select=select)
        return self.predictor(self.projector(x, count), count)


class Teacher(nn.Module):
    """Encoder and projector, a copy of the student's. No graph: its weights only follow the student's."""

    def __init__(self, student: Student):
        super().__init__()
        self.encoder = copy.deepcopy(student.encoder)
        self.projector = copy.deepcopy(student.projector)
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, mel: Tensor, lengths: Tensor | None, mask: Tensor, *, select: FixedRows | None = None) -> Tensor:
        """Targets ``[M, out]`` at the masked tokens, from input that is not masked."""
        select = select or self.encoder.select(mel, lengths, mask)
        x = self.encoder.masked_tokens(mel, lengths, mask, replace=False, select=select)
        return self.projector(x, None if select is None else select.count)


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

    def forward(
        self, view1: Tensor, view2: Tensor, lengths: Tensor | None, mask: Tensor, *, capacity: int | None = None
    ) -> FrameLoss:
        """The loss of one batch, and both networks' output deviation.

        Args:
            view1, view2: mel ``[B, 1, n_mels, T]`` of the same clips.
            lengths: valid frames int64 ``[B]``, or None: all. mask: bool ``[B, L]``, shared by both views. Both belong
                on the CPU for mels that lie there; for a GPU they are best where the mels are.
            capacity: how many tokens of ``mask`` are masked and valid at most. Where it is given, and on a GPU, the
                shapes depend on no value, so that nobody waits for the GPU and a CUDA graph can hold the whole; without
                it there is room for all B * L, which costs time. More than that give a NaN, and no gradient.

        Raises ``ValueError`` where no token is masked and valid: there is nothing to learn from. Where shapes depend on
        no value the loss is NaN then.
        """
        student, teacher, count = self._outputs(view1, view2, lengths, mask, capacity)
        return frame_loss(student, teacher, symmetric=self.symmetric, count=count)

    def outputs(self, view1: Tensor, view2: Tensor, lengths: Tensor | None, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Student's and teacher's outputs ``[2M, out]`` (view 1 first), or ``[M, out]`` when not symmetric. On a GPU
        there is a row for each token of the views, and those beyond the masked ones are padding."""
        return self._outputs(view1, view2, lengths, mask, None)[:2]

    def _outputs(
        self, view1: Tensor, view2: Tensor, lengths: Tensor | None, mask: Tensor, capacity: int | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Both outputs, and how many of their rows are no padding; None: all."""
        if view1.shape != view2.shape:
            _checks.fail(_NAME, "view2", f"of view1's shape {list(view1.shape)}", view2)
        if self.symmetric:
            view1 = view2 = torch.cat([view1, view2])
            lengths = None if lengths is None else lengths.repeat(2)
            mask = mask.repeat(2, 1)
            capacity = None if capacity is None else 2 * capacity
        # once for both networks
        select = self.student.encoder.select(view1, lengths, mask, capacity)
        teacher = self.teacher(view1, lengths, mask, select=select)
        return self.student(view2, lengths, mask, select=select), teacher, None if select is None else select.count

    def teacher_pairs(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Parameters of the student that the teacher follows, and the teacher's, in the same order."""
        student = [*self.student.encoder.parameters(), *self.student.projector.parameters()]
        return student, list(self.teacher.parameters())
