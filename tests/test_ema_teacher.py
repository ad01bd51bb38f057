"""EMATeacher against the loop that it replaces, torch's AveragedModel, and what it refuses."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from atst_fast import EMATeacher
from atst_fast.models import ATSTFrame, FrameEncoder
from atst_fast.optim import AdamWEMA
from tests.tolerances import EMA_TEACHER

TINY = {"dim": 24, "depth": 2, "num_heads": 3}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8))
        self.predictor = nn.Linear(8, 4)
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.predictor(self.encoder(x)) * self.scale[0]


@pytest.fixture
def student():
    torch.manual_seed(0)
    model = Model()
    model(torch.randn(16, 6))
    return model


def moved(model):
    """Another student: weights and statistics a training step later."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    model.train()(torch.randn(16, 6).to(model.predictor.weight.dtype))
    return model


def assert_near(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=EMA_TEACHER)


@pytest.mark.parametrize("buffers", ["skip", "copy", "lerp"])
def test_update(student, buffers):
    teacher = EMATeacher(student, momentum=0.9, buffers=buffers)
    before, now = copy.deepcopy(student.state_dict()), moved(student)
    teacher.update(now)
    buffer_names = dict(student.named_buffers())
    for name, s in now.state_dict().items():
        t, lerped = before[name], 0.9 * before[name] + 0.1 * s
        if name in buffer_names:
            whole = s if not s.is_floating_point() else lerped
            lerped = {"skip": t, "copy": s, "lerp": whole}[buffers]
        assert_near(teacher.module.state_dict()[name].double(), lerped.double())
    assert teacher.n_averaged == 1
    assert not any(p.requires_grad for p in teacher.parameters())


def test_replaces_averaged_model(student):
    """Keys, forward and numbers, once the first update, which copies there, has been made one here."""
    theirs = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    ours = EMATeacher(student, momentum=0.9)
    assert set(ours.state_dict()) == set(theirs.state_dict())
    ours.set(student)
    theirs.update_parameters(student)
    for _ in range(3):
        student = moved(student)
        for averaged in (ours, theirs):
            averaged.update_parameters(student)
    for key, value in theirs.module.state_dict().items():
        assert_near(ours.module.state_dict()[key], value)
    x = torch.randn(5, 6)
    assert_near(ours.eval()(x), theirs.eval()(x))
    ours.load_state_dict(theirs.state_dict())
    assert ours.n_averaged == 4


def test_the_teacher_of_atst():
    """What the official loop averages, by name; nothing of the predictor is copied."""
    system = ATSTFrame(TINY, hidden=16, out=8, max_frames=41)
    teacher = EMATeacher(system.student, momentum=0.75, include=("encoder", "projector"), buffers="skip")
    assert teacher.module.predictor is None
    assert list(teacher.module.state_dict()) == list(system.teacher.state_dict())
    with torch.no_grad():
        for p in system.student.parameters():
            p.add_(0.5)
    teacher.update(system.student)
    for (_, t), s in zip(teacher.module.named_parameters(), system.teacher_pairs()[0]):
        assert_near(t, s - 0.75 * 0.5)


def test_parts_of_names(student):
    student.encoder_head = nn.Linear(8, 2)
    teacher = EMATeacher(student, include=["encoder.0.weight", "scale"])
    assert [n for n, _ in teacher.module.named_parameters()] == ["scale", "encoder.0.weight"]
    assert teacher.module.encoder[1] is None
    assert EMATeacher(student, include=["encoder"]).module.encoder_head is None
    teacher.update(moved(student))


