"""Kaldi's filterbank of one 10 s clip and of a training batch of them, as SSAST and ASiT call it.

Beside it: torchaudio's own function, which takes one clip; its formula for a whole batch (cuFFT and a matrix product),
the same clip after clip, and compiled.
"""

import functools

import pytest
import torch

from benchmarks import bench_kaldi_fbank as cpu
from benchmarks.gpu import timing

SIZES = {"tiny": (2, 1), "clip": (1, 10), "batch": (144, 10)}  # clips, seconds


def with_torchaudio(wave, rate):
    kaldi = pytest.importorskip("torchaudio.compliance.kaldi", reason="torchaudio is not installed")
    settings = {"window_type": "hanning", "num_mel_bins": cpu.N_MELS, "sample_frequency": rate}

    def call():
        x = wave / 32768 if wave.dtype == torch.int16 else wave
        return torch.stack([kaldi.fbank(clip[None], **settings) for clip in x])

    return call


PROVIDERS = {
    "atst_fast": cpu.fused,
    "torchaudio": with_torchaudio,
    "torch_each_clip": cpu.torch_each_clip,
    "torch_batched": cpu.torch_batched,
    "torch_batched_compiled": lambda wave, rate: timing.compiled(cpu.torch_batched(wave, rate)),
}


@functools.cache
def make_wave(size, model, dtype, device):
    clips, seconds = SIZES[size]
    wave = torch.randint(-20000, 20000, (clips, seconds * cpu.RATES[model]), dtype=torch.int16)
    return (wave if dtype == "int16" else wave / 32768).to(device)


def work(size, model, dtype):
    """Bytes in and out, operations, and what the rate counts."""
    (clips, seconds), rate = SIZES[size], cpu.RATES[model]
    frames = clips * cpu.frames_of(seconds, rate)
    moved = clips * seconds * rate * (2 if dtype == "int16" else 4) + frames * cpu.N_MELS * 4
    return {"bytes": moved, "flops": cpu.flops(frames, rate), "items": (clips * seconds, "s audio")}


@pytest.mark.benchmark(group="kaldi_fbank")
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", ["int16", "float32"])
@pytest.mark.parametrize("model", cpu.RATES)
@pytest.mark.parametrize("size", SIZES)
def test_kaldi_fbank(measure, size, model, dtype, provider):
    measure(PROVIDERS[provider](make_wave(size, model, dtype, "cuda"), cpu.RATES[model]), **work(size, model, dtype))


@pytest.mark.benchmark(group="kaldi_fbank")
@pytest.mark.parametrize("provider", ["atst_fast", "torch_batched"])
@pytest.mark.parametrize("size", ["tiny", "clip"])
def test_kaldi_fbank_in_a_graph(measure, size, provider):
    call = PROVIDERS[provider](make_wave(size, "ssast", "float32", "cuda"), cpu.RATES["ssast"])
    measure(call, way="replayed", **work(size, "ssast", "float32"))
