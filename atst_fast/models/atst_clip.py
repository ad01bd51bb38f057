"""ATST-Clip: a student that predicts, from one crop of a clip, what its own moving average says of another."""

import torch
from torch import Tensor

from atst_fast.models.clip_encoder import ClipEncoder
from atst_fast.models.loss import FrameLoss, frame_loss
from atst_fast.models.student_teacher import StudentTeacher
from atst_fast.ops import _checks

_NAME = "ATSTClip"


class ATSTClip(StudentTeacher):
    """Both networks of ATST-Clip, with the state-dict keys of audiossl's ``ATST`` (``audiossl/models/atst/atst.py``);
    see ``StudentTeacher``.

    Args: ``arch`` and further keywords as ``ClipEncoder``; ``hidden`` and ``out`` widths of the heads.
    """

    def __init__(self, arch="small", *, hidden: int = 4096, out: int = 256, **encoder):
        super().__init__(ClipEncoder(arch, **encoder), hidden, out)

    def forward(
        self, view1: Tensor, view2: Tensor, lengths1: Tensor | None = None, lengths2: Tensor | None = None
    ) -> FrameLoss:
        """The loss of one batch, and both networks' output deviation: each view is predicted from the other.

        Args:
            view1, view2: mel ``[B, 1, n_mels, T]`` of two crops of the same clips; the shorter one padded to T frames.
            lengths1, lengths2: their valid frames int64 ``[B]``, or None: all T. They belong on the CPU for mels that
                lie there; for a GPU they are best where the mels are.

        On a GPU nobody waits for it, and a CUDA graph can hold the whole; a length that is out of range makes the loss
        NaN there. Raises ``ValueError`` for views of different shapes and, on a CPU, such a length.
        """
        student, teacher, count = self._outputs(view1, view2, lengths1, lengths2)
        return frame_loss(student, teacher, count=count)

    def outputs(
        self, view1: Tensor, view2: Tensor, lengths1: Tensor | None = None, lengths2: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Student's and teacher's outputs ``[2B, out]``, view 1 first."""
        return self._outputs(view1, view2, lengths1, lengths2)[:2]

    def _outputs(
        self, view1: Tensor, view2: Tensor, lengths1: Tensor | None, lengths2: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Both outputs, and how many of their rows count: all, or -1 where a length is out of range; None: all."""
        for name, view in (("view1", view1), ("view2", view2)):
            _checks.tensor(_NAME, name, view, "[B, 1, n_mels, T] (clips, 1, mel bins, frames)", dim=4)
        if view1.shape != view2.shape:
            _checks.fail(_NAME, "view2", f"of view1's shape {list(view1.shape)}", view2)
        lengths = _both(lengths1, lengths2, view1)
        mel = torch.cat([view1, view2])
        select = self.student.encoder.select(mel, lengths)  # once for both networks
        count = None if select is None else select.count
        teacher = self.teacher(lambda e: e(mel, lengths, select=select), count)
        return self.student(lambda e: e(mel, lengths, select=select), count), teacher, count


def _both(lengths1: Tensor | None, lengths2: Tensor | None, mel: Tensor) -> Tensor | None:
    """The lengths of both views one after the other; None: all frames of all clips."""
    if lengths1 is None and lengths2 is None:
        return None
    clips, frames = mel.shape[0], mel.shape[-1]
    for name, lengths in (("lengths1", lengths1), ("lengths2", lengths2)):
        if lengths is not None:
            expected = _checks.Later("[{}] (valid frames of each clip, 0 to {})", clips, frames)
            _checks.tensor(_NAME, name, lengths, expected, dim=1, dtypes=(torch.int64,))
            if lengths.shape[0] != clips:
                _checks.fail(_NAME, name, expected, lengths)
    given = lengths1 if lengths1 is not None else lengths2
    whole = torch.full((clips,), frames, device=None if given is None else given.device)
    return torch.cat([whole if lengths is None else lengths for lengths in (lengths1, lengths2)])
