import json
import os
import stat
from pathlib import Path

import pytest
import torch

from atst_fast import Checkpoint, load_checkpoint, save_checkpoint
from atst_fast.models import ClipEncoder, FrameEncoder
from atst_fast.models.pretrained import write_pickle
from tests.integrations.layouts import (
    FRAMES,
    HYPER,
    SIZE,
    assert_same,
    clip_system,
    dino,
    distilled,
    fine_tuned,
    frame_system,
    lightning,
    linear_head,
    moved,
    prefixed,
)

safe_open = pytest.importorskip("safetensors", reason="needs the extra train").safe_open
load_file = pytest.importorskip("safetensors.torch", reason="needs the extra train").load_file

SYSTEMS = {"frame": frame_system, "clip": clip_system}


def tensors_of(path):
    """All tensors of a file by name, whoever wrote it, without our reader."""
    if path.suffix == ".safetensors":
        return load_file(path)
    with torch.serialization.safe_globals([__import__("argparse").Namespace]):
        content = torch.load(path, weights_only=True)
    if "state_dict" in content:
        return content["state_dict"]
    if "teacher" in content:
        return {f"{n}.{k}": v for n in ("teacher", "student") if n in content for k, v in content[n].items()}
    return content


def assert_equal(a, b):
    """Two Checkpoints, but for what saving adds to the configuration."""
    assert_same(a.encoder.state_dict(), b.encoder.state_dict())
    assert_same(a.heads, b.heads)
    assert (a.encoder.config, a.front_end, a.method, a.layout) == (b.encoder.config, b.front_end, b.method, b.layout)
    kept = {k: v for k, v in a.config.items() if k not in ("model", "models", "front_end")}
    assert {k: b.config.get(k) for k in kept} == kept


def write_official(layout, method, path):
    """A file of that layout, not written by `save_checkpoint`; the roles in it."""
    system = SYSTEMS[method]()
    encoder = system.teacher.encoder.state_dict()
    if layout == "lightning":
        lightning(path, prefixed("model.", system.state_dict()), HYPER | {"win_length": 640})
        return ["teacher", "student"]
    if layout == "dino":
        both = (("teacher", system.teacher), ("student", system.student))
        dino(path, {n: (net.encoder.state_dict(), net.projector.state_dict()) for n, net in both}, arch="ast")
        return ["teacher", "student"]
    if layout == "distilled":
        lightning(path, prefixed("model.", distilled(project=8).state_dict()), {"max_epochs": 3})
        return ["teacher", "student"]
    if layout == "finetuned":
        lightning(path, prefixed("encoder.encoder.", encoder) | linear_head(64), {"num_labels": 3})
    else:
        torch.save(encoder | linear_head(64), path)
    return ["teacher"]


@pytest.mark.parametrize("method", SYSTEMS)
@pytest.mark.parametrize("layout", ["lightning", "dino", "finetuned", "distilled", "bare"])
def test_round_trip_of_every_official_layout(tmp_path, layout, method):
    """Read, written back and read again: the same names and numbers in the file, and the same Checkpoints."""
    path, again = tmp_path / "official.ckpt", tmp_path / "again.ckpt"
    roles = write_official(layout, method, path)
    loaded = {role: load_checkpoint(path, role) for role in roles}
    save_checkpoint(again, loaded, layout=layout)
    assert_same(tensors_of(again), tensors_of(path))
    for role in roles:
        assert_equal(loaded[role], load_checkpoint(again, role))


@pytest.mark.parametrize("method", SYSTEMS)
@pytest.mark.parametrize("layout", ["lightning", "safetensors", "dino"])
def test_systems(tmp_path, layout, method):
    system = SYSTEMS[method](drop_path_rate=0.2, mlp_ratio=2.0)
    path = save_checkpoint(tmp_path / "a.ckpt", system, layout=layout, front_end={"win_length": 640})
    for which in ("teacher", "student"):
        loaded, network = load_checkpoint(path, which), getattr(system, which)
        assert loaded.layout == layout
        assert_same(prefixed("encoder.", loaded.encoder.state_dict()) | loaded.heads, network.state_dict())
        assert loaded.encoder.config == network.encoder.config
        assert (loaded.front_end["win_length"], loaded.front_end["n_mels"]) == (640, 64)


