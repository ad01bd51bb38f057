"""A pretrained encoder with a linear head, and ATST-C2F: one that learns from another one's answers."""

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atst_fast.models.clip_encoder import ClipEncoder
from atst_fast.models.features import CLIP_CHUNK, clip_features, frame_features, token_features
from atst_fast.models.frame_encoder import FrameEncoder
from atst_fast.models.heads import Head, LinearHead
from atst_fast.ops import _checks

LEVELS = ("clip", "frame")
LOSSES = ("bce", "ce")


def read(
    encoder: FrameEncoder | ClipEncoder,
    mel: Tensor,
    lengths: Tensor | None,
    level: str,
    chunk_frames: int,
    *,
    scale_bug: bool = True,
) -> Tensor:
    """What a head sees of an encoder's last block: ``[B, width]``, or ``[B, L, D]`` at level "frame"."""
    if level == "frame":
        return token_features(encoder, mel, lengths, 1, chunk_frames)
    if isinstance(encoder, FrameEncoder):
        return frame_features(encoder, mel, lengths, 1, chunk_frames)
    return clip_features(encoder, mel, lengths, 1, chunk_frames, scale_bug=scale_bug)


class FineTuned(nn.Module):
    """An encoder and a linear head; keys ``encoder.*`` and ``head.{norm,linear}.*``, as audiossl's ``ClipModel``.

    Args:
        encoder: ``FrameEncoder`` or ``ClipEncoder``; it is taken over, not copied.
        classes: number of labels.
        level: ``"clip"``: one answer per clip, from the last block's mean over tokens (``models.frame_features``), of a
            ``ClipEncoder`` from class token and mean (``models.clip_features``), through batch statistics. ``"frame"``:
            one per token of 40 ms (``models.token_features``), without them.
        chunk_frames: mel frames that go through the encoder at once; default: ``max_frames`` of a ``FrameEncoder``,
            and 601 at most of a ``ClipEncoder``, which is the published 6 s.
        scale_bug: as in ``models.clip_features``, which is where it matters.

    Upstream: audiossl/methods/atst/downstream/model.py, audiossl/methods/atstframe/downstream/model.py.
    """

    def __init__(
        self,
        encoder: FrameEncoder | ClipEncoder,
        classes: int,
        *,
        level: Literal["clip", "frame"] = "clip",
        chunk_frames: int | None = None,
        scale_bug: bool = True,
    ):
        super().__init__()
        if not isinstance(encoder, FrameEncoder | ClipEncoder):
            _checks.fail("FineTuned", "encoder", "a FrameEncoder or a ClipEncoder", encoder, TypeError)
        if level not in LEVELS:
            _checks.fail("FineTuned", "level", "'clip' or 'frame'", level)
        both = not isinstance(encoder, FrameEncoder) and level == "clip"  # class token and mean
        if chunk_frames is None:
            chunk_frames = min(encoder.max_frames, CLIP_CHUNK) if both else encoder.max_frames
        self.level, self.chunk_frames, self.scale_bug = level, chunk_frames, scale_bug
        self.encoder = encoder
        self.head = LinearHead(encoder.dim * (1 + both), classes, batch_norm=level == "clip")
        # all that it takes, beside the encoder's, to build it again
        self.config: dict[str, Any] = {
            "classes": classes,
            "level": level,
            "chunk_frames": chunk_frames,
            "scale_bug": scale_bug,
        }

    @property
    def encoder_is_frame(self) -> bool:
        """Whether the encoder is a ``FrameEncoder``."""
        return isinstance(self.encoder, FrameEncoder)

    def forward(self, mel: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Logits ``[B, classes]``, or ``[B, L, classes]`` at frame level, of mel ``[B, 1, n_mels, T]`` with ``lengths``
        int64 ``[B]`` valid frames (None: all). Differentiable in the weights and ``mel``."""
        features = read(self.encoder, mel, lengths, self.level, self.chunk_frames, scale_bug=self.scale_bug)
        return self.head(_as_read(features, self.head))


def _as_read(features: Tensor, head: LinearHead) -> Tensor:
    """In the dtype of the head: means over tokens are float32."""
    return features.to(head.linear.weight.dtype)


class DistilledLogits(NamedTuple):
    """Logits ``[B, classes]`` (``[B, L, classes]`` at frame level): the student's ``label`` answer, which is trained on
    labels and used afterwards; its ``distilled`` answer, which is trained on the teacher's (the same tensor unless
    there is a projector); and the ``teacher``'s, without a graph. For ``torch.export.save`` see `FrameLoss`."""

    label: Tensor
    distilled: Tensor
    teacher: Tensor


