"""Drop-in modules: parameters and buffers with the official state-dict keys, no maths of their own."""

from atst_fast.nn.block import Block
from atst_fast.nn.frame_attention import FrameAttention
from atst_fast.nn.kaldi_fbank import KaldiFbank
from atst_fast.nn.log_mel import LogMelSpectrogram
from atst_fast.nn.mel_spectrogram import AmplitudeToDB, MelSpectrogram
from atst_fast.nn.mlp import Mlp
from atst_fast.nn.patch_embed import PatchEmbed
from atst_fast.nn.selection import FixedRows, FixedSelection, Selection

__all__ = [
    "AmplitudeToDB",
    "Block",
    "FixedRows",
    "FixedSelection",
    "FrameAttention",
    "KaldiFbank",
    "LogMelSpectrogram",
    "MelSpectrogram",
    "Mlp",
    "PatchEmbed",
    "Selection",
]
