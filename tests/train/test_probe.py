"""The probe: what it can and cannot read, its numbers on files of known content, and its errors."""

import json
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch

from atst_fast.models import ATSTFrame, ClipEncoder, FrameEncoder
from atst_fast.train import checkpoint
from atst_fast.train import probe as module
from atst_fast.train.config import UserError
from atst_fast.train.features import (
    Features,
    Labelled,
    encoder_features,
    log_mels,
    mel_features,
    read_labels,
)
from atst_fast.train.metrics import Event, roll
from atst_fast.train.probe import (
    ProbeConfig,
    Task,
    confusion,
    draw,
    fit,
    fresh,
    load_task,
    probe,
    summarise,
    table,
    typical,
)
from atst_fast.train.summary import summary
from tests.tolerances import CHUNKED_FEATURES

pytest.importorskip("sklearn", reason="needs the extra eval")

PITCH = {"high": 3000.0, "low": 300.0, "middle": 1000.0}
CONFIG = ProbeConfig(run="unused", max_frames=600, median=3)


def _scene(rng, seconds=2.0):
    """Tones of two of three pitches over noise, each with its own start and end, as (int16, events)."""
    t = np.arange(int(seconds * 16000)) / 16000
    audio, events = 0.003 * rng.standard_normal(len(t)), []
    for label in rng.choice(sorted(PITCH), 2, replace=False):
        onset, offset = rng.uniform(0, 0.8), rng.uniform(1.0, seconds)
        audio += 0.2 * np.sin(2 * np.pi * PITCH[label] * t) * ((t >= onset) & (t < offset))
        events.append({"label": str(label), "onset": onset, "offset": offset})
    return (audio * 32767).astype(np.int16), events


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("tones"), np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 10)):
        rows = []
        for i in range(count):
            audio, events = _scene(rng)
            soundfile.write(folder / f"{split}{i}.wav", audio, 16000)
            rows.append({"file": f"{split}{i}.wav", "labels": sorted(e["label"] for e in events), "events": events})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with an untrained model in it."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(1)
    size = {"dim": 64, "depth": 2, "num_heads": 2}
    model = ATSTFrame(size, hidden=32, out=16, max_frames=101)
    front_end = {"n_mels": 64, "win_length": 1024}
    checkpoint.save(folder, 5, model.state_dict(), {}, {"model": model.config, "front_end": front_end}, keep=1)
    rows = [{"step": i, "loss": 1.0, "std_student": 0.05, "std_teacher": 0.05} for i in range(5)]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tensorboard").mkdir()
    return folder


def test_probe_end_to_end(run, data, capsys):
    out = probe(ProbeConfig(run=run, data=data, seeds=2, max_frames=600, median=3))
    assert out == run / "probe"
    assert {p.name for p in out.iterdir()} == {"probe.json", "loss.png", "events.png", "confusion.png"}
    record = json.loads((out / "probe.json").read_text())
    assert list(record["results"]) == ["pretrained", "random", "log-mel"]
    for values in record["results"].values():
        assert set(values) == {"clip_map", "clip_top1", "frame_map", "segment_f1", "event_f1"}
        assert len(values["event_f1"]["values"]) == 2
        assert values["clip_map"]["mean"] > 0.95  # three pure tones: anything can tell them apart
        assert values["segment_f1"]["mean"] > 0.9
    text = capsys.readouterr().out
    assert all(word in text for word in ("pretrained", "random", "log-mel", "event F1", "tensorboard --logdir"))


