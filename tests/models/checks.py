"""What is asked of ATST-Frame and ATST-Clip alike, and of their encoders."""

import copy
import pickle

import pytest
import torch

from tests.golden import assert_golden, load
from tests.golden.systems import optimizer_of, set_rates
from tests.tolerances import GOLDEN_CHECKSUM, GOLDEN_LOSS_RTOL, NETWORK_RTOL, SCHEDULE_RTOL


def assert_same(ours, plain, what="", least=0.0):
    """Up to rounding: of the largest value, or of ``least`` where all are smaller."""
    atol = NETWORK_RTOL * max(plain.abs().max().item(), least)
    torch.testing.assert_close(ours, plain, rtol=0, atol=atol, msg=lambda m: f"{what}: {m}")


def assert_golden_rates_and_update(name, system, schedules):
    """What the optimizer and the teacher's average make of the gradients of the golden batch."""
    _, meta = load(name)
    optimizer = optimizer_of(system)
    rates = schedules(meta["step"])
    assert rates == pytest.approx((meta["lr"], meta["wd"], meta["ema_used"]), rel=SCHEDULE_RTOL)
    set_rates(optimizer, rates)
    optimizer.step()
    assert_golden_update(name, system.state_dict())


def assert_golden_update(name, state):
    """The weights of both networks after the step."""
    t, _ = load(name)
    for family, prefix in (("out/after_opt/", "student."), ("out/after_ema/", "teacher.")):
        keys = [k for k in t if k.startswith(family)]
        assert {k.removeprefix(family) for k in keys} == {k for k in state if k.startswith(prefix)}
        for key in keys:
            assert_golden(name, key, state[key.removeprefix(family)])


def assert_five_golden_steps(name, system, schedules, golden_batch):
    t, _ = load(name)
    optimizer = optimizer_of(system)
    got = {"loss": [], "std_stu": [], "std_tea": [], "lr": [], "wd": [], "ema": []}
    for step in range(5):
        rates = schedules(step)
        set_rates(optimizer, rates)
        out = system(*golden_batch(t, f"in/step{step}/"))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        for key, value in zip(got, (*(x.item() for x in out), *rates)):
            got[key].append(value)
    for key, values in got.items():
        rtol = SCHEDULE_RTOL if key in ("lr", "wd", "ema") else GOLDEN_LOSS_RTOL
        torch.testing.assert_close(
            torch.tensor(values, dtype=torch.float64), t[f"out/{key}"], rtol=rtol, atol=0, msg=key
        )
    assert_golden_end(name, system.state_dict())


def assert_golden_end(name, state):
    """The weights after five steps."""
    t, meta = load(name)
    assert set(meta["checksum_names"]) == set(state)
    for key in meta["full"]:
        assert_golden(name, f"out/final/{key}", state[key])
    final = [state[k].double() for k in meta["checksum_names"]]
    for key, sums in (("sum", [v.sum() for v in final]), ("abssum", [v.abs().sum() for v in final])):
        torch.testing.assert_close(torch.stack(sums), t[f"out/checksum_{key}"], rtol=0, atol=GOLDEN_CHECKSUM)


def assert_step_equals(ours, plain, batch, seed):
    """Loss, gradients and statistics; the same seed drops the same branches in both."""
    losses = []
    for system in (ours, plain):
        torch.manual_seed(seed)
        out = system(*batch)
        out[0].backward()
        losses.append(torch.stack([x.detach() for x in out]))
    # gradients that the batch statistics cancel (a last norm's bias) are nothing but rounding of the others
    assert_same(*losses, "loss and spreads", least=1e-2)
    for name, p in plain.student.named_parameters():
        if p.grad is not None:
            assert_same(ours.student.get_parameter(name).grad, p.grad, name, least=1e-2)
    for name, buffer in plain.named_buffers():
        assert_same(ours.get_buffer(name), buffer, name, least=1e-2)


def trained_a_little(system, plain):
    """Both with the same weights, none of which is zero or one."""
    with torch.no_grad():
        for p in system.parameters():
            p.add_(torch.randn_like(p), alpha=0.05)
    plain.load_state_dict(system.state_dict())
    return system, plain


def copies(module):
    """A deep copy, one through pickle, and one built from its config."""
    built = type(module)(**module.config).train(module.training)
    built.load_state_dict(module.state_dict())
    return copy.deepcopy(module), pickle.loads(pickle.dumps(module)), built
