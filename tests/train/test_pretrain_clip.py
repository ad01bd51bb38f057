"""Pretraining of ATST-Clip, from a folder to a probe; what it shares with ATST-Frame is in test_pretrain.py."""

import dataclasses
import json
import signal

import numpy as np
import pytest
import soundfile
import torch

from atst_fast import load_checkpoint, save_checkpoint
from atst_fast.models import ClipEncoder
from atst_fast.models.encoder import ARCHS
from atst_fast.train import checkpoint, pretrain
from atst_fast.train.config import UserError
from atst_fast.train.pack import PackConfig, pack
from tests.integrations.standins.audiossl_encoders import AST
from tests.tolerances import NETWORK_RTOL
from tests.train import test_pretrain as frame
from tests.train.conftest import tone, write_clips


@pytest.fixture(scope="module", autouse=True)
def _small_encoder():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as m:
        m.setitem(ARCHS, "tiny", frame.SIZE)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return write_clips(tmp_path_factory.mktemp("clips"))


def settings(data, out, **changes):
    """Ten steps on crops of 0.6 and 0.45 s."""
    method = {"method": "clip", "positive_seconds": 0.45}
    return dataclasses.replace(frame.settings(data, out), **(method | changes))


@pytest.fixture
def config(clips, tmp_path):
    return settings(clips, tmp_path / "run")


@pytest.fixture(scope="module")
def whole(clips, tmp_path_factory):
    """The run without interruption; shared, do not change it."""
    config = settings(clips, tmp_path_factory.mktemp("whole") / "run")
    assert pretrain.pretrain(config) == 0
    return config


def test_a_run_leaves_an_encoder_of_clips(whole):
    written = frame.lines(whole)
    assert [line["step"] for line in written] == [2, 4, 6, 8, 10]
    assert all(np.isfinite(line["loss"]) and line["std_teacher"] > 0 for line in written)
    record = json.loads((whole.out / "config.json").read_text())["settings"]
    assert (record["method"], record["clip_seconds"], record["positive_seconds"]) == ("clip", 0.6, 0.45)
    assert record["momentum"] == 0.99
    loaded = checkpoint.load_encoder(whole.out)
    assert isinstance(loaded.encoder, ClipEncoder)
    assert loaded.method == "clip"
    assert loaded.encoder(torch.randn(2, 1, 64, 61)).shape == (2, 24)
    weights, _ = frame.final(whole)
    assert weights["model.student.encoder.cls_token"].shape == (1, 1, 24)
    assert weights["model.teacher.encoder.pos_embed"].shape == (1, 16, 24)  # of the longer crop


def test_a_checkpoint_for_the_official_code(config, tmp_path):
    """With positions for 10 s, as that has them, whatever the crops were; all names and shapes are its own."""
    assert pretrain.pretrain(dataclasses.replace(config, max_seconds=10.0, steps=2)) == 0
    loaded = {which: load_checkpoint(checkpoint.find(config.out), which) for which in ("teacher", "student")}
    path = save_checkpoint(tmp_path / "last.ckpt", loaded, layout="lightning")
    state = torch.load(path, weights_only=True)["state_dict"]
    official, mel = AST(embed_dim=24, depth=2, num_heads=3).eval(), torch.randn(2, 1, 64, 601)
    for which in loaded:
        prefix = f"model.{which}.encoder."
        weights = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        assert weights["pos_embed"].shape == (1, 251, 24)
        official.load_state_dict(weights, strict=True)
        with torch.no_grad():
            want = official(mel, length=torch.tensor([601, 601]))
            got = loaded[which].encoder(mel)
        torch.testing.assert_close(got, want, rtol=0, atol=NETWORK_RTOL * want.abs().max().item())


def test_it_trains(whole):
    """Everything but the mask token, which has no part in ATST-Clip."""
    weights, _ = frame.final(whole)
    torch.manual_seed(whole.seed)
    alone = pretrain.World(torch.device("cpu"))
    fresh = pretrain.Run(dataclasses.replace(whole, out=whole.out.with_name("fresh")), alone, None).model.state_dict()
    still = {k for k, v in fresh.items() if torch.equal(weights[f"model.{k}"], v)}
    assert still == {"student.encoder.mask_embed", "teacher.encoder.mask_embed"}


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_signal_saves_and_the_same_command_goes_on(config, whole, monkeypatch, tmp_path, precision):
    config = dataclasses.replace(config, precision=precision)
    if precision == "bf16":
        whole = dataclasses.replace(config, out=tmp_path / "whole")
        assert pretrain.pretrain(whole) == 0
    with monkeypatch.context() as m:
        frame.interrupt_after(m, 4, lambda _: signal.raise_signal(signal.SIGTERM))
        assert pretrain.pretrain(config) == 143
    assert pretrain.pretrain(config) == 0
    frame.assert_same_run(whole, config)


def test_a_pack_trains_as_its_folder_does(config, whole, tmp_path):
    packed = pack(PackConfig(src=config.data, dst=tmp_path / "p"))
    assert pretrain.pretrain(dataclasses.replace(config, data=packed, workers=1)) == 0
    frame.assert_same_run(whole, config)


def test_it_does_not_go_on_from_the_other_method(whole):
    with pytest.raises(UserError, match="method: 'frame' now, 'clip' before"):
        pretrain.pretrain(dataclasses.replace(whole, method="frame", positive_seconds=None))


def test_the_loss_falls(clips, tmp_path):
    config = settings(clips, tmp_path / "run", lr=0.2, steps=60, log_every=1, hidden=32, batch_size=6)
    assert pretrain.pretrain(config) == 0
    losses = [line["loss"] for line in frame.lines(config)]
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:10])


def test_a_probe_reads_the_result(whole, tmp_path):
    pytest.importorskip("sklearn", reason="needs the extra eval")
    from atst_fast.train.probe import ProbeConfig, probe

    for split, count in (("train", 12), ("test", 4)):
        lines = []
        for i in range(count):
            name, label = f"{split}{i}.wav", "low" if i % 2 else "high"
            soundfile.write(tmp_path / name, tone(1.3, seed=5 + 20 * (i % 2)), 16000)
            events = [{"label": label, "onset": 0.2, "offset": 1.0}]
            lines.append(json.dumps({"file": name, "labels": [label], "events": events}))
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    out = probe(ProbeConfig(run=whole.out, data=tmp_path, out=tmp_path / "probe", seeds=1, blocks=2, max_frames=200))
    results = json.loads((out / "probe.json").read_text())["results"]
    assert set(results) == {"pretrained", "random", "log-mel"}
    assert all(0 <= value["mean"] <= 1 for value in results["pretrained"].values())
