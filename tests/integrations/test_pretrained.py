import json

import pytest
import torch

from atst_fast import CheckpointError, Embedder, hear, load_checkpoint
from atst_fast.models import ClipEncoder, FrameEncoder
from tests.integrations.layouts import assert_same, moved

pytest.importorskip("safetensors", reason="needs the extra train")

SIZE = {"dim": 48, "depth": 2, "num_heads": 3}
FRONT_END = {"win_length": 640, "f_min": 50.0, "top_db": None, "minmax": None}


@pytest.fixture(params=[(FrameEncoder, FRONT_END), (ClipEncoder, FRONT_END), (FrameEncoder, {})])
def embedder(request):
    kind, front_end = request.param
    encoder = moved(kind(SIZE, max_frames=41))
    return Embedder(encoder, front_end, n_blocks=1, chunk_frames=32, batch_size=3, official=True).eval()


@torch.no_grad()
def test_round_trip(embedder, tmp_path):
    embedder.front_end.mel_scale.fb.mul_(0.9)  # tables of one's own are kept too
    again = Embedder.from_pretrained(embedder.save_pretrained(tmp_path))
    assert_same(again.state_dict(), embedder.state_dict())
    assert again.to_config() == embedder.to_config()
    assert not again.training
    waveform = torch.randn(2, 9000)
    assert torch.equal(again.scene(waveform), embedder.scene(waveform))
    assert torch.equal(again.timestamps(waveform)[0], embedder.timestamps(waveform)[0])


def test_its_encoder_alone(embedder, tmp_path):
    embedder.save_pretrained(tmp_path)
    loaded = load_checkpoint(tmp_path)
    assert_same(loaded.encoder.state_dict(), embedder.encoder.state_dict())
    assert (loaded.layout, loaded.encoder.config) == ("pretrained", embedder.encoder.config)
    assert loaded.front_end == embedder.front_end.config
    assert loaded.front_end["win_length"] == embedder.front_end.spectrogram.window.numel()
    size = embedder.scene_embedding_size  # of one block, which is what it says of itself
    assert hear.load_model(tmp_path).scene_embedding_size == size
    assert hear.load_model(tmp_path, n_blocks=2).scene_embedding_size == 2 * size


def test_refusals(embedder, tmp_path):
    with pytest.raises(ValueError, match=r"Embedder\.save_pretrained: front_end must be None: the module has its own"):
        embedder.save_pretrained(tmp_path, front_end={})
    embedder.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="holds a module of class Embedder, not FrameEncoder"):
        FrameEncoder.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["encoder"] = "Linear"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"config\.json describes no Embedder .KeyError.'Linear'"):
        Embedder.from_pretrained(tmp_path)
