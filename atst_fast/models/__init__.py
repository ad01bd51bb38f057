"""Encoders, the two-network systems, and what is built on an encoder."""

from atst_fast.models.atst_clip import ATSTClip
from atst_fast.models.atst_frame import ATSTFrame
from atst_fast.models.clip_encoder import ClipEncoder
from atst_fast.models.encoder import ARCHS, Encoder
from atst_fast.models.features import clip_features, frame_features, token_features
from atst_fast.models.finetune import (
    Distilled,
    DistilledLogits,
    DistillLoss,
    FineTuned,
    distill_loss,
    layer_scales,
    tagging_loss,
)
from atst_fast.models.frame_encoder import FrameEncoder
from atst_fast.models.heads import LinearHead
from atst_fast.models.loss import FrameLoss, frame_loss
from atst_fast.models.student_teacher import StudentTeacher

__all__ = [
    "ARCHS",
    "ATSTClip",
    "ATSTFrame",
    "ClipEncoder",
    "DistillLoss",
    "Distilled",
    "DistilledLogits",
    "Encoder",
    "FineTuned",
    "FrameEncoder",
    "FrameLoss",
    "LinearHead",
    "StudentTeacher",
    "clip_features",
    "distill_loss",
    "frame_features",
    "frame_loss",
    "layer_scales",
    "tagging_loss",
    "token_features",
]
