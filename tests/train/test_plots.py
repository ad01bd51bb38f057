"""Pictures: each is drawn, and shows what it was given."""

import json

import numpy as np
import pytest

from atst_fast.train import plots
from atst_fast.train.config import UserError
from atst_fast.train.metrics import Event

matplotlib = pytest.importorskip("matplotlib", reason="needs the extra eval")


def _pixels(path):
    from matplotlib.image import imread

    return (imread(path)[..., :3] * 255).round().astype(int)


def _count(path, colour):
    from matplotlib.colors import to_rgb

    return int((np.abs(_pixels(path) - np.array(to_rgb(colour)) * 255).max(axis=-1) < 3).sum())


@pytest.mark.parametrize("lines", [1, 200])
def test_loss_curve(tmp_path, lines):
    log = tmp_path / "log.jsonl"
    rows = [{"step": 10 * i, "loss": 1 / (i + 1), "std_student": 0.05, "std_teacher": 0.06} for i in range(lines)]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 5, "lo')  # a power cut
    plots.loss_curve(log, tmp_path / "loss.png")
    assert _pixels(tmp_path / "loss.png").std() > 10


def test_an_empty_log_is_named(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "lo')
    with pytest.raises(UserError, match="has no lines"):
        plots.loss_curve(tmp_path / "log.jsonl", tmp_path / "loss.png")


def test_events_show_both_sides(tmp_path):
    mel = np.random.default_rng(0).normal(size=(64, 400)).astype(np.float32)
    long, short = [Event("dog", 0.5, 3.5)], [Event("dog", 0.5, 2.0)]
    for name, true, predicted in (("a", long, short), ("b", short, long), ("none", [], [])):
        plots.events(mel, true, predicted, tmp_path / f"{name}.png", title="x.wav")
    base = [_count(tmp_path / "none.png", c) for c in (plots.TRUE, plots.PREDICTED)]
    true, predicted = (
        [_count(tmp_path / f"{name}.png", c) - b for c, b in zip((plots.TRUE, plots.PREDICTED), base)] for name in "ab"
    )
    assert true[0] == pytest.approx(2 * true[1], rel=0.1)
    assert predicted[1] == pytest.approx(2 * predicted[0], rel=0.1)


def test_confusion(tmp_path):
    right, wrong = np.diag([5, 9, 3]), np.roll(np.diag([5, 9, 3]), 1, axis=1)
    for name, counts in (("right", right), ("wrong", wrong), ("empty", 0 * right)):
        plots.confusion(counts, ["a", "b", "c"], tmp_path / f"{name}.png")
    assert (_pixels(tmp_path / "right.png") != _pixels(tmp_path / "wrong.png")).any()
