"""Fine-tuning and distillation with encoders in bfloat16, beside float32."""

import dataclasses
import json
import os
import signal

import pytest
import torch
from rich.console import Console

from atst_fast.train import checkpoint, evaluate
from atst_fast.train.config import UserError
from atst_fast.train.distill import DistillRun, distill
from atst_fast.train.distributed import World
from atst_fast.train.finetune import FinetuneRun, finetune
from tests.conftest import needs_gpu
from tests.tolerances import BF16_STEP_RTOL
from tests.train.test_finetune import (
    AUDIOSET,
    distillation,
    scores,
    settings,
    starting_points,
)
from tests.train.tiny import assert_equal


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tones, an untrained encoder of either kind, and a fine-tuned ATST-Clip; do not change it."""
    folder = starting_points(tmp_path_factory.mktemp("bf16"))
    assert finetune(settings(folder / "data", folder / "clip", folder / "teacher", epochs=1)) == 0
    return folder


def of(folder, kind, out, **options):
    """A run of fine-tuned clips or frames, or of distillation."""
    start, level = ("clip", "clip") if kind == "clip" else ("frame", "frame" if kind == "frame" else "clip")
    config = settings(folder / "data", folder / start, out, **{"level": level, "precision": "bf16", **options})
    return distillation(config, folder / "teacher", project=8) if kind == "distill" else config


def make(config):
    kind = DistillRun if "teacher" in {f.name for f in dataclasses.fields(config)} else FinetuneRun
    return kind(config, World(torch.device("cpu")), Console(quiet=True))


@pytest.mark.parametrize("kind", ["clip", "frame", "distill"])
def test_bf16_follows_float32(kind, folder, tmp_path):
    float32, bf16 = (losses(folder, kind, tmp_path / name, precision=name) for name in ("float32", "bf16"))
    torch.testing.assert_close(bf16, float32, rtol=BF16_STEP_RTOL, atol=0)
    assert not torch.equal(bf16[:3], float32[:3])


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("kind", ["clip", "frame", "distill"])
def test_a_gpu_follows_the_cpu(kind, precision, folder, tmp_path):
    drawn = {} if kind == "frame" else AUDIOSET
    cpu = losses(folder, kind, tmp_path / "cpu", precision="float32", **drawn)
    gpu = losses(folder, kind, tmp_path / "gpu", precision=precision, device="cuda", **drawn)
    torch.testing.assert_close(gpu, cpu, rtol=BF16_STEP_RTOL, atol=0)


def losses(folder, kind, out, **options):
    """Of six steps, in which no path is dropped; there are scores at their end."""
    config = of(folder, kind, out, epochs=2, lr=2.0, drop_path=0.0, log_every=1, **options)
    assert (distill if kind == "distill" else finetune)(config) == 0
    assert scores(out).keys()
    return torch.tensor([json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()])


@pytest.mark.parametrize("kind", ["clip", "frame", "distill"])
def test_what_computes_is_the_rounded_copy(kind, folder, tmp_path):
    """Of the encoders; heads are float32."""
    run = make(of(folder, kind, tmp_path, lr=50.0))
    before = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    out = run.step(4, *run.prepare(run.batches.batch(4)))
    assert out["loss"].dtype == torch.float32
    copies, moved = dict(run.working.named_parameters()), []
    for name, p in run.model.named_parameters():
        in_encoder = name.startswith(("encoder.", "student.", "teacher.encoder."))
        assert (p.dtype, copies[name].dtype) == (torch.float32, torch.bfloat16 if in_encoder else torch.float32), name
        assert p is not copies[name]
        assert torch.equal(copies[name], p.to(copies[name].dtype)), name
        moved += [name] * (not torch.equal(p, before[name]))
        assert (p.grad is None) == (copies[name].grad is None)
    trained = {n for n in before if not n.startswith("teacher.") and "mask_embed" not in n}
    assert set(moved) == trained
    for name, buffer in run.model.named_buffers():
        assert run.working.get_buffer(name) is buffer
        assert buffer.dtype in (torch.float32, torch.int64)


@pytest.mark.parametrize("kind", ["clip", "frame", "distill"])
def test_it_goes_on_bit_for_bit_and_saves_float32(kind, folder, tmp_path, monkeypatch):
    train, config = distill if kind == "distill" else finetune, of(folder, kind, tmp_path / "parts", epochs=2)
    assert train(dataclasses.replace(config, out=tmp_path / "whole")) == 0
    real = FinetuneRun.step

    def stop(self, step, *inputs):
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, step, *inputs)

    with monkeypatch.context() as m:
        m.setattr(FinetuneRun, "step", stop)
        assert train(config) == 128 + signal.SIGINT
    for other in ("auto", "float32"):
        with pytest.raises(UserError, match="precision: 'float32' now, 'bf16' before"):
            train(dataclasses.replace(config, precision=other))
    assert train(config) == 0
    a, b = (checkpoint.load(tmp_path / name).weights for name in ("whole", "parts"))
    assert_equal(a, b, "weights")
    assert all(w.dtype == torch.float32 for name, w in a.items() if not name.endswith("num_batches_tracked"))
    assert scores(tmp_path / "whole") == scores(tmp_path / "parts")


def test_scores_are_of_the_copy(folder, tmp_path, monkeypatch):
    run, seen = make(of(folder, "clip", tmp_path)), []
    real = evaluate.clip_logits
    monkeypatch.setattr(evaluate, "clip_logits", lambda model, *rest: seen.append(model) or real(model, *rest))
    run.score()
    assert {m.encoder.pos_embed.dtype for m in seen} == {torch.bfloat16}
