from types import SimpleNamespace

import pytest
import torch

from atst_fast.models import ATSTClip, ClipEncoder
from tests.golden import assert_golden, load
from tests.golden.systems import clip_step
from tests.models import checks, plain_clip

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
    system, schedules = clip_step()
    forward_and_back(system)
    checks.assert_golden_rates_and_update("clip_step", system, schedules)


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
    checks.assert_five_golden_steps("clip_step5", *clip_step(), golden_batch)


def both(drop_path_rate=0.5):
    kwargs = {"hidden": 40, "out": 16, "mlp_ratio": 2.0, "drop_path_rate": drop_path_rate}
    ours = ATSTClip(TINY, max_frames=41, **kwargs)
    plain = plain_clip.System(TINY, positions=10, **kwargs)
    return checks.trained_a_little(ours, plain)


def random_batch(clips=4, frames=41):
    return *torch.randn(2, clips, 1, 64, frames), *torch.randint(0, frames + 1, (2, clips))


@pytest.mark.parametrize("seed", range(3))
def test_step_equals_the_plain_structure(seed):
    """With stochastic depth."""
    torch.manual_seed(seed)
    checks.assert_step_equals(*both(), random_batch(clips=2 + seed), seed + 100)


def test_lengths_of_one_view_alone():
    system, _ = both(drop_path_rate=0.0)
    view1, view2, _, lengths = random_batch()
    full = torch.full((4,), 41)
    assert torch.equal(system(view1, view2, None, lengths).loss, system(view1, view2, full, lengths).loss)
    assert torch.equal(system(view1, view2, lengths).loss, system(view1, view2, lengths, full).loss)
    assert torch.equal(system(view1, view2).loss, system(view1, view2, full, full).loss)


def test_a_count_that_no_batch_has_makes_the_loss_nan_and_moves_nothing(monkeypatch):
    """What `ClipEncoder.select` gives for a length out of range, where nobody can look at it."""
    system, _ = both()
    before = {name: buffer.clone() for name, buffer in system.named_buffers() if "running" in name}
    monkeypatch.setattr(ClipEncoder, "select", lambda self, mel, lengths: SimpleNamespace(count=torch.tensor(-1)))
    monkeypatch.setattr(
        ClipEncoder, "forward", lambda self, mel, lengths, select: mel[:, 0, :24, 0] + self.cls_token[0]
    )
    out = system(*random_batch())
    assert out.loss.isnan()
    assert all(torch.equal(system.get_buffer(name), value) for name, value in before.items())
    monkeypatch.setattr(ClipEncoder, "select", lambda self, mel, lengths: SimpleNamespace(count=torch.tensor(8)))
    assert system(*random_batch()).loss.isfinite()
    assert not any(torch.equal(system.get_buffer(name), value) for name, value in before.items())


def test_the_teacher_has_no_graph():
    system, _ = both()
    view1, view2, *lengths = random_batch()
    student, teacher = system.outputs(view1.requires_grad_(), view2, *lengths)
    assert student.requires_grad
    assert not teacher.requires_grad


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
    for other in checks.copies(system):
        assert torch.equal(other(*batch).loss, want)


def test_autocast_trains():
    system, _ = both(drop_path_rate=0.2)
    with torch.autocast("cpu", torch.bfloat16):
        out = system(*random_batch())
        out.loss.backward()
    assert out.loss.dtype == torch.float32
    assert all(p.grad.isfinite().all() for n, p in system.student.named_parameters() if "mask_embed" not in n)
