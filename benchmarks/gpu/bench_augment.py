"""One augmented view of a batch (log-mixup-exp, frequency warp), given the draws.

Beside it: the same in plain PyTorch with the whole batch at a time, and that compiled. The reference, which goes clip
by clip, would be no peer on a GPU.
"""

import pytest
import torch

from atst_fast.ops.augment import MemoryBank, draw_augment
from atst_fast.reference.augment import EPS
from benchmarks.gpu import timing

SIZES = {"tiny": (2, 101), "batch": (144, 1001)}  # clips, frames


def mixed(mel, bank, bank_lengths, partner, start, alpha):
    """log-mixup-exp of ``[B, F, T]`` with rows of the bank or of the batch."""
    frames, slots, clips = mel.shape[2], len(bank), torch.arange(len(mel), device=mel.device)
    other = torch.where(partner < slots, partner, partner - slots).clamp(min=0)
    from_bank = (partner < slots) & (slots > 0)
    width = torch.where(from_bank, bank_lengths[other.clamp(max=slots - 1)], frames)[:, None]
    shift = torch.where(from_bank, start, 0)[:, None]
    t = torch.arange(frames, device=mel.device)
    column = torch.where(width >= frames, t + shift, t - shift)
    inside = ((column >= 0) & (column < width))[:, None]
    of_bank = bank[other.clamp(max=slots - 1)[:, None], :, column.clamp(0, bank.shape[2] - 1)]
    of_batch = mel[torch.where(from_bank, clips, other)]
    z = torch.where(from_bank[:, None, None], of_bank.transpose(1, 2), of_batch)
    a, x = alpha[:, None, None], mel.exp()
    y = torch.log(torch.where(inside, (1 - a) * x + a * z.exp(), x) + EPS)
    return torch.where((partner < 0)[:, None, None], mel, y)


def taps(size, first, length):
    """Where ``size`` bicubic samples of ``[first, first + length)`` lie, and their weights: ``[B, size, 4]`` each."""
    at = torch.arange(size, device=first.device) * ((length - 1) / max(size - 1, 1))[:, None]
    whole = at.floor()
    f = (at - whole)[..., None]
    distance = torch.cat([1 + f, f, 1 - f, 2 - f], -1)
    near = (1.25 * distance - 2.25) * distance * distance + 1
    far = ((-0.75 * distance + 3.75) * distance - 6) * distance + 3
    index = whole.long()[..., None] + torch.arange(-1, 3, device=first.device)
    index = torch.minimum(index.clamp(min=0), length[:, None, None] - 1) + first[:, None, None]
    return index, torch.where(distance <= 1, near, far)


def batched(mel, bank, bank_lengths, partner, start, alpha, crop, canvas):
    """What torch.ops.atst_fast.augment computes, for draws in their range: gathers along both axes."""
    _, _, bins, frames = mel.shape
    top, left = (canvas[0] - bins) // 2, (canvas[1] - frames) // 2
    x = mixed(mel[:, 0], bank, bank_lengths, partner, start, alpha)
    i, j, h, w = crop.unbind(1)
    for axis, (first, length) in ((2, (j - left, w)), (1, (i - top, h))):
        size = x.shape[axis]
        index, weights = taps(size, first, length)
        weights = torch.where((index >= 0) & (index < size), weights, 0.0)  # zeros around it, on the canvas
        index, weights = (v.unsqueeze(3 - axis) for v in (index.clamp(0, size - 1), weights))
        shape = [len(x), bins, frames]
        x = sum(x.gather(axis, index[..., k].expand(shape)) * weights[..., k] for k in range(4))
    return x[:, None]


PROVIDERS = {
    "atst_fast": lambda *arguments: lambda: torch.ops.atst_fast.augment(*arguments),
    "plain PyTorch": lambda *arguments: lambda: batched(*arguments),
    "plain PyTorch, compiled": lambda *arguments: timing.compiled(lambda: batched(*arguments)),
}


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