def test_each_seed_draws_its_own_random_encoder():
    encoder = FrameEncoder({"dim": 12, "depth": 1, "num_heads": 1})
    weights = [fresh(encoder, seed).pos_embed for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_the_same_seed_gives_the_same_scores(run, data):
    configs = [ProbeConfig(run=run, data=data, out=run / name, seeds=1, max_frames=600) for name in "ab"]
    a, b = (json.loads((probe(config) / "probe.json").read_text())["results"] for config in configs)
    assert a == b


def test_labels_that_mean_nothing_score_at_chance(data):
    """The probe cannot be fooled: with shuffled labels it is at the share of positives, 2/3."""
    task = load_task(data)
    mels = [mel_features(log_mels(files, {}), 4) for files in (task.train, task.test)]
    honest = fit(task, *mels, 0, CONFIG)
    order = np.random.default_rng(1).permutation(len(task.train))
    shuffled = [replace(task.train[i], labels=task.train[j].labels, events=None) for i, j in enumerate(order)]
    fooled = fit(Task(shuffled, task.test, task.labels), *mels, 0, CONFIG)
    assert honest.values["clip_map"] > 0.95
    assert fooled.values["clip_map"] < 0.85


def test_labels_without_events_give_clip_scores_only(run, data, tmp_path):
    for split in ("train", "test"):
        rows = [json.loads(line) for line in (data / f"{split}.jsonl").read_text().splitlines()]
        rows = [{"file": str(data / row["file"]), "labels": row["labels"]} for row in rows]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = probe(ProbeConfig(run=run, data=tmp_path, out=tmp_path / "out", seeds=1))
    results = json.loads((out / "probe.json").read_text())["results"]
    assert set(results["pretrained"]) == {"clip_map", "clip_top1"}
    assert {p.name for p in out.iterdir()} == {"probe.json", "loss.png"}


def test_features_do_not_depend_on_what_else_is_in_the_batch():
    torch.manual_seed(0)
    encoder = FrameEncoder({"dim": 64, "depth": 2, "num_heads": 2}, max_frames=41).eval()
    mels = [torch.randn(64, n) for n in (101, 40, 57)]  # chunks of 40 frames: 40 40 20 (1 left), 40, 40 16 (1 left)
    together = encoder_features(encoder, mels, 2)
    assert [f.shape for f in together.frames] == [(25, 128), (10, 128), (14, 128)]
    for i, mel in enumerate(mels):
        alone = encoder_features(encoder, [mel], 2)
        assert np.abs(alone.frames[0] - together.frames[i]).max() < CHUNKED_FEATURES
        assert np.allclose(together.clips[i], together.frames[i].mean(axis=0))
    first = encoder.intermediate(mels[0][None, None, :, :40], None, 2)[0].detach().numpy()
    assert np.abs(first - together.frames[0][:10]).max() < CHUNKED_FEATURES


def test_features_of_atst_clip_are_class_tokens_and_means():
    torch.manual_seed(0)
    encoder = ClipEncoder({"dim": 64, "depth": 2, "num_heads": 2}, max_frames=41).eval()
    mels = [torch.randn(64, n) for n in (59, 40)]  # chunks of 40 and 19 frames, 10 and 4 tokens
    features = encoder_features(encoder, mels, 2)
    assert [f.shape for f in features.frames] == [(14, 128), (10, 128)]
    assert features.clips.shape == (2, 256)
    with torch.no_grad():
        parts = [encoder.intermediate(part[None, None], None, 2) for part in mels[0].split(40, dim=1)]
    (whole, tokens), (rest, others) = ([x[0].numpy() for x in part] for part in parts)
    assert np.abs(features.frames[0] - np.concatenate([tokens, others])).max() < CHUNKED_FEATURES
    assert np.abs(features.clips[0, :128] - (10 * whole + 4 * rest) / 14).max() < CHUNKED_FEATURES
    assert np.allclose(features.clips[:, 128:], [f.mean(axis=0) for f in features.frames])


def test_atst_clip_reads_no_position_that_it_has_not_learned():
    """Published encoders have 250 positions, of which six seconds of training have moved 150."""
    encoder = ClipEncoder({"dim": 16, "depth": 1, "num_heads": 1}).eval()
    with torch.no_grad():
        encoder.pos_embed[:, 151:] = torch.nan
    features = encoder_features(encoder, [torch.randn(64, 1001)], 1)
    assert features.frames[0].shape == (250, 16)
    assert np.isfinite(features.frames[0]).all()
    assert np.isfinite(features.clips).all()


def test_mel_features():
    mel = torch.arange(2 * 9.0).reshape(2, 9)
    features = mel_features([mel], 4)
    assert features.clips.tolist() == [[4.0, 13.0]]
    assert features.frames[0].tolist() == [[0, 1, 2, 3, 9, 10, 11, 12], [4, 5, 6, 7, 13, 14, 15, 16]]


def test_confusion_counts_frames_with_one_label():
    labels, events = ["a", "b"], (Event("a", 0, 0.12), Event("b", 0.08, 0.2))
    task = Task([], [Labelled("x", ("a", "b"), events)], labels)
    fitted = fit_of(frames=[np.array([[1, 0], [0, 1], [1, 0], [0, 1], [0, 1.0]])])
    # frames 0, 1: a alone; 2: both; 3, 4: b alone
    assert confusion(task, fitted).tolist() == [[1, 1], [0, 2]]


def test_typical_is_the_median_file():
    events = (Event("a", 0.0, 0.4),)
    task = Task([], [Labelled(str(i), ("a",), events) for i in range(3)], ["a"])
    good, none = roll(events, ["a"], 20), np.zeros((20, 1), bool)
    middle = good | roll([Event("a", 0.6, 0.8)], ["a"], 20)  # one right, one too many
    index, predicted = typical(task, fit_of(active=[good, middle, none]))
    assert index == 1
    assert [e.onset for e in predicted] == [0.0, pytest.approx(0.6)]


def fit_of(**arrays):
    from atst_fast.train.probe import Fitted

    return Fitted(np.zeros((1, 1)), **arrays)


def test_mean_and_spread():
    fits = {"a": [fit_of(values={"clip_map": v}) for v in (0.1, 0.2, 0.6)]}
    cell = summarise(fits)["a"]["clip_map"]
    assert cell["mean"] == pytest.approx(0.3)
    assert cell["std"] == pytest.approx(np.std([0.1, 0.2, 0.6], ddof=1))
    assert table(summarise(fits), CONFIG).row_count == 1


def test_a_label_that_is_always_there_needs_no_classifier():
    files = [Labelled(f"{i}", ("a", "b")[: 1 + i % 2], None) for i in range(20)]
    x = np.array([[i % 2, 0.0] for i in range(20)], np.float32)
    fitted = fit(Task(files, files, ["a", "b"]), Features(x, []), Features(x, []), 0, CONFIG)
    assert fitted.values["clip_map"] == 1


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"file": "x.wav", "labels": "piano"}', r"line 2: .*labels must be a list, got 'piano'"),
        ('{"file": "x.wav", "labels": ["caf\udce9"]}', "line 2"),  # Latin-1
        (
            '{"file": "x.wav", "labels": ["b"], "events": [{"label": "a", "onset": 1, "offset": 2}]}',
            "line 2: .*the label 'a', which is not among the labels",
        ),
        ('{"file": "x.wav", "events": [{"label": "a", "onset": NaN, "offset": 2}]}', "line 2: .*must hold, got nan"),
        ('{"file": "x.wav", "events": [{"label": "a", "onset": 0, "offset": Infinity}]}', "line 2: .*got 0.0 and inf"),
        ('{"file": "x.wav", "events": [{"label": "a", "onset": -1, "offset": 2}]}', "line 2: .*got -1.0 and 2.0"),
        ('{"file": "x.wav", "events": [{"label": "a", "onset": 2, "offset": 1}]}', "line 2: .*got 2.0 and 1.0"),
        ('{"file": "x.wav", "events": [{"label": "a", "onset": 2, "offset": 1e9}]}', "line 2: .*offset <= 100000"),
        ('{"labels": ["a"]}', "line 2"),
        ('{"file": "x.wav"}', "line 2"),
        ('{"file": "x.wav", "events": [{"label": "a", "onset": 1}]}', "line 2"),
        ("not json", "line 2"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    text = '{"file": "x.wav", "labels": ["a"]}\n' + line + "\n"
    (tmp_path / "train.jsonl").write_text(text, errors="surrogateescape")
    with pytest.raises(UserError, match=message):
        read_labels(tmp_path / "train.jsonl")


def test_any_line_of_utf8_is_read(tmp_path):
    rows = [{"file": "x.wav", "labels": ["a\u2028b", "é"]}, {"file": "y.wav", "labels": []}]
    text = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\r\n\n"
    (tmp_path / "train.jsonl").write_bytes(text.encode("utf-8-sig"))
    files = read_labels(tmp_path / "train.jsonl")
    assert [f.labels for f in files] == [("a\u2028b", "é"), ()]


def test_a_file_too_short_for_a_patch_is_named(tmp_path):
    soundfile.write(tmp_path / "blip.wav", np.zeros(400, np.int16), 16000)
    with pytest.raises(UserError, match=r"blip\.wav: too short: 400 samples"):
        log_mels([Labelled(tmp_path / "blip.wav", ("a",), None)], {})


def test_a_checkpoint_of_no_run(run, data, tmp_path, capsys, monkeypatch):
    """A copy of a checkpoint, with labels that no test file has, into a folder with pictures of another probe."""
    monkeypatch.setenv("COLUMNS", "400")
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(checkpoint.find(run).read_bytes())
    for split in ("train", "test"):
        rows = [json.loads(line) for line in (data / f"{split}.jsonl").read_text().splitlines()]
        rows = [{"file": str(data / row["file"]), "labels": row["labels"] if split == "train" else []} for row in rows]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "probe").mkdir()
    for name in ("events.png", "mine.png"):
        (tmp_path / "probe" / name).write_text("")
    assert probe(ProbeConfig(run=copy, data=tmp_path, seeds=1)) == tmp_path / "probe"
    assert {p.name for p in (tmp_path / "probe").iterdir()} == {"probe.json", "mine.png"}
    record = json.loads((tmp_path / "probe/probe.json").read_text(), parse_constant=pytest.fail)
    assert record["results"]["pretrained"]["clip_map"]["mean"] is None
    shown = capsys.readouterr().out
    assert str(copy) in shown
    assert "not measured" in shown
    assert "tensorboard" not in shown


