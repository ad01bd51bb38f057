"""Drop-ins for torchaudio's MelSpectrogram and AmplitudeToDB."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from atst_fast.nn.tables import Tables
from atst_fast.ops import _checks
from atst_fast.ops.log_mel import log_mel_with, make_tables


class MelSpectrogram(Tables):
    """``torchaudio.transforms.MelSpectrogram``: energies of HTK triangles, by ``ops.log_mel``'s kernels.

    Arguments, defaults and buffers (``spectrogram.window [win_length]``, ``mel_scale.fb [n_fft // 2 + 1, n_mels]``) are
    torchaudio's, so that state dicts interchange; the buffers stay float32 whatever the module is cast to.

    Args:
        sample_rate, f_min, f_max: Hz; f_max None is half of the rate. n_fft: 512, 1024 or 2048 (torchaudio's default of
            400 is refused). win_length: n_fft if None. hop_length: ``win_length // 2`` if None, at most n_fft.
        window_fn, wkwargs: called as ``window_fn(win_length, **wkwargs)``.
        pad, power, normalized, center, pad_mode, onesided, norm, mel_scale: 0, 2.0, False, True, "reflect", None or
            True, None and "htk"; anything else is an error that names the argument.

    With `AmplitudeToDB` after it, `LogMelSpectrogram` does both in one pass. Largest error against float64, for
    energies within 60 dB of the strongest bin of a clip's spectra: 5e-4 of the energy.

    Raises:
        ValueError: an argument that is not supported or out of range. TypeError: a size that is no whole number.
    """

    spectrogram: nn.Module
    mel_scale: nn.Module

    def __init__(
        self,
        sample_rate: int = 16000,
        n_fft: int = 400,
        win_length: int | None = None,
        hop_length: int | None = None,
        f_min: float = 0.0,
        f_max: float | None = None,
        pad: int = 0,
        n_mels: int = 128,
        window_fn: Callable[..., Tensor] = torch.hann_window,
        power: float = 2.0,
        normalized: bool = False,
        wkwargs: dict | None = None,
        center: bool = True,
        pad_mode: str = "reflect",
        onesided: bool | None = None,
        norm: str | None = None,
        mel_scale: str = "htk",
    ):
        _only("pad", pad, 0)
        _only("power", power, 2.0)
        _only("normalized", normalized, False)
        _only("center", center, True)
        _only("pad_mode", pad_mode, "reflect")
        _only("onesided", onesided, None, True)
        _only("norm", norm, None)
        _only("mel_scale", mel_scale, "htk")
        for name, value in {
            "n_fft": n_fft,
            "win_length": win_length,
            "hop_length": hop_length,
            "n_mels": n_mels,
        }.items():
            if value is not None and not _checks.is_integer(value):
                _checks.fail("MelSpectrogram", name, "a whole number", value, TypeError)
        f_max = float(sample_rate // 2) if f_max is None else f_max
        settings = (sample_rate, n_fft, win_length, f_min, f_max, n_mels, window_fn, wkwargs)
        super().__init__(("spectrogram.window", "mel_scale.fb"), _make, *settings)
        self.sample_rate, self.n_fft, self.n_mels, self.power = sample_rate, n_fft, n_mels, power
        self.win_length = n_fft if win_length is None else win_length
        self.hop_length = self.win_length // 2 if hop_length is None else hop_length
        self.f_min, self.f_max, self.pad, self.normalized = f_min, f_max, pad, normalized
        if not 1 <= self.hop_length <= n_fft:
            _checks.fail("MelSpectrogram", "hop_length", f"from 1 to n_fft ({n_fft})", self.hop_length)
        # as attributes of the two parts, where torchaudio's users read them
        fixed = {"pad": pad, "power": power, "normalized": normalized, "center": True, "pad_mode": pad_mode}
        sizes = {"n_fft": n_fft, "win_length": self.win_length, "hop_length": self.hop_length, "onesided": True}
        vars(self.spectrogram).update(sizes | fixed)
        bands = {"n_mels": n_mels, "sample_rate": sample_rate, "f_min": f_min, "f_max": f_max}
        vars(self.mel_scale).update(bands | {"norm": norm, "mel_scale": mel_scale})

    def forward(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:
        """``[..., N]`` float32, or int16 that is read as x / 32768, to float32 ``[..., n_mels, N // hop_length + 1]``.

        ``lengths`` ``[B]`` of a waveform ``[B, N]`` or ``[B, 1, N]``, and what is differentiable: as in `ops.log_mel`.
        """
        tables = self._window, self._fb
        return log_mel_with(
            waveform, *tables, self.hop_length, top_db=None, minmax=None, decibels=False, lengths=lengths
        )

    def extra_repr(self) -> str:
        return f"sample_rate={self.sample_rate}, n_fft={self.n_fft}, hop_length={self.hop_length}, n_mels={self.n_mels}"


class AmplitudeToDB(nn.Module):
    """``torchaudio.transforms.AmplitudeToDB``: ``10 log10(max(x, 1e-10))``, or 20 log10 of magnitudes; plain PyTorch.

    Args:
        stype: "power" or "magnitude". top_db: dB below the maximum at which values are floored, 0 or more, or None. The
            maximum is taken over each ``[C, F, T]`` of ``[..., C, F, T]``, and over all of ``[F, T]``.

    Raises:
        ValueError: another stype, a negative top_db, an input of one axis.
    """

    def __init__(self, stype: str = "power", top_db: float | None = None):
        super().__init__()
        if stype not in ("power", "magnitude"):
            _checks.fail("AmplitudeToDB", "stype", "'power' or 'magnitude'", stype)
        if top_db is not None and not top_db >= 0:
            _checks.fail("AmplitudeToDB", "top_db", "0 or more, or None", top_db)
        self.stype, self.top_db = stype, top_db
        self.multiplier, self.amin, self.ref_value = 10.0 if stype == "power" else 20.0, 1e-10, 1.0
        self.db_multiplier = math.log10(max(self.amin, self.ref_value))

    def forward(self, x: Tensor) -> Tensor:
        """``[..., F, T]`` to as many dB of the same dtype; differentiable."""
        _checks.tensor("AmplitudeToDB", "x", x, "[..., F, T] (bins, frames)")
        if x.dim() < 2:
            _checks.fail("AmplitudeToDB", "x", "[..., F, T] (bins, frames)", x)
        db = self.multiplier * x.clamp(min=self.amin).log10()
        if self.top_db is None or not db.numel():
            return db
        axes = (-3, -2, -1) if db.dim() > 2 else (-2, -1)
        return torch.maximum(db, db.amax(axes, keepdim=True) - self.top_db)

    def extra_repr(self) -> str:
        return f"stype={self.stype}, top_db={self.top_db}"


def _make(sample_rate, n_fft, win_length, f_min, f_max, n_mels, window_fn, wkwargs) -> tuple[Tensor, Tensor]:
    """Torchaudio's tables, refused under its names."""
    try:
        window, fb = make_tables(sample_rate, n_fft, win_length, f_min, f_max, n_mels)
    except ValueError as error:
        raise ValueError(f"MelSpectrogram: {str(error).removeprefix('log_mel: ')}") from None
    with torch.device("cpu"):
        own = window_fn(window.shape[0], **(wkwargs or {}))
    if not isinstance(own, Tensor) or own.shape != window.shape:
        _checks.fail("MelSpectrogram", "window_fn", f"a function that returns [{window.shape[0]}] values", own)
    return own.to(window), fb


def _only(name: str, got: object, *supported: object) -> None:
    if got not in supported:
        expected = " or ".join(map(repr, supported))
        _checks.fail("MelSpectrogram", name, f"{expected} (nothing else is supported)", got)
