"""Clips to batches: which clips, which crops, prepared ahead in threads.

Batch k of epoch e follows from (seed, e, k) and the files alone, so that a run continues exactly from its step number.
"""

import os
import queue
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from atst_fast.train.audio import SILENT, AudioError, Problems, find_audio, names_hash, probe, read
from atst_fast.train.batch import Batch
from atst_fast.train.config import UserError
from atst_fast.train.pack import Pack, is_pack

_Item = TypeVar("_Item", covariant=True)
_ORDER, _CROP, _SUBSET = range(3)  # the streams of random numbers


class Source(Protocol):
    """Clips by number."""

    names: list[str]
    samples: NDArray[np.int64]  # [clips], at 16 kHz

    def take(self, clips: NDArray[np.int64], where: NDArray[np.float64], out: Sequence[NDArray[np.int16]]) -> None:
        """Fill each ``out[k]`` [B, N_k] with a crop of each clip; ``where`` [K, B] in [0, 1) says which of its
        N_k-sample crops."""
        ...


def starts(samples: NDArray[np.int64], n: int, where: NDArray[np.float64]) -> NDArray[np.int64]:
    """The first sample of each crop of ``n``: uniform over all whole ones, 0 for clips that are shorter."""
    return (where * (np.maximum(samples - n, 0) + 1)).astype(np.int64)


class FolderSource:
    """Audio files, decoded by a pool of threads (soundfile leaves Python alone while it works)."""

    def __init__(self, folder: Path, workers: int, problems: Problems):
        self.folder, self.problems = folder, problems
        self.pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
        names = find_audio(folder)
        found = list(self.pool.map(self._probe, names, chunksize=64))
        self.names = [name for name, n in zip(names, found) if n]
        self.samples = np.array([n for n in found if n], np.int64)
        if not self.names:
            raise UserError(f"none of the {len(names)} audio files in {folder} can be used; {problems.summary()}")

    def take(self, clips: NDArray[np.int64], where: NDArray[np.float64], out: Sequence[NDArray[np.int16]]) -> None:
        list(self.pool.map(self._fill, clips.tolist(), where.T, zip(*out)))

    def _probe(self, name: str) -> int:
        try:
            return probe(self.folder / name).samples
        except AudioError as error:
            self.problems.add(name, f"{error} (skipped)")
            return 0

    def _fill(self, clip: int, where: NDArray[np.float64], rows: Sequence[NDArray[np.int16]]) -> None:
        """The crops of one clip. The place of a file that turns out to be undecodable, wherever that is, goes to the
        next clip that can be read."""
        for i in range(clip, clip + len(self.names)):
            name, length = self.names[i % len(self.names)], self.samples[i % len(self.names) :][:1]
            try:
                crops = [
                    read(self.folder / name, int(starts(length, len(row), w)[0]), len(row))
                    for row, w in zip(rows, where[:, None])
                ]
            except AudioError as error:
                self.problems.add(name, f"{error} (skipped)")
                continue
            for x, row in zip(crops, rows):
                if not x.any():
                    self.problems.add(name, SILENT)
                row[: len(x)] = x
                row[len(x) :] = 0
            return
        raise UserError(f"no audio file in {self.folder} can be decoded any more; {self.problems.summary()}")


class PackSource:
    """Clips of a pack, gathered from mapped memory."""

    def __init__(self, folder: Path):
        self.pack = Pack(folder)
        self.names, self.samples = self.pack.names, self.pack.samples

    def take(self, clips: NDArray[np.int64], where: NDArray[np.float64], out: Sequence[NDArray[np.int16]]) -> None:
        for crop, w in zip(out, where, strict=True):
            self.pack.take(clips, starts(self.samples[clips], crop.shape[1], w), crop)


def open_source(path: Path, workers: int | None = None, problems: Problems | None = None) -> Source:
    """The clips of a folder of audio or of a pack."""
    if is_pack(path):
        return PackSource(path)
    return FolderSource(path, workers or os.cpu_count() or 1, problems or Problems())


