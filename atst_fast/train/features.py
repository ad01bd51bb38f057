"""Labelled audio files, and the frozen features that a probe sees: of an encoder, or plain log-mel."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from atst_fast.models import ClipEncoder
from atst_fast.models.features import CLIP_CHUNK
from atst_fast.train.config import UserError
from atst_fast.train.metrics import Event

BATCH = 16  # chunks that go through the encoder together
LONGEST = 100_000  # seconds, of a labelled file: more than a day; beyond it the times are of another unit


@dataclass(frozen=True)
class Labelled:
    """An audio file, the labels of the whole, and its events (None: it has labels only)."""

    path: Path
    labels: tuple[str, ...]
    events: tuple[Event, ...] | None


@dataclass(frozen=True)
class Features:
    """Of each file: ``clips`` float32 ``[files, D]`` and ``frames``, one float32 ``[L, D']`` per file (40 ms a row)."""

    clips: np.ndarray
    frames: list[np.ndarray]


def read_labels(path: Path) -> list[Labelled]:
    """The lines of a JSONL file (UTF-8), ``{"file", "labels", "events": [{"label", "onset", "offset"}]}``.

    ``file`` is relative to the JSONL file; seconds. One of ``labels`` and ``events`` is enough; with both, the events'
    labels are among them. Raises UserError naming the line.
    """
    if not path.is_file():
        raise UserError(f"there is no labels file {path}: expected one JSON object per line with file, labels, events")
    files = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):  # a label may hold what str.splitlines splits at
        if not line.strip():
            continue
        try:
            files.append(_labelled(path.parent, json.loads(line.decode("utf-8-sig"))))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            expected = '{"file": ..., "labels": [...], "events": [{"label", "onset", "offset"}]}'
            got = line[:120].decode(errors="backslashreplace")
            raise UserError(f"{path}, line {number}: expected {expected}, got {got!r} ({error!r})") from error
    if not files:
        raise UserError(f"{path} is empty")
    return files


def _labelled(folder: Path, row: dict[str, Any]) -> Labelled:
    """One line of a labels file; ValueError, KeyError, TypeError or AttributeError where it is none."""
    events = row.get("events")
    if events is not None:
        events = tuple(Event(str(e["label"]), float(e["onset"]), float(e["offset"])) for e in events)
    labels = row["labels"] if events is None else row.get("labels", [e.label for e in events])
    if not isinstance(labels, list):
        raise TypeError(f"labels must be a list, got {labels!r}")
    labels = tuple(sorted(set(map(str, labels))))
    for event in events or ():
        if event.label not in labels:
            raise ValueError(f"an event has the label {event.label!r}, which is not among the labels")
        if not 0 <= event.onset <= event.offset <= LONGEST:  # not so for nan either
            raise ValueError(f"0 <= onset <= offset <= {LONGEST} must hold, got {event.onset} and {event.offset}")
    return Labelled(folder / row["file"], labels, events)


def log_mels(files: Sequence[Labelled], front_end: dict[str, Any]) -> list[Tensor]:
    """The log-mel spectrogram float32 ``[n_mels, T]`` of every file."""
    from atst_fast.nn import LogMelSpectrogram
    from atst_fast.train.audio import AudioError, probe, read

    spectrogram = LogMelSpectrogram(**front_end)
    mels = []
    for file in files:
        try:
            probe(file.path)  # which knows what is too short
            mels.append(spectrogram(torch.from_numpy(read(file.path))[None])[0])
        except AudioError as error:
            raise UserError(f"{file.path}: {error}") from error
    return mels


def mel_features(mels: Sequence[Tensor], patch: int) -> Features:
    """Plain log-mel: the mean over time of each band, and per token its ``patch`` frames side by side."""
    clips = np.stack([mel.mean(dim=1).numpy() for mel in mels])
    return Features(clips, [_patches(mel, patch).numpy() for mel in mels])


def _patches(mel: Tensor, patch: int) -> Tensor:
    tokens = mel.shape[1] // patch
    return mel[:, : tokens * patch].unflatten(1, (tokens, patch)).permute(1, 0, 2).flatten(1)


@torch.inference_mode()
def encoder_features(encoder: Any, mels: Sequence[Tensor], n_blocks: int) -> Features:
    """The last ``n_blocks`` blocks of an encoder, per token, and their mean over time; of a ``ClipEncoder`` its class
    tokens before that mean.

    Longer files are cut into chunks of the length that the encoder was made for, at most 6 s for a ``ClipEncoder``,
    which has learned no later positions; their class tokens are averaged with the weight of their frames.
    """
    width = encoder.config["patch"][1]
    longest = min(encoder.max_frames, CLIP_CHUNK) if isinstance(encoder, ClipEncoder) else encoder.max_frames
    chunk = longest // width * width
    frames: list[list[np.ndarray]] = [[] for _ in mels]
    classes: list[list[np.ndarray]] = [[] for _ in mels]
    for owners, mel, lengths in _batches(mels, chunk, width):
        tokens = encoder.tokens(lengths).tolist()
        out = encoder.intermediate(mel, lengths, n_blocks)
        cls, out = out if isinstance(out, tuple) else (out[:, 0, :0], out)
        for owner, whole, rows, n in zip(owners, cls, out, tokens, strict=True):
            frames[owner].append(rows[:n].float().numpy())
            classes[owner].append(n * whole.float().numpy())
    joined = [np.concatenate(parts) for parts in frames]
    clips = [np.concatenate([sum(cls) / len(f), f.mean(axis=0)]) for cls, f in zip(classes, joined)]
    return Features(np.stack(clips), joined)


def _batches(mels: Sequence[Tensor], chunk: int, patch: int) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Chunks of at least one token as (owners, mel [B, 1, n_mels, T] padded with zeros, valid frames [B])."""
    chunks = [(i, part) for i, mel in enumerate(mels) for part in mel.split(chunk, dim=1) if part.shape[1] >= patch]
    for at in range(0, len(chunks), BATCH):
        owners, parts = zip(*chunks[at : at + BATCH], strict=True)
        lengths = torch.tensor([part.shape[1] for part in parts])
        mel = torch.zeros(len(parts), 1, parts[0].shape[0], int(lengths.max()))
        for row, part in zip(mel, parts, strict=True):
            row[0, :, : part.shape[1]] = part
        yield list(owners), mel, lengths
