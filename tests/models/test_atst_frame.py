import copy
import pickle

import pytest
import torch

from atst_fast.models import ATSTFrame
from benchmarks import official
from tests.golden import assert_golden, load
from tests.golden.systems import frame_step, optimizer_of, set_rates
from tests.tolerances import GOLDEN_CHECKSUM, NETWORK_RTOL

TINY = {"dim": 24, "depth": 3, "num_heads": 3}


def golden_system(**kwargs):
    system, schedules = frame_step(**kwargs)
    return system, schedules, optimizer_of(system)


def golden_batch(t, prefix="in/"):
    assert torch.equal(t[f"{prefix}mask0"], t[f"{prefix}mask1"])
    assert torch.equal(t[f"{prefix}len0"], t[f"{prefix}len1"])
    return [t[prefix + k] for k in ("mel0", "mel1", "len0", "mask0")]


def test_golden_step():
    t, meta = load("frame_step")
    system, schedules, optimizer = golden_system()
    out = system(*golden_batch(t))
    assert_golden("frame_step", "out/loss", out.loss[None])
    assert_golden("frame_step", "out/std_stu", out.std_student[None])
    assert_golden("frame_step", "out/std_tea", out.std_teacher[None])
    out.loss.backward()
    grads = [k for k in t if k.startswith("grad/") and "asym" not in k]
    assert len(grads) == len(list(system.student.parameters()))
    for key in grads:
        assert_golden("frame_step", key, system.student.get_parameter(key.removeprefix("grad/")).grad)
    rates = schedules(meta["step"])
    assert rates == pytest.approx((meta["lr"], meta["wd"], meta["ema_used"]), rel=1e-12)
    set_rates(optimizer, rates)
    optimizer.step()
    state = system.state_dict()
    for family, prefix in (("out/after_opt/", "student."), ("out/after_ema/", "teacher.")):
        keys = [k for k in t if k.startswith(family)]
        assert {k.removeprefix(family) for k in keys} == {k for k in state if k.startswith(prefix)}
        for key in keys:
            assert_golden("frame_step", key, state[key.removeprefix(family)])


def test_golden_outputs():
    t, _ = load("frame_step")
    student, teacher = golden_system()[0].outputs(*golden_batch(t))
    assert_golden("frame_step", "out/student_output", student)
    assert_golden("frame_step", "out/teacher_output", teacher)
    assert not teacher.requires_grad


def test_golden_step_that_is_not_symmetric():
    t, _ = load("frame_step")
    system, _, _ = golden_system(symmetric=False)
    out = system(*golden_batch(t))
    assert_golden("frame_step", "out/asym/loss", out.loss[None])
    assert_golden("frame_step", "out/asym/std_stu", out.std_student[None])
    assert_golden("frame_step", "out/asym/std_tea", out.std_teacher[None])
    out.loss.backward()
    for key in (k for k in t if k.startswith("grad/asym/")):
        assert_golden("frame_step", key, system.student.get_parameter(key.removeprefix("grad/asym/")).grad)


def test_golden_five_steps():
    t, meta = load("frame_step5")
    system, schedules, optimizer = golden_system()
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
        want = t[f"out/{key}"]
        noise = 1e-12 if key in ("lr", "wd", "ema") else 1e-5
        torch.testing.assert_close(torch.tensor(values, dtype=torch.float64), want, rtol=noise, atol=0, msg=key)
    state = system.state_dict()
    assert set(meta["checksum_names"]) == set(state)
    for key in meta["full"]:
        assert_golden("frame_step5", f"out/final/{key}", state[key])
    final = [state[name].double() for name in meta["checksum_names"]]
    for key, sums in (("sum", [v.sum() for v in final]), ("abssum", [v.abs().sum() for v in final])):
        torch.testing.assert_close(torch.stack(sums), t[f"out/checksum_{key}"], rtol=0, atol=GOLDEN_CHECKSUM)


def both(symmetric=True, drop_path_rate=0.5):
    kwargs = {"hidden": 40, "out": 16, "mlp_ratio": 2.0, "drop_path_rate": drop_path_rate}
    ours = ATSTFrame(TINY, symmetric=symmetric, max_frames=41, **kwargs)
    plain = official.System(TINY, symmetric=symmetric, positions=10, **kwargs)
    with torch.no_grad():
        for p in ours.parameters():
            p.add_(torch.randn_like(p), alpha=0.05)
    plain.load_state_dict(ours.state_dict())
    return ours, plain


