"""The operators: plain functions on tensors, differentiable where their docstrings say so.

Each module ``ops/<op>.py`` holds the contract (docstring), the checks, the fake kernel, the autograd formula and the
dispatch of one operator; what it computes in the plainest form is ``atst_fast.reference.<op>``.
"""

from atst_fast.ops._registry import build_info
from atst_fast.ops.add_norm import add_norm
from atst_fast.ops.augment import AugmentDraws, MemoryBank, augment_views, draw_augment
from atst_fast.ops.batch_norm_relu import batch_norm_relu
from atst_fast.ops.ema import ema_update_
from atst_fast.ops.epilogue import add_branch, bias_gelu
from atst_fast.ops.frame_attention import frame_attention, frame_attention_packed
from atst_fast.ops.frame_loss import frame_loss
from atst_fast.ops.kaldi_fbank import kaldi_fbank
from atst_fast.ops.log_mel import log_mel
from atst_fast.ops.mlp import mlp
from atst_fast.ops.patch_embed import patch_embed
from atst_fast.ops.rows import select_rows

__all__ = [
    "AugmentDraws",
    "MemoryBank",
    "add_branch",
    "add_norm",
    "augment_views",
    "batch_norm_relu",
    "bias_gelu",
    "build_info",
    "draw_augment",
    "ema_update_",
    "frame_attention",
    "frame_attention_packed",
    "frame_loss",
    "kaldi_fbank",
    "log_mel",
    "mlp",
    "patch_embed",
    "select_rows",
]
