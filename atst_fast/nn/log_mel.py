"""Log-mel front end: the buffers of ``ops.log_mel``."""

import torch
from torch import Tensor, nn

from atst_fast.nn.tables import Tables
from atst_fast.ops.log_mel import log_mel_with, make_tables


class LogMelSpectrogram(Tables):
    """MelSpectrogram + AmplitudeToDB(top_db) + MinMax in one operator: arguments and numbers of ``ops.log_mel``.

    Buffers, named as torchaudio's MelSpectrogram names them: ``spectrogram.window [win_length]`` and
    ``mel_scale.fb [n_fft // 2 + 1, n_mels]``, float32; what is loaded into them is what is computed with. They stay
    float32 under ``.half()`` and ``.bfloat16()``: 80 dB do not fit into less. A module that was made on the meta device
    has its tables again as soon as it leaves it.
    """

    spectrogram: nn.Module
    mel_scale: nn.Module

    def __init__(
        self,
        sample_rate: int = 16000,
        n_fft: int = 1024,
        win_length: int | None = None,
        hop_length: int = 160,
        f_min: float = 60.0,
        f_max: float = 7800.0,
        n_mels: int = 64,
        top_db: float | None = 80.0,
        minmax: tuple[float, float] | None = (-79.6482, 50.6842),
        dtype: torch.dtype = torch.float32,
    ):
        names = "spectrogram.window", "mel_scale.fb"
        super().__init__(names, make_tables, sample_rate, n_fft, win_length, f_min, f_max, n_mels)
        self.sample_rate, self.n_fft, self.hop_length = sample_rate, n_fft, hop_length
        self.top_db, self.minmax, self.dtype = top_db, minmax, dtype
        # all that it takes to build this front end again, but for the dtype
        self.config = {
            "sample_rate": sample_rate,
            "n_fft": n_fft,
            "win_length": win_length or n_fft,
            "hop_length": hop_length,
            "f_min": f_min,
            "f_max": f_max,
            "n_mels": n_mels,
            "top_db": top_db,
            "minmax": None if minmax is None else tuple(minmax),
        }

    def forward(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:
        """``[..., N]`` float32 or int16 to ``[..., n_mels, T]``; per-clip floors need ``[B, 1, N]`` or ``lengths``."""
        return log_mel_with(
            waveform,
            self._window,
            self._fb,
            self.hop_length,
            top_db=self.top_db,
            minmax=self.minmax,
            lengths=lengths,
            dtype=self.dtype,
        )

    def extra_repr(self) -> str:
        return f"sample_rate={self.sample_rate}, n_fft={self.n_fft}, hop_length={self.hop_length}, top_db={self.top_db}"
