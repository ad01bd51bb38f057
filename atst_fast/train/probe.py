"""``atst-fast probe``: what linear classifiers can read from a frozen encoder, beside what they read from less.

The same probe is trained on the pretrained encoder, on the same encoder with fresh random weights, and on plain
log-mel: a difference between the first two is what pretraining taught.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from atst_fast.train.config import UserError
from atst_fast.train.features import Features, Labelled, encoder_features, log_mels, mel_features, read_labels
from atst_fast.train.metrics import (
    METRICS,
    Event,
    best_thresholds,
    clip_map,
    event_counts,
    events_of,
    frame_values,
    roll,
    top1,
)

CLIP_C = (0.01, 0.1, 1.0, 10.0, 100.0)
FRAME_C = 1.0
NEWTON_WIDTH = 1024


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """What ``atst-fast probe`` measures, and where the results go."""

    run: Path
    """folder of a run (its last checkpoint), or a checkpoint"""
    data: Path = Path("demo_data")
    """folder with train.jsonl and test.jsonl: {"file", "labels", "events": [{"label", "onset", "offset"}]} per line"""
    out: Path | None = None
    """folder for results and pictures; default: probe/ in the folder of the run, or beside a checkpoint of none"""
    encoder: Literal["teacher", "student"] = "teacher"
    """which network of the run"""
    blocks: int = 1
    """how many of the last blocks to read, side by side"""
    seeds: int = 3
    """repetitions: each draws its own fifth of the training files for validation, and its own random encoder"""
    max_frames: int = 15000
    """frames of the training files that a frame-level probe is trained on, drawn at random"""
    median: int = 7
    """frames of 40 ms of the median filter over the decisions"""


@dataclass
class Fitted:
    """Test scores of one probe: ``clips`` ``[files, labels]``; ``frames`` and ``active`` (bool, after thresholds and
    the median filter), one ``[L, labels]`` per file; ``values``, the metrics."""

    clips: np.ndarray
    frames: list[np.ndarray] = field(default_factory=list)
    active: list[np.ndarray] = field(default_factory=list)
    values: dict[str, float] = field(default_factory=dict)


@dataclass
class Task:
    """Train and test files and what they mean in numbers."""

    train: list[Labelled]
    test: list[Labelled]
    labels: list[str]

    @property
    def has_events(self) -> bool:
        return all(f.events is not None for f in [*self.train, *self.test])

    def clips(self, files: Sequence[Labelled]) -> np.ndarray:
        return np.array([[label in f.labels for label in self.labels] for f in files])


def load_task(folder: Path) -> Task:
    """Read ``train.jsonl`` and ``test.jsonl``; UserError where they cannot be used."""
    train, test = (read_labels(folder / f"{split}.jsonl") for split in ("train", "test"))
    labels = sorted({label for f in train for label in f.labels})
    unknown = sorted({label for f in test for label in f.labels} - set(labels))
    if unknown:
        raise UserError(f"{folder / 'test.jsonl'} has labels that train.jsonl lacks: {', '.join(unknown)}")
    if len(labels) < 2 or len(train) < 10:
        found = f"{len(labels)} labels in {len(train)} files"
        raise UserError(f"{folder / 'train.jsonl'} must have at least 2 labels in at least 10 files, got {found}")
    return Task(train, test, labels)


class Classifiers:
    """One logistic regression per label on standardised features; a label that is always or never there is constant."""

    def __init__(self, x: np.ndarray, y: np.ndarray, c: float):
        from sklearn.linear_model import LogisticRegression

        self.mean, self.std = x.mean(axis=0), x.std(axis=0) + 1e-6
        x, self.models = self._scale(x), []
        # Newton's method converges in a few steps of D^3 operations; where that is too many, there are cheaper steps
        newton = x.shape[1] <= NEWTON_WIDTH
        solver = {"solver": "newton-cholesky"} if newton else {"solver": "lbfgs", "max_iter": 1000}
        for column in y.T:
            several = column.any() and not column.all()
            self.models.append(LogisticRegression(C=c, **solver).fit(x, column) if several else column[0])

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Log-odds ``[n, labels]``."""
        x = self._scale(x)
        columns = [
            np.full(len(x), 1e3 if m else -1e3) if isinstance(m, np.bool_) else m.decision_function(x)
            for m in self.models
        ]
        return np.stack(columns, axis=1)

    def _scale(self, x: np.ndarray) -> np.ndarray:
        return (x - self.mean) / self.std


