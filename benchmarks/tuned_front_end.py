"""Waveforms to two views and a mask on the GPU, in plain PyTorch with the whole batch at a time: for tuned.py.

torch.stft and a matrix product for the log-mel; log-mixup-exp with a ring of earlier clips; the stretch in frequency as
a batched product with each clip's matrix of bicubic weights.
"""

import torch
from torch import nn

from atst_fast.bench.cases.augment import taps
from atst_fast.train.masks import block_mask
from benchmarks.official_front_end import mel_matrix

LOW, HIGH = -79.6482, 50.6842
EPS = torch.finfo(torch.float32).eps


class FrontEnd(nn.Module):
    """Called with ``[B, N]`` int16; returns views ``[B, 1, 64, T]`` and a mask ``[B, T // 4]``.

    The ring has a place for each of ``bank_size`` earlier clips and for the batch, so that a clip can be mixed with
    those before it in its batch as well.
    """

    def __init__(self, clips, samples, bank_size=2000):
        super().__init__()
        self.bank_size, frames = bank_size, samples // 160 + 1
        self.register_buffer("window", torch.hann_window(1024))
        self.register_buffer("matrix", mel_matrix().t().contiguous())
        self.register_buffer("ring", torch.zeros(bank_size + clips, self.matrix.shape[0], frames))
        self.register_buffer("pushed", torch.zeros((), dtype=torch.int64))

    def forward(self, waveform):
        mel = self.log_mel(waveform)
        view2 = self.warp(self.mix(mel))
        return mel[:, None], view2[:, None], block_mask(len(mel), mel.shape[2] // 4, device=mel.device)

    def log_mel(self, waveform):
        x = waveform.float() / 32768
        spectrum = torch.stft(x, 1024, 160, window=self.window, pad_mode="reflect", return_complex=True)
        power = torch.view_as_real(spectrum).square().sum(-1)
        decibel = 10 * torch.log10((self.matrix @ power).clamp(min=1e-10))
        decibel = torch.maximum(decibel, decibel.amax((1, 2), keepdim=True) - 80.0)
        return (decibel - LOW) * (2 / (HIGH - LOW)) - 1

    def mix(self, mel):
        before = self.pushed + torch.arange(len(mel), device=mel.device)
        self.ring.index_copy_(0, before % len(self.ring), mel)
        self.pushed.add_(len(mel))
        back, alpha = torch.rand(2, len(mel), device=mel.device)
        partner = before - 1 - (back * before.clamp(max=self.bank_size)).long()
        other, alpha = self.ring[partner % len(self.ring)], 0.4 * alpha[:, None, None]
        mixed = torch.log((1 - alpha) * mel.exp() + alpha * other.exp() + EPS)
        return torch.where((before > 0)[:, None, None], mixed, mel)

    def warp(self, mel):
        bins = mel.shape[1]
        u = torch.rand(2, len(mel), device=mel.device)
        height = ((0.6 + 0.9 * u[0]) * bins).long().clamp(1, bins)
        return stretch(mel, (u[1] * (bins + 1 - height)).long(), height)


def stretch(mel, top, height):
    """Bins ``[top, top + height)`` of each clip over all of them, bicubic with aligned corners."""
    bins = mel.shape[1]
    index, weights = taps(bins, top, height)
    columns = torch.arange(bins, device=mel.device)
    return torch.where(index[..., None] == columns, weights[..., None], 0).sum(2) @ mel
