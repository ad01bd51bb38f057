"""Scores of a fine-tuned encoder: which part of a file is seen, with what, and what is handed on."""

import io

import numpy as np
import pytest
import soundfile
import torch

from atst_fast.models import FineTuned, FrameEncoder
from atst_fast.nn import LogMelSpectrogram
from atst_fast.train import evaluate
from atst_fast.train.distributed import World
from atst_fast.train.evaluate import Evaluation, held_out, token_logits
from atst_fast.train.features import Labelled
from atst_fast.train.labelled import Reader
from atst_fast.train.metrics import Event, best_thresholds, clip_map, roll, top1
from tests.tolerances import CHUNKED_FEATURES

SIZE = {"dim": 16, "depth": 1, "num_heads": 1}
LABELS = ["a", "b"]
SAMPLES = [7040, 9600, 4000, 14480, 600]  # 45 frames: 40 and five more; 61, 26, 91; and 4, the shortest


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("noise"), np.random.default_rng(0)
    for i, n in enumerate(SAMPLES):
        soundfile.write(folder / f"{i}.wav", rng.normal(0, 0.02 + 0.05 * i, n), 16000, subtype="PCM_16")
    labels = ["a", "b", "a", "b", "b"]
    return [
        Labelled(folder / f"{i}.wav", (label,), (Event(label, 0.05, 0.01 + 0.3 / (i + 1)),))
        for i, label in enumerate(labels)
    ]


def make(level, patch=(64, 4), **options):
    torch.manual_seed(0)
    encoder = FrameEncoder(SIZE, patch=patch, max_frames=41, drop_path_rate=0.0, **options)
    model = FineTuned(encoder, 2, level=level)
    torch.nn.init.normal_(model.head.linear.weight)
    return model


def evaluation(held, test, level, seconds=0.4, median=3):
    settings = {"level": level, "seconds": seconds, "median": median}
    return Evaluation(Reader(held), Reader(test), LABELS, {}, settings, World(torch.device("cpu")))


def mel_of(file, first=0, most=None):
    audio, _ = soundfile.read(file.path, dtype="int16", start=first, frames=-1 if most is None else most)
    return LogMelSpectrogram()(torch.from_numpy(audio)[None, None])


@torch.no_grad()
def test_clips_are_scored_by_their_middle(files, monkeypatch):
    monkeypatch.setattr(evaluate, "BATCH", 2)
    model = make("clip").eval()
    logits = [model(mel_of(f, max(n - 6400, 0) // 2, 6400))[0].numpy() for f, n in zip(files, SAMPLES)]
    truth = np.array([[label in f.labels for label in LABELS] for f in files])
    got = list(evaluate.clip_logits(model, Reader(files), {}, 0.4, range(5)))
    np.testing.assert_allclose(np.concatenate(got), logits, rtol=0, atol=CHUNKED_FEATURES)
    scores = evaluation(files[:2], files, "clip").test(model)
    assert scores == {"clip_map": clip_map(np.array(logits), truth), "clip_top1": top1(np.array(logits), truth)}
    held = evaluation(files[:2], files[2:], "clip").held_out(model)
    assert held == {"held_out_map": clip_map(np.array(logits[:2]), truth[:2])}
    assert evaluation([], files, "clip").held_out(model) == {}


@pytest.mark.parametrize("pieces", [1, 16])
@torch.no_grad()
def test_every_token_of_a_file_is_scored(files, monkeypatch, pieces):
    """In chunks of 40 frames, however many of them go through the encoder at once."""
    monkeypatch.setattr(evaluate, "PIECE", pieces)
    model = make("frame").eval()
    got = list(token_logits(model, Reader(files), {}, range(5)))
    assert [len(g) for g in got] == [11, 15, 6, 22, 1]
    for file, logits in zip(files, got):
        parts = [p[..., : p.shape[3] // 4 * 4] for p in mel_of(file).split(40, dim=3) if p.shape[3] >= 4]
        want = torch.cat([model.head(model.encoder(part)[0]) for part in parts])
        np.testing.assert_allclose(logits, want, rtol=0, atol=CHUNKED_FEATURES)


def test_a_file_of_less_than_a_token_has_none(files):
    got = list(token_logits(make("frame", patch=(64, 8)).eval(), Reader(files), {}, [4, 0]))
    assert [g.shape for g in got] == [(0, 2), (5, 2)]


def test_what_the_detector_is_scored_with(files, monkeypatch):
    """Thresholds of the files held out, by label; the median filter; the seconds of a token; each file's own events."""
    model, seen = make("frame", patch=(64, 8)).eval(), []
    monkeypatch.setattr(evaluate, "frame_values", lambda *a: seen.append(a) or ([], {"frame_map": 0.5}))
    assert evaluation(files[:3], files[3:], "frame").test(model) == {"frame_map": 0.5}
    scores, events, labels, thresholds, median, hop = seen[0]
    held = list(token_logits(model, Reader(files), {}, range(3)))
    truth = [roll(f.events, LABELS, len(h), 0.08) for f, h in zip(files, held)]
    assert thresholds.tolist() == best_thresholds(np.concatenate(held), np.concatenate(truth)).tolist()
    assert (events, labels, median, hop) == ([f.events for f in files[3:]], LABELS, 3, 0.08)
    assert [len(s) for s in scores] == [11, 0]
    evaluation(files[:1], files, "frame").test(model)  # no b is there
    assert np.isfinite(seen[1][3]).all()
    assert seen[1][3][1] == 0
    assert evaluation(files[:3], files[3:], "frame").held_out(model) == {"held_out_map": 0.5}
    assert [len(s) for s in seen[2][0]] == [len(h) for h in held]
    assert not seen[2][3].any()


@pytest.mark.parametrize("training", [True, False])
def test_the_model_answers_in_eval_mode_and_is_left_as_it_was(files, training):
    model = make("clip").train(training)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    evaluation([], files, "clip").test(model)
    assert model.training == training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_the_share_that_is_held_out():
    files = list(range(10))
    for share, n in ((0, 0), (0.01, 1), (0.25, 2), (1, 10)):
        held, used = held_out(files, share, seed=0)
        assert (len(held), sorted(held + used)) == (n, files)
    assert held_out(files, 0.5, seed=0) != held_out(files, 0.5, seed=1)


def test_the_table_shows_three_digits():
    from rich.console import Console

    console = Console(width=100, record=True, file=io.StringIO())
    console.print(evaluate.show({"clip_map": 0.12345}, 7))
    assert "0.123" in (text := console.export_text())
    assert "7 test files" in text
