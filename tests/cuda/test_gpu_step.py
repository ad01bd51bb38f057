"""The training step where only a GPU can tell: in a CUDA graph, in bf16, and that nobody waits."""

import dataclasses

import pytest
import torch

from atst_fast.train.batch import Batch
from atst_fast.train.graph import WARM_UP, CudaGraph
from atst_fast.train.upload import upload
from tests import tolerances
from tests.conftest import needs_gpu
from tests.train import tiny
from tests.train.test_graph import assert_same_state

pytestmark = needs_gpu
CUDA = torch.device("cuda")


@pytest.mark.parametrize("method", ["frame", "clip"])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_graph_gives_the_bits_of_the_plain_step(precision, method):
    """Also of the random numbers, and after a batch of another shape."""
    shapes = [8] * (WARM_UP + 3) + [5] + [8] * 3
    outcomes = []
    for graph in (None, CudaGraph(CUDA)):
        step = tiny.stepper(precision, method=method, device=CUDA, graph=graph)
        results = [step(tiny.clips(20 + k, batch).cuda(), 20 + k) for k, batch in enumerate(shapes)]
        outcomes.append((torch.stack([torch.stack(r[:3]) for r in results]), step, torch.cuda.get_rng_state()))
    (expected, plain, rng), (ours, graphed, our_rng) = outcomes
    assert expected.isfinite().all()
    assert torch.equal(ours, expected)
    assert torch.equal(our_rng, rng)
    assert_same_state(graphed, plain)


@pytest.mark.parametrize("method", ["frame", "clip"])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("graphed", [False, True])
def test_nothing_waits_for_the_gpu(precision, graphed, method):
    step = tiny.stepper(precision, method=method, device=CUDA, graph=CudaGraph(CUDA) if graphed else None)
    waveforms = [tiny.clips(k).pin_memory() for k in range(3)]
    for k in range(WARM_UP + 1):
        step(waveforms[0], k)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for k, waveform in enumerate(waveforms):
            step(waveform, k)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_uploads_are_what_was_sent():
    """While a stream is kept busy with what came before."""
    sent = [tiny.clips(k, 64) for k in range(6)]
    batches = (Batch(k, waveform.pin_memory()) for k, waveform in enumerate(sent))
    received, load = [], torch.randn(2048, 2048, device=CUDA)
    for batch in upload(batches, CUDA):
        for _ in range(20):
            load = (load @ load).tanh()
        received.append((batch.step, batch.waveform.clone()))
    assert [step for step, _ in received] == list(range(6))
    assert all(torch.equal(ours.cpu(), sent[step]) for step, ours in received)


def test_bf16_follows_float32():
    float32, bf16 = (tiny.curve(tiny.stepper(p, device=CUDA), 200) for p in ("float32", "bf16"))
    windows = [x.unfold(0, 20, 20).mean(-1) for x in (bf16, float32)]
    assert windows[1][-1, 0] < 0.5 * float32[0, 0]
    torch.testing.assert_close(bf16, float32, rtol=tolerances.BF16_STEP_RTOL, atol=0)
    torch.testing.assert_close(*windows, rtol=tolerances.BF16_CURVE_RTOL, atol=0)


def test_bf16_begins_as_float32_does_in_atst_clip():
    float32, bf16 = (tiny.curve(tiny.stepper(p, method="clip", device=CUDA), 20) for p in ("float32", "bf16"))
    torch.testing.assert_close(bf16, float32, rtol=tolerances.BF16_STEP_RTOL, atol=0)


@pytest.mark.parametrize("method", ["frame", "clip"])
def test_pretraining_with_and_without_a_graph(tmp_path, method):
    """The same bits, also of a run that stopped and went on."""
    pytest.importorskip("soundfile", reason="needs the extra train")
    from atst_fast.train import pretrain
    from tests.train.conftest import write_clips
    from tests.train.test_pretrain import assert_same_run, settings

    clips = write_clips(tmp_path / "clips")
    with_graph = dataclasses.replace(settings(clips, tmp_path / "graph"), device="cuda", method=method)
    plain = dataclasses.replace(with_graph, out=tmp_path / "plain", graph=False)
    assert pretrain.pretrain(with_graph) == pretrain.pretrain(plain) == 0
    assert_same_run(with_graph, plain)
    eighth = str(tmp_path / "graph/checkpoints/step-00000008.safetensors")
    resumed = dataclasses.replace(with_graph, out=tmp_path / "resumed", resume=eighth)
    assert pretrain.pretrain(resumed) == 0
    assert_same_run(with_graph, resumed)
