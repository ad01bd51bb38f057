"""``atst-fast embed``: the embeddings of a folder of audio, of any length and rate, in bounded memory."""

import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor
from tyro.conf import Positional

from atst_fast.train.config import UserError

if TYPE_CHECKING:
    from atst_fast.integrations.embedding import Embedder
    from atst_fast.integrations.spans import Span
    from atst_fast.train.audio import Problems
    from atst_fast.train.embedding_file import Rows

_HELD = 8 * 2**20  # bytes of a spectrogram that stay in memory (five minutes); the rest goes to the disk
_HEADERS = 4096  # files that are queued at once


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """What ``atst-fast embed`` reads, with which encoder, and what it writes."""

    folder: Positional[Path]
    """folder of audio files (searched recursively), of any length and sample rate"""
    out: Path
    """file to write: .safetensors, .npz or .parquet; it appears when it is complete"""
    checkpoint: Path
    """a checkpoint of any known layout, or the folder of a run for its last one"""
    which: Literal["teacher", "student"] = "teacher"
    """which network of the checkpoint"""
    timestamps: bool = False
    """an embedding every 40 ms instead of one per file"""
    n_blocks: int | None = None
    """how many of the encoder's last blocks, side by side; default: 12, or all if there are fewer"""
    chunk_frames: int | None = None
    """mel frames (10 ms) that the encoder sees at once; default: what it was trained on"""
    official: bool = False
    """cut and weigh chunks as audiossl does, whose times drift by 10 ms per chunk"""
    batch_size: int = 8
    """chunks that go through the encoder together"""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes a GPU if there is one"""
    workers: int | None = None
    """threads that decode audio; default: one per core, at most 4"""


def embed(config: EmbedConfig) -> Path:
    """Write ``config.out`` and return it. Files that cannot be used are named and counted; raises UserError when none
    can be, and where the checkpoint cannot be read or the file cannot be written."""
    from rich.console import Console

    from atst_fast.train import audio
    from atst_fast.train.embedding_file import Rows, write, writer_of
    from atst_fast.train.files import explain, make_folder

    _check(config)
    writer_of(config.out)
    console, began = Console(stderr=True), time.perf_counter()
    problems = audio.Problems(lambda text: console.print(text, style="yellow", highlight=False, markup=False))
    names = audio.find_audio(config.folder)
    embedder = _embedder(config)
    make_folder(config.out.parent)
    kind: Literal["scene", "timestamps"] = "timestamps" if config.timestamps else "scene"
    width = embedder.timestamp_embedding_size if config.timestamps else embedder.scene_embedding_size
    with explain(f"write {config.out}", "nothing was left behind"), Rows(config.out.parent, width) as rows:
        seconds = _embed_all(config, embedder, names, rows, kind, problems, console)
        done = rows.counts()
        if not done:
            raise UserError(
                f"none of the {len(names)} audio files in {config.folder} can be used; {problems.summary()}"
            )
        about: dict[str, Any] = {"kind": kind, "checkpoint": str(config.checkpoint), "which": config.which}
        about |= {"n_blocks": embedder.n_blocks, "chunk_frames": embedder.chunk_frames, "official": config.official}
        write(config.out, rows, names, about | ({"hop_ms": embedder.hop_ms} if config.timestamps else {}))
    if problems.reasons:
        console.print(problems.summary(), style="yellow")
    rate = seconds / (time.perf_counter() - began)
    what = f"{sum(done.values())} x {width} of {len(done)} files, {seconds / 3600:.2f} hours of audio"
    console.print(f"{config.out}: {what}, {rate:.0f} x real time", highlight=False, soft_wrap=True)
    return config.out


def _check(config: EmbedConfig) -> None:
    for name in ("batch_size", "workers", "n_blocks", "chunk_frames"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {value}")


def _embedder(config: EmbedConfig) -> "Embedder":
    from atst_fast.integrations.embedding import Embedder
    from atst_fast.train.checkpoint import load_encoder
    from atst_fast.train.device import pick_device

    device = pick_device(config.device)
    loaded = load_encoder(config.checkpoint, config.which)
    options = {"n_blocks": config.n_blocks, "chunk_frames": config.chunk_frames}
    try:
        embedder = Embedder(
            loaded.encoder.to(device),
            loaded.front_end,
            official=config.official,
            batch_size=config.batch_size,
            **options,
        )
    except ValueError as error:
        name = str(error).removeprefix("Embedder: ").split()[0]
        if options.get(name) is None:
            raise
        message = str(error).removeprefix(f"Embedder: {name} ")
        raise UserError(f"--{name.replace('_', '-')} {message}") from error
    return embedder.eval()


class Spectrogram:
    """Decibels of one file, in memory or on the disk: ``samples`` at the encoder's rate and the ``loudest`` value."""

    def __init__(self, file: int, bands: int, folder: Path):
        self.file, self.bands, self.samples, self.loudest = file, bands, 0, -float("inf")
        self._spool = SpooledTemporaryFile(max_size=_HELD, dir=str(folder))  # noqa: SIM115 (closed by close)

    def add(self, decibels: Tensor) -> None:
        self.loudest = max(self.loudest, float(decibels.max()))
        self._spool.write(decibels.T.contiguous().numpy().data)

    def read(self, start: int, frames: int) -> Tensor:
        """``[bands, frames]`` from frame ``start`` on."""
        self._spool.seek(start * self.bands * 4)
        data = bytearray(self._spool.read(frames * self.bands * 4))
        return torch.frombuffer(data, dtype=torch.float32).view(-1, self.bands).T

    def close(self) -> None:
        self._spool.close()


