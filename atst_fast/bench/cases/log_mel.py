"""log_mel of clips of noise: torchaudio's formula with torch.stft, torchaudio and librosa themselves.

``bare_rfft`` is torch.fft.rfft (MKL) of frames that somebody else has already cut and windowed, which no log-mel built
on it can beat.
"""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from atst_fast import ops
from atst_fast.bench import timing
from atst_fast.bench.operator import CPU, CUDA, OURS, Operator, Provider, installed
from atst_fast.ops.log_mel import tables
from atst_fast.reference import log_mel as reference

RATE, N_FFT, HOP, N_MELS = 16000, 1024, 160, 64
F_MIN, F_MAX, TOP_DB, LOW, HIGH = 60.0, 7800.0, 80.0, -79.6482, 50.6842


class Inputs(NamedTuple):
    """``wave [batch, 1, samples]``; ``frames`` of each clip."""

    wave: Tensor
    frames: int

    def samples(self) -> Tensor:
        """As float32, whatever they are kept as."""
        return self.wave / 32768 if self.wave.dtype == torch.int16 else self.wave


def make(device: str, batch: int, frames: int, dtype: str) -> Inputs:
    wave = torch.randint(-20000, 20000, (batch, 1, (frames - 1) * HOP), dtype=torch.int16)
    return Inputs((wave if dtype == "int16" else wave / 32768).to(device), frames)


def ours(inputs: Inputs):
    return lambda: ops.log_mel(inputs.wave)


def formula(inputs: Inputs):
    """torchaudio's MelSpectrogram and AmplitudeToDB, one after the other."""
    window, fb = (t.to(inputs.wave.device) for t in tables(RATE, N_FFT, None, F_MIN, F_MAX, N_MELS))

    def call():
        x = inputs.samples().flatten(0, -2)
        spectrum = torch.stft(x, N_FFT, HOP, N_FFT, window, center=True, pad_mode="reflect", return_complex=True)
        power = spectrum.abs().pow(2.0)
        mel = torch.matmul(power.transpose(-1, -2), fb).transpose(-1, -2)
        db = 10.0 * torch.log10(torch.clamp(mel, min=1e-10))
        db = torch.maximum(db, db.amax(dim=(-2, -1), keepdim=True) - TOP_DB)
        return 2 * (db - LOW) / (HIGH - LOW) - 1

    return call


def with_torchaudio(inputs: Inputs):
    transforms = installed("torchaudio", "pip install torchaudio").transforms
    settings = {"n_fft": N_FFT, "hop_length": HOP, "f_min": F_MIN, "f_max": F_MAX, "n_mels": N_MELS}
    mel = transforms.MelSpectrogram(RATE, **settings).to(inputs.wave.device)
    decibels = transforms.AmplitudeToDB("power", top_db=TOP_DB).to(inputs.wave.device)
    return lambda: 2 * (decibels(mel(inputs.samples())) - LOW) / (HIGH - LOW) - 1


def with_librosa(inputs: Inputs):
    librosa = installed("librosa", "pip install 'atst_fast[bench]'")
    x = inputs.wave.flatten(0, -2).numpy()
    settings = {"sr": RATE, "n_fft": N_FFT, "hop_length": HOP, "pad_mode": "reflect", "n_mels": N_MELS}
    triangles = {"fmin": F_MIN, "fmax": F_MAX, "htk": True, "norm": None}

    def call():
        y = x / 32768 if x.dtype == "int16" else x
        mel = librosa.feature.melspectrogram(y=y.astype("float32", copy=False), **settings, **triangles)
        db = librosa.power_to_db(mel, ref=1.0, amin=1e-10, top_db=TOP_DB)
        return torch.from_numpy(2 * (db - LOW) / (HIGH - LOW) - 1)

    return call


def bare_rfft(inputs: Inputs):
    x = torch.nn.functional.pad(inputs.samples().flatten(0, -2), (N_FFT // 2, N_FFT // 2))
    frames = x.unfold(-1, N_FFT, HOP) * torch.hann_window(N_FFT)
    return functools.partial(torch.fft.rfft, frames)


def truth(inputs: Inputs) -> list[Tensor]:
    window, fb = (t.to(inputs.wave.device).double() for t in tables(RATE, N_FFT, None, F_MIN, F_MAX, N_MELS))
    x = inputs.wave.flatten(0, -2)
    x = x if x.dtype == torch.int16 else x.double()
    scale = 2 / (HIGH - LOW)
    return [reference.log_mel(x, window, fb, None, HOP, TOP_DB, scale, -LOW * scale - 1, 1)]


def flops(frames: int) -> float:
    """Window, real transform (2.5 n log2 n), power of each bin, two triangles per bin; a logarithm taken as 25."""
    bins = N_FFT // 2 + 1
    return frames * (N_FFT + 2.5 * N_FFT * math.log2(N_FFT) + 3 * bins + 4 * bins + 25 * N_MELS)


def work(inputs: Inputs) -> dict:
    """The rate of operations is that of matrix products, all fused multiply-adds, of which a transform has few."""
    wave, frames = inputs.wave, len(inputs.wave) * inputs.frames
    moved = wave.numel() * wave.element_size() + frames * N_MELS * 4
    return {"bytes": moved, "flops": flops(frames), "items": (wave.numel() / RATE, "s audio")}


DTYPES = ("int16", "float32")
OPERATOR = Operator(
    "log_mel",
    sizes={
        "cpu": {
            "tiny": {"batch": 1, "frames": 101},
            "clip": {"batch": 1, "frames": 1001},
            "batch": {"batch": 16, "frames": 1001},
        },
        "cuda": {
            "tiny": {"batch": 2, "frames": 101},
            "clip": {"batch": 1, "frames": 1001},
            "batch": {"batch": 144, "frames": 1001},
        },
    },
    options={"cpu": {"dtype": DTYPES, "threads": (1, 2)}, "cuda": {"dtype": DTYPES}},
    make=make,
    providers={
        OURS: Provider(ours),
        "torch_stft": Provider(formula),
        "torch_stft_compiled": Provider(lambda inputs: timing.compiled(formula(inputs)), CUDA),
        "torchaudio": Provider(with_torchaudio),
        "librosa": Provider(with_librosa, CPU),
        "bare_rfft": Provider(bare_rfft, CPU, part="the bare FFT"),
    },
    truth=truth,
    work=work,
    curves={
        "cpu": ("clip", {"frames": (101, 301, 1001, 3001, 10001), "batch": (1, 2, 4, 8, 16)}),
        "cuda": ("batch", {"frames": (101, 301, 1001, 3001), "batch": (1, 4, 16, 64, 256)}),
    },
    replayed={"tiny": (OURS, "torch_stft"), "clip": (OURS, "torch_stft")},
    # float32 sums over the bins of a filter, where noise happens to leave little of them: a logarithm shows it
    allowed={"float32": 1e-3},
)
