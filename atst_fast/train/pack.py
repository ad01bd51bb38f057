"""``atst-fast pack``: a folder of audio as int16 PCM shards that training maps into memory.

A pack is a folder: ``data-00000.pcm``, ... (int16 little-endian mono 16 kHz, every clip from a page boundary on),
``index.npy`` (one ``INDEX`` row per clip), ``names.jsonl`` (one JSON string per clip) and ``meta.json``, written last.
"""

import contextlib
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from atst_fast.train.config import RATE, UserError
from atst_fast.train.files import explain, new_folder, write_atomically

FORMAT = "atst_fast pack"
VERSION = 1
PAGE = 4096  # bytes
INDEX = np.dtype([("shard", "<u4"), ("offset", "<u8"), ("samples", "<u8")])  # offset in samples within its shard
META, NAMES, ROWS = "meta.json", "names.jsonl", "index.npy"


@dataclass(frozen=True, kw_only=True)
class PackConfig:
    """What ``atst-fast pack`` reads and where the pack goes."""

    src: Path
    """folder of audio files (searched recursively)"""
    dst: Path
    """folder to make; it appears when it is complete"""
    shard_gb: float = 4.0
    """largest size of a file of the pack, in 10^9 bytes"""
    workers: int | None = None
    """threads that decode audio; default: one per core"""


def is_pack(folder: Path) -> bool:
    """Whether the folder is a pack, perhaps a damaged one; a folder of audio may have a meta.json of its own."""
    try:
        with open(folder / META, "rb") as f:
            return FORMAT.encode() in f.read(PAGE) or (folder / ROWS).is_file()
    except OSError:
        return (folder / META).is_file()


class Pack:
    """A pack mapped into memory: ``names``, ``samples`` [clips], ``take`` for whole batches.

    Raises UserError naming the file when anything is missing, damaged or of another version.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.meta = _meta(folder)
        shards = self.meta["shards"]
        self._shards = [self._map(folder / s["name"], s["bytes"]) for s in shards]
        self.index = self._index([s["bytes"] // 2 for s in shards])
        self.samples: NDArray[np.int64] = self.index["samples"].astype(np.int64)
        self._rows = list(zip(self.index["shard"].tolist(), self.index["offset"].tolist()))

    @property
    def names(self) -> list[str]:
        path = self.folder / NAMES
        try:
            names = [json.loads(line) for line in path.read_text().splitlines()]
        except (OSError, ValueError) as error:
            raise UserError(f"the pack is damaged: {path}: {error}") from error
        if len(names) != len(self.index):
            raise UserError(f"the pack is damaged: {path} has {len(names)} names for {len(self.index)} clips")
        return names

    def take(self, clips: NDArray[np.int64], starts: NDArray[np.int64], out: NDArray[np.int16]) -> None:
        """Fill ``out`` [B, N] with N samples of each clip from its start on, zeros after the clip's end."""
        n = out.shape[1]
        for row, clip, start in zip(out, clips.tolist(), starts.tolist()):
            shard, offset = self._rows[clip]
            m = min(n, int(self.samples[clip]) - start)
            row[:m] = self._shards[shard][offset + start : offset + start + m]
            row[m:] = 0

    @staticmethod
    def _map(path: Path, size: int) -> NDArray[np.int16]:
        if not path.is_file():
            raise UserError(f"the pack is damaged: {path} is missing")
        if path.stat().st_size != size:
            raise UserError(f"the pack is damaged: {path} has {path.stat().st_size} bytes, expected {size}")
        return np.memmap(path, dtype="<i2", mode="r")

    def _index(self, sizes: list[int]) -> NDArray[Any]:
        path = self.folder / ROWS
        try:
            index = np.load(path)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"the pack is damaged: {path}: {error}") from error
        if index.dtype != INDEX or index.shape != (self.meta["clips"],):
            expected = f"{self.meta['clips']} rows of {INDEX}"
            raise UserError(f"the pack is damaged: {path} has {index.shape} rows of {index.dtype}, expected {expected}")
        if (index["samples"] < 1).any():
            raise UserError(f"the pack is damaged: {path} has clips without samples")
        fits = (index["shard"] < len(sizes)).all()
        if fits and len(index):
            size = np.array(sizes, np.uint64)[index["shard"]]  # offset + samples could wrap around: never added
            fits = ((index["samples"] <= size) & (index["offset"] <= size - index["samples"])).all()
        if not fits:
            raise UserError(f"the pack is damaged: {path} points outside the shards")
        return index


def _meta(folder: Path) -> dict[str, Any]:
    path = folder / META
    try:
        meta = json.loads(path.read_text())
        if meta["format"] != FORMAT:
            raise UserError(f"{path} describes no pack of atst_fast (format {meta['format']!r})")
        if meta["version"] != VERSION:
            raise UserError(f"{path}: pack version {meta['version']}, this program reads {VERSION}; pack it again")
        if meta["rate"] != RATE:
            raise UserError(f"{path}: the pack has {meta['rate']} Hz, expected {RATE} Hz; pack it again")
        if not all(isinstance(s["name"], str) and isinstance(s["bytes"], int) for s in meta["shards"]):
            raise TypeError("shards")
        int(meta["clips"])
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"the pack is damaged: {path}: {type(error).__name__} {error}") from error
    return meta