def fit(task: Task, train: Features, test: Features, seed: int, config: ProbeConfig) -> Fitted:
    """Train clip-level and frame-level probes on four fifths of the training files, and score them on the test files.

    The other fifth chooses the regularisation of the clip-level probe and the thresholds of the frame-level one.
    """
    order = np.random.default_rng(seed).permutation(len(task.train))
    held, used = np.split(order, [max(len(order) // 5, 1)])
    y, y_test = task.clips(task.train), task.clips(task.test)
    probes = [Classifiers(train.clips[used], y[used], c) for c in CLIP_C]
    best = max(probes, key=lambda p: np.nan_to_num(clip_map(p(train.clips[held]), y[held])))
    scores = best(test.clips)
    fitted = Fitted(scores, values={"clip_map": clip_map(scores, y_test), "clip_top1": top1(scores, y_test)})
    if task.has_events:
        _fit_frames(task, train, test, used, held, seed, config, fitted)
    return fitted


def _fit_frames(
    task: Task,
    train: Features,
    test: Features,
    used: np.ndarray,
    held: np.ndarray,
    seed: int,
    config: ProbeConfig,
    fitted: Fitted,
) -> None:
    def stack(indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        x = [train.frames[i] for i in indices]
        y = [roll(task.train[i].events or (), task.labels, len(train.frames[i])) for i in indices]
        return np.concatenate(x), np.concatenate(y)

    x, y = stack(used)
    few = np.random.default_rng(seed).permutation(len(x))[: config.max_frames]
    probe = Classifiers(x[few], y[few], FRAME_C)
    x_held, y_held = stack(held)
    thresholds = best_thresholds(probe(x_held), y_held)
    fitted.frames = [probe(x) for x in test.frames]
    events = [f.events or () for f in task.test]
    fitted.active, values = frame_values(fitted.frames, events, task.labels, thresholds, config.median)
    fitted.values |= values


def probe(config: ProbeConfig) -> Path:
    """Train and score the probes, print them as a table, write ``probe.json`` and the pictures; returns their folder.

    The spread is the standard deviation over ``seeds``. A seed draws the fifth of the training files that is held out,
    the frames that are used, and the weights of the random encoder; the pretrained encoder and the test files stay.
    """
    from rich.console import Console
    from rich.progress import Progress

    from atst_fast.train import checkpoint
    from atst_fast.train.files import make_folder
    from atst_fast.train.summary import summary

    if config.seeds < 1 or config.max_frames < 1 or config.median < 1 or config.median % 2 == 0:
        raise UserError("--seeds and --max-frames must be at least 1, --median odd and at least 1")
    console, task = Console(), load_task(config.data)
    path = checkpoint.find(config.run)
    loaded = checkpoint.load_encoder(path, config.encoder)
    encoder, front_end = loaded.encoder, loaded.front_end
    if not 1 <= config.blocks <= len(encoder.blocks):
        raise UserError(f"--blocks must be between 1 and {len(encoder.blocks)} in this encoder, got {config.blocks}")
    out = config.out or checkpoint.run_of(path) / "probe"
    make_folder(out)
    with Progress(console=console, transient=True) as progress:
        fits = compare(task, encoder, front_end, config, progress)
    results = summarise(fits)
    console.print(table(results, config))
    write_results(out, config, path, task, results)
    pictures = draw(out, task, front_end, fits["pretrained"][0], checkpoint.run_of(path) / "log.jsonl")
    console.print(summary(path, results, out, pictures))
    return out


def compare(
    task: Task, encoder: Any, front_end: dict[str, Any], config: ProbeConfig, progress: Any
) -> dict[str, list[Fitted]]:
    """The probes of all seeds on each kind of features."""
    bar = progress.add_task("log-mel", total=3 * config.seeds)
    mels = [log_mels(files, front_end) for files in (task.train, task.test)]

    def run(name: str, features: Callable[[int], list[Features]]) -> list[Fitted]:
        progress.update(bar, description=f"probing {name}")
        fits = []
        for seed in range(config.seeds):
            train, test = features(seed)
            fits.append(fit(task, train, test, seed, config))
            progress.advance(bar)
        return fits

    plain = [mel_features(m, encoder.config["patch"][1]) for m in mels]
    trained = [encoder_features(encoder, m, config.blocks) for m in mels]
    return {
        "pretrained": run("the pretrained encoder", lambda _: trained),
        "random": run(
            "random encoders", lambda seed: [encoder_features(fresh(encoder, seed), m, config.blocks) for m in mels]
        ),
        "log-mel": run("log-mel", lambda _: plain),
    }


def fresh(encoder: Any, seed: int) -> Any:
    """An encoder of the same sizes with the random weights of ``seed``."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return type(encoder)(**encoder.config).eval().requires_grad_(False)


def summarise(fits: dict[str, list[Fitted]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Features to metric to mean, standard deviation (0 for one seed) and values of the seeds."""
    results: dict[str, dict[str, dict[str, Any]]] = {}
    for name, seeds in fits.items():
        results[name] = {}
        for metric in seeds[0].values:
            values = [f.values[metric] for f in seeds]
            spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
            results[name][metric] = {"mean": float(np.mean(values)), "std": spread, "values": values}
    return results


def table(results: dict[str, dict[str, dict[str, Any]]], config: ProbeConfig) -> Any:
    """The results as a rich table."""
    from rich.table import Table

    rows = Table(title=f"linear probes on frozen features, test files: mean ± deviation of {config.seeds} seeds")
    rows.add_column("features")
    metrics = list(next(iter(results.values())))
    for metric in metrics:
        rows.add_column(METRICS[metric], justify="right")
    for name, values in results.items():
        best = [m for m in metrics if values[m]["mean"] >= max(r[m]["mean"] for r in results.values())]
        cells = [f"{values[m]['mean']:.3f} ± {values[m]['std']:.3f}" for m in metrics]
        rows.add_row(name, *(f"[bold]{c}[/]" if m in best else c for c, m in zip(cells, metrics, strict=True)))
    return rows


def write_results(out: Path, config: ProbeConfig, path: Path, task: Task, results: dict[str, Any]) -> None:
    from atst_fast.train.files import explain, write_atomically

    record = {
        "checkpoint": str(path),
        "config": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()},
        "labels": task.labels,
        "files": {"train": len(task.train), "test": len(task.test)},
        "a seed varies": "held-out fifth of the training files, frames used, weights of the random encoder",
        "results": _json(results),
    }
    with explain(f"write {out / 'probe.json'}"):
        write_atomically(out / "probe.json", lambda p: p.write_text(json.dumps(record, indent=1) + "\n"))


def _json(value: Any) -> Any:
    """Numbers that JSON does not know (nan: no test file has what is counted) as null."""
    if isinstance(value, dict):
        return {k: _json(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_json(v) for v in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def confusion(task: Task, fitted: Fitted) -> np.ndarray:
    """Frames in which exactly one label sounds: counts ``[true label, label with the highest score]``."""
    counts = np.zeros((len(task.labels),) * 2, int)
    for file, scores in zip(task.test, fitted.frames, strict=True):
        truth = roll(file.events or (), task.labels, len(scores))
        alone = truth.sum(axis=1) == 1
        np.add.at(counts, (truth[alone].argmax(axis=1), scores[alone].argmax(axis=1)), 1)
    return counts


def typical(task: Task, fitted: Fitted) -> tuple[int, list[Event]]:
    """The test file with the median event F1 and what was predicted for it: neither the best nor the worst."""
    found = [events_of(active, task.labels) for active in fitted.active]
    scores = [event_counts([(f.events or (), p)]).micro for f, p in zip(task.test, found, strict=True)]
    index = int(np.argsort(scores, kind="stable")[len(scores) // 2])
    return index, found[index]


def draw(out: Path, task: Task, front_end: dict[str, Any], fitted: Fitted, log: Path) -> list[str]:
    """The pictures: loss curve (where the run has a log), and events and confusion (where the data has events).

    Returns their names; those that an earlier probe left and that this one does not draw go.
    """
    from atst_fast.train import plots
    from atst_fast.train.logging import read_log

    drawn = []
    if log.is_file() and read_log(log):
        plots.loss_curve(log, out / "loss.png")
        drawn += ["loss.png"]
    if task.has_events:
        index, predicted = typical(task, fitted)
        file = task.test[index]
        mel = log_mels([file], front_end)[0].numpy()
        plots.events(mel, file.events or (), predicted, out / "events.png", title=file.path.name)
        plots.confusion(confusion(task, fitted), task.labels, out / "confusion.png")
        drawn += ["confusion.png", "events.png"]
    for name in {"loss.png", "confusion.png", "events.png"} - set(drawn):
        (out / name).unlink(missing_ok=True)
    return sorted(drawn)
