"""The front end as the official code structures it: one clip at a time, in plain PyTorch and NumPy.

Waveform to log-mel (``torch.stft`` and a dense mel matrix, as torchaudio has it), view 1 as it is, view 2 mixed with an
earlier clip and stretched in frequency, and one block mask for both.
"""

import random

import numpy as np
import torch
import torch.nn.functional as F


def mel_matrix(bins=513, n_mels=64, f_min=60.0, f_max=7800.0, sample_rate=16000):
    """Triangles on the HTK mel scale without area normalisation: ``[bins, n_mels]``."""

    def mel(f):
        return 2595 * np.log10(1 + f / 700)

    points = 700 * (10 ** (np.linspace(mel(f_min), mel(f_max), n_mels + 2) / 2595) - 1)
    slopes = points[None] - np.linspace(0, sample_rate // 2, bins)[:, None]
    widths = np.diff(points)
    triangles = np.minimum(-slopes[:, :-2] / widths[:-1], slopes[:, 2:] / widths[1:])
    return torch.tensor(np.maximum(triangles, 0), dtype=torch.float32)


class FrontEnd:
    """Called with a clip ``[N]`` in [-1, 1]; returns two views ``[1, 64, T]``, their length and a mask ``[T // 4]``."""

    def __init__(self, mask_ratio=0.65, mask_len=5, bank_size=2000):
        self.window, self.matrix = torch.hann_window(1024), mel_matrix()
        self.mask_ratio, self.mask_len, self.bank_size = mask_ratio, mask_len, bank_size
        self.bank = []
        self.rng = np.random.default_rng(0)

    def __call__(self, waveform):
        mel = self.log_mel(waveform[None])
        return mel, self.crop(self.mix(mel)), mel.shape[-1], self.mask(mel.shape[-1] // 4)

    def log_mel(self, waveform):
        spectrum = torch.stft(
            waveform, 1024, 160, window=self.window, center=True, pad_mode="reflect", return_complex=True
        )
        power = spectrum.abs().pow(2.0)
        mel = torch.matmul(power.transpose(-1, -2), self.matrix).transpose(-1, -2)
        decibel = 10 * torch.log10(mel.clamp(min=1e-10))
        decibel = torch.max(decibel, decibel.amax() - 80.0)
        return (decibel + 79.6482) / (50.6842 + 79.6482) * 2 - 1

    def mix(self, mel):
        alpha = 0.4 * self.rng.random()
        mixed = mel
        if self.bank:
            other = self.bank[self.rng.integers(len(self.bank))]
            eps = torch.finfo(mel.dtype).eps
            mixed = torch.log((1 - alpha) * mel.exp() + alpha * other.exp() + eps)
        self.bank = [*self.bank, mel][-self.bank_size :]
        return mixed

    def crop(self, mel):
        _, bins, frames = mel.shape
        canvas = torch.zeros_like(mel)
        canvas[:] = mel
        height = int(np.clip(int(self.rng.uniform(0.6, 1.5) * bins), 1, bins))
        top = random.randint(0, bins - height)
        crop = canvas[:, top : top + height]
        return F.interpolate(crop[None], (bins, frames), mode="bicubic", align_corners=True)[0]

    def mask(self, tokens):
        spans = max(int(self.mask_ratio * tokens / self.mask_len + self.rng.random()), 2)
        starts = self.rng.choice(tokens - self.mask_len, spans, replace=False)
        index = np.asarray([start + i for start in starts for i in range(self.mask_len)])
        mask = np.full((1, tokens), False)
        mask[0, np.unique(index[index < tokens])] = True
        return torch.from_numpy(mask[0])


def collate(clips):
    """Two views ``[B, 1, 64, T]``, lengths and masks of a list of clips."""
    view1, view2, lengths, masks = zip(*clips)
    return torch.stack(view1), torch.stack(view2), torch.tensor(lengths), torch.stack(masks)
