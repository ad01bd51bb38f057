"""The pictures of a run: loss curve, events over a spectrogram, confusion matrix. PNG files, no display needed."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from atst_fast.train.config import UserError
from atst_fast.train.files import write_atomically
from atst_fast.train.logging import read_log
from atst_fast.train.metrics import Event

TRUE, PREDICTED = "#1b9e77", "#d95f02"
MEL_HOP = 0.01  # seconds


def _figure(width: float, height: float, **layout: Any) -> Any:
    from matplotlib.figure import Figure  # without pyplot: no global state, no display

    return Figure(figsize=(width, height), dpi=120, layout="constrained", **layout)


def loss_curve(log: Path, path: Path) -> None:
    """Loss and output deviations of a run's ``log.jsonl`` over its steps. UserError when the log has no lines."""
    rows = read_log(log)
    if not rows:
        raise UserError(f"{log} has no lines: nothing to draw")
    steps = np.array([row["step"] for row in rows])
    figure = _figure(8, 5.5)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    loss = np.array([row["loss"] for row in rows])
    width = max(len(loss) // 50, 1)
    top.plot(steps, loss, color="#9ecae1", lw=0.8, label="logged steps")
    if width > 1:
        smooth = np.convolve(loss, np.ones(width) / width, "valid")
        top.plot(steps[width - 1 :], smooth, color="#08519c", lw=1.8, label=f"mean of the last {width} logged steps")
    top.set(ylabel="loss (2 - 2 cos)", title="Pretraining")
    top.legend(frameon=False)
    bottom.plot(steps, [row["std_student"] for row in rows], color=PREDICTED, lw=1.2, label="student")
    bottom.plot(steps, [row["std_teacher"] for row in rows], color=TRUE, lw=1.2, label="teacher")
    bottom.set(xlabel="step", ylabel="output deviation", ylim=(0, None))
    bottom.legend(frameon=False, ncols=2, loc="lower right")
    for axes in (top, bottom):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    write_atomically(path, partial(figure.savefig, format="png"))


def events(mel: np.ndarray, true: Sequence[Event], predicted: Sequence[Event], path: Path, title: str = "") -> None:
    """A mel spectrogram ``[n_mels, T]`` and over the same seconds one lane per label: true above, predicted below."""
    seconds = mel.shape[1] * MEL_HOP
    labels = sorted({e.label for e in (*true, *predicted)}, reverse=True)
    figure = _figure(11, 3.2 + 0.36 * max(len(labels), 2))
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[2.6, 0.36 * max(len(labels), 2)])
    top.imshow(mel, origin="lower", aspect="auto", extent=(0, seconds, 0, len(mel)), cmap="magma")
    top.set(ylabel="mel band", title=f"{title}: true and predicted events".removeprefix(": "))
    for lane, label in enumerate(labels):
        for side, height, colour in ((true, 0.02, TRUE), (predicted, -0.36, PREDICTED)):
            spans = [(e.onset, e.offset - e.onset) for e in side if e.label == label]
            bottom.broken_barh(spans, (lane + height, 0.34), facecolors=colour)
    for lane in range(len(labels) - 1):
        bottom.axhline(lane + 0.5, color="0.85", lw=0.8)
    bottom.set(xlabel="seconds", yticks=range(len(labels)), ylim=(-0.5, max(len(labels), 1) - 0.5), xlim=(0, seconds))
    bottom.set_yticklabels(labels)
    bottom.grid(axis="x", alpha=0.25)
    handles = [_patch(TRUE, "true"), _patch(PREDICTED, "predicted")]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    write_atomically(path, partial(figure.savefig, format="png"))


def _patch(colour: str, label: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(color=colour, label=label)


def confusion(counts: np.ndarray, labels: Sequence[str], path: Path) -> None:
    """Counts ``[true, predicted]`` as shares of each row, in percent."""
    totals = counts.sum(axis=1, keepdims=True)
    shares = 100 * counts / np.maximum(totals, 1)
    size = 3.0 + 0.5 * len(labels)
    figure = _figure(size + 0.8, size)
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    for i, row in enumerate(shares):
        for j, value in enumerate(row):
            if value >= 0.5:
                colour = "white" if value > 55 else "black"
                axes.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize=8, color=colour)
    axes.set_xticks(range(len(labels)), labels, rotation=45, ha="right")
    axes.set_yticks(range(len(labels)), [f"{label} ({n})" for label, n in zip(labels, totals[:, 0], strict=True)])
    accuracy = 100 * np.trace(counts) / max(counts.sum(), 1)
    axes.set(xlabel="label with the highest score", ylabel="true label (frames)")
    axes.set_title(f"Frames in which one label sounds alone: {accuracy:.0f} % right", fontsize=11)
    figure.colorbar(image, ax=axes, shrink=0.75, label="% of the row")
    write_atomically(path, partial(figure.savefig, format="png"))