def random_batch(clips=4, frames=41):
    mask = torch.rand(clips, frames // 4) < 0.5
    mask[:, :2] = True
    return *torch.randn(2, clips, 1, 64, frames), torch.randint(8, frames + 1, (clips,)), mask


def assert_same(ours, plain, what):
    # gradients that the batch statistics cancel (norm_frame.bias) are nothing but rounding of the others
    atol = NETWORK_RTOL * max(plain.abs().max().item(), 1e-2)
    torch.testing.assert_close(ours, plain, rtol=0, atol=atol, msg=lambda m: f"{what}: {m}")


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_step_equals_the_plain_structure(symmetric, seed):
    """With stochastic depth: the same seed drops the same branches in both."""
    torch.manual_seed(seed)
    ours, plain = both(symmetric)
    batch = random_batch(clips=2 + seed)
    losses = []
    for system in (ours, plain):
        torch.manual_seed(seed + 100)
        out = system(*batch)
        out[0].backward()
        losses.append(torch.stack([x.detach() for x in out]))
    assert_same(*losses, "loss and spreads")
    for name, p in plain.student.named_parameters():
        assert_same(ours.student.get_parameter(name).grad, p.grad, name)
    for name, buffer in plain.named_buffers():
        assert_same(ours.get_buffer(name), buffer, name)


def test_teacher_has_no_graph_and_its_own_statistics():
    system, _ = both()
    before = copy.deepcopy(system.teacher.state_dict())
    system(*random_batch()).loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in system.teacher.parameters())
    changed = {k for k, v in system.teacher.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {f"projector.1.{k}" for k in ("running_mean", "running_var", "num_batches_tracked")}


def test_teacher_starts_as_a_copy_and_pairs_with_the_student():
    system = ATSTFrame(TINY, hidden=40, out=16)
    student, teacher = system.student.state_dict(), system.teacher.state_dict()
    assert set(teacher) == {k for k in student if not k.startswith("predictor")}
    assert all(torch.equal(student[k], v) for k, v in teacher.items())
    pairs = list(zip(*system.teacher_pairs()))
    names = {id(p): n for n, p in system.named_parameters()}
    assert [names[id(t)] for _, t in pairs] == [names[id(s)].replace("student", "teacher") for s, _ in pairs]
    assert all(s is not t and s.data_ptr() != t.data_ptr() for s, t in pairs)
    assert {id(t) for _, t in pairs} == {id(p) for p in system.teacher.parameters()}


def test_keys_are_those_of_the_published_checkpoints():
    with torch.device("meta"):
        system = ATSTFrame("base")
    shapes = {k: tuple(v.shape) for k, v in system.state_dict().items()}
    for side in ("student", "teacher"):
        encoder = {k: v for k, v in shapes.items() if k.startswith(f"{side}.encoder.")}
        assert len(encoder) == 138
        assert encoder[f"{side}.encoder.pos_embed"] == (1, 251, 768)
        assert encoder[f"{side}.encoder.mask_embed"] == (1, 1, 768)
        assert encoder[f"{side}.encoder.patch_embed.patch_embed.weight"] == (768, 256)
        assert encoder[f"{side}.encoder.blocks.11.attn.qkv.weight"] == (2304, 768)
        assert shapes[f"{side}.projector.0.weight"] == (4096, 768)
        assert shapes[f"{side}.projector.3.weight"] == (256, 4096)
    assert shapes["student.predictor.0.weight"] == (4096, 256)
    assert not any("predictor" in k for k in shapes if k.startswith("teacher"))
    projector = sum(p.numel() for p in system.student.projector.parameters())
    predictor = sum(p.numel() for p in system.student.predictor.parameters())
    assert (projector, predictor) == (4_202_496, 2_105_344)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"mask": torch.zeros(4, 10, dtype=torch.bool)}, "mask must select at least one valid token"),
        ({"lengths": torch.full((4,), 3)}, "mask must select at least one valid token"),
        ({"mask": torch.ones(4, 9, dtype=torch.bool)}, r"mask must be \[8, 10\]"),
        ({"mask": torch.ones(4, 10)}, "mask must be .* dtype bool"),
        ({"lengths": torch.full((4,), 42)}, "lengths must be"),
        ({"view2": torch.zeros(4, 1, 64, 40)}, "ATSTFrame: view2 must be of view1's shape"),
    ],
)
def test_errors(change, message):
    system, _ = both()
    batch = dict(zip(("view1", "view2", "lengths", "mask"), random_batch())) | change
    with pytest.raises((ValueError, TypeError), match=message):
        system(**batch)


def test_copies():
    system, _ = both(drop_path_rate=0.0)
    batch = random_batch()
    want = system(*batch).loss
    for other in (copy.deepcopy(system), pickle.loads(pickle.dumps(system))):
        assert torch.equal(other(*batch).loss, want)
    with pytest.raises(RuntimeError, match="predictor"):
        system.load_state_dict({k: v for k, v in system.state_dict().items() if "predictor" not in k})


def test_config_builds_the_same_system():
    system, _ = both()
    again = ATSTFrame(**system.config)
    assert not any(again.load_state_dict(system.state_dict()))


def test_autocast_trains():
    system, _ = both(drop_path_rate=0.2)
    with torch.autocast("cpu", torch.bfloat16):
        out = system(*random_batch())
        out.loss.backward()
    assert out.loss.dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in system.student.parameters())
