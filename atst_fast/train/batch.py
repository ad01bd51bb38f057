"""What a training step is given."""

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """``waveform`` int16 [B, N] of training step ``step``: a crop of each clip, or several side by side."""

    step: int
    waveform: Tensor
