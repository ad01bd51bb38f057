import math

import pytest
import torch

from atst_fast.train.front_end import ClipBatch, FrontEndBatch
from atst_fast.train.step import make_optimizer, train_step
from tests.golden import load
from tests.golden.systems import clip_step, frame_step
from tests.tolerances import GOLDEN_LOSS_RTOL, GOLDEN_STEP_ATOL, SCHEDULE_RTOL


def golden_system():
    model, schedules = frame_step()
    return model, make_optimizer(model, schedules), schedules


def golden_batch(t, step):
    return FrontEndBatch(*(t[f"in/step{step}/{k}"] for k in ("mel0", "mel1", "len0", "mask0")))


def clip_batch(t, step):
    return ClipBatch(*(t[f"in/step{step}/{k}"] for k in ("mel0", "mel1", "len0", "len1")))


@pytest.mark.parametrize(
    "name, system, batch", [("frame_step5", frame_step, golden_batch), ("clip_step5", clip_step, clip_batch)]
)
def test_five_steps_are_those_of_the_official_code(name, system, batch):
    t, meta = load(name)
    model, schedules = system()
    optimizer = make_optimizer(model, schedules)
    outs = [train_step(model, optimizer, schedules, batch(t, step), step) for step in range(5)]
    for key, name in (("loss", "loss"), ("std_stu", "std_student"), ("std_tea", "std_teacher")):
        got = torch.tensor([float(getattr(out, name)) for out in outs], dtype=torch.float64)
        torch.testing.assert_close(got, t[f"out/{key}"], rtol=GOLDEN_LOSS_RTOL, atol=0)
    for key, name in (("lr", "lr"), ("wd", "weight_decay"), ("ema", "momentum")):
        assert [getattr(out.rates, name) for out in outs] == pytest.approx(t[f"out/{key}"].tolist(), rel=SCHEDULE_RTOL)
    state = model.state_dict()
    for key in meta["full"]:
        want = t[f"out/final/{key}"]
        torch.testing.assert_close(
            state[key], want, rtol=0, atol=GOLDEN_STEP_ATOL, msg=lambda m, key=key: f"{key}: {m}"
        )


def test_group_0_is_decayed_and_the_other_is_not():
    t, _ = load("frame_step5")
    model, optimizer, schedules = golden_system()
    train_step(model, optimizer, schedules, golden_batch(t, 0), 20)
    decayed, plain = optimizer.param_groups
    assert decayed["weight_decay"] == schedules(20).weight_decay
    assert plain["weight_decay"] == 0
    assert decayed["lr"] == plain["lr"] == schedules(20).lr
    names = {id(p): n for n, p in model.student.named_parameters()}
    assert {"encoder.pos_embed", "encoder.mask_embed"} <= {names[id(p)] for p in decayed["params"]}
    assert all(p.ndim == 1 for p in plain["params"])


def test_diagnostics_have_no_graph():
    t, _ = load("frame_step5")
    out = train_step(*golden_system(), golden_batch(t, 0), 0)
    assert not any(x.requires_grad for x in out[:3])
    assert all(math.isfinite(x) for x in out[:3])
