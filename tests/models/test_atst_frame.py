import copy

import pytest
import torch

from atst_fast.models import ATSTFrame
from benchmarks import official
from tests.golden import assert_golden, load
from tests.golden.systems import frame_step
from tests.models import checks

TINY = {"dim": 24, "depth": 3, "num_heads": 3}


def golden_batch(t, prefix="in/"):
    assert torch.equal(t[f"{prefix}mask0"], t[f"{prefix}mask1"])
    assert torch.equal(t[f"{prefix}len0"], t[f"{prefix}len1"])
    return [t[prefix + k] for k in ("mel0", "mel1", "len0", "mask0")]


def test_golden_step():
    t, _ = load("frame_step")
    system, schedules = frame_step()
    out = system(*golden_batch(t))
    assert_golden("frame_step", "out/loss", out.loss[None])
    assert_golden("frame_step", "out/std_stu", out.std_student[None])
    assert_golden("frame_step", "out/std_tea", out.std_teacher[None])
    out.loss.backward()
    grads = [k for k in t if k.startswith("grad/") and "asym" not in k]
    assert len(grads) == len(list(system.student.parameters()))
    for key in grads:
        assert_golden("frame_step", key, system.student.get_parameter(key.removeprefix("grad/")).grad)
    checks.assert_golden_rates_and_update("frame_step", system, schedules)


def test_golden_outputs():
    t, _ = load("frame_step")
    student, teacher = frame_step()[0].outputs(*golden_batch(t))
    assert_golden("frame_step", "out/student_output", student)
    assert_golden("frame_step", "out/teacher_output", teacher)
    assert not teacher.requires_grad


def test_golden_step_that_is_not_symmetric():
    t, _ = load("frame_step")
    system, _ = frame_step(symmetric=False)
    out = system(*golden_batch(t))
    assert_golden("frame_step", "out/asym/loss", out.loss[None])
    assert_golden("frame_step", "out/asym/std_stu", out.std_student[None])
    assert_golden("frame_step", "out/asym/std_tea", out.std_teacher[None])
    out.loss.backward()
    for key in (k for k in t if k.startswith("grad/asym/")):
        assert_golden("frame_step", key, system.student.get_parameter(key.removeprefix("grad/asym/")).grad)


def test_golden_five_steps():
    checks.assert_five_golden_steps("frame_step5", *frame_step(), golden_batch)


def both(symmetric=True, drop_path_rate=0.5):
    kwargs = {"hidden": 40, "out": 16, "mlp_ratio": 2.0, "drop_path_rate": drop_path_rate}
    ours = ATSTFrame(TINY, symmetric=symmetric, max_frames=41, **kwargs)
    plain = official.System(TINY, symmetric=symmetric, positions=10, **kwargs)
    return checks.trained_a_little(ours, plain)


def random_batch(clips=4, frames=41):
    mask = torch.rand(clips, frames // 4) < 0.5
    mask[:, :2] = True
    return *torch.randn(2, clips, 1, 64, frames), torch.randint(8, frames + 1, (clips,)), mask


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_step_equals_the_plain_structure(symmetric, seed):
    """With stochastic depth."""
    torch.manual_seed(seed)
    checks.assert_step_equals(*both(symmetric), random_batch(clips=2 + seed), seed + 100)


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


def test_copies_and_config():
    system, _ = both(drop_path_rate=0.0)
    batch = random_batch()
    want = system(*batch).loss
    for other in checks.copies(system):
        assert torch.equal(other(*batch).loss, want)
    with pytest.raises(RuntimeError, match="predictor"):
        system.load_state_dict({k: v for k, v in system.state_dict().items() if "predictor" not in k})


def test_autocast_trains():
    system, _ = both(drop_path_rate=0.2)
    with torch.autocast("cpu", torch.bfloat16):
        out = system(*random_batch())
        out.loss.backward()
    assert out.loss.dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in system.student.parameters())
