"""What a training step is given."""

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """``waveform`` int16 [B, N] of training step ``step``."""

    step: int
    waveform: Tensor
