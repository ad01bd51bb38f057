"""Copies on a stream of their own, on a double of the GPU that does each stream's work as early or late as it may."""

from types import SimpleNamespace

import pytest
import torch

from atst_fast.train import upload
from atst_fast.train.batch import Batch

STEPS = 7


class Stream:
    """Work in order; ``done`` says how much of it has been done."""

    def __init__(self, machine):
        self.machine, self.work, self.done = machine, [], 0
        machine.streams.append(self)

    def put(self, work, after=None):
        """``after``: (stream, how much of it) that has to be done first."""
        self.work.append((work, after))
        self.machine.advance()

    def wait_stream(self, other):
        self.put(lambda: None, (other, len(other.work)))

    def wait_event(self, event):
        self.put(lambda: None, event.place)

    def run(self):
        """All that may be done."""
        while self.done < len(self.work):
            work, after = self.work[self.done]
            if after and after[0].done < after[1]:
                return
            work()
            self.done += 1

    def force(self, upto):
        """So much of it, and of others what that waits for."""
        while self.done < upto:
            work, after = self.work[self.done]
            if after:
                after[0].force(after[1])
            work()
            self.done += 1


class Event:
    place = None

    def record(self, stream):
        self.place = (stream, len(stream.work))

    def synchronize(self):
        if self.place:
            self.place[0].force(self.place[1])


class Buffer:
    def __init__(self, machine, like):
        self.machine, self.shape, self.device = machine, like.shape, machine.device
        self.value = torch.full_like(like, -1)

    def copy_(self, source, non_blocking):
        assert non_blocking
        self.machine.current.put(lambda: self.value.copy_(source))


class Machine:
    """``first``: which stream's work is done as soon as it may be; the other's is done when somebody waits for it."""

    device = SimpleNamespace(type="cuda")

    def __init__(self, first):
        self.streams, self.first, self.most_ahead = [], first, 0
        self.compute = self.current = Stream(self)
        cuda = SimpleNamespace(
            Stream=lambda device: Stream(self),
            Event=Event,
            current_stream=lambda device: self.current,
            stream=self.enter,
        )
        self.buffers = []
        self.torch = SimpleNamespace(cuda=cuda, empty_like=self.empty_like)

    def empty_like(self, waveform, device):
        assert device is self.device
        self.buffers.append(Buffer(self, waveform))
        return self.buffers[-1]

    def enter(self, stream):
        machine = self

        class Entered:
            def __enter__(self):
                self.before, machine.current = machine.current, stream

            def __exit__(self, *_):
                machine.current = self.before

        return Entered()

    def advance(self):
        for stream in self.streams:
            if (stream is self.compute) == (self.first == "compute"):
                stream.run()


def batches():
    for k in range(STEPS):
        yield Batch(k, torch.full((2, 3), k, dtype=torch.int16))


@pytest.mark.parametrize("first", ["compute", "copies"])
def test_every_step_reads_its_own_batch(monkeypatch, first):
    machine = Machine(first)
    monkeypatch.setattr(upload, "torch", machine.torch)
    read, ahead = [], []
    for batch in upload.upload(batches(), machine.device):
        step, buffer = batch
        machine.compute.put(lambda step=step, buffer=buffer: read.append((step, buffer.value.clone())))
        ahead.append(step - len(read))
    machine.compute.force(len(machine.compute.work))
    assert [step for step, _ in read] == list(range(STEPS))
    assert all((value == step).all() for step, value in read)
    assert len(machine.buffers) == 2
    if first == "copies":
        assert max(ahead[:-1]) == 2  # steps that are queued before it


def test_the_next_batch_is_copied_while_a_step_runs(monkeypatch):
    machine = Machine("copies")
    monkeypatch.setattr(upload, "torch", machine.torch)
    uploads = upload.upload(batches(), machine.device)
    assert next(uploads).step == 0
    assert [int(b.value[0, 0]) for b in machine.buffers] == [0, 1]
    machine.compute.put(lambda: None)  # step 0, which nobody has waited for
    assert next(uploads).step == 1
    assert [int(b.value[0, 0]) for b in machine.buffers] == [0, 1]  # it may still read buffer 0
    machine.compute.run()
    machine.advance()
    assert [int(b.value[0, 0]) for b in machine.buffers] == [2, 1]


def test_a_cpu_gets_the_batches_as_they_are():
    source = list(batches())
    assert all(a is b for a, b in zip(upload.upload(iter(source), torch.device("cpu")), source, strict=True))


def test_one_batch_and_none(monkeypatch):
    machine = Machine("compute")
    monkeypatch.setattr(upload, "torch", machine.torch)
    one = list(upload.upload(iter(list(batches())[:1]), machine.device))
    assert [b.step for b in one] == [0]
    assert list(upload.upload(iter([]), machine.device)) == []
