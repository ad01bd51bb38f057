"""Fine-tuning and distillation end to end on tones: what is learned, continued bit for bit, and every message."""

import dataclasses
import json
import os
import re
import signal

import numpy as np
import pytest
import soundfile
import torch
from rich.console import Console
from safetensors import safe_open

from atst_fast import load_checkpoint
from atst_fast.models import ATSTFrame, ClipEncoder
from atst_fast.train import checkpoint, evaluate
from atst_fast.train.cli import main
from atst_fast.train.config import UserError
from atst_fast.train.distill import DistillRun, distill
from atst_fast.train.distributed import World
from atst_fast.train.evaluate import Evaluation, clip_logits, held_out, token_logits
from atst_fast.train.features import Labelled
from atst_fast.train.finetune import FinetuneRun, finetune
from atst_fast.train.finetune_config import DistillConfig, FinetuneConfig
from atst_fast.train.labelled import Reader
from atst_fast.train.metrics import Event
from atst_fast.train.tagger import load_tagger
from tests.tolerances import CHUNKED_FEATURES
from tests.train.tiny import assert_equal

SIZE = {"dim": 32, "depth": 2, "num_heads": 2}
PITCH = {"high": 3000.0, "low": 300.0, "middle": 1000.0}
AUDIOSET = {"sampler": "balanced", "mixup_partner": "file", "mixup_prob": 0.5, "freq_mask": 20, "time_mask": 20}
FRONT_END = {"n_mels": 64, "win_length": 1024}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Two that wait for each other on a busy machine take ten times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write_tones(folder, *, single=False, counts=(16, 6)):
    """Files of 0.9 to 1.2 s with tones of one or two of three pitches, each with its own start and end."""
    rng = np.random.default_rng(0)
    for split, count in zip(("train", "test"), counts):
        rows = []
        for i in range(count):
            seconds = rng.uniform(0.9, 1.2)
            t = np.arange(int(seconds * 16000)) / 16000
            audio, events = 0.003 * rng.standard_normal(len(t)), []
            chosen = [sorted(PITCH)[i % 3]] if single else rng.choice(sorted(PITCH), 1 + i % 2, replace=False)
            for label in chosen:
                onset, offset = rng.uniform(0, 0.3), rng.uniform(0.6, 0.9)
                audio += 0.2 * np.sin(2 * np.pi * PITCH[label] * t) * ((t >= onset) & (t < offset))
                events.append({"label": str(label), "onset": onset, "offset": offset})
            soundfile.write(folder / f"{split}{i}.wav", (audio * 32767).astype(np.int16), 16000)
            rows.append({"file": f"{split}{i}.wav", "labels": sorted(e["label"] for e in events), "events": events})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_tones(tmp_path_factory.mktemp("tones"))