def test_momentum(student):
    """A schedule by the number of updates, or by the step that is given; a tensor."""
    asked = []
    teacher = EMATeacher(student, momentum=lambda step: asked.append(step) or 0.5)
    for step in (None, None, 40, 0):
        teacher.update(student, step)
    assert asked == [0, 1, 40, 0]
    now = moved(student)
    by_number, by_tensor = EMATeacher(student, 0.25), EMATeacher(student, torch.tensor(0.25))
    for averaged in (by_number, by_tensor):
        averaged.update(now)
    assert torch.equal(by_number.module.scale, by_tensor.module.scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_averaged_in_float32(student, dtype):
    """Near 1 a step is below the resolution of bfloat16: without the average the teacher would stand still."""
    student = student.to(dtype)
    teacher = EMATeacher(student, momentum=0.999)
    now = copy.deepcopy(student)
    with torch.no_grad():
        now.scale.add_(1.0)
    for _ in range(10):
        teacher.update(now)
    assert_near(teacher.average.get_buffer("scale"), torch.full((3,), 2 - 0.999**10))
    assert teacher.module.scale.dtype == dtype
    assert torch.equal(teacher.module.scale.data, torch.full((3,), 2 - 0.999**10).to(dtype))
    again = EMATeacher(student, momentum=0.999)
    again.load_state_dict(teacher.state_dict())
    for averaged in (teacher, again):
        averaged.update(now)
    assert torch.equal(again.average.get_buffer("scale"), teacher.average.get_buffer("scale"))
    teacher.set(now)  # the averages as well, or the next update would undo it
    teacher.update(now)
    assert torch.equal(teacher.module.scale, now.scale)


@pytest.mark.parametrize("first", [torch.float32, torch.bfloat16])
def test_casting_the_teacher_keeps_its_averages(student, first):
    """Also that of a whole system whose part it is."""
    teacher = EMATeacher(student.to(first), momentum=0.999)
    system, now = nn.ModuleList([teacher]).half(), copy.deepcopy(student).half()
    with torch.no_grad():
        now.scale.add_(1.0)
    for _ in range(10):
        teacher.update(now)
    assert {name: x.dtype for name, x in teacher.average.named_buffers()} == {
        name.replace(".", "/"): torch.float32 for name, _ in student.named_parameters()
    }
    want = torch.full((3,), 2 - 0.999**10)
    assert_near(teacher.average.get_buffer("scale"), want)
    system.float()
    assert not [*teacher.average.buffers()]
    assert_near(teacher.module.scale, want)
    assert set(teacher.state_dict()) == set(EMATeacher(student.float()).state_dict())
    teacher.update(now.float())
    assert all(x.is_shared() for x in teacher.half().share_memory().state_dict().values())
    assert teacher.half().to("meta").to_empty(device="cpu").average.get_buffer("scale").dtype == torch.float32


def test_set_takes_buffers_that_updates_skip(student):
    teacher, now = EMATeacher(student, buffers="skip"), moved(student)
    teacher.set(now)
    for name, s in now.state_dict().items():
        assert torch.equal(teacher.module.state_dict()[name], s)


@pytest.mark.parametrize("momentum", [0.875, torch.tensor(0.875)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_the_operator_does_not_take(student, dtype, momentum):
    student = student.to(dtype)
    student.predictor.weight.data = student.predictor.weight.data.t().contiguous().t()
    teacher, now = EMATeacher(student, momentum), moved(student)
    want = 0.875 * student.predictor.weight + 0.125 * now.predictor.weight
    teacher.update(now)
    rtol, atol = (1e-12, 0) if dtype == torch.float64 else (0, EMA_TEACHER)
    torch.testing.assert_close(teacher.module.predictor.weight, want.detach(), rtol=rtol, atol=atol)


def test_a_student_of_another_dtype(student):
    teacher, now = EMATeacher(student, 0.9), moved(student)
    want = 0.9 * student.scale + 0.1 * now.scale
    teacher.update(now.double())
    assert_near(teacher.module.scale, want.detach())
    assert not teacher.module.scale.requires_grad


def test_wrappers_are_looked_through(student):
    plain, compiled = EMATeacher(student, 0.9), EMATeacher(torch.compile(student, backend="eager"), 0.9)
    now = moved(student)
    plain.update(torch.compile(nn.DataParallel(now), backend="eager"))
    now.encoder = torch.compile(now.encoder, backend="eager")
    compiled.update(now)
    for a, b in zip(plain.state_dict().values(), compiled.state_dict().values()):
        assert torch.equal(a, b)


def test_pairs_let_the_optimizer_do_it():
    torch.manual_seed(0)
    student = FrameEncoder(TINY, max_frames=41)
    teacher, twin = EMATeacher(student, 0.9), EMATeacher(student, 0.9)
    optimizer = AdamWEMA(student.parameters(), teacher=teacher.pairs(student), momentum=0.9)
    student(torch.randn(2, 1, 64, 41)).square().mean().backward()
    optimizer.step()
    twin.update(student)
    for a, b in zip(teacher.module.parameters(), twin.module.parameters()):
        assert_near(a, b)


def test_copies(student):
    teacher = EMATeacher(student, 0.9)
    for twin in (copy.deepcopy(teacher), pickle.loads(pickle.dumps(teacher))):
        assert all(torch.equal(a, b) for a, b in zip(twin.state_dict().values(), teacher.state_dict().values()))
        twin.update(moved(student))
        assert twin.n_averaged == 1


def test_parts_that_have_another_name_too(student):
    """An alias outside of what is included does not take it away."""
    student.alias, student.first = student.encoder, student.encoder[0]
    student.tied = nn.Linear(6, 8)
    student.tied.weight = student.encoder[0].weight
    now = moved(student)
    want = student.tied.weight.lerp(now.tied.weight, 0.5).detach()
    for include in ("encoder", "encoder.0", "encoder.0.weight", "tied.weight"):
        teacher = EMATeacher(student, 0.5, include=[include])
        teacher.update(now)
        name = "tied.weight" if include == "tied.weight" else "encoder.0.weight"
        assert_near(teacher.module.get_parameter(name), want)
        assert teacher.module.predictor is None


@pytest.mark.parametrize(
    "kwargs, error, message",
    [
        ({"momentum": 1.5}, ValueError, "momentum must be a number from 0 to 1"),
        ({"momentum": "0.9"}, TypeError, "momentum must be a number from 0 to 1"),
        ({"buffers": "sum"}, ValueError, "buffers must be 'skip', 'copy' or 'lerp'"),
        ({"include": "encoder"}, TypeError, "include must be several names"),
        ({"include": ("encoder", "decoder")}, ValueError, r"include must be names that the student has \(encoder, "),
        ({"student": [1]}, TypeError, "student must be a torch.nn.Module"),
    ],
)
def test_errors(student, kwargs, error, message):
    with pytest.raises(error, match=f"EMATeacher: {message}"):
        EMATeacher(**{"student": student} | kwargs)


def test_errors_of_an_update(student):
    teacher = EMATeacher(student, momentum=lambda step: 2.0)
    with pytest.raises(ValueError, match="EMATeacher: momentum must be"):
        teacher.update(student)
    with pytest.raises(ValueError, match="EMATeacher: student must be a module with a tensor scale of shape"):
        EMATeacher(student).update(student.predictor)
    other = copy.deepcopy(student)
    other.scale = nn.Parameter(torch.ones(1))  # which would be broadcast
    for method in ("update", "set", "pairs"):
        with pytest.raises(
            ValueError, match=r"student must be a module with a tensor scale of shape \[3\], got float32"
        ):
            getattr(EMATeacher(student), method)(other)