class Distilled(nn.Module):
    """ATST-C2F: a pretrained ATST-Frame that learns from labels and from a fine-tuned ATST-Clip at the same input.

    Keys as audiossl's ``Distill`` (audiossl/methods/atstframe/module_distill.py, module_distill_other.py):
    ``teacher.encoder.*``, ``teacher.head.*``, ``student.*``, ``linear.*`` and, with ``project``, ``projector.*`` and
    ``project_linear.*``.

    Args:
        teacher: a `FineTuned`; its parameters are frozen. student: ``FrameEncoder``. chunk_frames: the student's.
        project: width of the hidden layer of a projector, behind which the student answers the teacher (4096 upstream,
            where it is an option); None: the same answer is trained on both.
        teacher_eval: what ``train()`` does to the teacher. False, as upstream, where nobody calls ``eval()`` on it: it
            drops paths, its head normalises with the statistics of the batch, and its running ones move. True: it
            answers as it does when tested.

    ``tagger`` is what remains after training: student and ``linear`` as a `FineTuned`, the same tensors.
    """

    def __init__(
        self,
        teacher: FineTuned,
        student: FrameEncoder,
        *,
        project: int | None = None,
        teacher_eval: bool = False,
        chunk_frames: int | None = None,
    ):
        super().__init__()
        if not isinstance(teacher, FineTuned):
            _checks.fail("Distilled", "teacher", "a FineTuned", teacher, TypeError)
        if not isinstance(student, FrameEncoder):
            _checks.fail("Distilled", "student", "a FrameEncoder", student, TypeError)
        classes, level = teacher.config["classes"], teacher.level
        tagger = FineTuned(student, classes, level=level, chunk_frames=chunk_frames)
        self.teacher_eval = teacher_eval
        self.teacher = teacher.requires_grad_(False)
        self.student = tagger.encoder
        self._tagger = (tagger,)  # not a module of this one: its parts are
        self.projector = self.project_linear = None
        if project is not None:
            if level == "frame":
                raise ValueError("Distilled: project must be None with a teacher of level 'frame', which has none")
            self.projector = Head(student.dim, project, student.dim)
            self.project_linear = LinearHead(student.dim, classes)
        self.linear = tagger.head
        self.config: dict[str, Any] = {"project": project, "teacher_eval": teacher_eval, **tagger.config}

    @property
    def tagger(self) -> FineTuned:
        (tagger,) = self._tagger
        tagger.training = self.training
        return tagger

    def train(self, mode: bool = True) -> "Distilled":
        super().train(mode)
        if self.teacher_eval:
            self.teacher.eval()
        return self

    def forward(self, mel: Tensor, lengths: Tensor | None = None) -> DistilledLogits:
        """Arguments as `FineTuned`; both networks see the same ``mel``."""
        with torch.no_grad():
            teacher = self.teacher(mel, lengths)
        features = read(self.student, mel, lengths, self.config["level"], self.config["chunk_frames"])
        features = _as_read(features, self.linear)
        label = distilled = self.linear(features)
        if self.projector is not None and self.project_linear is not None:
            distilled = self.project_linear(self.projector(features))
        return DistilledLogits(label, distilled, teacher)


class DistillLoss(NamedTuple):
    """Scalars: ``loss = weight * distillation + (1 - weight) * label``."""

    loss: Tensor
    label: Tensor
    distillation: Tensor


