import copy
import pickle

import pytest
import torch

from atst_fast.models import ATSTClip
from tests.golden import assert_golden, load
from tests.golden.systems import clip_step, optimizer_of, set_rates
from tests.models import plain_clip
from tests.tolerances import GOLDEN_CHECKSUM, GOLDEN_LOSS_RTOL, NETWORK_RTOL, SCHEDULE_RTOL

TINY = {"dim": 24, "depth": 3, "num_heads": 3}


def golden_batch(t, prefix="in/"):
    return [t[prefix + k] for k in ("mel0", "mel1", "len0", "len1")]


def forward_and_back(system):
    """Loss, spreads and gradients of the golden batch."""
    t, meta = load("clip_step")
    out = system(*golden_batch(t))
    for key, value in zip(("loss", "std_stu", "std_tea"), out):
        assert_golden("clip_step", f"out/{key}", value[None])
    out.loss.backward()
    for key in (k for k in t if k.startswith("grad/")):
        assert_golden("clip_step", key, system.student.get_parameter(key.removeprefix("grad/")).grad)
    assert [n for n, p in system.student.named_parameters() if p.grad is None] == meta["no_grad"]


def test_golden_step():
    t, meta = load("clip_step")
    system, schedules = clip_step()
    optimizer = optimizer_of(system)
    forward_and_back(system)
    rates = schedules(meta["step"])
    assert rates == pytest.approx((meta["lr"], meta["wd"], meta["ema_used"]), rel=SCHEDULE_RTOL)
    set_rates(optimizer, rates)
    optimizer.step()
    state = system.state_dict()
    for family, prefix in (("out/after_opt/", "student."), ("out/after_ema/", "teacher.")):
        keys = [k for k in t if k.startswith(family)]
        assert {k.removeprefix(family) for k in keys} == {k for k in state if k.startswith(prefix)}
        for key in keys:
            assert_golden("clip_step", key, state[key.removeprefix(family)])


def test_golden_step_in_fixed_shapes():
    system, _ = clip_step()
    for network in (system.student, system.teacher):
        network.encoder.fixed_shapes = True
    forward_and_back(system)


def test_golden_outputs():
    t, _ = load("clip_step")
    student, teacher = clip_step()[0].outputs(*golden_batch(t))
    assert_golden("clip_step", "out/student_output", student)
    assert_golden("clip_step", "out/teacher_output", teacher)
    assert not teacher.requires_grad


def test_golden_five_steps():
    t, meta = load("clip_step5")
    system, schedules = clip_step()
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
    state = system.state_dict()
    assert set(meta["checksum_names"]) == set(state)
    for key in meta["full"]:
        assert_golden("clip_step5", f"out/final/{key}", state[key])
    final = [state[name].double() for name in meta["checksum_names"]]
    for key, sums in (("sum", [v.sum() for v in final]), ("abssum", [v.abs().sum() for v in final])):
        torch.testing.assert_close(torch.stack(sums), t[f"out/checksum_{key}"], rtol=0, atol=GOLDEN_CHECKSUM)


def both(drop_path_rate=0.5):
    kwargs = {"hidden": 40, "out": 16, "mlp_ratio": 2.0, "drop_path_rate": drop_path_rate}
    ours = ATSTClip(TINY, max_frames=41, **kwargs)
    plain = plain_clip.System(TINY, positions=10, **kwargs)
    with torch.no_grad():
        for p in ours.parameters():
            p.add_(torch.randn_like(p), alpha=0.05)
    plain.load_state_dict(ours.state_dict())
    return ours, plain


def random_batch(clips=4, frames=41):
    return *torch.randn(2, clips, 1, 64, frames), *torch.randint(0, frames + 1, (2, clips))


def assert_same(ours, plain, what):
    # gradients that the batch statistics cancel (norm.bias) are nothing but rounding of the others
    atol = NETWORK_RTOL * max(plain.abs().max().item(), 1e-2)
    torch.testing.assert_close(ours, plain, rtol=0, atol=atol, msg=lambda m: f"{what}: {m}")


