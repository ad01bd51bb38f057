"""kaldi_fbank where only a GPU can tell: graphs, the public function on CUDA tensors."""

import pytest
import torch

from atst_fast import ops
from atst_fast.ops.kaldi_fbank import tables
from tests import tolerances as tol
from tests.conftest import needs_gpu
from tests.ops.test_kaldi_fbank import MODELS
from tests.ops.test_log_mel import speech_like

pytestmark = needs_gpu


@pytest.mark.parametrize("model", MODELS)
def test_public_function_agrees_with_the_cpu(model):
    x, lengths = speech_like(3 * 8000).reshape(3, 8000), torch.tensor([8000, 3000, 0])
    y = ops.kaldi_fbank(x.cuda(), **MODELS[model], lengths=lengths.cuda())
    assert y.is_cuda
    want = ops.kaldi_fbank(x, **MODELS[model], lengths=lengths)
    torch.testing.assert_close(y.cpu(), want, rtol=0, atol=tol.FBANK_OTHER_WAY)


def test_graph_replays_on_new_samples():
    x = torch.zeros(2, 20000, device="cuda")
    ops.kaldi_fbank(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.kaldi_fbank(x)
    for seed in (1, 2):
        new = speech_like(40000, seed).reshape(2, 20000).cuda()
        x.copy_(new)
        graph.replay()
        assert torch.equal(y, ops.kaldi_fbank(new))


def test_devices_are_not_mixed():
    with pytest.raises(ValueError, match="kaldi_fbank: lengths must be on cuda:0"):
        ops.kaldi_fbank(speech_like(9000)[None].cuda(), lengths=torch.tensor([9000]))


def test_opcheck():
    window, fb = tables(16000, 25.0, 20.0, 0.0, 23, "povey", device=torch.device("cuda"))
    x = torch.randn(2, 1000, device="cuda")
    torch.library.opcheck(torch.ops.atst_fast.kaldi_fbank.default, (x, window, fb, None, 160, 0.97, True))


def test_gradient_runs_the_reference():
    x = speech_like(3000).cuda().requires_grad_()
    y = ops.kaldi_fbank(x)
    y.sum().backward()
    assert torch.isfinite(x.grad).all()
    torch.testing.assert_close(y.detach(), ops.kaldi_fbank(x.detach()), rtol=0, atol=tol.FBANK_OTHER_WAY)
