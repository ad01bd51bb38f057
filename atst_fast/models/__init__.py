"""Encoders and the two-network systems."""

from atst_fast.models.atst_clip import ATSTClip
from atst_fast.models.atst_frame import ATSTFrame
from atst_fast.models.clip_encoder import ClipEncoder
from atst_fast.models.encoder import ARCHS, Encoder
from atst_fast.models.frame_encoder import FrameEncoder
from atst_fast.models.loss import FrameLoss, frame_loss
from atst_fast.models.student_teacher import StudentTeacher

__all__ = [
    "ARCHS",
    "ATSTClip",
    "ATSTFrame",
    "ClipEncoder",
    "Encoder",
    "FrameEncoder",
    "FrameLoss",
    "StudentTeacher",
    "frame_loss",
]
