"""Encoders and the two-network systems."""

from atst_fast.models.atst_frame import ATSTFrame
from atst_fast.models.frame_encoder import ARCHS, FrameEncoder
from atst_fast.models.loss import FrameLoss, frame_loss

__all__ = ["ARCHS", "ATSTFrame", "FrameEncoder", "FrameLoss", "frame_loss"]
