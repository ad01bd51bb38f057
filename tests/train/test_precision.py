import pytest
import torch

from atst_fast.train.precision import Trainee, pick_precision, working_copy
from tests import tolerances
from tests.train import tiny


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)


def windows(losses, size=20):
    return losses.unfold(0, size, size).mean(1)


def test_bf16_follows_the_loss_curve_of_float32():
    float32, bf16 = (tiny.curve(tiny.stepper(precision), 200) for precision in ("float32", "bf16"))
    assert windows(float32[:, 0])[-1] < 0.5 * float32[0, 0]  # there is a curve to follow
    for ours, theirs in zip(bf16.unbind(1), float32.unbind(1)):
        torch.testing.assert_close(ours, theirs, rtol=tolerances.BF16_STEP_RTOL, atol=0)
        torch.testing.assert_close(windows(ours), windows(theirs), rtol=tolerances.BF16_CURVE_RTOL, atol=0)
    assert not torch.equal(bf16, float32)


def test_bf16_begins_as_float32_does_in_atst_clip():
    """Twenty steps: after them the weights of two runs whose views are warped that much are their own."""
    float32, bf16 = (tiny.curve(tiny.stepper(p, method="clip"), 20) for p in ("float32", "bf16"))
    torch.testing.assert_close(bf16, float32, rtol=tolerances.BF16_STEP_RTOL, atol=0)
    assert not torch.equal(bf16, float32)


def test_the_copies_are_the_rounded_masters_after_every_step():
    step = tiny.stepper("bf16")
    trainee = step.trainee
    masters, copies = list(trainee.model.parameters()), list(trainee.working.parameters())
    assert {p.dtype for p in masters} == {torch.float32}
    assert {p.dtype for p in copies} == {torch.bfloat16}
    for k in range(30, 33):
        before = [p.detach().clone() for p in masters]
        step(tiny.clips(k), k)
        assert all(torch.equal(copy, p.bfloat16()) for copy, p in zip(copies, masters))
        assert not any(torch.equal(p, b) for p, b in zip(masters, before))
    assert all(p.grad is None for p in masters)
    trained = list(trainee.working.student.parameters())
    assert all(p.grad.dtype == torch.bfloat16 for p in trained)
    assert all(p.grad is None for p in trainee.working.teacher.parameters())


def test_running_statistics_are_shared_and_float32():
    step = tiny.stepper("bf16")
    model, working = step.trainee.model, step.trainee.working
    before = {name: b.clone() for name, b in model.named_buffers()}
    assert len(before) == 9  # mean, variance and count of three heads
    step(tiny.clips(0), 0)
    for name, buffer in model.named_buffers():
        assert working.get_buffer(name) is buffer
        assert buffer.dtype in (torch.float32, torch.int64)
        assert not torch.equal(buffer, before[name]), name
    assert {t.dtype for t in model.state_dict().values()} == {torch.float32, torch.int64}


def test_loaded_weights_reach_the_copy():
    one, other = tiny.stepper("bf16"), tiny.stepper("bf16")
    tiny.curve(one, 2)
    other.trainee.model.load_state_dict(one.trainee.model.state_dict())
    copies = [t.trainee.working.state_dict() for t in (one, other)]
    assert not all(torch.equal(*pair) for pair in zip(*(c.values() for c in copies)))
    other.trainee.rewrite()
    for name, ours in other.trainee.working.state_dict().items():
        assert torch.equal(ours, copies[0][name]), name


def test_float32_has_no_copy():
    step = tiny.stepper()
    assert step.trainee.working is step.trainee.model
    assert not step.trainee.shadows


def test_a_copy_shares_no_parameter_and_takes_no_gradient_along():
    model = tiny.stepper().trainee.model
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    working, shadows = working_copy(model)
    assert len(shadows) == len(list(model.parameters()))
    assert all(p.grad is None for p in working.parameters())
    assert [p.requires_grad for p in working.parameters()] == [p.requires_grad for p in model.parameters()]
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in working.parameters()}


def test_auto_is_bf16_on_a_gpu():
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 1)
    assert [pick_precision("auto", d) for d in (cpu, cuda)] == ["float32", "bf16"]
    assert [pick_precision("float32", d) for d in (cpu, cuda)] == ["float32", "float32"]
    assert pick_precision("bf16", cpu) == "bf16"


def test_a_precision_that_is_none_is_refused():
    step = tiny.stepper()
    with pytest.raises(ValueError, match="Trainee: precision must be one of float32, bf16, got 'half'"):
        Trainee(step.trainee.model, step.schedules, "half")
