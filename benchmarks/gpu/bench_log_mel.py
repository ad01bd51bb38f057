"""The front end of one 10 s clip and of a training batch of them.

Beside it: torchaudio's modules, the same formula with torch.stft (cuFFT) and a matrix product, and that compiled.
"""

import functools

import pytest
import torch

from benchmarks import bench_log_mel as cpu
from benchmarks.gpu import timing

SIZES = {"tiny": (2, 1), "clip": (1, 10), "batch": (144, 10)}  # clips, seconds


def with_torchaudio(wave):
    torchaudio = pytest.importorskip("torchaudio", reason="torchaudio is not installed")
    settings = {"n_fft": cpu.N_FFT, "hop_length": cpu.HOP, "f_min": 60.0, "f_max": 7800.0, "n_mels": cpu.N_MELS}
    mel = torchaudio.transforms.MelSpectrogram(cpu.RATE, **settings).to(wave.device)
    decibels = torchaudio.transforms.AmplitudeToDB("power", top_db=80.0).to(wave.device)

    def call():
        x = wave / 32768 if wave.dtype == torch.int16 else wave
        return 2 * (decibels(mel(x)) - cpu.LOW) / (cpu.HIGH - cpu.LOW) - 1

    return call


PROVIDERS = {
    "atst_fast": cpu.fused,
    "torchaudio": with_torchaudio,
    "torch_stft": cpu.torch_stft,
    "torch_stft_compiled": lambda wave: timing.compiled(cpu.torch_stft(wave)),
}


@functools.cache
def make_wave(size, dtype, device):
    clips, seconds = SIZES[size]
    wave = torch.randint(-20000, 20000, (clips, 1, seconds * cpu.RATE), dtype=torch.int16)
    return (wave if dtype == "int16" else wave / 32768).to(device)


def work(size, dtype):
    """Bytes in and out, operations, and what the rate counts."""
    clips, seconds = SIZES[size]
    samples, frames = clips * seconds * cpu.RATE, clips * (seconds * cpu.RATE // cpu.HOP + 1)
    moved = samples * (2 if dtype == "int16" else 4) + frames * cpu.N_MELS * 4
    return {"bytes": moved, "flops": cpu.flops(frames), "items": (clips * seconds, "s audio")}


@pytest.mark.benchmark(group="log_mel")
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", ["int16", "float32"])
@pytest.mark.parametrize("size", SIZES)
def test_log_mel(measure, size, dtype, provider):
    measure(PROVIDERS[provider](make_wave(size, dtype, "cuda")), **work(size, dtype))


@pytest.mark.benchmark(group="log_mel")
@pytest.mark.parametrize("provider", ["atst_fast", "torch_stft"])
@pytest.mark.parametrize("size", ["tiny", "clip"])
def test_log_mel_in_a_graph(measure, size, provider):
    measure(PROVIDERS[provider](make_wave(size, "float32", "cuda")), way="replayed", **work(size, "float32"))