def spectrogram(path: Path, file: int, embedder: "Embedder", folder: Path) -> Spectrogram:
    """Decode, resample and transform a file of any length, piece by piece. AudioError with the reason."""
    from atst_fast.integrations.mel_stream import stream_decibels
    from atst_fast.train import audio

    result = Spectrogram(file, embedder.encoder.n_mels, folder)

    def pieces() -> Iterator[Tensor]:
        for piece in audio.stream(path, embedder.sample_rate):
            result.samples += len(piece)
            yield torch.from_numpy(piece)
        if 0 < result.samples < embedder.shortest:
            yield torch.zeros(embedder.shortest - result.samples)

    try:
        for decibels in stream_decibels(pieces(), embedder.front_end):
            result.add(decibels)
    except BaseException:
        result.close()
        raise
    return result


def _embed_all(
    config: EmbedConfig,
    embedder: "Embedder",
    names: list[str],
    rows: "Rows",
    kind: Literal["scene", "timestamps"],
    problems: "Problems",
    console: Any,
) -> float:
    """Fill ``rows``; returns the seconds of audio."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"))
    workers = config.workers or min(4, os.cpu_count() or 1)
    threads = torch.get_num_threads()
    # one thread each: a team of threads for every one of these would only get in the way of the encoder's
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    seconds = 0.0
    try:
        with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as bar:
            reading = bar.add_task("reading headers", total=len(names))
            order, total = _by_length(config.folder, names, pool, problems, lambda: bar.advance(reading))
            task = bar.add_task("embedding", total=total)
            batches = _Batches(embedder, rows, kind, lambda of_chunks: bar.advance(task, of_chunks))
            for spectrum in _decoded(config, embedder, names, order, pool, workers + 1, problems):
                if embedder.spans(spectrum.samples, kind):
                    seconds += spectrum.samples / embedder.sample_rate
                    batches.add(spectrum)
                else:  # with official cuts
                    spectrum.close()
                    problems.add(names[spectrum.file], "shorter than a patch (skipped)")
            batches.flush()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # of threads that are started from now on
    return seconds


def _by_length(
    folder: Path, names: list[str], pool: ThreadPoolExecutor, problems: "Problems", advance: Callable[[], None]
) -> tuple[list[int], float]:
    """The files that can be opened, by number, the longest first, and the seconds of all."""
    from atst_fast.train import audio

    def length(name: str) -> float:
        try:
            info = audio.probe(folder / name, at_least=1)
        except audio.AudioError as error:
            problems.add(name, f"{error} (skipped)")
            return 0.0
        return info.frames / info.rate

    seconds = {}
    for at in range(0, len(names), _HEADERS):
        for file, found in enumerate(pool.map(length, names[at : at + _HEADERS]), at):
            advance()
            if found:
                seconds[file] = found
    return sorted(seconds, key=lambda file: -seconds[file]), sum(seconds.values())


def _decoded(
    config: EmbedConfig,
    embedder: "Embedder",
    names: list[str],
    order: list[int],
    pool: ThreadPoolExecutor,
    most: int,
    problems: "Problems",
) -> Iterator[Spectrogram]:
    """The spectrogram of every usable file in that order, made by threads up to ``most`` files ahead."""
    from atst_fast.train import audio

    todo = iter(order)
    ahead: deque[tuple[int, Future[Spectrogram]]] = deque()

    def submit(n: int) -> None:
        for file in islice(todo, n):
            path = config.folder / names[file]
            ahead.append((file, pool.submit(spectrogram, path, file, embedder, config.out.parent)))

    submit(most)
    while ahead:
        file, future = ahead.popleft()
        try:
            result = future.result()
        except audio.AudioError as error:
            problems.add(names[file], f"{error} (skipped)")
            submit(1)
        else:
            submit(1)
            yield result


class _Batches:
    """Collects chunks until there are enough for a batch, and hands its results to ``rows``."""

    def __init__(self, embedder: "Embedder", rows: "Rows", kind: Literal["scene", "timestamps"], advance: Any):
        self.embedder, self.rows, self.kind, self._advance = embedder, rows, kind, advance
        self._chunks: list[tuple[int, int, Span, Tensor]] = []  # file, place in it, span, log-mel
        self._scenes: dict[int, list[Any]] = {}  # file -> chunks to come, sum of those that came

    def add(self, spectrum: Spectrogram) -> None:
        """All of a file; it is closed."""
        from atst_fast.integrations.mel_stream import floor_and_scale

        spans = self.embedder.spans(spectrum.samples, self.kind)
        if self.kind == "scene":
            self._scenes[spectrum.file] = [len(spans), 0]
        try:
            for place, span in enumerate(spans):
                decibels = spectrum.read(span.start, span.frames)
                mel = floor_and_scale(decibels, spectrum.loudest, self.embedder.front_end)
                self._chunks.append((spectrum.file, place, span, mel))
                if len(self._chunks) == self.embedder.batch_size:
                    self.flush()
        finally:
            spectrum.close()

    @torch.inference_mode()
    def flush(self) -> None:
        """Encode what there is, the longer chunks apart from those that are less than half as long."""
        chunks = sorted(self._chunks, key=lambda chunk: -chunk[2].tokens)
        self._chunks = []
        while chunks:
            n = sum(2 * chunk[2].tokens >= chunks[0][2].tokens for chunk in chunks)
            self._encode(chunks[:n])
            chunks = chunks[n:]

    def _encode(self, chunks: list[tuple[int, int, "Span", Tensor]]) -> None:
        device = self.embedder.encoder.pos_embed.device
        spans = [span for _, _, span, _ in chunks]
        cls, tokens = self.embedder.encode([mel.to(device, non_blocking=True) for *_, mel in chunks], spans)
        if self.kind == "timestamps":
            for (file, place, span, _), of in zip(chunks, tokens):
                self.rows.add(file, place, of[: span.tokens].cpu().numpy())
        else:
            for (file, *_), part in zip(chunks, self.embedder.pool(cls, tokens, spans).cpu().numpy()):
                scene = self._scenes[file]
                scene[0] -= 1
                scene[1] = scene[1] + part
                if not scene[0]:
                    self.rows.add(file, 0, self._scenes.pop(file)[1].astype(np.float32)[None])
        hop = self.embedder.front_end.hop_length / self.embedder.sample_rate
        self._advance(sum(span.frames for span in spans) * hop)
