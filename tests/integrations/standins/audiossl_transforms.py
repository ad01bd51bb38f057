"""The transform of ATST-Clip (``audiossl/methods/atst/transform.py``) and what it is made of: torchvision's Compose,
torchaudio's mel transforms, audiossl's crop, mixup and resize crop. They draw from numpy's global generator."""

# ruff: noqa: NPY002

import random

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from atst_fast.ops.log_mel import tables


class Compose:
    def __init__(self, transforms):
        self.transforms = transforms

    def __call__(self, x):
        for step in self.transforms:
            x = step(x)
        return x


class Spectrogram(nn.Module):
    def __init__(self, n_fft, win_length, hop_length, window):
        super().__init__()
        self.n_fft, self.win_length, self.hop_length = n_fft, win_length, hop_length
        self.pad, self.power, self.normalized = 0, 2.0, False
        self.center, self.pad_mode, self.onesided = True, "reflect", True
        self.register_buffer("window", window.clone())

    def forward(self, x):
        frames = torch.stft(x, self.n_fft, self.hop_length, self.win_length, self.window, return_complex=True)
        return frames.abs().pow(self.power)


class MelScale(nn.Module):
    def __init__(self, fb):
        super().__init__()
        self.register_buffer("fb", fb.clone())

    def forward(self, x):
        return (x.mT @ self.fb).mT


class MelSpectrogram(nn.Module):
    def __init__(
        self, sample_rate=16000, n_fft=1024, win_length=1024, hop_length=160, f_min=60.0, f_max=7800.0, n_mels=64
    ):
        super().__init__()
        window, fb = tables(sample_rate, n_fft, win_length, f_min, f_max, n_mels)
        self.spectrogram, self.mel_scale = Spectrogram(n_fft, win_length, hop_length, window), MelScale(fb)

    def forward(self, x):
        return self.mel_scale(self.spectrogram(x))


class AmplitudeToDB(nn.Module):
    def __init__(self, top_db=80.0):
        super().__init__()
        self.multiplier, self.amin, self.db_multiplier, self.top_db = 10.0, 1e-10, 0.0, top_db

    def forward(self, x):
        db = self.multiplier * x.clamp(min=self.amin).log10()
        return torch.maximum(db, db.amax() - self.top_db)


class MinMax:
    def __init__(self, min, max):
        self.min, self.max = min, max

    def __call__(self, x):
        return (x - self.min) / (self.max - self.min) * 2.0 - 1.0


class RandomCrop:
    def __init__(self, size):
        self.size = size

    def __call__(self, signal):
        if signal.shape[1] < self.size:
            return F.pad(signal, (0, self.size - signal.shape[1]))
        start = np.random.randint(0, signal.shape[-1] - self.size + 1)
        return signal[:, start : start + self.size]


class Mixup(nn.Module):
    def __init__(self, ratio=0.4, n_memory=2000):
        super().__init__()
        self.ratio, self.n, self.log_mixup_exp, self.memory_bank = ratio, n_memory, True, []

    def forward(self, x):
        alpha, mixed = self.ratio * np.random.random(), x
        if self.memory_bank:
            z = self.memory_bank[np.random.randint(len(self.memory_bank))]
            mine, other = x.exp(), z.exp()
            difference = mine.shape[2] - other.shape[2]
            start = np.random.randint(0, abs(difference)) if difference else 0
            if difference <= 0:
                mine = (1 - alpha) * mine + alpha * other[:, :, start : start + mine.shape[2]]
            else:
                covered = slice(start, start + other.shape[2])
                mine[:, :, covered] = (1 - alpha) * mine[:, :, covered] + alpha * other
            mixed = torch.log(mine + torch.finfo(mine.dtype).eps)
        self.memory_bank = [*self.memory_bank, x][-self.n :]
        return mixed


class RandomResizeCrop(nn.Module):
    def __init__(self, virtual_crop_scale=(1.0, 1.5), freq_scale=(0.6, 1.5), time_scale=(0.6, 1.5)):
        super().__init__()
        self.virtual_crop_scale, self.freq_scale, self.time_scale = virtual_crop_scale, freq_scale, time_scale
        self.interpolation = "bicubic"

    def forward(self, x):
        _, bins, frames = x.shape
        high, wide = (int(n * scale) for n, scale in zip((bins, frames), self.virtual_crop_scale))
        canvas = torch.zeros(len(x), high, wide)
        top, left = (high - bins) // 2, (wide - frames) // 2
        canvas[:, top : top + bins, left : left + frames] = x
        h = np.clip(int(np.random.uniform(*self.freq_scale) * bins), 1, high)
        w = np.clip(int(np.random.uniform(*self.time_scale) * frames), 1, wide)
        i = random.randint(0, high - h) if high > h else 0
        j = random.randint(0, wide - w) if wide > w else 0
        crop = canvas[None, :, i : i + h, j : j + w]
        return F.interpolate(crop, size=(bins, frames), mode=self.interpolation, align_corners=True)[0]


class ATSTTrainTransform:
    def __init__(self, anchor_len=6.0, positive_len=6.0, virtual_crop=1.5):
        self.lengths = [anchor_len, positive_len]
        self.mel_feature = Compose([MelSpectrogram(), AmplitudeToDB(), MinMax(-79.6482, 50.6842)])
        self.positivecrop = Compose([RandomCrop(16000 * 6), self.mel_feature])
        self.positive_transform1 = Compose([Mixup(), RandomResizeCrop((1, virtual_crop))])
        self.positive_transform2 = Compose([Mixup(), RandomResizeCrop((1, virtual_crop))])

    def __call__(self, wave):
        crops, lengths, longest = [], [], max(self.lengths)
        for seconds in self.lengths:
            self.positivecrop.transforms[0].size = int(seconds * 16000)
            crops.append(self.positivecrop(wave))
        for i, (seconds, view) in enumerate(zip(self.lengths, (self.positive_transform1, self.positive_transform2))):
            padding = int(longest * 16000) // 160 - int(seconds * 16000) // 160
            crops[i] = F.pad(view(crops[i]), (0, padding))
            lengths.append(int(seconds * 16000) // 160 + 1)
        return crops, lengths