class Writer:
    """Fills ``folder``; a context manager."""

    def __init__(self, folder: Path, shard_bytes: int):
        self.folder, self.shard_bytes = folder, shard_bytes
        self.rows: list[tuple[int, int, int]] = []
        self.names: list[str] = []
        self.sizes: list[int] = []
        self._file: BinaryIO | None = None

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()

    def add(self, name: str, clip: NDArray[np.int16]) -> None:
        size = -(-clip.nbytes // PAGE) * PAGE
        if self._file is None or (self.sizes[-1] and self.sizes[-1] + size > self.shard_bytes):
            self._close()
            self._file = open(self.folder / f"data-{len(self.sizes):05d}.pcm", "wb")  # noqa: SIM115
            self.sizes.append(0)
        self.rows.append((len(self.sizes) - 1, self.sizes[-1] // 2, len(clip)))
        self.names.append(name)
        self._file.write(clip.astype("<i2", copy=False).data)
        self._file.write(bytes(size - clip.nbytes))
        self.sizes[-1] += size

    def finish(self, meta: dict[str, Any]) -> None:
        self._close()
        lines = "".join(json.dumps(name) + "\n" for name in self.names)
        write_atomically(self.folder / NAMES, lambda p: p.write_text(lines))
        write_atomically(self.folder / ROWS, self._save_index)
        shards = [{"name": f"data-{i:05d}.pcm", "bytes": size} for i, size in enumerate(self.sizes)]
        meta = {"format": FORMAT, "version": VERSION, "rate": RATE, "clips": len(self.rows), "shards": shards} | meta
        write_atomically(self.folder / META, lambda p: p.write_text(json.dumps(meta, indent=1) + "\n"))

    def _save_index(self, path: Path) -> None:
        with open(path, "wb") as f:
            np.save(f, np.array(self.rows, INDEX))

    def _close(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None


def decode_all(src: Path, names: list[str], workers: int, problems: Any) -> Iterator[tuple[str, NDArray[np.int16]]]:
    """(name, clip) of every usable file, in order, decoded by ``workers`` threads a few files ahead."""
    from atst_fast.train import audio

    def decode(name: str) -> NDArray[np.int16] | None:
        try:
            audio.probe(src / name)
            return audio.read(src / name)
        except audio.AudioError as error:
            problems.add(name, f"{error} (skipped)")
            return None

    with ThreadPoolExecutor(workers) as pool:
        todo = iter(names)
        ahead = [(name, pool.submit(decode, name)) for name in islice(todo, 4 * workers)]
        try:
            while ahead:
                name, future = ahead.pop(0)
                clip = future.result()
                ahead += [(n, pool.submit(decode, n)) for n in islice(todo, 1)]
                if clip is not None and not clip.any():
                    problems.add(name, audio.SILENT)
                yield name, clip if clip is not None else np.empty(0, np.int16)
        finally:
            pool.shutdown(cancel_futures=True)


def pack(config: PackConfig) -> Path:
    """Write the pack of ``config.src`` to ``config.dst`` and return it. Files that cannot be used are named and
    counted; raises UserError when none can, when ``dst`` is taken, or when it cannot be written."""
    import soxr
    from rich.console import Console
    from rich.progress import track

    from atst_fast.train import audio

    if not 0 < config.shard_gb <= 1000:
        raise UserError(f"--shard-gb must be positive and at most 1000, got {config.shard_gb}")
    if config.workers is not None and config.workers < 1:
        raise UserError(f"--workers must be at least 1, got {config.workers}")
    if config.dst.exists() and not (config.dst.is_dir() and not any(config.dst.iterdir())):
        what = "already holds a pack" if is_pack(config.dst) else "is not an empty folder"
        raise UserError(f"{config.dst} {what}; choose another name or delete it")
    console, began = Console(stderr=True), time.perf_counter()
    problems = audio.Problems(lambda text: console.print(text, style="yellow", highlight=False, markup=False))
    names = audio.find_audio(config.src)
    workers = config.workers or os.cpu_count() or 1
    hint = "no pack was left behind"
    with (
        explain(f"write the pack {config.dst}", hint),
        new_folder(config.dst) as folder,
        Writer(folder, int(config.shard_gb * 1e9)) as writer,
    ):
        clips = decode_all(config.src, names, workers, problems)
        for name, clip in track(clips, "packing", total=len(names), console=console):
            if len(clip):
                writer.add(name, clip)
        if not writer.rows:
            raise UserError(f"none of the {len(names)} audio files in {config.src} can be used; {problems.summary()}")
        samples = [n for _, _, n in writer.rows]
        source: dict[str, Any] = {"files": len(names), "skipped": len(names) - len(samples)}
        source["sha256"] = audio.names_hash(writer.names, samples)
        writer.finish({"samples": sum(samples), "resampler": f"soxr {soxr.__version__} HQ", "source": source})
    seconds = time.perf_counter() - began
    if problems.reasons:
        console.print(problems.summary(), style="yellow")
    hours = sum(samples) / RATE / 3600
    console.print(f"{config.dst}: {len(samples)} clips, {hours:.2f} hours, {len(samples) / seconds:.0f} clips/s")
    return config.dst
