"""augment_views: one view of a batch (log-mixup-exp, frequency warp), given the draws.

``push`` is the public function, which also copies the batch into the memory bank; without it the view alone is timed.
Beside it: the official code's way, clip by clip; the whole batch at a time in plain PyTorch, and that compiled.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from atst_fast import ops
from atst_fast.bench import timing
from atst_fast.bench.operator import CPU, CUDA, OURS, Operator, Provider
from atst_fast.ops.augment import AugmentDraws, MemoryBank, draw_augment
from atst_fast.reference import augment as reference


class Inputs(NamedTuple):
    """``mel [batch, 1, 64, frames]``, all of whose clips are mixed with the bank's."""

    mel: Tensor
    draws: AugmentDraws
    bank: MemoryBank
    push: bool

    def arguments(self) -> tuple:
        """Of torch.ops.atst_fast.augment and of the reference; the bank is the one that a push writes to."""
        *tensors, canvas = self.draws
        return self.mel, self.bank.mels, self.bank.lengths, *tensors, list(canvas)


def make(device: str, batch: int, frames: int, push: bool) -> Inputs:
    mel = 2 * torch.rand(batch, 1, 64, frames) - 1
    bank = MemoryBank(2 * batch)
    bank.push(mel)
    draws = draw_augment(mel.shape, bank, torch.Generator().manual_seed(0))
    draws = AugmentDraws._make(x.to(device) if isinstance(x, Tensor) else x for x in draws)
    return Inputs(mel.to(device), draws, bank.to(device), push)


def ours(inputs: Inputs):
    if inputs.push:
        return lambda: ops.augment_views(inputs.mel, [inputs.draws], [inputs.bank])[0]
    return lambda: torch.ops.atst_fast.augment(*inputs.arguments())


def pushing(view, prepare=lambda view: view):
    """A provider of what that function makes, with the push where there is one."""

    def provider(inputs: Inputs):
        call = prepare(view)

        def both():
            made = call(*inputs.arguments())
            if inputs.push:
                inputs.bank.push(inputs.mel)
            return made

        return both

    return provider


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
    y = torch.log(torch.where(inside, (1 - a) * x + a * z.exp(), x) + reference.EPS)
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


def truth(inputs: Inputs) -> list[Tensor]:
    mel, bank, lengths, partner, start, alpha, crop, canvas = inputs.arguments()
    return [reference.augment(mel.double(), bank.double(), lengths, partner, start, alpha, crop, canvas)]


def work(inputs: Inputs) -> dict:
    """Clip and partner are read, the view is written; the clip is copied into the bank."""
    passes = 5 if inputs.push else 3
    return {"bytes": passes * inputs.mel.numel() * 4, "items": (len(inputs.mel), "clips")}


OPERATOR = Operator(
    "augment_views",
    sizes={
        "cpu": {"tiny": {"batch": 2, "frames": 101}, "batch": {"batch": 8, "frames": 1001}},
        "cuda": {"tiny": {"batch": 2, "frames": 101}, "batch": {"batch": 144, "frames": 1001}},
    },
    options={"cpu": {"push": (True,), "threads": (1,)}, "cuda": {"push": (True, False)}},
    make=make,
    providers={
        OURS: Provider(ours),
        "clip by clip": Provider(pushing(reference.augment), CPU),
        "plain PyTorch": Provider(pushing(batched)),
        "plain PyTorch, compiled": Provider(pushing(batched, lambda view: timing.compiled(view)), CUDA),
    },
    truth=truth,
    work=work,
    curves={
        "cpu": ("batch", {"frames": (101, 301, 1001, 3001), "batch": (1, 2, 4, 8, 16)}),
        "cuda": ("batch", {"frames": (101, 301, 1001, 3001), "batch": (1, 4, 16, 64, 256)}),
    },
    runs="augment",
)
