"""The modules, the models and the training loop on a GPU, where some operators run their references."""

import copy

import pytest
import torch

from atst_fast.models import FrameEncoder
from atst_fast.optim import AdamWEMA
from atst_fast.train.front_end import ClipBatch, FrontEnd, FrontEndBatch
from atst_fast.train.step import make_optimizer, train_step
from tests import tolerances
from tests.conftest import needs_gpu
from tests.golden import load
from tests.golden.systems import clip_step, frame_step
from tests.models.test_atst_frame import both, random_batch

pytestmark = [
    needs_gpu,
    pytest.mark.filterwarnings("ignore:atst_fast.* runs its slow PyTorch reference"),
]


def near(gpu, cpu, what):
    atol = tolerances.GPU_NETWORK_RTOL * max(cpu.abs().max().item(), 1e-2)
    torch.testing.assert_close(gpu.cpu(), cpu, rtol=0, atol=atol, msg=lambda m: f"{what}: {m}")


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_step_is_that_of_the_cpu(symmetric):
    cpu, _ = both(symmetric, drop_path_rate=0.0)  # each device draws by itself what it drops
    gpu = copy.deepcopy(cpu).cuda()
    view1, view2, lengths, mask = random_batch()
    for model, device in ((cpu, "cpu"), (gpu, "cuda")):
        teacher = dict(zip(*model.teacher_pairs()))
        optimizer = AdamWEMA(model.student.parameters(), lr=0.0, teacher=teacher, momentum=0.5)
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


@pytest.mark.parametrize(
    "name, system, batch_of, keys",
    [
        ("frame_step5", frame_step, FrontEndBatch, ("mel0", "mel1", "len0", "mask0")),
        ("clip_step5", clip_step, ClipBatch, ("mel0", "mel1", "len0", "len1")),
    ],
)
def test_five_steps_are_those_of_the_official_code(name, system, batch_of, keys):
    t, meta = load(name)
    model, schedules = system()
    optimizer, losses = make_optimizer(model.cuda(), schedules), []
    for step in range(5):
        batch = batch_of(*(t[f"in/step{step}/{k}"].cuda() for k in keys))
        losses.append(train_step(model, optimizer, schedules, batch, step).loss.item())
    assert losses == pytest.approx(t["out/loss"].tolist(), rel=tolerances.GOLDEN_LOSS_RTOL)
    state = model.state_dict()
    for key in meta["full"]:
        near(state[key], t[f"out/final/{key}"], key)


def test_steps_from_waveforms():
    """Front end, model and optimizer together: the same seed gives the same losses."""

    def losses():
        torch.manual_seed(0)
        model, schedules = frame_step()
        optimizer, front_end = make_optimizer(model.cuda(), schedules), FrontEnd(bank_size=8).cuda()
        waves = torch.randn(3, 4, 16000, generator=torch.Generator().manual_seed(1)).mul(0.1).cuda()
        return [train_step(model, optimizer, schedules, front_end(wave), 20 + i).loss for i, wave in enumerate(waves)]

    first = torch.stack(losses())
    assert first.isfinite().all()
    near(torch.stack(losses()), first.cpu(), "losses")


def test_pretraining(tmp_path):
    pytest.importorskip("soundfile", reason="needs the extra train")
    from atst_fast.train import pretrain
    from tests.train.conftest import write_clips
    from tests.train.test_pretrain import but, final, settings

    config = but(settings(write_clips(tmp_path / "clips"), tmp_path / "run"), device="cuda")
    assert pretrain.pretrain(config) == 0
    weights, _ = final(config)
    assert all(value.isfinite().all() for value in weights.values() if value.is_floating_point())
