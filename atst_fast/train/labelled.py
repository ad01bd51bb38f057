"""Labelled audio to batches: which files, which part of them, and what their labels are in numbers."""

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from atst_fast.train.audio import AudioError, probe, read
from atst_fast.train.config import RATE, UserError
from atst_fast.train.features import Labelled
from atst_fast.train.metrics import Event, roll

HOP = 160  # samples of a mel frame
_ORDER, _CROP, _BALANCED, _PARTNER = 0, 1, 6, 7  # the streams of random numbers, beside those of mixup.py


class LabelledBatch(NamedTuple):
    """``waveform`` int16 ``[B + M, N]``, padded with zeros; ``lengths`` int64 ``[B + M]`` valid samples; ``targets``
    float32 ``[B + M, classes]``, or ``[B, L, classes]`` per token. The last M clips are there to be mixed with those of
    the numbers ``partner_of`` int64 ``[M]``."""

    step: int
    waveform: Tensor
    lengths: Tensor
    targets: Tensor
    partner_of: Tensor


class Reader:
    """Labelled files by number, read by a pool of threads; ``samples`` int64 ``[files]``, their lengths at 16 kHz."""

    def __init__(self, files: Sequence[Labelled], workers: int | None = None):
        self.files = list(files)
        self._pool = ThreadPoolExecutor(workers or os.cpu_count() or 1, thread_name_prefix="decode")
        self.samples = np.array(list(self._pool.map(_length, self.files, chunksize=16)), np.int64)

    def waveforms(self, numbers: Sequence[int], first: Sequence[int], most: int) -> tuple[Tensor, Tensor]:
        """Of each file at most ``most`` samples from ``first`` on: int16 ``[B, N]``, N that of the longest one, and
        the valid samples ``[B]``."""
        parts = list(self._pool.map(_part, (self.files[i] for i in numbers), first, [most] * len(numbers)))
        lengths = torch.tensor([len(part) for part in parts])
        waveform = torch.zeros(len(parts), int(lengths.max()), dtype=torch.int16)
        for row, part in zip(waveform, parts, strict=True):
            row[: len(part)] = torch.from_numpy(part)
        return waveform, lengths

    def middle(self, numbers: Sequence[int], most: int) -> list[int]:
        """Where the central ``most`` samples of each file begin."""
        return (np.maximum(self.samples[list(numbers)] - most, 0) // 2).tolist()


class LabelledBatches:
    """Shuffled batches of all files, without the incomplete one at the end of an epoch.

    Of files that are longer than ``seconds`` the middle is taken, as the official code does for labels of the whole;
    with ``frames_per_token`` targets are per token and a random part is. With ``weights`` ``[files]`` an epoch is as
    long, but each file of a batch is drawn from all by them. ``mixed`` of the clips bring another file along, any one.
    Of ``world`` processes, number ``rank`` gets
    its share of each batch, which is ``world`` times ``batch_size`` files. Batch k of epoch e follows from (seed, e, k)
    and that product.
    """

    def __init__(
        self,
        reader: Reader,
        labels: Sequence[str],
        batch_size: int,
        seconds: float,
        seed: int,
        frames_per_token: int | None = None,
        *,
        weights: NDArray[np.float64] | None = None,
        mixed: float = 0.0,
        rank: int = 0,
        world: int = 1,
    ):
        self.reader, self.labels, self.batch_size, self.seed = reader, list(labels), batch_size, seed
        self.most, self.frames_per_token = int(seconds * RATE), frames_per_token
        self._bounds = None if weights is None else np.cumsum(weights)
        self._mixed = mixed
        self._epoch: tuple[int, NDArray[np.int64]] | None = None
        self._whole = batch_size * world
        self._own = slice(rank * batch_size, (rank + 1) * batch_size)
        self.per_epoch = len(reader.files) // self._whole
        if not self.per_epoch:
            n = len(reader.files)
            whole = f"{batch_size} in each of {world} processes" if world > 1 else f"{batch_size}"
            raise UserError(f"{n} training files do not fill one batch of {whole}; give a smaller --batch-size")

    def numbers(self, step: int) -> list[int]:
        """The files of a step, of this process."""
        if self._bounds is not None:
            where = np.random.default_rng([self.seed, _BALANCED, step]).random(self._whole) * self._bounds[-1]
            drawn = np.searchsorted(self._bounds, where, side="right")
            return drawn.clip(max=len(self._bounds) - 1)[self._own].tolist()  # a product may round up to the last bound
        epoch, k = divmod(step, self.per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, np.random.default_rng([self.seed, _ORDER, epoch]).permutation(len(self.reader.files))
        return self._epoch[1][k * self._whole : (k + 1) * self._whole][self._own].tolist()

    def partners(self, step: int) -> tuple[list[int], list[int]]:
        """Which clips of a step, counted from 0, bring another file along, and which files."""
        draws = np.random.default_rng([self.seed, _PARTNER, step]).random((2, self._whole))[:, self._own]
        (of,) = np.nonzero(draws[0] < self._mixed)
        others = len(self.reader.files) - 1
        after = 1 + (draws[1, of] * others).astype(int)
        return of.tolist(), ((np.array(self.numbers(step))[of] + after) % (others + 1)).tolist()

    def names(self, step: int) -> list[str]:
        """Of all files that have a part in a step."""
        return [str(self.reader.files[i].path) for i in self.numbers(step) + self.partners(step)[1]]

    def batch(self, step: int, *, pin: bool = False) -> LabelledBatch:
        of, partners = self.partners(step)
        numbers = self.numbers(step) + partners
        first = self.reader.middle(numbers, self.most)
        if self.frames_per_token:
            where = np.random.default_rng([self.seed, _CROP, step]).random(self._whole)[self._own]
            first = (where * (np.maximum(self.reader.samples[numbers] - self.most, 0) + 1)).astype(int).tolist()
        waveform, lengths = self.reader.waveforms(numbers, first, self.most)
        files = [self.reader.files[i] for i in numbers]
        if self.frames_per_token:
            tokens = (waveform.shape[1] // HOP + 1) // self.frames_per_token
            rolls = [token_targets(f, self.labels, a, tokens, self.frames_per_token) for f, a in zip(files, first)]
            targets = torch.from_numpy(np.stack(rolls))
        else:
            targets = torch.tensor([[label in f.labels for label in self.labels] for f in files])
        targets = targets.float()
        if pin:
            waveform, lengths, targets = (x.pin_memory() for x in (waveform, lengths, targets))
        return LabelledBatch(step, waveform, lengths, targets, torch.tensor(of, dtype=torch.int64))


def balanced_weights(files: Sequence[Labelled]) -> NDArray[np.float64]:
    """``[files]``: the sum over a file's labels of 1000 / (files of that label + 0.01), as the official code weighs
    AudioSet, so that each label is drawn as often as any other (but for those that come with others)."""
    counts = Counter(label for f in files for label in set(f.labels))
    weights = np.array([sum(1000 / (counts[label] + 0.01) for label in set(f.labels)) for f in files])
    if not weights.any():
        raise UserError("--sampler balanced needs labels, and none of the files to train on has one")
    return weights


def token_targets(
    file: Labelled, labels: Sequence[str], first: int, tokens: int, frames_per_token: int
) -> NDArray[np.bool_]:
    """Bool ``[tokens, labels]``: what sounds in each token of a part that begins at sample ``first``."""
    start = first / RATE
    events = [Event(e.label, e.onset - start, e.offset - start) for e in file.events or () if e.offset > start]
    return roll(events, labels, tokens, frames_per_token * HOP / RATE)


def _length(file: Labelled) -> int:
    try:
        return probe(file.path).samples
    except AudioError as error:
        raise UserError(f"{file.path}: {error}") from error


def _part(file: Labelled, first: int, most: int) -> NDArray[np.int16]:
    try:
        return read(file.path, first, most)
    except AudioError as error:
        raise UserError(f"{file.path}: {error}") from error


def fingerprint(files: Sequence[Labelled]) -> str:
    """sha256 over names, labels and events: what tells one task from another."""
    h = hashlib.sha256()
    for f in files:
        h.update(repr((f.path.name, f.labels, f.events)).encode(errors="surrogateescape"))
    return h.hexdigest()
