"""The front end of one 10 s clip and of a batch, int16 and float32, on one thread and on two.

Beside it: torchaudio's formula (its MelSpectrogram and AmplitudeToDB, written with torch.stft), librosa, and the bare
torch.fft.rfft (MKL) of frames that somebody else has already cut and windowed, which no log-mel built on it can beat.

The floor counts what must be computed (`flops`) at the rate of this machine's sgemm on as many threads. That rate is
all fused multiply-adds, of which a transform has few, so about twice the floor is what its arithmetic can reach.
"""

import functools
import math

import pytest
import torch

from atst_fast import ops
from atst_fast.ops.log_mel import tables
from benchmarks import machine

RATE, N_FFT, HOP, N_MELS = 16000, 1024, 160, 64
LOW, HIGH = -79.6482, 50.6842
SIZES = {"tiny": (1, 1), "clip": (1, 10), "batch": (16, 10)}  # clips, seconds


def fused(wave):
    return lambda: ops.log_mel(wave)


def torch_stft(wave):
    window, fb = (t.to(wave.device) for t in tables(RATE, N_FFT, None, 60.0, 7800.0, N_MELS))

    def call():
        x = wave / 32768 if wave.dtype == torch.int16 else wave
        x = x.flatten(0, -2)
        spectrum = torch.stft(x, N_FFT, HOP, N_FFT, window, center=True, pad_mode="reflect", return_complex=True)
        power = spectrum.abs().pow(2.0)
        mel = torch.matmul(power.transpose(-1, -2), fb).transpose(-1, -2)
        db = 10.0 * torch.log10(torch.clamp(mel, min=1e-10))
        db = torch.maximum(db, db.amax(dim=(-2, -1), keepdim=True) - 80.0)
        return 2 * (db - LOW) / (HIGH - LOW) - 1

    return call


def with_librosa(wave):
    librosa = pytest.importorskip("librosa", reason="needs the extra bench")

    x = wave.flatten(0, -2).numpy()
    settings = {"sr": RATE, "n_fft": N_FFT, "hop_length": HOP, "pad_mode": "reflect", "n_mels": N_MELS}
    triangles = {"fmin": 60.0, "fmax": 7800.0, "htk": True, "norm": None}

    def call():
        y = x / 32768 if x.dtype == "int16" else x
        mel = librosa.feature.melspectrogram(y=y.astype("float32", copy=False), **settings, **triangles)
        db = librosa.power_to_db(mel, ref=1.0, amin=1e-10, top_db=80.0)
        return 2 * (db - LOW) / (HIGH - LOW) - 1

    return call


def bare_rfft(wave):
    x = torch.nn.functional.pad(wave.flatten(0, -2).float(), (N_FFT // 2, N_FFT // 2))
    frames = x.unfold(-1, N_FFT, HOP) * torch.hann_window(N_FFT)
    return functools.partial(torch.fft.rfft, frames)


PROVIDERS = {"atst_fast": fused, "torch_stft": torch_stft, "librosa": with_librosa, "bare_rfft": bare_rfft}


def flops(frames):
    """Window, real transform (2.5 n log2 n), power of each bin, two triangles per bin; a logarithm taken as 25."""
    bins = N_FFT // 2 + 1
    return frames * (N_FFT + 2.5 * N_FFT * math.log2(N_FFT) + 3 * bins + 4 * bins + 25 * N_MELS)


@functools.cache
def sgemm_rate(threads):
    assert torch.get_num_threads() == threads
    return machine.sgemm_rate()


@pytest.fixture
def on_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.benchmark(group="log_mel")
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", ["int16", "float32"])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("size", SIZES)
def test_log_mel(benchmark, on_threads, size, threads, dtype, provider):
    on_threads(threads)
    clips, seconds = SIZES[size]
    samples = seconds * RATE
    wave = torch.randint(-20000, 20000, (clips, 1, samples), dtype=torch.int16)
    call = PROVIDERS[provider](wave if dtype == "int16" else wave / 32768)
    benchmark.extra_info.update(items=(clips * seconds, "s audio"))
    benchmark(call)
    if benchmark.enabled:
        floor = flops(clips * (samples // HOP + 1)) / sgemm_rate(threads)
        over = benchmark.stats.stats.median / floor
        benchmark.extra_info.update(floor_at_sgemm_rate_s=floor, over_floor=over, note=f"{over:.1f} x floor")
