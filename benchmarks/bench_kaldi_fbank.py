"""Kaldi's filterbank of one 10 s clip and of a batch, as SSAST and ASiT call it, on one thread and on two.

Beside it: torchaudio's formula for the whole batch at once (its own function takes one clip: here, clip after clip),
and the bare torch.fft.rfft (MKL) of frames that somebody else has already cut, preemphasised and windowed.

The floor counts what must be computed (`flops`) at the rate of this machine's sgemm on as many threads; see
bench_log_mel.py.
"""

import functools
import math

import pytest
import torch

from atst_fast import ops
from atst_fast.ops.kaldi_fbank import tables
from atst_fast.reference import kaldi_fbank as reference
from benchmarks.bench_log_mel import on_threads, sgemm_rate  # noqa: F401 (a fixture)

N_MELS, SECONDS = 128, 10
RATES = {"ssast": 16000, "asit": 32000}
SIZES = {"tiny": (1, 1), "clip": (1, SECONDS), "batch": (16, SECONDS)}  # clips, seconds


def fused(wave, rate):
    settings = {"window_type": "hanning", "num_mel_bins": N_MELS, "sample_frequency": rate}
    return lambda: ops.kaldi_fbank(wave, **settings)


def torch_batched(wave, rate):
    """Plain PyTorch over the batch: every frame of every clip in memory, twice."""
    window, fb = (t.to(wave.device) for t in tables(rate, 25.0, 20.0, 0.0, N_MELS, "hanning"))
    return lambda: reference.kaldi_fbank(wave, window, fb, None, rate // 100, 0.97, True)


def torch_each_clip(wave, rate):
    """What a data pipeline does that calls torchaudio's function, which takes one clip."""
    calls = [torch_batched(clip[None], rate) for clip in wave]
    return lambda: torch.cat([call() for call in calls])


def bare_rfft(wave, rate):
    window, fb = (t.to(wave.device) for t in tables(rate, 25.0, 20.0, 0.0, N_MELS, "hanning"))
    frames = (wave / 32768 if wave.dtype == torch.int16 else wave).unfold(1, len(window), rate // 100) * window
    padded = torch.nn.functional.pad(frames, (0, 2 * (len(fb) - 1) - len(window)))
    return functools.partial(torch.fft.rfft, padded)


PROVIDERS = {
    "atst_fast": fused, "torch_batched": torch_batched, "torch_each_clip": torch_each_clip, "bare_rfft": bare_rfft
}  # fmt: skip


def frame_and_transform(rate):
    """Samples of a frame and of its transform: 400 and 512, 800 and 1024."""
    frame = rate * 25 // 1000
    return frame, 1 << (frame - 1).bit_length()


def frames_of(seconds, rate):
    return (seconds * rate - rate * 25 // 1000) // (rate // 100) + 1


def flops(frames, rate):
    """Mean, preemphasis and window, real transform (2.5 n log2 n), power and two triangles per bin; a logarithm: 25."""
    frame, n_fft = frame_and_transform(rate)
    bins = n_fft // 2 + 1
    return frames * (5 * frame + 2.5 * n_fft * math.log2(n_fft) + 3 * bins + 4 * bins + 25 * N_MELS)


@pytest.mark.benchmark(group="kaldi_fbank")
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("model", RATES)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("size", SIZES)
def test_kaldi_fbank(benchmark, on_threads, size, threads, model, provider):  # noqa: F811
    on_threads(threads)
    (clips, seconds), rate = SIZES[size], RATES[model]
    wave = torch.randint(-20000, 20000, (clips, seconds * rate)) / 32768
    call = PROVIDERS[provider](wave, rate)
    benchmark.extra_info.update(items=(clips * seconds, "s audio"))
    benchmark(call)
    if benchmark.enabled:
        floor = flops(clips * frames_of(seconds, rate), rate) / sgemm_rate(threads)
        over = benchmark.stats.stats.median / floor
        benchmark.extra_info.update(floor_at_sgemm_rate_s=floor, over_floor=over, note=f"{over:.1f} x floor")