def test_an_older_checkpoint_is_the_one_that_is_named(run, data, tmp_path):
    for name in ("step-00000005", "step-00000009"):
        (tmp_path / "checkpoints").mkdir(exist_ok=True)
        (tmp_path / f"checkpoints/{name}.safetensors").write_bytes(checkpoint.find(run).read_bytes())
    path = tmp_path / "checkpoints/step-00000005.safetensors"
    (tmp_path / "log.jsonl").write_text('{"step": 1, "lo')
    results = {name: {"clip_top1": {}} for name in ("pretrained", "random", "log-mel")}
    panel = summary(path, results, tmp_path / "probe", ["a.png"])
    text = [str(cell) for column in panel.renderable.columns for cell in column.cells]
    assert str(path) in text
    assert not any("step-00000009" in cell for cell in text)
    assert f"a.png in {tmp_path / 'probe'}" in text
    assert draw(tmp_path, Task([Labelled("x", ("a",), None)], [], ["a"]), {}, None, tmp_path / "log.jsonl") == []


def test_the_thresholds_are_those_of_the_files_held_out(data, monkeypatch):
    """And not of the test files, which would be a leak."""
    task, seen = load_task(data), []
    train, test = (mel_features(log_mels(files, {}), 4) for files in (task.train, task.test))
    real = module.best_thresholds
    monkeypatch.setattr(module, "best_thresholds", lambda scores, truth: seen.append(truth) or real(scores, truth))
    fit(task, train, test, 0, CONFIG)
    held = np.random.default_rng(0).permutation(len(task.train))[: len(task.train) // 5]
    rolls = [roll(task.train[i].events, task.labels, len(train.frames[i])) for i in held]
    assert np.array_equal(seen[0], np.concatenate(rolls))


def test_the_regularisation_is_chosen_on_the_files_held_out(data, monkeypatch):
    """Whichever classifier is the best one there is taken, wherever it stands in the list."""
    task = load_task(data)
    task = replace(task, train=[replace(f, events=None) for f in task.train])
    features = [mel_features(log_mels(files, {}), 4) for files in (task.train, task.test)]
    truth = {}  # of each file by its features
    for f, files in zip(features, (task.train, task.test)):
        truth |= {row.tobytes(): y for row, y in zip(f.clips, task.clips(files))}
    for good in range(len(module.CLIP_C)):

        class Fake:
            def __init__(self, x, y, c, *rest, good=module.CLIP_C[good]):
                self.sign = 1 if c == good else -1

            def __call__(self, x):
                return self.sign * np.array([truth[row.tobytes()] for row in x], float)

        monkeypatch.setattr(module, "Classifiers", Fake)
        assert fit(task, *features, 0, CONFIG).values["clip_map"] == 1


def test_unusable_tasks_are_named(tmp_path, data, run):
    with pytest.raises(UserError, match="there is no labels file"):
        load_task(tmp_path)
    rows = [{"file": f"{i}.wav", "labels": [f"label{i % 2}"]} for i in range(12)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "test.jsonl").write_text('{"file": "y.wav", "labels": ["other"]}\n')
    with pytest.raises(UserError, match=r"labels that train\.jsonl lacks: other"):
        load_task(tmp_path)
    (tmp_path / "test.jsonl").write_text('{"file": "y.wav", "labels": ["label1"]}\n')
    with pytest.raises(UserError, match=r"0\.wav: unreadable"):
        probe(ProbeConfig(run=run, data=tmp_path, out=tmp_path / "out"))
    with pytest.raises(UserError, match="--seeds"):
        probe(ProbeConfig(run=run, data=data, seeds=0))
    for blocks in (-1, 0, 3):
        with pytest.raises(UserError, match=f"--blocks must be between 1 and 2 in this encoder, got {blocks}"):
            probe(ProbeConfig(run=run, data=data, blocks=blocks, out=tmp_path / "out"))
