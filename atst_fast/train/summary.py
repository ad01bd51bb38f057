"""The last screen of a run: what was learned, how it went, and where everything lies."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from atst_fast.train import checkpoint
from atst_fast.train.logging import read_log


def summary(path: Path, results: dict[str, Any], out: Path, pictures: Sequence[str]) -> Any:
    """A rich panel about the run of checkpoint ``path``, whose probe gave ``results`` (as in ``probe.json``) and drew
    the files ``pictures`` into the folder ``out``."""
    from rich.panel import Panel
    from rich.table import Table

    run = checkpoint.run_of(path)
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="bold")
    rows.add_column(overflow="fold")
    for metric, name in (("clip_map", "clips"), ("frame_map", "frames"), ("event_f1", "events")):
        if metric in results["pretrained"]:
            rows.add_row(f"learned, {name}", verdict(results, metric))
    for name, text in course(run / "log.jsonl"):
        rows.add_row(name, text)
    rows.add_row("checkpoint", str(path))
    rows.add_row("pictures", f"{', '.join(pictures)} in {out}" if pictures else "none")
    numbers = [out / "probe.json", *(p for p in (run / "log.jsonl", run / "config.json") if p.exists())]
    rows.add_row("numbers", ", ".join(map(str, numbers)))
    if (run / "tensorboard").exists():
        rows.add_row("TensorBoard", f"tensorboard --logdir {run / 'tensorboard'}")
    rows.add_row("on your audio", "atst-fast pretrain --data FOLDER --out runs/mine --arch small")
    rows.add_row("", "atst-fast probe --run runs/mine --data FOLDER (with train.jsonl and test.jsonl)")
    return Panel(rows, title=f"{run}", expand=False)


def verdict(results: dict[str, Any], metric: str) -> str:
    """Pretrained beside random and log-mel, and whether the first two differ by more than twice the spread of that.

    The difference is taken seed by seed: both were trained on the same files.
    """
    ours, random, plain = (results[name][metric] for name in ("pretrained", "random", "log-mel"))
    gains = np.subtract(ours["values"], random["values"])
    gain, spread = gains.mean(), gains.std(ddof=1) if len(gains) > 1 else 0.0
    if math.isnan(gain):
        said = "not measured: no test file has what it counts"
    elif len(ours["values"]) < 2:
        said = "one seed has no spread to compare with"
    elif abs(gain) <= 2 * spread:
        said = "no clear difference"
    else:
        said = "pretraining helps" if gain > 0 else "pretraining does not help yet"
    numbers = f"pretrained {ours['mean']:.3f}, random {random['mean']:.3f}, log-mel {plain['mean']:.3f}"
    return f"{numbers}: {said} ({metric}, {gain:+.3f} ± {spread:.3f})"


def course(log: Path) -> list[tuple[str, str]]:
    """Loss, deviation and speed from first to last, of a run's log; nothing where it has none."""
    rows = read_log(log) if log.is_file() else []
    if not rows:
        return []
    first, last, rates = rows[0], rows[-1], sorted(row["clips_per_s"] for row in rows if "clips_per_s" in row)
    lines = [
        ("loss", f"{first['loss']:.3f} at step {first['step']}, {last['loss']:.3f} at step {last['step']}"),
        ("deviation", f"student {last['std_student']:.3f}, teacher {last['std_teacher']:.3f} (0.001: collapsed)"),
    ]
    return [*lines, ("speed", f"{rates[len(rates) // 2]:.1f} clips/s")] if rates else lines
