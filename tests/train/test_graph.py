"""What surrounds a CUDA graph of the step, with a double in its place that only records what to do."""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from atst_fast.optim import AdamWEMA
from atst_fast.train.graph import WARM_UP
from tests.train import tiny


class Double:
    """Records a step without doing it; a replay does it, with the recorded tensors. Counts what is asked of it."""

    def __init__(self):
        self.ran = self.replayed = 0
        self.recorded = []

    def run(self, work):
        self.ran += 1
        return work()

    def record(self, work, generators):
        self.work, self.numbers = work, torch.full((3,), torch.nan)
        self.recorded.append(generators)
        return self.numbers

    def replay(self):
        self.replayed += 1
        self.numbers.copy_(self.work())


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)


def state(step):
    everything = {**step.trainee.model.state_dict(), **step.front_end.state_dict()["_extra_state"]}
    for i, values in step.trainee.optimizer.state_dict()["state"].items():
        everything |= {f"{i}.{name}": value for name, value in values.items()}
    everything["bank"] = everything.pop("banks")[1]["mels"]
    everything["rng"] = torch.get_rng_state()
    return {k: v for k, v in everything.items() if v is not None}


def assert_same_state(one, other):
    ours, theirs = state(one), state(other)
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]), key


@pytest.mark.parametrize("method, precision", [("frame", "float32"), ("frame", "bf16"), ("clip", "bf16")])
def test_replays_are_the_plain_steps_bit_for_bit(method, precision):
    plain = tiny.stepper(precision, method=method)
    expected, rng = tiny.curve(plain, 7, first=20), torch.get_rng_state()
    double = Double()
    graphed = tiny.stepper(precision, method=method, graph=double)
    waveform, results = tiny.clips(0), []
    for k in range(20, 27):
        waveform.copy_(tiny.clips(k))
        results.append(graphed(waveform, k))
        waveform.fill_(0)  # whoever brings batches may use the memory again
    assert (double.ran, double.recorded, double.replayed) == (WARM_UP, [[]], 7 - WARM_UP)
    assert torch.equal(torch.stack([torch.stack(r[:3]) for r in results]), expected)
    assert [r.rates for r in results] == [plain.schedules(k) for k in range(20, 27)]
    torch.set_rng_state(rng)
    assert_same_state(graphed, plain)


def test_rates_are_there_before_the_replay(monkeypatch):
    seen = []
    monkeypatch.setattr(
        AdamWEMA, "refresh", lambda self: seen.append([*(g["lr"] for g in self.param_groups), self.momentum])
    )
    double = Double()
    step = tiny.stepper(graph=double)
    tiny.curve(step, WARM_UP + 2)
    rates = [step.schedules(k) for k in range(WARM_UP, WARM_UP + 2)]
    assert seen == [[r.lr, r.lr, r.momentum] for r in rates]


def test_a_batch_of_another_shape_is_trained_plainly():
    double, plain = Double(), tiny.stepper()
    graphed = tiny.stepper(graph=double)
    shapes = [8, 8, 8, 8, 5, 8, 5]
    for step in (plain, graphed):
        torch.manual_seed(1)
        results = [step(tiny.clips(k, batch), k) for k, batch in enumerate(shapes)]
        assert all(r.loss.isfinite() for r in results)
        if step is plain:
            expected = results
    assert (double.ran, len(double.recorded), double.replayed) == (5, 1, 2)
    assert [r.loss for r in results] == [r.loss for r in expected]


def test_a_recording_whose_bank_has_moved_is_made_anew():
    double = Double()
    step = tiny.stepper(graph=double)
    longer = tiny.clips(0)[:, :12000]  # of 0.75 s; the others have 0.5 s
    for k, samples in enumerate([*[8000] * (WARM_UP + 1), 12000, 8000, 8000]):
        before = [bank and bank.mels for bank in step.front_end.banks]
        step(longer[:, :samples].contiguous(), k)
        moved = any(bank and bank.mels is not old for bank, old in zip(step.front_end.banks, before))
        assert moved == (samples == 12000 or k == 0)
    assert (double.ran, len(double.recorded), double.replayed) == (WARM_UP + 1, 2, 3)


def test_what_is_recorded_has_been_run_before_in_that_shape():
    double = Double()
    step = tiny.stepper(graph=double)
    for k, batch in enumerate([5, 5, *[8] * WARM_UP]):
        step(tiny.clips(k, batch), k)
        assert not double.recorded
    step(tiny.clips(9), 9)
    assert len(double.recorded) == 1


def test_the_generator_of_the_views_is_registered():
    double = Double()
    step = tiny.stepper(graph=double)
    tiny.curve(step, WARM_UP)
    step.front_end.device_generator = torch.Generator()
    tiny.curve(step, 1)
    assert double.recorded == [[step.front_end.device_generator]]


def test_no_gradients_are_held_while_others_are_recorded():
    double = Double()
    step = tiny.stepper("bf16", graph=double)
    tiny.curve(step, WARM_UP)
    record = double.record

    def check(*args):
        assert all(p.grad is None for p in step.trainee.working.parameters())
        return record(*args)

    double.record = check
    tiny.curve(step, 1, first=WARM_UP)
    assert double.replayed == 1


def test_parts_are_watched_but_not_while_they_are_recorded():
    seen = []

    class Watch:
        def __init__(self, part):
            seen.append(part)

        def __enter__(self): ...

        def __exit__(self, *_): ...

    double = Double()
    step = tiny.stepper(graph=double)
    step.watch = Watch
    tiny.curve(step, WARM_UP + 2)
    assert seen == ["front end", "step"] * WARM_UP + ["step"] * 2


class NothingFromTheHost(TorchDispatchMode):
    """Refuses every tensor that lies on the CPU: to a GPU it would be copied from memory that is not pinned."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        devices = {x.device.type for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)}
        assert devices <= {"meta"}, f"{func} on {devices}"
        return out


@pytest.mark.parametrize("method", ["frame", "clip"])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_networks_take_no_tensor_of_the_host(monkeypatch, method, precision):
    """On meta tensors, which are no more on the CPU than those of a GPU, and have no values to be read."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # it does not know meta
    options = {"fixed_size": True} if method == "frame" else {}
    batch = tiny.stepper(method=method, **options).front_end(tiny.clips(0))
    batch = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in batch]
    model = tiny.stepper(precision, method=method, device="meta").trainee.working
    for network in (model.student, model.teacher):
        network.encoder.fixed_shapes = True
    with NothingFromTheHost():
        out = model(*batch)
        out.loss.backward()
    assert [x.dtype for x in out] == [torch.float32] * 3
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    assert {p.grad.dtype for p in model.student.parameters() if p.grad is not None} == {dtype}
    with pytest.raises(AssertionError, match="cpu"), NothingFromTheHost():
        torch.ones(3).to("meta")
