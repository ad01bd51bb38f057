import math

import pytest
import torch

from atst_fast.models import ATSTFrame
from atst_fast.train.front_end import FrontEndBatch
from atst_fast.train.schedule import Schedules
from atst_fast.train.step import make_optimizer, train_step
from tests.golden import load
from tests.tolerances import GOLDEN_LOSS_RTOL, GOLDEN_STEP_ATOL, SCHEDULE_RTOL


def golden_system():
    t, meta = load("frame_step")
    c = meta["cfg"]
    model = ATSTFrame(
        {"dim": c["dim"], "depth": c["depth"], "num_heads": c["heads"]},
        hidden=c["hid"],
        out=c["proj"],
        mlp_ratio=c["mlp_ratio"],
        max_frames=c["spec_w"],
        drop_path_rate=0.0,
    )
    model.load_state_dict({k.removeprefix("in/state/"): v for k, v in t.items() if k.startswith("in/state/")})
    schedules = Schedules(steps=c["maxs"], lr=c["lr"], warmup_steps=c["warm"], momentum=c["ema"])
    return model, make_optimizer(model, schedules), schedules


def golden_batch(t, step):
    return FrontEndBatch(*(t[f"in/step{step}/{k}"] for k in ("mel0", "mel1", "len0", "mask0")))


def test_five_steps_are_those_of_the_official_code():
    t, meta = load("frame_step5")
    model, optimizer, schedules = golden_system()
    outs = [train_step(model, optimizer, schedules, golden_batch(t, step), step) for step in range(5)]
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
