"""Scores of a fine-tuned encoder on labelled files: of whole clips, and of events in time."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from atst_fast.models import FineTuned
from atst_fast.nn import LogMelSpectrogram
from atst_fast.train.config import RATE
from atst_fast.train.distributed import World
from atst_fast.train.features import Labelled
from atst_fast.train.labelled import HOP, Reader
from atst_fast.train.metrics import METRICS, best_thresholds, clip_map, frame_values, roll, top1

BATCH = 16
PIECE = 16  # chunks of a long file that go through the encoder at once


def held_out(files: Sequence[Labelled], share: float, seed: int) -> tuple[list[Labelled], list[Labelled]]:
    """The files that are held out, ``share`` of them and at least one unless it is 0, and the others."""
    order = np.random.default_rng(seed).permutation(len(files))
    held = max(int(len(files) * share), 1) if share else 0
    return [files[i] for i in order[:held]], [files[i] for i in order[held:]]


class Evaluation:
    """The files held out and those to test on, and how they are scored; ``settings`` as resolved.

    Every process of ``world`` answers for its share of the files; the first one has the scores, the others get none.
    """

    def __init__(
        self,
        held: Reader,
        test: Reader,
        labels: Sequence[str],
        front_end: dict[str, Any],
        settings: dict[str, Any],
        world: World,
    ):
        self._held, self._test, self.labels, self.front_end = held, test, list(labels), front_end
        self._world = world
        self.level, self.seconds, self.median = settings["level"], settings["seconds"], settings["median"]

    def held_out(self, model: FineTuned) -> dict[str, float]:
        """The mean average precision of clips or tokens, under the name "held_out_map"; nothing without such files."""
        if not self._held.files:
            return {}
        scores = self._scores(model, self._held)
        if not self._world.first:
            return {}
        values = self._values(scores, self._held, np.zeros(len(self.labels)), model)
        return {"held_out_map": values[f"{self.level}_map"]}

    def test(self, model: FineTuned) -> dict[str, float]:
        """All metrics of the level. Thresholds of tokens are the best ones of the files held out, for each label; 0,
        a probability of a half, for a label that none of them has."""
        thresholds = np.zeros(len(self.labels))
        by_labels = self.level == "frame" and bool(self._held.files)
        held = self._scores(model, self._held) if by_labels else []
        scores = self._scores(model, self._test)
        if not self._world.first:
            return {}
        if by_labels:
            best = best_thresholds(np.concatenate(held), np.concatenate(self._truth(held, self._held, model)))
            thresholds = np.where(np.isfinite(best), best, 0.0)
        return self._values(scores, self._test, thresholds, model)

    def _scores(self, model: FineTuned, reader: Reader) -> list[NDArray[np.float32]]:
        """Logits of all files, in the first process: ``[files, classes]`` in parts, or ``[L, classes]`` of each."""
        training, numbers = model.training, self._world.share(len(reader.files))
        model.eval()
        try:
            if self.level == "clip":
                own = list(clip_logits(model, reader, self.front_end, self.seconds, numbers))
            else:
                own = list(token_logits(model, reader, self.front_end, numbers))
        finally:
            model.train(training)
        return self._world.gather(own)

    def _values(
        self, scores: list[NDArray[np.float32]], reader: Reader, thresholds: NDArray[Any], model: FineTuned
    ) -> dict[str, float]:
        if self.level == "clip":
            targets = np.array([[label in f.labels for label in self.labels] for f in reader.files])
            logits = np.concatenate(scores)
            return {"clip_map": clip_map(logits, targets), "clip_top1": top1(logits, targets)}
        events = [f.events or () for f in reader.files]
        return frame_values(scores, events, self.labels, thresholds, self.median, _hop(model))[1]

    def _truth(self, scores: Any, reader: Reader, model: FineTuned) -> list[NDArray[np.bool_]]:
        return [roll(f.events or (), self.labels, len(s), _hop(model)) for f, s in zip(reader.files, scores)]


def _hop(model: FineTuned) -> float:
    """Seconds of a token."""
    return model.encoder.patch_embed.patch_width * HOP / RATE


@torch.inference_mode()
def clip_logits(
    model: FineTuned, reader: Reader, front_end: dict[str, Any], seconds: float, numbers: Sequence[int]
) -> Iterator[NDArray[np.float32]]:
    """Logits ``[B, classes]`` of the middle ``seconds`` of the files of these ``numbers``, a batch after the other."""
    device = next(model.parameters()).device
    log_mel, most = LogMelSpectrogram(**front_end).to(device), int(seconds * RATE)
    for at in range(0, len(numbers), BATCH):
        part = numbers[at : at + BATCH]
        waveform, lengths = reader.waveforms(part, reader.middle(part, most), most)
        mel = log_mel(waveform.to(device), lengths.to(device))[:, None]
        yield model(mel, lengths // HOP + 1).float().cpu().numpy()


@torch.inference_mode()
def token_logits(
    model: FineTuned, reader: Reader, front_end: dict[str, Any], numbers: Sequence[int]
) -> Iterator[NDArray[np.float32]]:
    """Logits ``[L, classes]`` of each whole file of these ``numbers``, one after the other; L is 0 for a file of less
    than a token."""
    device = next(model.parameters()).device
    log_mel, width = LogMelSpectrogram(**front_end).to(device), model.encoder.patch_embed.patch_width
    piece = PIECE * (model.chunk_frames // width * width)
    for number in numbers:
        waveform, _ = reader.waveforms([number], [0], int(reader.samples[number]))
        mel = log_mel(waveform.to(device)[:, None])
        parts = [model(part)[0] for part in mel.split(piece, dim=3) if part.shape[3] >= width]
        yield torch.cat([mel.new_zeros(0, model.config["classes"]), *parts]).float().cpu().numpy()


def show(scores: dict[str, float], files: int) -> Any:
    """Scores as a rich table."""
    from rich.table import Table

    table = Table(*(METRICS[name] for name in scores), title=f"{files} test files")
    table.add_row(*(f"{value:.3f}" for value in scores.values()))
    return table