@pytest.mark.parametrize("seed", range(3))
def test_step_equals_the_plain_structure(seed):
    """With stochastic depth: the same seed drops the same branches in both."""
    torch.manual_seed(seed)
    ours, plain = both()
    batch = random_batch(clips=2 + seed)
    losses = []
    for system in (ours, plain):
        torch.manual_seed(seed + 100)
        out = system(*batch)
        out[0].backward()
        losses.append(torch.stack([x.detach() for x in out]))
    assert_same(*losses, "loss and spreads")
    for name, p in plain.student.named_parameters():
        if p.grad is not None:
            assert_same(ours.student.get_parameter(name).grad, p.grad, name)
    for name, buffer in plain.named_buffers():
        assert_same(ours.get_buffer(name), buffer, name)


def test_lengths_of_one_view_alone():
    system, _ = both(drop_path_rate=0.0)
    view1, view2, _, lengths = random_batch()
    full = torch.full((4,), 41)
    assert torch.equal(system(view1, view2, None, lengths).loss, system(view1, view2, full, lengths).loss)
    assert torch.equal(system(view1, view2, lengths).loss, system(view1, view2, lengths, full).loss)
    assert torch.equal(system(view1, view2).loss, system(view1, view2, full, full).loss)


def test_keys_are_those_of_the_published_checkpoints():
    with torch.device("meta"):
        system = ATSTClip("small")
    shapes = {k: tuple(v.shape) for k, v in system.state_dict().items()}
    for side in ("student", "teacher"):
        encoder = {k: v for k, v in shapes.items() if k.startswith(f"{side}.encoder.")}
        assert len(encoder) == 139
        assert encoder[f"{side}.encoder.cls_token"] == (1, 1, 384)
        assert encoder[f"{side}.encoder.pos_embed"] == (1, 251, 384)
        assert encoder[f"{side}.encoder.norm.weight"] == (384,)
        assert shapes[f"{side}.projector.0.weight"] == (4096, 384)
    assert shapes["student.predictor.0.weight"] == (4096, 256)
    assert not any("predictor" in k for k in shapes if k.startswith("teacher"))


def test_teacher_pairs():
    system, _ = both()
    names = {id(p): n for n, p in system.named_parameters()}
    students, teachers = ([names[id(p)] for p in side] for side in system.teacher_pairs())
    assert [n.replace("student", "teacher") for n in students] == teachers
    assert "teacher.encoder.mask_embed" in teachers


@pytest.mark.parametrize(
    "change, message",
    [
        ({"view2": torch.zeros(4, 1, 64, 40)}, "ATSTClip: view2 must be of view1's shape"),
        ({"lengths1": torch.full((4,), 42)}, "lengths must be .* 0 to 41"),
        ({"lengths2": torch.full((3,), 41)}, r"ATSTClip: lengths2 must be \[4\] \(valid frames"),
        ({"lengths2": torch.full((4,), 41.0)}, "ATSTClip: lengths2 must be .* of dtype int64"),
    ],
)
def test_errors(change, message):
    system, _ = both()
    batch = dict(zip(("view1", "view2", "lengths1", "lengths2"), random_batch())) | change
    with pytest.raises((ValueError, TypeError), match=message):
        system(**batch)


def test_copies_and_config():
    system, _ = both(drop_path_rate=0.0)
    batch = random_batch()
    want = system(*batch).loss
    built = ATSTClip(**system.config)
    built.load_state_dict(system.state_dict())
    for other in (copy.deepcopy(system), pickle.loads(pickle.dumps(system)), built):
        assert torch.equal(other(*batch).loss, want)


def test_autocast_trains():
    system, _ = both(drop_path_rate=0.2)
    with torch.autocast("cpu", torch.bfloat16):
        out = system(*random_batch())
        out.loss.backward()
    assert out.loss.dtype == torch.float32
    assert all(p.grad.isfinite().all() for n, p in system.student.named_parameters() if "mask_embed" not in n)