def tagging_loss(
    logits: Tensor, targets: Tensor, kind: Literal["bce", "ce"] = "bce", valid: Tensor | None = None
) -> Tensor:
    """The mean loss of ``logits`` ``[..., classes]``, a scalar; differentiable in them.

    ``"bce"``: of each class alone, ``targets`` float ``[..., classes]`` in [0, 1], or int64 ``[...]`` that mean one of
    them. ``"ce"``: one class of all, ``targets`` int64 ``[...]``, or float probabilities ``[..., classes]``. ``valid``
    bool ``[...]``: which rows count (all of them otherwise); none gives zero.
    Raises ValueError for another ``kind``, shapes that do not fit, and numbers of no class (on a GPU torch does);
    TypeError for other dtypes.
    """
    _checks.tensor("tagging_loss", "targets", targets, "[...] (class numbers) or [..., classes] (float values)")
    if kind not in LOSSES:
        _checks.fail("tagging_loss", "kind", "'bce' or 'ce'", kind)
    classes, indices = logits.shape[-1], not targets.is_floating_point()
    if targets.shape != (logits.shape[:-1] if indices else logits.shape):
        expected = f"class numbers {list(logits.shape[:-1])} or float values {list(logits.shape)}, as logits are"
        _checks.fail("tagging_loss", "targets", expected, targets)
    if indices and targets.dtype != torch.int64:
        _checks.fail("tagging_loss", "targets", "int64 class numbers or float values", targets, TypeError)
    if indices and _checks.readable(targets) and not ((targets >= 0) & (targets < classes)).all():
        _checks.fail("tagging_loss", "targets", f"class numbers from 0 to {classes - 1}", targets.tolist())
    if valid is not None:
        rows = list(logits.shape[:-1])
        _checks.tensor("tagging_loss", "valid", valid, f"{rows}, as logits are without classes", dtypes=(torch.bool,))
        if list(valid.shape) != rows:
            _checks.fail("tagging_loss", "valid", f"{rows}, as logits are without classes", valid)
        logits = logits.masked_fill(~valid[..., None], 0.0)  # whatever is there, it has no gradient
    wanted = targets if indices else targets.to(logits.dtype)
    if kind == "bce":
        wanted = F.one_hot(targets, classes).to(logits.dtype) if indices else wanted
        each = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean(-1)
    else:
        wanted = wanted.flatten() if indices else wanted.reshape(-1, classes)
        each = F.cross_entropy(logits.reshape(-1, classes), wanted, reduction="none").view(logits.shape[:-1])
    if valid is None:
        return each.mean()
    return torch.where(valid, each, 0.0).sum() / valid.sum().clamp(min=1)


def distill_loss(
    logits: DistilledLogits,
    targets: Tensor,
    kind: Literal["bce", "ce"] = "bce",
    weight: float = 0.5,
    valid: Tensor | None = None,
    *,
    hard_labels: bool = True,
) -> DistillLoss:
    """`tagging_loss` of the labels and of the teacher's answers (sigmoid for "bce", softmax for "ce", of temperature
    1), ``weight`` being the share of the latter: 0.5 in audiossl's module_distill_other.py, 1 (no labels at all) by
    default in its script for AudioSet-2M. ``hard_labels``: with "ce", of ``targets`` that are probabilities the
    largest is the label, as upstream; False: they are taken as they are. Differentiable in the student's logits.
    Raises as `tagging_loss`, and for a weight outside of [0, 1]."""
    if not 0 <= weight <= 1:
        _checks.fail("distill_loss", "weight", "between 0 and 1", weight)
    hard = kind == "ce" and hard_labels and targets.is_floating_point()
    label = tagging_loss(logits.label, targets.argmax(-1) if hard else targets, kind, valid)
    teacher = logits.teacher.detach()
    soft = teacher.sigmoid() if kind == "bce" else teacher.softmax(-1)
    distillation = tagging_loss(logits.distilled, soft, kind, valid)
    return DistillLoss(weight * distillation + (1 - weight) * label, label, distillation)


def layer_scales(model: nn.Module, decay: float, *, level: str = "clip", depth: int | None = None) -> dict[str, float]:
    """What each trainable parameter of a `FineTuned` or `Distilled`, also one that DDP or `torch.compile` has wrapped,
    multiplies its learning rate by, by name.

    Block i has ``decay ** (depth - i)``, what comes before the blocks as little as block 0, the encoder's last norm
    ``decay``, heads and projectors 1. At level "frame" the last norm has 1 and what comes before the blocks
    ``decay ** (depth + 1)``. ``depth``: the encoder's own; upstream it is 12 whatever the encoder is.
    Upstream: audiossl/methods/atstframe/module_distill.py, downstream/utils_as_strong/model_as_strong.py.
    """
    if not 0 < decay <= 1:
        _checks.fail("layer_scales", "decay", "more than 0 and at most 1", decay)
    if level not in LEVELS:
        _checks.fail("layer_scales", "level", "'clip' or 'frame'", level)
    found = ((path, m) for path, m in model.named_modules() if isinstance(m, FineTuned | Distilled))
    path, inner = next(found, (None, None))
    if path is None:
        _checks.fail("layer_scales", "model", "a FineTuned or a Distilled", type(model), TypeError)
    prefix = f"{path}." * bool(path) + ("student." if isinstance(inner, Distilled) else "encoder.")
    depth = len(model.get_submodule(prefix + "blocks")) if depth is None else depth  # type: ignore[arg-type]
    frame = level == "frame"
    scales = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        parts = name.removeprefix(prefix).split(".")
        if not name.startswith(prefix):
            scales[name] = 1.0
        elif parts[0] == "blocks":
            scales[name] = decay ** (depth - int(parts[1]))
        elif parts[0] in ("norm", "norm_frame"):
            scales[name] = 1.0 if frame else decay
        else:
            scales[name] = decay ** (depth + frame)
    return scales