def test_what_audiossl_reads(tmp_path):
    """The entries that its scripts and Lightning's load_from_checkpoint ask for."""
    system = frame_system()
    save_checkpoint(tmp_path / "a.ckpt", system, config={"epoch": 4, "global_step": 90})
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert set(content["state_dict"]) == {f"model.{k}" for k in system.state_dict()}
    assert {"pytorch-lightning_version", "epoch", "global_step", "hyper_parameters"} <= set(content)
    assert (content["epoch"], content["global_step"]) == (4, 90)
    said = content["hyper_parameters"]
    assert said.items() >= {"patch_h": 64, "patch_w": 4, "n_mels": 64, "spec_w": FRAMES, "win_length": 1024}.items()
    assert said.items() >= {"nprompt": 0, "avg_blocks": 0, "pos_type": "cut", "patch_embed": "Linear"}.items()
    assert not {"drop_path_rate", "mlp_ratio"} & set(said)  # audiossl's own values
    save_checkpoint(tmp_path / "b.ckpt", FrameEncoder("tiny"))
    assert torch.load(tmp_path / "b.ckpt", weights_only=True)["hyper_parameters"]["arch"] == "tiny"


def test_what_pretrain_reads(tmp_path):
    from atst_fast.train import checkpoint

    system = frame_system()
    save_checkpoint(tmp_path / "a.safetensors", system, layout="safetensors", config={"step": 7, "settings": {"a": 1}})
    loaded = checkpoint.load(tmp_path / "a.safetensors")
    assert (loaded.step, loaded.config["settings"]) == (7, {"a": 1})
    assert_same(loaded.weights, prefixed("model.", system.state_dict()))


@pytest.mark.parametrize("kind", [FrameEncoder, ClipEncoder])
@pytest.mark.parametrize("layout", ["lightning", "safetensors", "dino", "finetuned", "bare"])
def test_an_encoder_alone(tmp_path, kind, layout):
    encoder = moved(kind(SIZE, max_frames=FRAMES))
    loaded = load_checkpoint(save_checkpoint(tmp_path / "a.bin", encoder, layout=layout))
    assert (loaded.layout, loaded.heads) == (layout, {})
    assert type(loaded.encoder) is kind
    assert_same(loaded.encoder.state_dict(), encoder.state_dict())
    assert loaded.encoder.config == encoder.config
    if layout in ("lightning", "safetensors", "dino"):
        save_checkpoint(tmp_path / "b.bin", encoder, layout=layout, which="student")
        assert_same(load_checkpoint(tmp_path / "b.bin", "student").encoder.state_dict(), encoder.state_dict())


