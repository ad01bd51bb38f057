import json

import pytest
import torch

from atst_fast import CheckpointError, inspect_checkpoint, load_checkpoint
from atst_fast.models import ClipEncoder, FrameEncoder
from atst_fast.models.pretrained import CONFIG_FILE, WEIGHTS_FILE, Pretrained, read_safetensors, write_safetensors
from tests.integrations.layouts import FRAMES, assert_same, moved

pytest.importorskip("safetensors", reason="needs the extra train")

SIZE = {"dim": 48, "depth": 2, "num_heads": 3}
KINDS = [FrameEncoder, ClipEncoder]


@pytest.fixture(params=KINDS)
def encoder(request):
    return moved(request.param(SIZE, max_frames=FRAMES, n_mels=128, patch=(64, 4), drop_path_rate=0.2))


def test_round_trip(encoder, tmp_path):
    folder = encoder.save_pretrained(tmp_path / "a" / "b")
    assert {p.name for p in folder.iterdir()} == {"config.json", "model.safetensors"}
    again = type(encoder).from_pretrained(str(folder))
    assert type(again) is type(encoder)
    assert again.config == encoder.config
    assert not again.training
    assert_same(again.state_dict(), encoder.state_dict())
    mel = torch.randn(1, 1, 128, 24)
    assert torch.equal(again(mel), encoder.eval()(mel))
    assert all(p.requires_grad for p in again.parameters())
    assert all(p.is_meta for p in type(encoder).from_config(encoder.to_config()).parameters())


def test_load_checkpoint_reads_it(encoder, tmp_path):
    encoder.save_pretrained(tmp_path, front_end={"n_mels": 128, "win_length": 640, "minmax": (-1.0, 2.0)})
    loaded = load_checkpoint(tmp_path)
    assert_same(loaded.encoder.state_dict(), encoder.state_dict())
    assert loaded.encoder.config == encoder.config
    assert loaded.layout == "pretrained"
    assert loaded.method == ("clip" if isinstance(encoder, ClipEncoder) else "frame")
    assert (loaded.front_end["win_length"], loaded.front_end["minmax"]) == (640, (-1.0, 2.0))
    (tmp_path / "more").mkdir()
    assert inspect_checkpoint(tmp_path).size == sum((tmp_path / n).stat().st_size for n in (CONFIG_FILE, WEIGHTS_FILE))
    shorter = load_checkpoint(tmp_path, pos_embed="cut", max_frames=20)
    assert shorter.encoder.max_frames == 20


def test_saving_again_replaces(encoder, tmp_path):
    encoder.save_pretrained(tmp_path)
    moved(encoder).save_pretrained(tmp_path)
    assert_same(type(encoder).from_pretrained(tmp_path).state_dict(), encoder.state_dict())


def test_another_class_is_refused(tmp_path):
    FrameEncoder(SIZE, max_frames=FRAMES).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="holds a module of class FrameEncoder, not ClipEncoder"):
        ClipEncoder.from_pretrained(tmp_path)


def test_refusals(encoder, tmp_path):
    kind = type(encoder)
    with pytest.raises(CheckpointError, match=r"has no config\.json and no model\.safetensors"):
        kind.from_pretrained(tmp_path)
    encoder.save_pretrained(tmp_path)
    with torch.no_grad():
        encoder.pos_embed[0, 0, 0] = float("inf")
    encoder.mask_embed = None
    encoder.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"1 missing: mask_embed; 1 not finite: pos_embed$") as error:
        kind.from_pretrained(tmp_path)
    assert (error.value.missing, error.value.not_finite) == (("mask_embed",), ("pos_embed",))
    config = json.loads((tmp_path / "config.json").read_text())
    config["model"]["colour"] = "red"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"its config.json describes no {kind.__name__} .*colour"):
        kind.from_pretrained(tmp_path)
    config["model"].pop("colour")
    config["model"]["arch"]["num_heads"] = 0
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"its config.json describes no {kind.__name__} .*num_heads"):
        kind.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: its configuration is no JSON"):
        kind.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match=r"cannot read .*config\.json"):
        kind.from_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").mkdir()
    with pytest.raises(CheckpointError, match=r"has no config\.json, which save_pretrained writes"):
        kind.from_pretrained(tmp_path)
    (tmp_path / "config.json").rmdir()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors, which save_pretrained writes"):
        kind.from_pretrained(tmp_path)


def test_tensors_that_share_their_memory(tmp_path):
    """safetensors would refuse them."""
    x = torch.randn(3, 4)
    write_safetensors(tmp_path / "a", {"a": x, "b": x, "c": x.t(), "d": x[1]}, {})
    assert_same(read_safetensors(tmp_path / "a")[0], {"a": x, "b": x, "c": x.t(), "d": x[1]})


def test_without_safetensors(encoder, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"pip install 'atst_fast\[train\]'"):
        encoder.save_pretrained(tmp_path)


def test_a_module_says_how_it_is_built():
    with pytest.raises(NotImplementedError, match=r"Pretrained\.to_config"):
        Pretrained().to_config()
    with pytest.raises(NotImplementedError, match=r"Pretrained\.from_config"):
        Pretrained.from_config({})
