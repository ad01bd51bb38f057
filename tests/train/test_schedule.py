"""Schedules against the official tables."""

import numpy as np
import pytest

from atst_fast.train.schedule import Schedules, cosine_schedule
from tests import golden, tolerances

TENSORS, META = golden.load("schedules")
STEP_CASES = [case for case in META["cases"] if case["fn"] == "step"]


@pytest.mark.parametrize("case", STEP_CASES, ids=lambda case: case["id"])
def test_golden(case):
    ours = cosine_schedule(*case["args"])
    assert ours.shape == (case["args"][2],)
    ours = ours[case["idx"]] if "idx" in case else ours
    np.testing.assert_allclose(ours, TENSORS[f"out/{case['id']}"].numpy(), rtol=tolerances.SCHEDULE_RTOL, atol=0)


@pytest.mark.parametrize("case", [c for c in META["cases"] if c["fn"] == "epoch"], ids=lambda case: case["id"])
def test_golden_by_epochs(case):
    """The official function that counts in epochs is the same one of epochs times steps per epoch."""
    base, final, epochs, per_epoch, warmup = case["args"]
    ours = cosine_schedule(base, final, epochs * per_epoch, warmup * per_epoch)
    np.testing.assert_allclose(ours, TENSORS[f"out/{case['id']}"].numpy(), rtol=tolerances.SCHEDULE_RTOL, atol=0)


def test_schedules_of_the_five_golden_steps():
    tensors, meta = golden.load("frame_step5")
    cfg = meta["cfg"]
    schedules = Schedules(steps=cfg["maxs"], lr=cfg["lr"], warmup_steps=cfg["warm"], momentum=cfg["ema"])
    for k in range(5):
        rates = schedules(k)
        for name, value in (("lr", rates.lr), ("wd", rates.weight_decay), ("ema", rates.momentum)):
            assert value == pytest.approx(tensors[f"out/{name}"][k].item(), rel=tolerances.SCHEDULE_RTOL), name


def test_momentum_index_is_clamped_at_the_end():
    official, plain = (Schedules(steps=7, lr=1.0, momentum=0.5, momentum_offset=k) for k in (1, 0))
    table = cosine_schedule(0.5, 1.0, 7)
    assert [official(k).momentum for k in range(7)] == [*table[1:], table[-1]]
    assert [plain(k).momentum for k in range(7)] == list(table)
    assert official(100) == official(6)


def test_warmup_of_all_steps():
    np.testing.assert_array_equal(cosine_schedule(1.0, 0.0, 3, 3), [0.0, 0.5, 1.0])


@pytest.mark.parametrize(
    "args, message",
    [
        ((1.0, 0.0, 0), "cosine_schedule: steps must be at least 1, got int 0"),
        ((1.0, 0.0, 5, 6), "cosine_schedule: warmup_steps must be between 0 and steps (5), got int 6"),
        ((1.0, 0.0, 5, -1), "cosine_schedule: warmup_steps must be between 0 and steps (5), got int -1"),
        ((float("nan"), 0.0, 5), "cosine_schedule: base must be finite, got float nan"),
        ((1.0, float("inf"), 5), "cosine_schedule: final must be finite, got float inf"),
        ((1.0, 0.0, 5, 2, float("nan")), "cosine_schedule: start_warmup must be finite, got float nan"),
    ],
)
def test_errors(args, message):
    with pytest.raises(ValueError) as error:
        cosine_schedule(*args)
    assert str(error.value) == message


def test_negative_step():
    with pytest.raises(ValueError, match="Schedules: step must be 0 or more, got int -1"):
        Schedules(steps=3, lr=1.0)(-1)