@pytest.mark.parametrize("which", ["teacher", "student"])
def test_one_network_of_a_system(tmp_path, which):
    system = frame_system()
    loaded = load_checkpoint(save_checkpoint(tmp_path / "a.pt", system, layout="bare", which=which))
    assert_same(loaded.encoder.state_dict(), getattr(system, which).encoder.state_dict())
    assert loaded.heads.keys() == {k for k in getattr(system, which).state_dict() if not k.startswith("encoder.")}


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_fine_tuned_and_distilled(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    model = fine_tuned()
    loaded = load_checkpoint(save_checkpoint(path, model, layout="finetuned", front_end={"win_length": 640}))
    assert set(tensors_of(path)) >= {"encoder.encoder.cls_token", "head.linear.weight"}
    assert (loaded.layout, loaded.encoder.config) == ("finetuned", model.encoder.config)
    assert_same(loaded.heads, prefixed("head.", model.head.state_dict()))
    assert loaded.front_end["win_length"] == 640
    model = distilled()
    save_checkpoint(path, model, layout="distilled", front_end={"win_length": 640})
    assert_same(tensors_of(path), prefixed("model.", model.state_dict()))
    teacher, student = (load_checkpoint(path, which) for which in ("teacher", "student"))
    assert (teacher.encoder.config, student.encoder.config) == (model.teacher.encoder.config, model.student.config)
    assert (teacher.front_end["win_length"], student.front_end["win_length"]) == (640, 640)


def test_sizes_that_no_shape_shows_are_kept(tmp_path):
    encoder = moved(FrameEncoder({"dim": 48, "depth": 1, "num_heads": 3}, max_frames=43, n_mels=128))
    for layout in ("lightning", "safetensors", "dino", "finetuned"):
        loaded = load_checkpoint(save_checkpoint(tmp_path / "a.bin", encoder, layout=layout))
        assert loaded.encoder.config == encoder.config
        assert loaded.front_end["n_mels"] == 128


def test_each_network_of_a_file_has_its_own_sizes(tmp_path):
    sizes = ({"dim": 48, "depth": 1, "num_heads": 3}, {"dim": 48, "depth": 2, "num_heads": 2})
    encoders = {"teacher": moved(ClipEncoder(sizes[0])), "student": moved(FrameEncoder(sizes[1], max_frames=43))}
    save_checkpoint(tmp_path / "a.ckpt", encoders, layout="distilled")
    for which, encoder in encoders.items():
        loaded = load_checkpoint(tmp_path / "a.ckpt", which)
        assert loaded.encoder.config == encoder.config
        assert_same(loaded.encoder.state_dict(), encoder.state_dict())


def test_the_file_is_replaced_as_a_whole(tmp_path, monkeypatch):
    path = save_checkpoint(tmp_path / "a.safetensors", frame_system(), layout="safetensors")
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask
    with safe_open(path, framework="pt") as f:
        assert json.loads(f.metadata()["config"])["model"]["max_frames"] == FRAMES
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for layout in ("safetensors", "lightning"):
        with pytest.raises(OSError, match="No space left"):
            save_checkpoint(path, clip_system(), layout=layout)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_an_error_of_the_disk():
    """torch.save by itself raises a RuntimeError of its own."""
    with pytest.raises(OSError, match="No space left"):
        write_pickle(Path("/dev/full"), {"x": torch.zeros(1_000_000)})


def test_a_folder_that_is_not_there(tmp_path):
    for layout in ("safetensors", "lightning"):
        with pytest.raises(OSError, match=r"nowhere"):
            save_checkpoint(tmp_path / "nowhere" / "a", frame_system(), layout=layout)


@pytest.mark.parametrize(
    "model, arguments, message",
    [
        (FrameEncoder, {"layout": "onnx"}, "save_checkpoint: layout must be one of lightning, .*, got 'onnx'"),
        (FrameEncoder, {"which": "both"}, "which must be one of teacher, student, got 'both'"),
        (FrameEncoder, {"layout": "distilled"}, "'distilled' holds a teacher and a student, got teacher alone"),
        (
            lambda *_, **__: torch.nn.Linear(1, 1),
            {},
            "model must hold an encoder or a student and a teacher, got Linear",
        ),
        (lambda *_, **__: {}, {}, "model must be a mapping of 'teacher' and 'student'"),
        (lambda *_, **__: 3, {}, "model must be a module, a Checkpoint or a mapping of them, got int 3"),
    ],
)
def test_wrong_arguments(tmp_path, model, arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        save_checkpoint(tmp_path / "a.pt", model(SIZE, max_frames=FRAMES), **arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layout", ["lightning", "safetensors", "dino", "bare"])
def test_heads_without_a_place(tmp_path, layout):
    encoder = FrameEncoder(SIZE, max_frames=FRAMES)
    checkpoint = Checkpoint(encoder, {}, "frame", "finetuned", {"colour.weight": torch.ones(3)}, {})
    with pytest.raises(ValueError, match=f"layout '{layout}' has no place for heads named colour"):
        save_checkpoint(tmp_path / "a.pt", checkpoint, layout=layout)
