"""One augmented view of a batch (log-mixup-exp, frequency warp), given the draws."""

import pytest
import torch

from atst_fast.ops.augment import MemoryBank, draw_augment
from atst_fast.reference.augment import augment as reference

SIZES = {"tiny": (2, 101), "batch": (144, 1001)}  # clips, frames


def fused(*arguments):
    return lambda: torch.ops.atst_fast.augment(*arguments)


def plain(*arguments):
    return lambda: reference(*arguments)


def compiled(*arguments):
    call = torch.compile(reference)
    return lambda: call(*arguments)


PROVIDERS = {"atst_fast": fused, "plain PyTorch": plain, "plain PyTorch, compiled": compiled}


def make_arguments(size, device):
    """Of torch.ops.atst_fast.augment and the reference: a batch whose clips are all mixed with the bank's."""
    clips, frames = SIZES[size]
    mel = 2 * torch.rand(clips, 1, 64, frames) - 1
    bank = MemoryBank(2 * clips)
    bank.push(mel)
    *draws, canvas = draw_augment(mel.shape, bank, torch.Generator().manual_seed(0))
    return [x.to(device) for x in (mel, bank.mels, bank.lengths, *draws)] + [list(canvas)]


@pytest.mark.benchmark(group="augment")
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("size", SIZES)
def test_augment(measure, size, provider):
    arguments = make_arguments(size, "cuda")
    # clip and partner are read, the view is written
    moved = 3 * arguments[0].numel() * 4
    measure(PROVIDERS[provider](*arguments), bytes=moved, items=(SIZES[size][0], "clips"))
