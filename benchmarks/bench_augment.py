"""One augmented view of 10 s clips (log-mixup-exp, frequency warp), given the draws, on one thread."""

import pytest
import torch

from atst_fast.ops.augment import MemoryBank, augment_views, draw_augment
from atst_fast.reference.augment import augment as reference

SIZES = {"tiny": (2, 101), "batch": (8, 1001)}  # clips, frames
PROVIDERS = ["atst_fast", "plain PyTorch"]


@pytest.mark.benchmark(group="augment")
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("size", SIZES)
def test_augment(benchmark, provider, size):
    clips, frames = SIZES[size]
    mel = 2 * torch.rand(clips, 1, 64, frames) - 1
    bank = MemoryBank(64)
    bank.push(mel)
    drawn = draw_augment(mel.shape, bank, torch.Generator().manual_seed(0))
    # clip and partner are read, the view is written; the clip is copied into the bank
    benchmark.extra_info.update(bytes=5 * mel.numel() * 4, items=(clips, "clips"))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if provider == "atst_fast":
            benchmark(lambda: augment_views(mel, [drawn], [bank]))
        else:
            benchmark(lambda: (reference(mel, bank.mels, bank.lengths, *drawn), bank.push(mel)))
    finally:
        torch.set_num_threads(before)
