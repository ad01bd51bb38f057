"""The augmentation of fine-tuning: clips and their labels mixed with others, bands masked, a random crop, resized."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from atst_fast.ops._checks import fail
from atst_fast.ops.augment import AugmentDraws, MemoryBank, augment_views, draw_augment

_MIX, _ALONE, _CROP, _MASKS = range(2, 6)  # the streams of random numbers, beside those of labelled.py


class Masks:
    """SpecAugment: of each clip a band of less than ``bins`` mel bins and one of less than ``frames`` frames, anywhere
    within its length, become 0, which is a middling loudness. 0 means no band.

    What is drawn follows from (seed, step) and is the same however many processes (``rank`` of ``world``) share a
    batch. Upstream: torchaudio's FrequencyMasking(20) and TimeMasking(50) with AudioSet-2M, on request.
    """

    def __init__(self, bins: int, frames: int, seed: int, *, rank: int = 0, world: int = 1):
        self.bins, self.frames, self.seed, self.rank, self.world = bins, frames, seed, rank, world

    def __call__(self, mel: Tensor, lengths: Tensor, step: int) -> Tensor:
        """Of mel ``[B, 1, F, T]`` with ``lengths`` int64 ``[B]`` frames on the CPU; changes and returns it."""
        clips, _, bins, frames = mel.shape
        draws = np.random.default_rng([self.seed, _MASKS, step]).random((clips * self.world, 4))
        own = torch.from_numpy(draws[self.rank * clips : (self.rank + 1) * clips])
        rows = _band(own[:, :2], self.bins, torch.full((clips,), bins), bins)
        columns = _band(own[:, 2:], self.frames, lengths, frames)
        mel.masked_fill_(rows.to(mel.device)[:, None, :, None], 0.0)
        return mel.masked_fill_(columns.to(mel.device)[:, None, None, :], 0.0)


def _band(draws: Tensor, most: int, sizes: Tensor, size: int) -> Tensor:
    """Bool ``[B, size]``: a band of less than ``most`` within the first ``sizes``, by two numbers from 0 to 1 each."""
    width = (draws[:, 0] * sizes.clamp(max=most)).long()
    start = (draws[:, 1] * (sizes - width)).long()
    at = torch.arange(size)
    return (at >= start[:, None]) & (at < (start + width)[:, None])


class FileMixup:
    """As `Mixup`, but the partner is another file, that came along with the batch, and not every clip has one.

    What is mixed follows from (seed, step) and is the same however many processes (``rank`` of ``world``) share a
    batch; the crop is each process's own. Nothing is remembered. Upstream: the same script for AudioSet-2M (alpha 10,
    half of the clips).
    """

    def __init__(self, alpha: float, seed: int, masks: Masks | None = None, *, rank: int = 0, world: int = 1):
        if not alpha > 0:
            fail("FileMixup", "alpha", "more than 0", alpha)
        self.alpha, self.seed, self.masks, self.rank, self.world = alpha, seed, masks, rank, world

    def __call__(
        self, mel: Tensor, lengths: Tensor, targets: Tensor, step: int, partner_of: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As of `Mixup`, of ``[B + M, ...]`` clips, of which the last M are the partners of those numbers: ``[B, 1, F,
        T]``, T that of the longest, and ``[B, classes]``."""
        clips = len(mel) - len(partner_of)
        draws, own = np.random.default_rng([self.seed, _MIX, step]), slice(self.rank * clips, (self.rank + 1) * clips)
        shares = draws.beta(self.alpha, self.alpha, clips * self.world)[own]
        places = draws.random(clips * self.world)[own]
        mixed, labels = mel[:clips, ..., : int(lengths[:clips].max())].clone(), targets[:clips].clone()
        for k, row in enumerate(partner_of.tolist(), clips):
            partner = mel[k, 0, :, : int(lengths[k])]
            _blend(mixed[row, 0], int(lengths[row]), partner, shares[row], places[row])
            labels[row].lerp_(targets[k], 1 - shares[row])
        if self.masks is not None:
            mixed = self.masks(mixed, lengths[:clips], step)
        crop = np.random.default_rng([self.seed, _CROP, step, self.rank]).integers(2**62)
        return resize_crop(mixed, lengths[:clips], int(crop)), labels


