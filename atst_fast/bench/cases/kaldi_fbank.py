"""kaldi_fbank as SSAST (16 kHz) and ASiT (32 kHz) call it, of clips of noise.

Beside it: torchaudio's formula for the whole batch at once, and clip after clip, as its own function takes one; that
function itself; and the bare torch.fft.rfft (MKL) of frames that somebody else has already cut and windowed.
"""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from atst_fast import ops
from atst_fast.bench import timing
from atst_fast.bench.operator import CPU, CUDA, OURS, Operator, Provider, installed
from atst_fast.ops.kaldi_fbank import tables
from atst_fast.reference import kaldi_fbank as reference

N_MELS, PREEMPHASIS, LOW = 128, 0.97, 20.0
RATES = {"ssast": 16000, "asit": 32000}


class Inputs(NamedTuple):
    """``wave [batch, samples]`` float32 or int16, of ``rate`` Hz; ``window [frame]``, ``fb [bins, mels]``."""

    wave: Tensor
    rate: int
    window: Tensor
    fb: Tensor

    @property
    def shift(self) -> int:
        return self.rate // 100

    @property
    def n_fft(self) -> int:
        return 2 * (len(self.fb) - 1)

    @property
    def frames(self) -> int:
        return (self.wave.shape[1] - len(self.window)) // self.shift + 1


def make(device: str, batch: int, frames: int, model: str, dtype: str = "float32") -> Inputs:
    rate = RATES[model]
    window, fb = (t.to(device) for t in tables(rate, 25.0, LOW, 0.0, N_MELS, "hanning"))
    samples = (frames - 1) * (rate // 100) + len(window)
    wave = torch.randint(-20000, 20000, (batch, samples), dtype=torch.int16)
    return Inputs((wave if dtype == "int16" else wave / 32768).to(device), rate, window, fb)


def ours(inputs: Inputs):
    wave, rate = inputs.wave, float(inputs.rate)
    return lambda: ops.kaldi_fbank(wave, window_type="hanning", num_mel_bins=N_MELS, sample_frequency=rate)


def formula(wave: Tensor, inputs: Inputs) -> Tensor:
    """Every frame of every clip in memory, twice."""
    return reference.kaldi_fbank(wave, inputs.window, inputs.fb, None, inputs.shift, PREEMPHASIS, True)


def batched(inputs: Inputs):
    return lambda: formula(inputs.wave, inputs)


def each_clip(inputs: Inputs):
    return lambda: torch.cat([formula(clip[None], inputs) for clip in inputs.wave])


def with_torchaudio(inputs: Inputs):
    kaldi = installed("torchaudio.compliance.kaldi", "pip install torchaudio")
    settings = {"window_type": "hanning", "num_mel_bins": N_MELS, "sample_frequency": inputs.rate}

    def call():
        x = inputs.wave / 32768 if inputs.wave.dtype == torch.int16 else inputs.wave
        return torch.stack([kaldi.fbank(clip[None], **settings) for clip in x])

    return call


def bare_rfft(inputs: Inputs):
    frames = inputs.wave.unfold(1, len(inputs.window), inputs.shift) * inputs.window
    padded = torch.nn.functional.pad(frames, (0, inputs.n_fft - len(inputs.window)))
    return functools.partial(torch.fft.rfft, padded)


def truth(inputs: Inputs) -> list[Tensor]:
    wide = inputs._replace(window=inputs.window.double(), fb=inputs.fb.double())
    return [formula(inputs.wave if inputs.wave.dtype == torch.int16 else inputs.wave.double(), wide)]


def work(inputs: Inputs) -> dict:
    """Mean, preemphasis and window, real transform (2.5 n log2 n), power and two triangles per bin; a logarithm: 25."""
    wave, n = inputs.wave, inputs.n_fft
    frames, bins = len(wave) * inputs.frames, n // 2 + 1
    each = 5 * len(inputs.window) + 2.5 * n * math.log2(n) + 3 * bins + 4 * bins + 25 * N_MELS
    moved = wave.element_size() * wave.numel() + 4 * frames * N_MELS
    return {"bytes": moved, "flops": frames * each, "items": (wave.numel() / inputs.rate, "s audio")}


MODELS = tuple(RATES)
OPERATOR = Operator(
    "kaldi_fbank",
    sizes={
        "cpu": {
            "tiny": {"batch": 2, "frames": 98},
            "clip": {"batch": 1, "frames": 998},
            "batch": {"batch": 16, "frames": 998},
        },
        "cuda": {
            "tiny": {"batch": 2, "frames": 98},
            "clip": {"batch": 1, "frames": 998},
            "batch": {"batch": 144, "frames": 998},
        },
    },
    options={"cpu": {"model": MODELS, "threads": (1, 2)}, "cuda": {"model": MODELS, "dtype": ("float32", "int16")}},
    make=make,
    providers={
        OURS: Provider(ours),
        "torch_batched": Provider(batched),
        "torch_batched_compiled": Provider(
            lambda inputs: functools.partial(timing.compiled(formula), inputs.wave, inputs), CUDA
        ),
        "torch_each_clip": Provider(each_clip),
        "torchaudio": Provider(with_torchaudio),
        "bare_rfft": Provider(bare_rfft, CPU, part="the bare FFT"),
    },
    truth=truth,
    work=work,
    curves={
        "cpu": ("clip", {"frames": (98, 298, 998, 2998, 9998), "batch": (1, 2, 4, 8, 16)}),
        "cuda": ("batch", {"frames": (98, 298, 998, 2998), "batch": (1, 4, 16, 64, 256)}),
    },
    replayed={"tiny": (OURS, "torch_batched"), "clip": (OURS, "torch_batched")},
    # as that of log_mel: noise leaves little in some triangle, and a logarithm shows it
    allowed={"float32": 1e-3},
)
