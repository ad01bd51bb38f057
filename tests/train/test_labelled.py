"""Batches of labelled files: which part of a file, and what it is labelled with."""

import numpy as np
import soundfile
import torch

from atst_fast.train.features import Labelled
from atst_fast.train.labelled import LabelledBatches, Reader, token_targets
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


def test_targets_of_a_part():
    file = Labelled("x", ("a", "b"), (Event("a", 0.0, 0.5), Event("b", 0.9, 1.5), Event("b", 0.1, 0.2)))
    roll = token_targets(file, ["a", "b"], 8000 - 640, 25, 4)  # from 0.46 s on
    assert roll[:, 0].nonzero()[0].tolist() == [0]
    assert roll[:, 1].nonzero()[0].tolist() == list(range(11, 25))
