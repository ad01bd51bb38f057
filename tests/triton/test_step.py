"""Whole training steps with the Triton kernels, in the shapes of a GPU, against those of the official code."""

import pytest
import torch

from atst_fast.train.front_end import FrontEndBatch
from atst_fast.train.step import make_optimizer, train_step
from tests import tolerances
from tests.golden import assert_golden, load
from tests.golden.systems import clip_step, frame_step

SPARE = 5  # places beyond those of the masked patches, some of which lie in padding


@pytest.fixture(autouse=True)
def _few_programs(triton_ops, monkeypatch):
    """The interpreter takes milliseconds for a program, whatever it does: here each takes more rows."""
    if triton_ops.device == "cpu":
        from atst_fast.kernels import add_norm

        for name in ("forward_config", "backward_config"):
            monkeypatch.setattr(add_norm, name, lambda width: add_norm.Config(16, 4, 1, 4))


def batch_of(t, prefix, device):
    names = ("mel0", "mel1", "len0", "mask0")
    return FrontEndBatch(*(t[prefix + k].to(device) for k in names), capacity=int(t[f"{prefix}mask0"].sum()) + SPARE)


def test_golden_step(triton_ops):
    t, _ = load("frame_step")
    system, _ = frame_step()
    *batch, capacity = batch_of(t, "in/", triton_ops.device)
    system.to(triton_ops.device)
    with triton_ops.poison():
        out = system(*batch, capacity=capacity)
        out.loss.backward()
    for key, value in zip(("loss", "std_stu", "std_tea"), out):
        assert_golden("frame_step", f"out/{key}", value.detach().cpu()[None])
    for key in (k for k in t if k.startswith("grad/") and "asym" not in k):
        assert_golden("frame_step", key, system.student.get_parameter(key.removeprefix("grad/")).grad.cpu())


def test_golden_step_of_atst_clip(triton_ops):
    t, _ = load("clip_step")
    system, _ = clip_step()
    system.to(triton_ops.device)
    if triton_ops.device == "cpu":  # there is no GPU: the shapes of one all the same
        for network in (system.student, system.teacher):
            network.encoder.fixed_shapes = True
    with triton_ops.poison():
        out = system(*(t[f"in/{k}"].to(triton_ops.device) for k in ("mel0", "mel1", "len0", "len1")))
        out.loss.backward()
    for key, value in zip(("loss", "std_stu", "std_tea"), out):
        assert_golden("clip_step", f"out/{key}", value.detach().cpu()[None])
    for key in (k for k in t if k.startswith("grad/")):
        assert_golden("clip_step", key, system.student.get_parameter(key.removeprefix("grad/")).grad.cpu())


@pytest.mark.parametrize("length", [-1, pytest.param(108, marks=pytest.mark.long)])
def test_a_length_out_of_range_makes_the_loss_of_atst_clip_nan(triton_ops, length, monkeypatch):
    """It is not looked at on a GPU."""
    t, _ = load("clip_step")
    system, _ = clip_step()
    system.to(triton_ops.device)
    for network in (system.student, system.teacher):
        network.encoder.fixed_shapes = True
    batch = [t[f"in/{k}"][:2].to(triton_ops.device) for k in ("mel0", "mel1", "len0", "len1")]
    batch[3][1] = length
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # as on a GPU
    with torch.no_grad():
        assert system(*batch).loss.isnan()
    assert system.student.encoder(batch[1], batch[3]).isnan().all()


@pytest.mark.long
def test_five_steps_are_those_of_the_official_code(triton_ops):
    t, meta = load("frame_step5")
    model, schedules = frame_step()
    optimizer = make_optimizer(model.to(triton_ops.device), schedules)
    batches = [batch_of(t, f"in/step{k}/", triton_ops.device) for k in range(5)]
    losses = [train_step(model, optimizer, schedules, batch, k).loss for k, batch in enumerate(batches)]
    assert torch.stack(losses).tolist() == pytest.approx(t["out/loss"].tolist(), rel=tolerances.GOLDEN_LOSS_RTOL)
    state, near = model.state_dict(), dict(rtol=0, atol=tolerances.GOLDEN_STEP_ATOL)
    for key in meta["full"]:
        torch.testing.assert_close(
            state[key].cpu(), t[f"out/final/{key}"], **near, msg=lambda m, key=key: f"{key}: {m}"
        )
