"""Waveform to two views and a mask, per 10 s clip on one thread: ours in batches, the official code clip by clip."""

import pytest
import torch

from atst_fast.train.front_end import FrontEnd
from benchmarks import official_front_end

SIZES = {"tiny": (2, 8000), "batch": (8, 160000)}  # clips, samples


@pytest.mark.benchmark(group="front_end")
@pytest.mark.parametrize("provider", ["atst_fast", "official structure"])
@pytest.mark.parametrize("size", SIZES)
def test_front_end(benchmark, provider, size):
    clips, samples = SIZES[size]
    wave = (torch.randn(clips, samples) * 3000).clamp(-32768, 32767).to(torch.int16)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if provider == "atst_fast":
            call, argument = FrontEnd(bank_size=64), wave
        else:
            official = official_front_end.FrontEnd(bank_size=64)
            call, argument = (lambda waves: [official(w) for w in waves]), wave.float() / 32768
        for _ in range(4):
            call(argument)  # fill the bank
        benchmark.extra_info.update(bytes=clips * (samples * 2 + 6 * 64 * (samples // 160 + 1) * 4))
        benchmark.extra_info.update(items=(clips, "clips"))
        benchmark(call, argument)
    finally:
        torch.set_num_threads(before)
