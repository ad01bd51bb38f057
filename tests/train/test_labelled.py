"""Batches of labelled files: which part of a file, and what it is labelled with."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from atst_fast.train.config import UserError
from atst_fast.train.features import Labelled
from atst_fast.train.labelled import LabelledBatches, Reader, balanced_weights, fingerprint, token_targets
from atst_fast.train.metrics import Event
from tests.train.conftest import tone


def test_batches_are_of_the_middle_or_of_a_random_part(tmp_path):
    events = [{"label": "high", "onset": 0.2, "offset": 0.5}]
    path, samples = tmp_path / "x.wav", tone(1.1)
    soundfile.write(path, samples, 16000)
    file = Labelled(path, ("high",), (Event(**events[0]),))
    reader = Reader([file] * 4)
    middle = LabelledBatches(reader, ["high", "low"], 2, 0.5, seed=0).batch(0)
    first = (len(samples) - 8000) // 2
    assert torch.equal(middle.waveform[0], torch.from_numpy(samples[first : first + 8000]))
    assert middle.targets.tolist() == [[1, 0], [1, 0]]
    whole = LabelledBatches(reader, ["high", "low"], 2, 12.0, seed=0).batch(0)
    assert whole.lengths.tolist() == [len(samples)] * 2
    starts = set()
    for step in range(6):
        part = LabelledBatches(reader, ["high", "low"], 2, 0.5, 0, frames_per_token=4).batch(step)
        for row, targets in zip(part.waveform.numpy(), part.targets):
            start = next(i for i in range(len(samples)) if np.array_equal(samples[i : i + 8000], row))
            want = token_targets(file, ["high", "low"], start, 12, 4)
            assert targets.tolist() == want.tolist()
            starts.add(start)
    assert len(starts) > 8


@pytest.fixture
def files(tmp_path):
    """Eight files of a common label, two of a rare one, one of both and one of none."""
    soundfile.write(tmp_path / "x.wav", tone(0.2), 16000)
    labels = [("a",)] * 8 + [("b",)] * 2 + [("a", "b"), ()]
    (tmp_path / "files").mkdir()
    paths = [tmp_path / f"files/{i}.wav" for i in range(len(labels))]
    for path in paths:
        path.symlink_to(tmp_path / "x.wav")
    return [Labelled(path, names, ()) for path, names in zip(paths, labels)]


def test_weights_are_of_rare_labels(files):
    a, b = 1000 / 9.01, 1000 / 3.01
    np.testing.assert_allclose(balanced_weights(files), [a] * 8 + [b] * 2 + [a + b, 0])
    with pytest.raises(UserError, match="--sampler balanced needs labels, and none of the files to train on has one"):
        balanced_weights(files[-1:])


def test_draws_are_balanced_and_any_number_of_processes_shares_them(files):
    reader, weights = Reader(files, 1), balanced_weights(files)
    whole = LabelledBatches(reader, ["a", "b"], 4, 1.0, seed=7, weights=weights, mixed=0.5)
    halves = [
        LabelledBatches(reader, ["a", "b"], 2, 1.0, 7, weights=weights, mixed=0.5, rank=r, world=2) for r in (0, 1)
    ]
    drawn = []
    for step in range(500):
        numbers = whole.numbers(step)
        assert numbers == halves[0].numbers(step) + halves[1].numbers(step)
        drawn += numbers
        of, partners = whole.partners(step)
        own = [half.partners(step) for half in halves]
        assert (of, partners) == (own[0][0] + [k + 2 for k in own[1][0]], own[0][1] + own[1][1])
    shares = np.bincount(drawn, minlength=12) / len(drawn)
    np.testing.assert_allclose(shares, weights / weights.sum(), atol=0.035)  # four deviations of the largest
    assert whole.per_epoch == halves[0].per_epoch == 3


def test_partners_are_other_files(files):
    batches, seen = LabelledBatches(Reader(files, 1), ["a", "b"], 4, 1.0, seed=7, mixed=0.5), set()
    mixed = 0
    for step in range(300):
        numbers, (of, partners) = batches.numbers(step), batches.partners(step)
        assert all(numbers[k] != partner for k, partner in zip(of, partners, strict=True))
        seen |= {(numbers[k], partner) for k, partner in zip(of, partners)}
        mixed += len(of)
    assert mixed / 1200 == pytest.approx(0.5, abs=0.05)
    assert len(seen) > 0.9 * 12 * 11
    batch = batches.batch(1)
    of, partners = batches.partners(1)
    assert batch.partner_of.tolist() == of != []
    assert len(batch.waveform) == len(batch.lengths) == len(batch.targets) == 4 + len(of)
    assert batches.names(1) == [str(files[i].path) for i in batches.numbers(1) + partners]
    want = [["a" in files[i].labels, "b" in files[i].labels] for i in batches.numbers(1) + partners]
    assert batch.targets.tolist() == want
    assert not LabelledBatches(Reader(files, 1), ["a", "b"], 4, 1.0, seed=7).batch(1).partner_of.numel()


def test_targets_of_a_part():
    file = Labelled("x", ("a", "b"), (Event("a", 0.0, 0.5), Event("b", 0.9, 1.5), Event("b", 0.1, 0.2)))
    roll = token_targets(file, ["a", "b"], 8000 - 640, 25, 4)  # from 0.46 s on
    assert roll[:, 0].nonzero()[0].tolist() == [0]
    assert roll[:, 1].nonzero()[0].tolist() == list(range(11, 25))


def test_every_place_of_a_part_is_drawn(tmp_path):
    """Of 8161 samples 8160: the part begins at 0 or at 1, and has 52 frames, 13 tokens."""
    samples = np.arange(8161, dtype=np.int16)
    soundfile.write(tmp_path / "x.wav", samples, 16000)
    reader, starts = Reader([Labelled(tmp_path / "x.wav", ("a",), ())] * 2), set()
    for step in range(12):
        part = LabelledBatches(reader, ["a"], 2, 0.51, 0, frames_per_token=4).batch(step)
        assert part.lengths.tolist() == [8160, 8160]
        assert part.targets.shape == (2, 13, 1)
        own = [LabelledBatches(reader, ["a"], 1, 0.51, 0, 4, rank=rank, world=2).batch(step) for rank in (0, 1)]
        assert torch.equal(torch.cat([half.waveform for half in own]), part.waveform)
        starts |= set(part.waveform[:, 0].tolist())
    assert starts == {0, 1}


def test_files_come_in_the_order_of_their_numbers(tmp_path):
    for i in range(4):
        soundfile.write(tmp_path / f"{i}.wav", np.full(600 + i, i, np.int16), 16000)
    reader = Reader([Labelled(tmp_path / f"{i}.wav", (str(i),), ()) for i in range(4)])
    waveform, lengths = reader.waveforms([3, 0, 2], [0, 1, 0], 601)
    assert lengths.tolist() == [601, 599, 601]
    assert waveform[:, 0].tolist() == [3, 0, 2]
    batch = LabelledBatches(reader, list("0123"), 4, 0.03, seed=0).batch(0)
    assert batch.waveform[:, 0].tolist() == batch.targets.argmax(1).tolist() != [0, 1, 2, 3]


def test_too_few_files_for_a_batch(tmp_path):
    soundfile.write(tmp_path / "x.wav", tone(1.0), 16000)
    reader = Reader([Labelled(tmp_path / "x.wav", ("a",), ())] * 3)
    with pytest.raises(UserError, match="3 training files do not fill one batch of 4; give a smaller --batch-size"):
        LabelledBatches(reader, ["a"], 4, 0.5, seed=0)


def test_files_that_cannot_be_read_are_named(tmp_path):
    path = tmp_path / "x.wav"
    soundfile.write(path, tone(1.0), 16000)
    file = Labelled(path, ("a",), ())
    reader = Reader([file])
    path.write_bytes(b"")
    for call in (lambda: reader.waveforms([0], [0], 100), lambda: Reader([file])):
        with pytest.raises(UserError, match=r"x\.wav: empty: 0 bytes"):
            call()


def test_another_task_has_another_fingerprint():
    file = Labelled(Path("x.wav"), ("a",), (Event("a", 0.0, 0.5),))
    others = [
        replace(file, path=Path("y.wav")),
        replace(file, labels=("a", "b")),
        replace(file, events=(Event("a", 0.0, 0.6),)),
        replace(file, events=None),
    ]
    assert len({fingerprint([f]) for f in (file, *others)}) == 5
    assert fingerprint([file]) == fingerprint([replace(file, path=Path("/elsewhere/x.wav"))])