@pytest.fixture(scope="module")
def frame(tmp_path_factory):
    return untrained_frame(tmp_path_factory.mktemp("frame"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return untrained_clip(tmp_path_factory.mktemp("clip"))


def untrained_frame(folder):
    """A run's folder with an untrained ATST-Frame in it."""
    torch.manual_seed(1)
    model = ATSTFrame(SIZE, hidden=32, out=16, max_frames=81)
    checkpoint.save(folder, 5, model.state_dict(), {}, {"model": model.config, "front_end": FRONT_END}, keep=1)
    (folder / "config.json").write_text("{}")
    return folder


def untrained_clip(folder):
    """The same of an ATST-Clip."""
    torch.manual_seed(2)
    encoder = ClipEncoder(SIZE, max_frames=81)
    weights = {f"{n}.encoder.{k}": v.clone() for n in ("teacher", "student") for k, v in encoder.state_dict().items()}
    checkpoint.save(folder, 5, weights, {}, {"model": encoder.config, "front_end": FRONT_END}, keep=1)
    return folder


def starting_points(folder):
    """Tones in ``data``, and an untrained encoder of either kind in ``clip`` and ``frame``."""
    for name in ("data", "clip", "frame"):
        (folder / name).mkdir()
    write_tones(folder / "data")
    untrained_clip(folder / "clip")
    untrained_frame(folder / "frame")
    return folder


def settings(data, start, out, **options):
    """A run of six epochs of three steps each, with checkpoints after every second one."""
    values = {
        "checkpoint": start,
        "data": data,
        "out": out,
        "epochs": 6,
        "warmup_epochs": 1,
        "batch_size": 4,
        "lr": 20.0,
        "save_every": 2,
        "eval_every": 3,
        "log_every": 2,
        "workers": 1,
        "device": "cpu",
    }
    return FinetuneConfig(**values | options)


def distillation(config, teacher, **options):
    return DistillConfig(**{**dataclasses.asdict(config), "teacher": teacher, **options})


def scores(run):
    return json.loads((run / "scores.json").read_text())["test"]


@pytest.fixture(scope="module")
def teachers(data, clip, tmp_path_factory):
    """A fine-tuned ATST-Clip of each level; shared, do not change it."""
    runs = {}
    for level in ("clip", "frame"):
        runs[level] = tmp_path_factory.mktemp(level) / "run"
        assert finetune(settings(data, clip, runs[level], level=level)) == 0
    return runs


@pytest.mark.parametrize("start", ["frame", "clip"])
def test_clips_are_learned(start, data, request, tmp_path, capsys):
    config = settings(
        data,
        request.getfixturevalue(start),
        tmp_path / "run",
        epochs=20,
        mixup=False,
        layer_decay=1.0,
        lr=8.0,
        save_every=20,
    )
    assert finetune(config) == 0
    got = scores(config.out)
    assert set(got) == {"clip_map", "clip_top1"}
    assert got["clip_map"] > 0.9  # pure tones; by chance it is at the share of positives, one half
    rows = [json.loads(line) for line in (config.out / "log.jsonl").read_text().splitlines()]
    assert np.median([row["loss"] for row in rows[-10:]]) < 0.5 * rows[0]["loss"]
    assert "held_out_map" in rows[-1]
    shown = capsys.readouterr().err
    assert f"fine-tuning ATST-{start.title()} at clip level" in shown
    assert "clip mAP" in shown
    tagger = load_tagger(config.out)
    assert tagger.labels == ["high", "low", "middle"]
    assert tagger.front_end["n_mels"] == 64


def test_events_are_learned(data, frame, tmp_path):
    config = settings(data, frame, tmp_path / "run", level="frame", epochs=20, layer_decay=1.0, median=3, save_every=20)
    assert finetune(config) == 0
    got = scores(config.out)
    assert set(got) == {"frame_map", "segment_f1", "event_f1"}
    assert got["frame_map"] > 0.9
    assert got["segment_f1"] > 0.9


@pytest.mark.parametrize("level", ["clip", "frame"])
def test_distillation(level, data, frame, teachers, tmp_path):
    config = distillation(settings(data, frame, tmp_path / "run", level=level, epochs=2), teachers[level])
    assert distill(config) == 0
    row = json.loads((config.out / "log.jsonl").read_text().splitlines()[-1])
    assert row["loss"] == pytest.approx((row["label"] + row["distillation"]) / 2, rel=1e-6)
    path = checkpoint.find(config.out)
    with safe_open(path, framework="pt") as f:
        names = set(f.keys())
    assert {"model.teacher.encoder.cls_token", "model.teacher.head.linear.weight"} <= names
    assert {"model.student.norm_frame.weight", "model.linear.linear.bias"} <= names
    for which, start in (("teacher", teachers[level]), ("student", frame)):  # more than the shapes of their tensors say
        want = load_checkpoint(checkpoint.find(start)).encoder.config
        assert load_checkpoint(checkpoint.find(config.out), which).encoder.config == want
    student = load_tagger(config.out).model
    assert student.encoder_is_frame
    assert student.level == level
    # the teacher's weights are those of its run; its running statistics move at clip level, where it is in train mode
    before = load_tagger(teachers[level]).model.state_dict()
    after = {k.removeprefix("model.teacher."): v for k, v in checkpoint.load(path).weights.items() if "teacher" in k}
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert moved == (
        {f"head.norm.{k}" for k in ("running_mean", "running_var", "num_batches_tracked")} if level == "clip" else set()
    )


def test_official_keys(data, frame, teachers):
    with safe_open(checkpoint.find(teachers["clip"]), framework="pt") as f:
        names = set(f.keys())
    assert {"encoder.encoder.cls_token", "encoder.encoder.blocks.0.attn.qkv.weight"} <= names
    assert {"head.norm.running_mean", "head.linear.weight"} <= names
    assert all(name.startswith(("encoder.encoder.", "head.")) for name in names)


@pytest.mark.parametrize("kind", ["clips", "frames", "distilled", "drawn"])
def test_a_run_that_is_stopped_goes_on_bit_for_bit(kind, data, frame, teachers, tmp_path, monkeypatch, capsys):
    def config(name):
        more = {"level": "frame"} if kind == "frames" else AUDIOSET if kind == "drawn" else {}
        c = settings(data, frame, tmp_path / name, **more)
        return distillation(c, teachers["clip"]) if kind == "distilled" else c

    run = distill if kind == "distilled" else finetune
    assert run(config("whole")) == 0
    real = FinetuneRun.step

    def stop(self, step, *inputs):
        if step == 7:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, step, *inputs)

    monkeypatch.setattr(FinetuneRun, "step", stop)
    assert run(config("parts")) == 128 + signal.SIGINT
    assert "SIGINT: saved" in capsys.readouterr().err
    assert not (tmp_path / "parts/scores.json").exists()
    monkeypatch.undo()
    assert run(config("parts")) == 0
    a, b = (checkpoint.find(tmp_path / name) for name in ("whole", "parts"))
    assert a.name == b.name == "step-00000018.safetensors"
    assert_equal(checkpoint.load(a).weights, checkpoint.load(b).weights, "weights")
    assert_equal(checkpoint.load_state(a), checkpoint.load_state(b), "state")
    assert scores(tmp_path / "whole") == scores(tmp_path / "parts")
    logs = [
        [json.loads(line) for line in (tmp_path / n / "log.jsonl").read_text().splitlines()] for n in ("whole", "parts")
    ]
    steps = [{row["step"]: row["loss"] for row in log} for log in logs]
    assert steps[0].items() <= steps[1].items()  # the second one has a line at the step where it was stopped
    assert run(config("parts")) == 0
    assert "complete: 18 of 18 steps" in capsys.readouterr().err


def test_one_label_each_is_a_choice(frame, tmp_path):
    folder = tmp_path / "single"
    folder.mkdir()
    write_tones(folder, single=True)
    config = settings(folder, frame, tmp_path / "run", epochs=2, mixup=False)
    assert finetune(config) == 0
    assert json.loads((config.out / "config.json").read_text())["settings"]["loss"] == "ce"


def test_an_optimizer_group_for_each_scale(data, frame, tmp_path):
    config = settings(data, frame, tmp_path, layer_decay=0.5, clip_norm=0.01, lr=2000.0)
    run = FinetuneRun(config, World(torch.device("cpu")), Console(quiet=True))
    groups = {g["scale"]: g["params"] for g in run.optimizer.param_groups}
    assert set(groups) == {1.0, 0.5, 0.25}
    assert sum(map(len, groups.values())) == len(list(run.model.parameters()))
    assert any(p is run.model.head.linear.weight for p in groups[1.0])
    batch = run.batches.batch(4)
    before = [p.detach().clone() for p in run.model.parameters()]
    run.step(4, *run.prepare(batch))
    assert [g["lr"] for g in run.optimizer.param_groups] == [run.rates[4] * s for s in (0.25, 0.5, 1.0)]
    norm = sum(p.grad.square().sum() for p in run.model.parameters() if p.grad is not None).sqrt()
    assert norm <= 0.01 * 1.001
    names = [n for (n, p), b in zip(run.model.named_parameters(), before) if torch.equal(p, b)]
    assert names == ["encoder.mask_embed"]


@pytest.mark.parametrize("kind", [FinetuneRun, DistillRun])
def test_padding_is_not_trained_on(kind, data, frame, teachers, tmp_path):
    config = settings(data, frame, tmp_path, level="frame", drop_path=0.0)
    config = distillation(config, teachers["frame"]) if kind is DistillRun else config
    run = kind(config, World(torch.device("cpu")), Console(quiet=True))
    batch = run.batches.batch(0)
    mel, lengths, targets, valid = run.prepare(batch)
    tokens = (batch.lengths // 160 + 1) // 4
    assert lengths.tolist() == (batch.lengths // 160 + 1).tolist()
    assert valid.sum(1).tolist() == tokens.tolist()
    assert len(set(tokens.tolist())) > 1
    assert valid.shape == targets.shape[:2] == (len(mel), mel.shape[3] // 4)
    torch.nn.init.ones_(run.tagger.head.linear.bias)  # of a logit of 0 either answer costs the same
    out = run.losses(mel, lengths, targets, valid)["loss"]
    torch.testing.assert_close(
        run.losses(mel, lengths, torch.where(valid[..., None], targets, 1.0), valid)["loss"], out
    )


def test_scores_do_not_depend_on_what_else_is_in_the_batch(data, teachers, monkeypatch):
    files = [Labelled(data / f"test{i}.wav", ("high",), ()) for i in range(6)]
    model, _, front_end = load_tagger(teachers["clip"])
    (together,) = clip_logits(model, Reader(files), front_end, 0.95, range(6))
    monkeypatch.setattr(evaluate, "BATCH", 1)
    alone = np.concatenate(list(clip_logits(model, Reader(files), front_end, 0.95, range(6))))
    assert np.abs(alone - together).max() < CHUNKED_FEATURES
    model, _, front_end = load_tagger(teachers["frame"])
    whole = list(token_logits(model, Reader(files), front_end, range(6)))
    monkeypatch.setattr(evaluate, "PIECE", 1)
    for a, b in zip(whole, token_logits(model, Reader(files), front_end, range(6)), strict=True):
        assert a.shape == b.shape
        assert np.abs(a - b).max() < CHUNKED_FEATURES


def test_thresholds_are_those_of_the_files_held_out(data, teachers, monkeypatch):
    model, labels, front_end = load_tagger(teachers["frame"])
    files = [Labelled(data / f"test{i}.wav", ("high",), (Event("high", 0.2, 0.4),)) for i in range(4)]
    s = {"level": "frame", "seconds": 10.0, "median": 1}
    seen = []
    monkeypatch.setattr(evaluate, "frame_values", lambda *a: seen.append(a[3]) or ([], {}))
    world = World(torch.device("cpu"))
    held = Evaluation(Reader(files[:2]), Reader(files[2:]), labels, front_end, s, world)
    held.test(model.train())
    assert model.training
    model.eval()
    truth = np.concatenate([s[:, 0] for s in token_logits(model, Reader(files[:2]), front_end, range(2))])
    assert seen[0][0] in truth
    Evaluation(Reader([]), Reader(files[2:]), labels, front_end, s, world).test(model)
    assert not seen[1].any()
    assert not seen[0][1:].any()  # of labels that no such file has
    assert held_out(files, 0, 0)[0] == []
    one, others = held_out(files, 0.1, 0)
    assert len(one) == 1
    assert {*map(id, one), *map(id, others)} == set(map(id, files))


def test_messages(data, frame, clip, teachers, tmp_path):
    def refused(message, start=frame, run=finetune, **options):
        teacher = options.pop("teacher", None)
        config = settings(data, start, tmp_path / "run", **options)
        with pytest.raises(UserError, match=message):
            run(distillation(config, teacher) if teacher else config)

    refused("13 files to train on do not fill one batch: a smaller --batch-size", batch_size=32)
    refused("--chunk-seconds must be at most 0.81 with .*, got 0.9", chunk_seconds=0.9)
    refused("--no-scale-bug has no effect on an ATST-Frame", scale_bug=False)
    refused("nowhere: No such file", start=tmp_path / "nowhere")
    refused("--checkpoint must be an ATST-Frame, got an ATST-Clip", start=clip, run=distill, teacher=teachers["clip"])
    refused("was fine-tuned at level clip, and --level is frame", run=distill, teacher=teachers["clip"], level="frame")
    square = tmp_path / "square"
    encoder = ClipEncoder(SIZE, patch=(16, 16), max_frames=96)
    weights = {f"{n}.encoder.{k}": v.clone() for n in ("teacher", "student") for k, v in encoder.state_dict().items()}
    checkpoint.save(square, 1, weights, {}, {"model": encoder.config, "front_end": FRONT_END}, keep=1)
    refused("--level frame needs one token at a time; .*square has 4", start=square, level="frame")
    refused("holds no head", run=distill, teacher=frame)
    assert finetune(settings(data, frame, tmp_path / "run", epochs=1)) == 0
    refused(r"belongs to a run of other settings.*\n  epochs: 2 now, 1 before", epochs=2)
    refused("holds a run .* and --resume is never", epochs=1, resume="never")
    other = tmp_path / "other"
    other.mkdir()
    write_tones(other, counts=(15, 6))
    with pytest.raises(UserError, match=r"files: '.*' now, '.*' before"):
        finetune(settings(other, frame, tmp_path / "run", epochs=1))
    rows = [json.loads(line) for line in (other / "train.jsonl").read_text().splitlines()]
    (other / "train.jsonl").write_text("".join(json.dumps({k: r[k] for k in ("file", "labels")}) + "\n" for r in rows))
    with pytest.raises(UserError, match="--level frame needs the events of every file"):
        finetune(settings(other, frame, tmp_path / "events", level="frame"))
    (other / rows[3]["file"]).write_bytes(b"")
    with pytest.raises(UserError, match=r"\.wav: empty"):
        finetune(settings(other, frame, tmp_path / "broken", validation=0, eval_every=10))
    for split in ("train", "test"):
        text = (
            (data / f"{split}.jsonl").read_text().replace('"high"', '"loud"').replace('"file": "', f'"file": "{data}/')
        )
        (other / f"{split}.jsonl").write_text(text)
    labels = r"\['high', 'low', 'middle'\] and \['loud', 'low', 'middle'\]"
    with pytest.raises(UserError, match=f"has other labels than .*{labels}"):
        distill(distillation(settings(other, frame, tmp_path / "labels"), teachers["clip"]))


def test_command_line(data, tmp_path, capsys):
    assert (
        main(
            [
                "finetune",
                "--checkpoint",
                str(tmp_path / "no"),
                "--data",
                str(data),
                "--out",
                str(tmp_path / "x"),
                "--batch-size",
                "4",
            ]
        )
        == 2
    )
    assert re.search("atst-fast finetune: .*no: No such file", capsys.readouterr().err)
    with pytest.raises(SystemExit):
        main(["distill", "--help"])
    assert "--teacher-mode" in capsys.readouterr().out
