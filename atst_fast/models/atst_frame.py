"""ATST-Frame: a student that predicts, from masked audio, what its own moving average says of the whole."""

import torch
from torch import Tensor

from atst_fast.models.frame_encoder import FrameEncoder
from atst_fast.models.loss import FrameLoss, frame_loss
from atst_fast.models.student_teacher import StudentTeacher
from atst_fast.ops import _checks

_NAME = "ATSTFrame"


class ATSTFrame(StudentTeacher):
    """Both networks of ATST-Frame, with the state-dict keys of audiossl's ``FrameATST``
    (``audiossl/methods/atstframe/model.py``); see ``StudentTeacher``.

    Args: ``arch`` and further keywords as ``FrameEncoder``; ``hidden`` and ``out`` widths of the heads; ``symmetric``:
    both networks see both views, and each view is predicted from the other. Otherwise the teacher sees view 1 and the
    student view 2.
    """

    def __init__(self, arch="small", *, hidden: int = 4096, out: int = 256, symmetric: bool = True, **encoder):
        super().__init__(FrameEncoder(arch, **encoder), hidden, out)
        self.symmetric = symmetric
        self.config["symmetric"] = symmetric

    def forward(
        self, view1: Tensor, view2: Tensor, lengths: Tensor | None, mask: Tensor, capacity: int | None = None
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
        for name, view in (("view1", view1), ("view2", view2)):
            _checks.tensor(_NAME, name, view, "[B, 1, n_mels, T] (clips, 1, mel bins, frames)", dim=4)
        if view1.shape != view2.shape:
            _checks.fail(_NAME, "view2", f"of view1's shape {list(view1.shape)}", view2)
        _checks.tensor(_NAME, "mask", mask, "[B, L] (clips, tokens)", dim=2, dtypes=(torch.bool,))
        if lengths is not None:
            _checks.tensor(_NAME, "lengths", lengths, "[B] (valid frames of each clip)", dim=1)
        if self.symmetric:
            view1 = view2 = torch.cat([view1, view2])
            lengths = None if lengths is None else lengths.repeat(2)
            mask = mask.repeat(2, 1)
            capacity = None if capacity is None else 2 * capacity
        # once for both networks
        select = self.student.encoder.select(view1, lengths, mask, capacity)
        count = None if select is None else select.count
        teacher = self.teacher(lambda e: e.masked_tokens(view1, lengths, mask, replace=False, select=select), count)
        student = self.student(lambda e: e.masked_tokens(view2, lengths, mask, replace=True, select=select), count)
        return student, teacher, count