class Mixup:
    """``share x + (1 - share) partner`` of log-mels and of labels, share ~ Beta(alpha, alpha), then a random resized
    crop in both axes (canvas of 1.5 times the frames).

    The partner is one of the last ``capacity`` clips before it, those of the same batch included; the very first clip
    has none, and of the others ``prob`` have one. Of a partner of another length the overlap is mixed, at a random
    place. Each batch is cropped at its clips' own lengths, which stay; ``masks`` come before that. What is drawn
    follows from (seed, step); the bank is the only state.
    Upstream: the transform of audiossl/methods/atstframe/downstream/train_finetune.py (capacity 5000).
    """

    def __init__(self, capacity: int, alpha: float, seed: int, prob: float = 1.0, masks: Masks | None = None):
        if not alpha > 0:
            fail("Mixup", "alpha", "more than 0", alpha)
        self.bank, self.alpha, self.seed = MemoryBank(capacity), alpha, seed
        self.prob, self.masks = prob, masks
        self.labels: Tensor | None = None
        # on the host, so that nobody waits for a GPU to know them; the bank takes a batch to be of one length
        self.count, self.lengths = 0, torch.zeros(capacity, dtype=torch.int64)

    def __call__(self, mel: Tensor, lengths: Tensor, targets: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Mel ``[B, 1, F, T]`` with ``lengths`` int64 ``[B]`` frames on the CPU, zero past them, and targets
        ``[B, classes]`` of training step ``step``; both new."""
        draws = np.random.default_rng([self.seed, _MIX, step])
        alone = np.random.default_rng([self.seed, _ALONE, step]).random(len(mel)) >= self.prob
        mixed, labels = self._mix(mel, lengths, targets, draws, alone)
        self._push(mel, lengths, targets)
        if self.masks is not None:
            mixed = self.masks(mixed, lengths, step)
        return resize_crop(mixed, lengths, int(draws.integers(2**62))), labels

    def _mix(
        self, mel: Tensor, lengths: Tensor, targets: Tensor, draws: np.random.Generator, alone: NDArray[np.bool_]
    ) -> tuple[Tensor, Tensor]:
        count = self.count
        out, labels = mel.clone(), targets.clone()
        for row in range(len(mel)):
            share, where, place = draws.beta(self.alpha, self.alpha), draws.random(), draws.random()
            before = count + row
            if not before or alone[row]:
                continue
            number = before - 1 - int(where * min(before, self.bank.capacity))
            if number >= count:
                partner, of = mel[number - count, 0, :, : int(lengths[number - count])], targets[number - count]
            else:
                slot = number % self.bank.capacity
                assert self.bank.mels is not None
                assert self.labels is not None
                partner, of = self.bank.mels[slot, :, : int(self.lengths[slot])], self.labels[slot]
            _blend(out[row, 0], int(lengths[row]), partner, share, place)
            labels[row].lerp_(of, 1 - share)
        return out, labels

    def _push(self, mel: Tensor, lengths: Tensor, targets: Tensor) -> None:
        capacity = self.bank.capacity
        slots = (self.count + torch.arange(len(mel)))[-capacity:] % capacity
        self.bank.push(mel)
        if self.labels is None:
            self.labels = targets.new_zeros(capacity, targets.shape[1])
        self.labels[slots.to(targets.device)] = targets[-capacity:]
        self.lengths[slots] = lengths[-capacity:]
        self.count += len(mel)

    def state_dict(self) -> dict[str, Any]:
        used = min(self.count, self.bank.capacity)
        labels = None if self.labels is None else self.labels[:used].clone()
        return {"bank": self.bank.state_dict(), "labels": labels, "lengths": self.lengths[:used].clone()}

    def load_state_dict(self, state: dict[str, Any], device: torch.device | str = "cpu") -> None:
        """Continue where a mixup of the same capacity was, on ``device``."""
        self.bank.load_state_dict(state["bank"])
        self.bank.to(device)
        self.count = self.bank.count
        self.lengths[: len(state["lengths"])] = state["lengths"]
        labels = state["labels"]
        if labels is not None:
            self.labels = labels.new_zeros(self.bank.capacity, labels.shape[1], device=device)
            self.labels[: len(labels)] = labels


def _blend(mel: Tensor, own: int, partner: Tensor, share: float, place: float) -> None:
    """Mix ``partner`` ``[F, P]`` into ``mel`` ``[F, T]``, of which ``own`` frames are valid, where they overlap;
    ``place``, from 0 to 1, says where that is."""
    start = int(place * (abs(own - partner.shape[1]) + 1))
    if partner.shape[1] > own:
        partner, start = partner[:, start : start + own], 0
    part = mel[:, start : min(start + partner.shape[1], mel.shape[1])]
    part.lerp_(partner, 1 - share)


def resize_crop(mel: Tensor, lengths: Tensor, seed: int) -> Tensor:
    """A random crop of each clip of mel ``[B, 1, F, T]``, resized to its length: ``lengths`` int64 ``[B]`` on the CPU.
    Changes mel and returns it."""
    generator = torch.Generator().manual_seed(seed)
    for frames in lengths.unique().tolist():
        rows = (lengths == frames).nonzero().squeeze(1).to(mel.device)
        part = mel[rows, :, :, :frames].contiguous()
        crop = draw_augment(
            part.shape, None, generator, canvas_scale=(1.0, 1.5), freq_scale=(0.6, 1.5), time_scale=(0.6, 1.5)
        )
        mel[rows, :, :, :frames] = augment_views(part, [AugmentDraws(*crop)])[0]
    return mel
