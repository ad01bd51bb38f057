"""Log-mel in plain PyTorch: torch.stft, a matrix product with the filterbank, decibels, floor, affine map."""

import math

import torch
from torch import Tensor


def filterbank(n_fft: int, sample_rate: float, f_min: float, f_max: float, n_mels: int) -> Tensor:
    """HTK mel triangles without area normalisation, ``[n_fft // 2 + 1, n_mels]`` float32, as torchaudio builds them.

    Built in float32 in torchaudio's own order of operations: half a unit in the last place of a triangle's foot decides
    whether a bin belongs to it. Source: torchaudio.functional.melscale_fbanks (mel_scale="htk", norm=None).
    """

    plain: dict = {"dtype": torch.float32, "device": "cpu"}

    def mel(hz: float) -> float:
        return 2595.0 * math.log10(1.0 + hz / 700.0)

    bins = torch.linspace(0, sample_rate // 2, n_fft // 2 + 1, **plain)
    edges = 700.0 * (10.0 ** (torch.linspace(mel(f_min), mel(f_max), n_mels + 2, **plain) / 2595.0) - 1.0)
    width = edges[1:] - edges[:-1]
    slopes = edges[None, :] - bins[:, None]
    down = -slopes[:, :-2] / width[:-1]
    up = slopes[:, 2:] / width[1:]
    return torch.minimum(down, up).clamp(min=0.0)


def log_mel(
    waveform: Tensor,
    window: Tensor,
    fb: Tensor,
    lengths: Tensor | None,
    hop_length: int,
    top_db: float | None,
    scale: float,
    bias: float,
    group: int,
    decibels: bool = True,
) -> Tensor:
    """``[R, N]`` to ``[R, n_mels, N // hop_length + 1]``; ``group`` consecutive rows share one floor.

    ``window`` ``[n_fft]``, ``fb`` ``[n_fft // 2 + 1, n_mels]``; int16 is read as x / 32768; the result is
    ``max(dB, max(dB) - top_db) * scale + bias``, or without ``decibels`` the same of the energies. With ``lengths``
    ``[R]`` each row is transformed as if it ended there, and frames past its own last one are 0.
    """
    if not waveform.dtype.is_floating_point:
        waveform = waveform.to(window.dtype) / 32768
    n_fft, frames = window.shape[0], waveform.shape[1] // hop_length + 1
    window, fb = window.to(waveform.dtype), fb.to(waveform.dtype)

    def mel(x: Tensor) -> Tensor:
        spectrum = torch.stft(x, n_fft, hop_length, n_fft, window, pad_mode="reflect", return_complex=True)
        energy = (spectrum.abs().square().transpose(1, 2) @ fb).transpose(1, 2)
        return 10.0 * torch.log10(energy.clamp(min=1e-10)) if decibels else energy

    def normalised(db: Tensor) -> Tensor:
        if top_db is not None and db.numel():
            per_group = db.reshape(-1, group, *db.shape[1:])
            floor = per_group.amax(dim=(1, 2, 3), keepdim=True) - top_db
            db = torch.maximum(per_group, floor).reshape(db.shape)
        return db * scale + bias

    if lengths is None:
        if not waveform.shape[0]:
            return waveform.new_zeros(0, fb.shape[1], frames)
        return normalised(mel(waveform))
    out = waveform.new_zeros(waveform.shape[0], fb.shape[1], frames)
    for row, n in enumerate(lengths.tolist()):
        if n:
            y = normalised(mel(waveform[row : row + 1, :n]))[0]
            out[row, :, : y.shape[1]] = y
    return out
