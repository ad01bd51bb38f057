"""The rules that HEAR's validator holds a module to, and what it only warns of, over more lengths than it tries."""

import importlib

import pytest
import torch

from atst_fast import hear
from atst_fast.integrations import Embedder
from atst_fast.models import ClipEncoder, FrameEncoder

SIZE = {"dim": 16, "depth": 2, "num_heads": 2}
SECONDS = [1.07, 1.98, 4.0, 0.05, 0.1234, 0.999, 1.009, 10.0, 10.01, 10.05, 12.3456, 21.0]


@pytest.fixture(scope="module", params=["frame", "clip", "short chunks"])
def model(request):
    torch.manual_seed(0)
    encoder = (ClipEncoder if request.param == "clip" else FrameEncoder)(SIZE)
    return Embedder(encoder, chunk_frames=100 if request.param == "short chunks" else None).eval()


def white_noise(model, sounds, seconds):
    return torch.rand(sounds, int(seconds * model.sample_rate)) * 2 - 1


def test_the_module_has_the_functions_by_name():
    module = importlib.import_module("atst_fast.hear")
    for name in ("load_model", "get_scene_embeddings", "get_timestamp_embeddings"):
        assert callable(getattr(module, name))
    assert module.get_scene_embedding is module.get_scene_embeddings  # audiossl's spelling
    assert module.get_timestamp_embedding is module.get_timestamp_embeddings


def test_the_model_has_the_attributes(model):
    assert isinstance(model, torch.nn.Module)
    assert model.sample_rate in (16000, 22050, 44100, 48000)
    for name in ("scene_embedding_size", "timestamp_embedding_size"):
        assert type(getattr(model, name)) is int


@pytest.mark.parametrize("seconds", SECONDS)
def test_timestamp_embeddings(model, seconds):
    audio = white_noise(model, 2, seconds)
    embeddings, ms = hear.get_timestamp_embeddings(audio, model)
    assert embeddings.dtype == torch.float32
    assert embeddings.ndim == 3
    assert len(embeddings) == 2
    assert ms.shape == embeddings.shape[:2]
    assert embeddings.shape[2] == model.timestamp_embedding_size
    assert embeddings.isfinite().all()
    assert not embeddings.requires_grad
    duration = 1000 * audio.shape[1] / model.sample_rate
    steps = ms.diff()
    hop = steps.mean().item() if steps.numel() else model.hop_ms
    assert hop <= 50
    assert ((steps - hop).abs() <= 1).all()  # regular
    assert 0 <= ms.min() <= hop
    assert duration - hop <= ms.max() <= duration


@pytest.mark.parametrize("seconds", [2.74, 0.03, 11.0])
def test_scene_embeddings(model, seconds):
    embeddings = hear.get_scene_embeddings(white_noise(model, 4, seconds), model)
    assert embeddings.dtype == torch.float32
    assert embeddings.shape == (4, model.scene_embedding_size)
    assert embeddings.isfinite().all()
    assert not embeddings.requires_grad


def test_embeddings_repeat(model):
    audio = white_noise(model, 2, 1.5)
    assert torch.equal(hear.get_scene_embeddings(audio, model), hear.get_scene_embeddings(audio, model))


def test_load_model(tmp_path):
    encoder = FrameEncoder({"dim": 64, "depth": 2, "num_heads": 1}, drop_path_rate=0.5)
    path = tmp_path / "encoder.pt"
    torch.save(encoder.state_dict(), path)
    with pytest.raises(ValueError, match="no weights come with this package"):
        hear.load_model()
    model = hear.load_model(str(path), n_blocks=1)
    assert (model.scene_embedding_size, model.training) == (64, False)
    audio = white_noise(model, 2, 1.5)
    want = Embedder(encoder.eval(), n_blocks=1).scene(audio)
    assert torch.equal(hear.get_scene_embeddings(audio, model), want)
    with pytest.raises(ValueError, match="cannot read"):
        hear.load_model(tmp_path / "nowhere.pt")


def test_load_model_of_either_network(tmp_path):
    encoders = {which: FrameEncoder({"dim": 64, "depth": 1, "num_heads": 1}) for which in ("teacher", "student")}
    state = {f"model.{n}.encoder.{k}": v for n, encoder in encoders.items() for k, v in encoder.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "both.ckpt")
    for options, which in (({}, "teacher"), ({"which": "student"}, "student"), ({"which": "teacher"}, "teacher")):
        loaded = hear.load_model(tmp_path / "both.ckpt", **options)
        assert torch.equal(loaded.encoder.pos_embed, encoders[which].pos_embed)


def test_load_model_of_an_embedder_keeps_its_options(tmp_path):
    pytest.importorskip("safetensors", reason="needs the extra train")
    Embedder(FrameEncoder(SIZE), {"top_db": 40.0}, n_blocks=1, chunk_frames=100).save_pretrained(tmp_path)
    assert hear.load_model(tmp_path).n_blocks == 1
    model = hear.load_model(tmp_path, n_blocks=2)
    assert (model.n_blocks, model.chunk_frames, model.front_end.top_db) == (2, 100, 40.0)


@pytest.mark.parametrize("name", ["get_scene_embeddings", "get_timestamp_embeddings"])
def test_something_else_is_no_model(name):
    with pytest.raises(TypeError, match=f"^{name}: model must be what load_model returns, got Linear"):
        getattr(hear, name)(torch.zeros(1, 16000), torch.nn.Linear(1, 1))
