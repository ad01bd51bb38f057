import time

import numpy as np
import pytest
import soundfile
import torch

from atst_fast.train import audio
from atst_fast.train.config import UserError
from atst_fast.train.data import Batches, Prefetcher, open_source, starts
from atst_fast.train.pack import PackConfig, pack
from tests.train.conftest import GOOD


def batches(folder, size=3, samples=4000, **kw):
    return Batches(open_source(folder, 2), size, samples, **{"seed": 0, "crops_per_clip": 1, **kw})


def collect(data, first, last):
    with Prefetcher(data, first, last, ahead=2) as it:
        return [b.waveform.clone() for b in it]


def test_a_batch_follows_from_its_number_alone(clips_folder):
    data = batches(clips_folder)
    assert data.per_epoch == 4
    straight = collect(data, 0, 10)
    assert all(w.dtype == torch.int16 and w.shape == (3, 4000) for w in straight)
    for first in (1, 4, 7):
        again = collect(batches(clips_folder), first, 10)
        assert all(torch.equal(a, b) for a, b in zip(again, straight[first:], strict=True))
    assert not torch.equal(straight[0], batches(clips_folder, seed=1).batch(0).waveform)


def test_an_epoch_takes_every_clip_once_in_a_new_order(clips_folder):
    data = batches(clips_folder)
    epochs = [[name for k in range(4) for name in data.names(4 * e + k)] for e in range(3)]
    assert all(sorted(e) == sorted(data.source.names) for e in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_long_clips_come_as_often_as_the_crop_fits(clips_folder):
    lengths = open_source(clips_folder, 2).samples  # 6400, 8000, ... 24000
    for crops, expected in ((None, np.maximum(lengths // 8000, 1)), (1, np.ones(12)), (3, np.full(12, 3))):
        data = batches(clips_folder, size=1, samples=8000, crops_per_clip=crops)
        assert np.bincount(data.order(0)).tolist() == expected.tolist()
        assert data.per_epoch == expected.sum()


def place(clip, crop):
    """Which of the crops of that length it is: from 0, the first one, to 1, the last one."""
    same = (np.lib.stride_tricks.sliding_window_view(clip, len(crop)) == crop).all(1)
    return np.flatnonzero(same)[0] / (len(same) - 1)


@pytest.mark.parametrize("packed", [False, True])
def test_crops_of_a_clip_lie_side_by_side(clips_folder, tmp_path, packed):
    """Each at a place of its own; the first is where the only one would be."""
    folder = pack(PackConfig(src=clips_folder, dst=tmp_path / "p")) if packed else clips_folder
    data, single = batches(folder, samples=(4000, 2500)), batches(folder)
    assert data.per_epoch == 4
    apart = []
    for step in range(4):
        both = data.batch(step).waveform
        assert (both.dtype, both.shape) == (torch.int16, (3, 6500))
        assert torch.equal(both[:, :4000], single.batch(step).waveform)
        for name, row in zip(data.names(step), both.numpy()):
            clip = audio.read(clips_folder / name)
            apart.append(place(clip, row[:4000]) - place(clip, row[4000:]))
    assert min(apart) < -0.2
    assert max(apart) > 0.2


def test_both_crops_are_of_the_same_clip_when_one_of_them_cannot_be_read(clips_folder, monkeypatch):
    data = Batches(open_source(clips_folder, 1), 12, (1600, 1600), 0, crops_per_clip=1)
    real, first = audio.read, []

    def read(path, start=0, samples=None):
        if path.name == "05.wav" and first.append(start) is None and len(first) % 2 == 0:
            raise audio.AudioError("undecodable")
        return real(path, start, samples)

    monkeypatch.setattr("atst_fast.train.data.read", read)
    rows = data.batch(0).waveform
    whole = {name: real(clips_folder / name) for name in data.source.names}
    for row in rows.numpy():
        owners = [
            {n for n, x in whole.items() if (np.lib.stride_tricks.sliding_window_view(x, 1600) == crop).all(1).any()}
            for crop in (row[:1600], row[1600:])
        ]
        assert owners[0] & owners[1] - {"05.wav"}
    assert len(first) == 2


def test_the_incomplete_batch_is_left_out(clips_folder):
    data = batches(clips_folder, size=5)
    assert data.per_epoch == 2
    assert len({*data.names(0), *data.names(1)}) == 10


def test_ranks_share_an_epoch_without_overlap(clips_folder):
    ranks = [batches(clips_folder, rank=r, world=2) for r in range(2)]
    seen = [name for data in ranks for k in range(data.per_epoch) for name in data.names(k)]
    assert sorted(seen) == sorted(ranks[0].source.names)
    assert not torch.equal(ranks[0].batch(0).waveform, ranks[1].batch(0).waveform)


def test_a_subset_moves_on_and_round(clips_folder):
    data = batches(clips_folder, size=4, subset=4)
    assert data.per_epoch == 1
    epochs = [set(data.names(e)) for e in range(4)]
    assert len(epochs[0] | epochs[1] | epochs[2]) == 12
    assert epochs[3] == epochs[0]


def test_crops_are_new_at_every_step_and_for_every_seed(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.arange(30000, dtype=np.int16), 16000)
    source = open_source(tmp_path, 1)
    firsts = {
        int(Batches(source, 1, 600, seed, crops_per_clip=5).batch(step).waveform[0, 0])
        for seed in range(2)
        for step in range(10)
    }
    assert len(firsts) > 15


def test_crops_start_anywhere_they_fit():
    samples = np.array([10, 12, 3])
    assert starts(samples, 10, np.array([0.999, 0.999, 0.999])).tolist() == [0, 2, 0]
    drawn = starts(np.full(3000, 12), 10, np.random.default_rng(0).random(3000))
    assert np.bincount(drawn).min() > 900


def test_short_clips_are_padded_at_their_end(clips_folder):
    data = batches(clips_folder, size=12, samples=32000)
    batch = data.batch(0)
    for name, row in zip(data.names(0), batch.waveform.numpy()):
        x = audio.read(clips_folder / name)
        np.testing.assert_array_equal(row[: len(x)], x)
        assert not row[len(x) :].any()


def test_folder_and_pack_give_the_same_batches(good_folder, tmp_path):
    pack(PackConfig(src=good_folder, dst=tmp_path / "p", shard_gb=1e-4))
    (good_folder / "layer3.MP3").unlink()  # its length is known exactly only after decoding
    folder = open_source(good_folder, 2)
    packed = open_source(tmp_path / "p")
    assert set(folder.names) | {"layer3.MP3"} == set(packed.names) == set(GOOD)
    where = np.linspace(0, 0.99, len(folder.names))
    clips = np.array([packed.names.index(n) for n in folder.names])
    a, b = np.ones((2, len(where), 10000), np.int16)
    folder.take(np.arange(len(where)), where[None], [a])
    packed.take(clips, where[None], [b])
    np.testing.assert_array_equal(a, b)
    assert folder.samples.tolist() == packed.samples[clips].tolist()


def test_bad_files_are_named_and_never_fatal(bad_folder, clips_folder):
    for path in bad_folder.iterdir():
        path.rename(clips_folder / path.name)
    told = []
    problems = audio.Problems(told.append)
    data = Batches(open_source(clips_folder, 2, problems), 16, 4000, 0)
    before = [data.batch(step).waveform for step in range(3)]
    named = {line.split(":")[0] for line in told}
    assert {"empty.wav", "text.wav", "text.mp3", "cut.wav", "cut.ogg", "blip.wav", "gone.wav"} <= named
    assert {"cut.flac", "nan.wav", "silent.wav"} <= named  # found when they were decoded
    assert not any(name[0].isdigit() for name in named)
    assert "files with a problem" in problems.summary()
    # another process finds the same substitutes for what cannot be decoded
    again = Batches(open_source(clips_folder, 1), 16, 4000, 0)
    for step in (2, 0, 1):
        assert torch.equal(again.batch(step).waveform, before[step])


def test_nothing_usable_is_said_clearly(bad_folder):
    (bad_folder / "silent.wav").unlink()
    for name in ("cut.flac", "cut.mp3", "nan.wav"):
        (bad_folder / name).unlink()
    with pytest.raises(UserError, match=r"none of the (\d+) audio files .* \1 files with a problem"):
        open_source(bad_folder, 2)


def test_files_that_vanish_during_the_run(clips_folder):
    data = batches(clips_folder)
    for path in clips_folder.iterdir():
        path.unlink()
    with pytest.raises(UserError, match="can be decoded any more"), Prefetcher(data, 0, 3) as it:
        next(it)


def test_too_few_clips_for_a_batch(clips_folder):
    with pytest.raises(UserError, match=r"12 crops of 12 usable clips do not fill one batch of 13.*--batch-size"):
        batches(clips_folder, size=13)
    with pytest.raises(UserError, match=r"12 crops of 12 .* batch of 7 in each of 2 processes; give more audio"):
        batches(clips_folder, size=7, world=2)
    with pytest.raises(UserError, match=r"^7 crops of --subset do not .* of 4 in each of 2 .*; give a larger one"):
        batches(clips_folder, size=4, subset=7, world=2)


def test_leaving_early_stops_the_thread(clips_folder):
    began = time.perf_counter()
    with Prefetcher(batches(clips_folder), 0, 10**9, ahead=1) as it:
        next(it)
    assert time.perf_counter() - began < 5


def test_fingerprint_tells_clip_lists_apart(clips_folder):
    one = batches(clips_folder).fingerprint()
    assert one == batches(clips_folder, seed=3).fingerprint()
    (clips_folder / "00.flac").unlink()
    assert one != batches(clips_folder).fingerprint()
