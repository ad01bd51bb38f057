"""The modules, the models and the training loop on a GPU, where some operators run their references."""

import copy

import pytest
import torch

from atst_fast.models import FrameEncoder
from atst_fast.optim import AdamWEMA
from tests import tolerances
from tests.models.test_atst_frame import both, random_batch

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore:atst_fast.* runs its slow PyTorch reference"),
]


def near(gpu, cpu, what):
    atol = tolerances.GPU_NETWORK_RTOL * max(cpu.abs().max().item(), 1e-2)
    torch.testing.assert_close(gpu.cpu(), cpu, rtol=0, atol=atol, msg=lambda m: f"{what}: {m}")


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_step_is_that_of_the_cpu(symmetric):
    cpu, _ = both(symmetric)
    gpu = copy.deepcopy(cpu).cuda()
    view1, view2, lengths, mask = random_batch()
    for model, device in ((cpu, "cpu"), (gpu, "cuda")):
        teacher = dict(zip(*model.teacher_pairs()))
        optimizer = AdamWEMA(model.student.parameters(), lr=0.0, teacher=teacher, momentum=0.5)
        torch.manual_seed(3)  # which paths are dropped is drawn on the CPU
        model(view1.to(device), view2.to(device), lengths, mask).loss.backward()
        optimizer.step()
    for (name, p), q in zip(cpu.named_parameters(), gpu.parameters()):
        near(q.detach(), p.detach(), name)
        if p.grad is not None:
            near(q.grad, p.grad, f"gradient of {name}")


def test_an_encoder_reads_padded_clips_wherever_their_lengths_are():
    torch.manual_seed(1)
    cpu = FrameEncoder({"dim": 48, "depth": 2, "num_heads": 3}).eval()
    gpu = copy.deepcopy(cpu).cuda()
    mel, lengths = torch.randn(3, 1, 64, 120), torch.tensor([120, 50, 8])
    with torch.no_grad():
        expected = cpu(mel, lengths)
        for where in ("cpu", "cuda"):
            near(gpu(mel.cuda(), lengths.to(where)), expected, f"lengths on {where}")


def test_pretraining(tmp_path):
    pytest.importorskip("soundfile", reason="needs the extra train")
    from atst_fast.train import pretrain
    from tests.train.conftest import write_clips
    from tests.train.test_pretrain import but, final, settings

    config = but(settings(write_clips(tmp_path / "clips"), tmp_path / "run"), device="cuda")
    assert pretrain.pretrain(config) == 0
    weights, _ = final(config)
    assert all(value.isfinite().all() for value in weights.values() if value.is_floating_point())
