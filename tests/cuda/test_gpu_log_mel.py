"""log_mel where only a GPU can tell: streams, graphs, the public function and the module on CUDA tensors."""

import pytest
import torch

from atst_fast import nn, ops
from atst_fast.ops.log_mel import tables
from tests import tolerances as tol
from tests.conftest import needs_gpu
from tests.ops.test_log_mel import speech_like

pytestmark = needs_gpu


def test_public_function_and_module_agree_with_the_cpu():
    x = speech_like(3 * 8000).reshape(3, 1, 8000)
    y = ops.log_mel(x.cuda())
    assert y.is_cuda
    torch.testing.assert_close(y.cpu(), ops.log_mel(x), rtol=0, atol=tol.MEL_80)
    assert torch.equal(nn.LogMelSpectrogram().cuda()(x.cuda()), y)
    lengths = torch.tensor([8000, 3000, 0])
    ragged = ops.log_mel(x.cuda(), lengths=lengths.cuda())
    torch.testing.assert_close(ragged.cpu(), ops.log_mel(x, lengths=lengths), rtol=0, atol=tol.MEL_80)


def test_side_stream():
    x = speech_like(50000).cuda()
    y = ops.log_mel(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        late = x.clone()
        z = ops.log_mel(late)
    stream.synchronize()
    assert torch.equal(y, z)


def test_graph_replays_on_new_samples():
    x = torch.zeros(2, 1, 20000, device="cuda")
    ops.log_mel(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.log_mel(x)
    for seed in (1, 2):
        new = speech_like(40000, seed).reshape(2, 1, 20000).cuda()
        x.copy_(new)
        graph.replay()
        assert torch.equal(y, ops.log_mel(new))


def test_more_samples_than_an_int_counts():
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GB of free memory")
    x = torch.zeros(3, 1 << 30, dtype=torch.int16, device="cuda")
    new = (speech_like(51200) * 32767).to(torch.int16).cuda()
    x[2, -51200:] = new
    y = ops.log_mel(x[:, None], hop_length=1024, minmax=None)
    assert y.numel() < 2**31 < x.numel()
    expected = ops.log_mel(new, hop_length=1024, minmax=None)[:, -40:]
    torch.testing.assert_close(y[2, 0, :, -40:], expected, rtol=0, atol=tol.MEL_60_DB)
    assert (y[:2] + 100).abs().max() <= 100 * tol.MEL_CONSTANT


def test_another_current_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x = speech_like(9000)
    with torch.cuda.device(0):
        assert torch.equal(ops.log_mel(x.to("cuda:1")).cpu(), ops.log_mel(x.to("cuda:0")).cpu())
    with pytest.raises(ValueError, match="log_mel: lengths must be on cuda:0"):
        ops.log_mel(x[None].to("cuda:0"), lengths=torch.tensor([9000], device="cuda:1"))


def test_devices_are_not_mixed():
    with pytest.raises(ValueError, match="log_mel: lengths must be on cuda:0"):
        ops.log_mel(speech_like(9000)[None].cuda(), lengths=torch.tensor([9000]))


def test_opcheck_and_compile():
    window, fb = tables(16000, 512, None, 60.0, 7800.0, 64, device=torch.device("cuda"))
    x = torch.randn(2, 1000, device="cuda")
    torch.library.opcheck(torch.ops.atst_fast.log_mel.default, (x, window, fb, None, 160, 80.0, 1.0, 0.0, 1))
    module = nn.LogMelSpectrogram().cuda()
    x = speech_like(4000)[None].cuda()
    compiled = torch.compile(lambda x: module(x) * 2, fullgraph=True)
    assert torch.equal(compiled(x), module(x) * 2)


def test_gradient_runs_the_reference():
    x = speech_like(3000).cuda().requires_grad_()
    y = ops.log_mel(x)
    y.sum().backward()
    assert torch.isfinite(x.grad).all()
    torch.testing.assert_close(y.detach(), ops.log_mel(x.detach()), rtol=0, atol=tol.MEL_80)
