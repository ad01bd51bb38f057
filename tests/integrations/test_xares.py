"""What the checker of X-ARES asks of an encoder."""

import pytest
import torch

from atst_fast.integrations.embedding import Embedder
from atst_fast.integrations.xares import ATSTEncoder
from atst_fast.models import ClipEncoder, FrameEncoder

SIZE = {"dim": 16, "depth": 2, "num_heads": 2}


@pytest.fixture(params=[FrameEncoder, ClipEncoder])
def encoder(request):
    return ATSTEncoder(Embedder(request.param(SIZE), n_blocks=1))


def test_conforms(encoder):
    assert type(encoder).__name__.endswith("Encoder")
    assert isinstance(encoder, torch.nn.Module)
    assert (encoder.sampling_rate, encoder.output_dim, encoder.hop_size_in_ms) == (16000, 16, 40)
    audio = torch.randn(2, 50000)
    out = encoder(audio)
    assert out.shape == (2, 79, encoder.output_dim)
    assert out.dtype == torch.float32
    assert abs(50000 / 16 / out.shape[1] - encoder.hop_size_in_ms) < 1


def test_one_waveform_is_a_batch_of_one(encoder):
    audio = torch.randn(20000)
    assert torch.equal(encoder(audio), encoder(audio[None]))


def test_it_stays_frozen_and_in_eval_mode(encoder):
    assert not encoder.train().embedder.encoder.training
    assert not any(p.requires_grad for p in encoder.parameters())


def test_a_head_can_be_trained_on_it(encoder):
    head = torch.nn.Linear(encoder.output_dim, 3)
    out = encoder(torch.randn(2, 8000, requires_grad=True))
    assert not out.requires_grad
    head(out).sum().backward()
    assert head.weight.grad.any()


def test_something_else_is_no_waveform(encoder):
    with pytest.raises(TypeError, match=r"Embedder: waveform must be a tensor \[B, N\]"):
        encoder([0.0, 0.1])


def test_eval_mode_from_the_start():
    embedder = Embedder(FrameEncoder(SIZE, drop_path_rate=0.9).train(), n_blocks=1)
    encoder, audio = ATSTEncoder(embedder), torch.randn(2, 8000)
    assert torch.equal(encoder(audio), encoder(audio))


def test_something_else_is_no_embedder():
    with pytest.raises(TypeError, match="ATSTEncoder: embedder must be an Embedder, got FrameEncoder"):
        ATSTEncoder(FrameEncoder(SIZE))