class Batches:
    """Shuffled batches of random crops, without the incomplete one at the end of an epoch.

    A crop has ``samples``; with several numbers, as many crops of a clip lie side by side, each at a place of its own.
    Every epoch goes through all clips in a new order, through long ones as often as the crop fits into them (or
    ``crops_per_clip`` times through each); with ``subset``, through the next ``subset`` of a fixed random order. Of
    ``world`` processes, number ``rank`` gets every ``world``-th entry of it.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int,
        samples: int | Sequence[int],
        seed: int,
        *,
        crops_per_clip: int | None = None,
        subset: int | None = None,
        rank: int = 0,
        world: int = 1,
    ):
        self.source, self.batch_size, self.seed = source, batch_size, seed
        self.samples = (samples,) if isinstance(samples, int) else tuple(samples)
        self.subset, self.rank, self.world = subset, rank, world
        fitting = np.maximum(source.samples // max(self.samples), 1)
        crops = fitting if crops_per_clip is None else crops_per_clip
        self._entries = np.repeat(np.arange(len(source.names)), crops)
        entries = len(self._entries)
        chosen = min(subset or entries, entries)
        self.per_epoch = chosen // world // batch_size
        self._epoch: tuple[int, NDArray[np.int64]] | None = None
        if not self.per_epoch:
            few = f"{entries} crops of {len(source.names)} usable clips"
            few, cure = (few, "more audio") if chosen == entries else (f"{chosen} crops of --subset", "a larger one")
            each = f" in each of {world} processes" if world > 1 else ""
            raise UserError(f"{few} do not fill one batch of {batch_size}{each}; give {cure} or a smaller --batch-size")

    def fingerprint(self) -> str:
        """sha256 of the clip list."""
        return names_hash(self.source.names, self.source.samples.tolist())

    def order(self, epoch: int) -> NDArray[np.int64]:
        """The clips of an epoch, for this rank."""
        if self._epoch is None or self._epoch[0] != epoch:
            clips = self._entries
            if self.subset and self.subset < len(clips):
                fixed = np.random.default_rng([self.seed, _SUBSET]).permutation(clips)
                clips = fixed.take(range(epoch * self.subset, (epoch + 1) * self.subset), mode="wrap")
            clips = np.random.default_rng([self.seed, _ORDER, epoch]).permutation(clips)
            self._epoch = epoch, clips[self.rank :: self.world]
        return self._epoch[1]

    def clips(self, step: int) -> NDArray[np.int64]:
        epoch, k = divmod(step, self.per_epoch)
        return self.order(epoch)[k * self.batch_size : (k + 1) * self.batch_size]

    def names(self, step: int) -> list[str]:
        return [self.source.names[i] for i in self.clips(step)]

    def batch(self, step: int, *, pin: bool = False) -> Batch:
        where = np.random.default_rng([self.seed, _CROP, step, self.rank]).random((len(self.samples), self.batch_size))
        out = torch.empty(self.batch_size, sum(self.samples), dtype=torch.int16, pin_memory=pin)
        self.source.take(self.clips(step), where, [crop.numpy() for crop in out.split(self.samples, dim=1)])
        return Batch(step, out)


class Prepares(Protocol[_Item]):
    """What makes the batches of steps by number."""

    def batch(self, step: int, *, pin: bool = False) -> _Item: ...


class Prefetcher(Generic[_Item]):
    """Iterates over the batches of steps ``first .. last - 1``, prepared ahead by a thread. A context manager."""

    def __init__(self, batches: Prepares[_Item], first: int, last: int, *, ahead: int = 4, pin: bool = False):
        self._queue: queue.Queue[_Item | BaseException | None] = queue.Queue(ahead)
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._work, args=(batches, first, last, pin), name="prefetch", daemon=True
        )

    def __enter__(self) -> Iterator[_Item]:
        self._thread.start()
        return iter(self._next, None)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _next(self) -> _Item | None:
        item = self._queue.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def _work(self, batches: Prepares[_Item], first: int, last: int, pin: bool) -> None:
        try:
            for step in range(first, last):
                if not self._put(batches.batch(step, pin=pin)):
                    return
            self._put(None)
        except BaseException as error:
            self._put(error)

    def _put(self, item: _Item | BaseException | None) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False
