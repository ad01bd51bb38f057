"""The augmentation of fine-tuning: clips and their labels mixed with earlier ones, then a random crop, resized."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from atst_fast.ops._checks import fail
from atst_fast.ops.augment import AugmentDraws, MemoryBank, augment_views, draw_augment


class Mixup:
    """``share x + (1 - share) partner`` of log-mels and of labels, share ~ Beta(alpha, alpha), then a random resized
    crop in both axes (canvas of 1.5 times the frames).

    The partner is one of the last ``capacity`` clips before it, those of the same batch included; the very first clip
    has none. Of a partner of another length the overlap is mixed, at a random place. Each batch is cropped at its
    clips' own lengths, which stay. What is drawn follows from (seed, step); the bank is the only state.
    Upstream: the transform of audiossl/methods/atstframe/downstream/train_finetune.py (capacity 5000).
    """

    def __init__(self, capacity: int, alpha: float, seed: int):
        if not alpha > 0:
            fail("Mixup", "alpha", "more than 0", alpha)
        self.bank, self.alpha, self.seed = MemoryBank(capacity), alpha, seed
        self.labels: Tensor | None = None
        # on the host, so that nobody waits for a GPU to know them; the bank takes a batch to be of one length
        self.count, self.lengths = 0, torch.zeros(capacity, dtype=torch.int64)

    def __call__(self, mel: Tensor, lengths: Tensor, targets: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Mel ``[B, 1, F, T]`` with ``lengths`` int64 ``[B]`` frames on the CPU, zero past them, and targets
        ``[B, classes]`` of training step ``step``; both new."""
        draws = np.random.default_rng([self.seed, 2, step])
        mixed, labels = self._mix(mel, lengths, targets, draws)
        self._push(mel, lengths, targets)
        return self._crop(mixed, lengths, int(draws.integers(2**62))), labels

    def _mix(self, mel: Tensor, lengths: Tensor, targets: Tensor, draws: np.random.Generator) -> tuple[Tensor, Tensor]:
        count, frames = self.count, mel.shape[3]
        out, labels = mel.clone(), targets.clone()
        for row in range(len(mel)):
            share, where, place = draws.beta(self.alpha, self.alpha), draws.random(), draws.random()
            before = count + row
            if not before:
                continue
            number = before - 1 - int(where * min(before, self.bank.capacity))
            if number >= count:
                partner, of = mel[number - count, 0, :, : int(lengths[number - count])], targets[number - count]
            else:
                slot = number % self.bank.capacity
                assert self.bank.mels is not None
                assert self.labels is not None
                partner, of = self.bank.mels[slot, :, : int(self.lengths[slot])], self.labels[slot]
            own = int(lengths[row])
            start = int(place * (abs(own - partner.shape[1]) + 1))
            if partner.shape[1] > own:
                partner, start = partner[:, start : start + own], 0
            part = out[row, 0, :, start : min(start + partner.shape[1], frames)]
            part.lerp_(partner, 1 - share)
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

    def _crop(self, mel: Tensor, lengths: Tensor, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        for frames in lengths.unique().tolist():
            rows = (lengths == frames).nonzero().squeeze(1).to(mel.device)
            part = mel[rows, :, :, :frames].contiguous()
            crop = draw_augment(
                part.shape, None, generator, canvas_scale=(1.0, 1.5), freq_scale=(0.6, 1.5), time_scale=(0.6, 1.5)
            )
            mel[rows, :, :, :frames] = augment_views(part, [AugmentDraws(*crop)])[0]
        return mel

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
