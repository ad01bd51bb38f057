"""Kaldi's log-mel filterbank in plain PyTorch: frames, preemphasis, torch.fft, triangles in mel, natural logarithm."""

import math

import torch
from torch import Tensor

EPSILON = torch.finfo(torch.float32).eps  # the least energy whose logarithm is taken, also in float64


def window_function(window_type: str, frame_length: int) -> Tensor:
    """Symmetric window ``[frame_length]`` float32: "hanning", or "povey", which is that to the power of 0.85."""
    hann = torch.hann_window(frame_length, periodic=False, dtype=torch.float32, device="cpu")
    return hann if window_type == "hanning" else hann.pow(0.85)


def filterbank(n_fft: int, sample_frequency: float, low_freq: float, high_freq: float, num_mel_bins: int) -> Tensor:
    """Triangles that are linear in mel, ``[n_fft // 2 + 1, num_mel_bins]`` float32; the last bin has no weight.

    ``high_freq`` of 0 or less counts from the Nyquist frequency. In float32 where torchaudio has float32, in its order
    of operations. Source: torchaudio.compliance.kaldi.get_mel_banks.
    """
    plain: dict = {"dtype": torch.float32, "device": "cpu"}
    nyquist = 0.5 * sample_frequency
    high_freq = high_freq + nyquist if high_freq <= 0 else high_freq
    lowest, highest = (1127.0 * math.log(1.0 + hz / 700.0) for hz in (low_freq, high_freq))
    step = (highest - lowest) / (num_mel_bins + 1)
    number = torch.arange(num_mel_bins, **plain)
    left, centre, right = lowest + number * step, lowest + (number + 1.0) * step, lowest + (number + 2.0) * step
    bins = 1127.0 * (1.0 + (sample_frequency / n_fft) * torch.arange(n_fft // 2, **plain) / 700.0).log()[:, None]
    up, down = (bins - left) / (centre - left), (right - bins) / (right - centre)
    triangles = torch.minimum(up, down).clamp(min=0.0)
    return torch.nn.functional.pad(triangles, (0, 0, 0, 1))


def kaldi_fbank(
    waveform: Tensor,
    window: Tensor,
    fb: Tensor,
    lengths: Tensor | None,
    frame_shift: int,
    preemphasis: float,
    remove_dc_offset: bool,
) -> Tensor:
    """``[R, N]`` to ``[R, (N - W) // frame_shift + 1, num_mel_bins]``, natural logarithms.

    ``window`` ``[W]``, ``fb`` ``[n_fft // 2 + 1, num_mel_bins]``; int16 is read as x / 32768. Of each frame of W
    samples its mean is subtracted, then ``preemphasis`` times the sample before (the first one's is itself); it is
    windowed and followed by zeros up to n_fft. With ``lengths`` ``[R]`` frames that do not end within a row's samples
    are 0.
    """
    if not waveform.dtype.is_floating_point:
        waveform = waveform.to(window.dtype) / 32768
    n_fft, window, fb = 2 * (fb.shape[0] - 1), window.to(waveform.dtype), fb.to(waveform.dtype)
    frames = waveform.unfold(1, window.shape[0], frame_shift)
    if not frames.shape[0]:
        return waveform.new_zeros(0, frames.shape[1], fb.shape[1])
    if remove_dc_offset:
        frames = frames - frames.mean(2, keepdim=True)
    before = torch.cat([frames[..., :1], frames[..., :-1]], 2)
    power = torch.fft.rfft((frames - preemphasis * before) * window, n_fft).abs().square()
    out = (power @ fb).clamp(min=EPSILON).log()
    if lengths is None:
        return out
    count = (lengths - window.shape[0]).div(frame_shift, rounding_mode="floor") + 1
    exists = torch.arange(out.shape[1], device=out.device) < count[:, None]
    return torch.where(exists[..., None], out, out.new_zeros(()))
