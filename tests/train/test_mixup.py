"""The augmentation of fine-tuning: mixed as drawn, with whom, cropped at each clip's own length, continued."""

import pytest
import torch

from atst_fast.train import mixup as mixup_module
from atst_fast.train.mixup import FileMixup, Masks, Mixup
from tests.train.tiny import assert_equal


@pytest.fixture
def plain(monkeypatch):
    """Without the crop."""
    monkeypatch.setattr(mixup_module, "resize_crop", lambda mel, lengths, seed: mel)


def batch(step, frames=(20, 20, 20), classes=5):
    """Clips that are constant, and a label each that says which constant."""
    values = torch.arange(len(frames)) + len(frames) * step + 1.0
    mel = values[:, None, None, None] * (torch.arange(max(frames)) < torch.tensor(frames)[:, None, None, None])
    return mel.repeat(1, 1, 8, 1), torch.tensor(frames), values[:, None].repeat(1, classes)


def test_labels_are_mixed_as_clips_are(plain):
    mixup, seen = Mixup(4, 0.5, seed=1), set()
    for step in range(30):
        mel, lengths, targets = batch(step)
        out, labels = mixup(mel, lengths, targets, step)
        torch.testing.assert_close(out[:, 0, 0, :5], labels)
        assert torch.equal(out, out[:, :, :1, :1].expand_as(out))
        numbers = targets[:, 0]
        assert (labels[:, 0] <= numbers).all()  # the partner came before it
        assert (labels[:, 0] >= (numbers - 4).clamp(min=1)).all()  # and is one of the last four
        seen |= set((numbers - labels[:, 0]).tolist())
    assert not torch.equal(mixup(*batch(0), 0)[1], Mixup(4, 0.5, seed=2)(*batch(0), 0)[1])
    assert max(seen) > 3.5
    assert len(seen) > 60


def test_shares_are_drawn_from_a_symmetric_beta(plain):
    """Ones whose partners are zeros: what is left of a one is its share."""
    mixup, shares = Mixup(1, 0.5, seed=3), []
    mel, lengths, targets = torch.zeros(20, 1, 2, 4), torch.full((20,), 4), torch.zeros(20, 1)
    targets[1::2] = 1
    for step in range(30):
        shares.append(mixup(mel, lengths, targets, step)[1][1::2, 0])
    shares = torch.cat(shares)
    assert shares.mean().item() == pytest.approx(0.5, abs=0.06)  # three deviations of the mean of 300
    assert shares.var().item() == pytest.approx(0.125, abs=0.02)


def test_a_batch_larger_than_the_bank(plain):
    mixup = Mixup(2, 0.5, seed=1)
    for step in range(20):
        mel, lengths, targets = batch(step, (20,) * 5)
        out, labels = mixup(mel, lengths, targets, step)
        torch.testing.assert_close(out[:, 0, 0, :5], labels)
        assert (labels[:, 0] >= (targets[:, 0] - 2).clamp(min=1)).all()


def test_the_crop_is_in_both_axes(monkeypatch):
    """A ramp over the bands: a part of it, stretched, spans less of its range."""
    monkeypatch.setattr(Mixup, "_mix", lambda self, mel, lengths, targets, *_: (mel.clone(), targets))
    mixup, mel = Mixup(2, 0.5, seed=0), torch.linspace(1, 2, 64)[None, None, :, None].repeat(1, 1, 1, 40)
    spans, silent = [], 0
    for step in range(12):
        out = mixup(mel, torch.tensor([40]), torch.zeros(1, 1), step)[0][0, 0]
        column = out[:, out[0].argmax()]
        spans.append((column[0] / column[-1]).item())
        silent += bool((out[0] == 0).any())  # of the canvas that is longer than the clip
    assert max(spans) > 0.6
    assert silent


def test_the_very_first_clip_has_no_partner(plain):
    mel, lengths, targets = batch(0)
    out, labels = Mixup(4, 0.5, seed=0)(mel, lengths, targets, 0)
    assert torch.equal(out[0], mel[0])
    assert torch.equal(labels[0], targets[0])
    assert not torch.equal(labels[1:], targets[1:])


def test_partners_of_other_lengths_are_mixed_where_they_overlap(plain):
    mixup = Mixup(2, 50.0, seed=0)  # shares near a half
    shapes = set()
    for step in range(20):
        mel, lengths, targets = batch(step, (30, 12))
        out, _ = mixup(mel, lengths, targets, step)
        assert not out[1, ..., 12:].any()  # its padding stays
        assert torch.equal(out[1, ..., :12], out[1, :, :1, :1].expand(1, 8, 12))  # a longer partner covers all of it
        changed = (out[0, 0, 0] != mel[0, 0, 0]).nonzero().squeeze(1)
        if step and len(changed) < 30:
            assert len(changed) == 12
            assert torch.equal(changed, torch.arange(12) + changed[0])
            shapes.add(int(changed[0]))
    assert len(shapes) > 3


@pytest.mark.parametrize("frames", [(12, 13), (13, 12)])
def test_every_place_of_a_partner_is_drawn(plain, frames):
    """Ramps over time; the places are 0 and 1, of the shorter clip on the longer one and of the part of it."""
    mixup, places = Mixup(1, 50.0, seed=0), set()  # the partner is the clip before
    ramp = torch.arange(13.0)
    for step in range(12):
        mel = torch.zeros(2, 1, 2, 13)
        for row, n in zip(mel, frames):
            row[..., :n] = ramp[:n]
        out, labels = mixup(mel, torch.tensor(frames), torch.eye(2), step)
        own, share = frames[1], labels[1, 1]
        assert 0.2 < share < 0.8
        if own == 13:  # the other one covers all but the first or the last frame
            place = int(out[1, 0, 0, -1] != mel[1, 0, 0, -1])
            want = mel[1, 0, 0].clone()
            want[place : place + 12] = share * want[place : place + 12] + (1 - share) * ramp[:12]
        else:
            place = int(((out[1, 0, 0, 0]) / (1 - share)).round())
            want = share * ramp[:12] + (1 - share) * ramp[place : place + 12]
            want = torch.nn.functional.pad(want, (0, 1))
        torch.testing.assert_close(out[1, 0, 0], want)
        places.add(place)
    assert places == {0, 1}


def test_lengths_of_a_batch_larger_than_the_bank(plain):
    """Those of the clips that are kept: the partner of the next clip is the last one, of 12 frames, somewhere on it."""
    mixup, places = Mixup(1, 50.0, seed=0), set()
    for step in range(8):
        mixup(*batch(step, (30, 30, 12)), step)
        mel, lengths, targets = torch.zeros(1, 1, 8, 30), torch.tensor([30]), torch.zeros(1, 5)
        changed = mixup(mel, lengths, targets, 100 + step)[0][0, 0, 0].nonzero().squeeze(1)
        assert torch.equal(changed, torch.arange(12) + changed[0])
        places.add(int(changed[0]))
    assert len(places) > 3


def test_each_clip_is_cropped_once(monkeypatch):
    parts = []
    monkeypatch.setattr(mixup_module, "augment_views", lambda mel, draws: parts.append(mel.shape) or [mel])
    Mixup(2, 0.5, seed=0)(torch.randn(3, 1, 64, 40), torch.tensor([40, 25, 40]), torch.eye(3), 3)
    assert parts == [(1, 1, 64, 25), (2, 1, 64, 40)]


def test_the_crop_keeps_lengths_and_padding():
    mel, lengths, targets = torch.randn(3, 1, 64, 40), torch.tensor([40, 25, 40]), torch.eye(3)
    mel[1, ..., 25:] = 0
    out, labels = Mixup(2, 0.5, seed=0)(mel, lengths, targets, 3)
    assert out.shape == mel.shape
    assert not out[1, ..., 25:].any()
    assert out[1, ..., :25].abs().mean() > 0.1
    assert not torch.allclose(out[0], mel[0])
    torch.testing.assert_close(labels.sum(1), torch.ones(3))


def test_it_continues_where_it_stopped():
    def steps(mixup, first, last):
        out = []
        for step in range(first, last):
            torch.manual_seed(step)
            mel = torch.randn(3, 1, 64, 30)
            out.append(mixup(mel, torch.tensor([30, 30, 30]), torch.rand(3, 4), step))
        return out

    whole, first = Mixup(4, 0.5, seed=3), Mixup(4, 0.5, seed=3)
    want = steps(whole, 0, 6)
    steps(first, 0, 3)
    second = Mixup(4, 0.5, seed=3)
    second.load_state_dict(first.state_dict())
    assert_equal(steps(second, 3, 6), want[3:], "mixed")


def test_as_many_clips_are_mixed_as_asked_for(plain):
    mixup, whole = Mixup(4, 0.5, seed=1, prob=0.25), Mixup(4, 0.5, seed=1)
    mixed = 0
    for step in range(60):
        mel, lengths, targets = batch(step)
        (out, labels), (_, all_labels) = (m(mel, lengths, targets, step) for m in (mixup, whole))
        alone = (labels == targets).all(1)
        assert torch.equal(out[alone], mel[alone])
        assert torch.equal(labels[~alone], all_labels[~alone])  # with the same partner, as much
        mixed += int((~alone).sum())
    assert mixed / 180 == pytest.approx(0.25, abs=0.1)  # three deviations


def with_files(step, frames=(20, 30, 20, 20), partners=((0, 24), (2, 20), (3, 9))):
    """Four clips and partners of three of them, all constant, and labels that say which constant."""
    mel, lengths, targets = batch(step, (*frames, *(n for _, n in partners)))
    return mel, lengths, targets, torch.tensor([of for of, _ in partners])


def test_files_are_mixed_as_their_labels_are(plain):
    shares, places = [], set()
    for step in range(40):
        mel, lengths, targets, of = with_files(step)
        out, labels = FileMixup(10.0, seed=1)(mel, lengths, targets, step, of)
        assert out.shape == (4, 1, 8, 30)  # as long as the longest of the clips themselves
        assert torch.equal(out[1], mel[1, ..., :30])
        assert torch.equal(labels[1], targets[1])
        for row in (0, 2):
            torch.testing.assert_close(out[row, 0, :, :20], labels[row, :1].expand(8, 20), rtol=1e-5, atol=0)
        changed = (out[3, 0, 0] != mel[3, 0, 0, :30]).nonzero().squeeze(1)
        assert torch.equal(changed, torch.arange(9) + changed[0])
        assert changed[-1] < 20
        places.add(int(changed[0]))
        torch.testing.assert_close(out[3, 0, 0, changed], labels[3, :1].expand(9), rtol=1e-5, atol=0)
        assert not out[0, ..., 20:].any()
        shares += [((labels[k] - targets[n]) / (targets[k] - targets[n]))[0] for k, n in ((0, 4), (2, 5), (3, 6))]
    assert len(places) > 8  # of 12
    shares = torch.stack(shares)
    assert shares.mean().item() == pytest.approx(0.5, abs=0.03)
    assert shares.std().item() == pytest.approx(21**-0.5 / 2, abs=0.025)  # of Beta(10, 10)


def test_two_processes_mix_and_mask_as_one(plain):
    mel, lengths, targets, of = with_files(0, frames=(30, 20, 20, 25), partners=((0, 24), (1, 30), (3, 9)))
    mel = mel + torch.rand(mel.shape) * (mel != 0)
    whole, labels = FileMixup(0.5, 1, Masks(4, 9, 1))(mel, lengths, targets, 5, of)
    for rank, rows, partners in ((0, [0, 1, 4, 5], [0, 1]), (1, [2, 3, 6], [1])):
        place = {"rank": rank, "world": 2}
        half = FileMixup(0.5, 1, Masks(4, 9, 1, **place), **place)
        out, own = half(mel[rows], lengths[rows], targets[rows], 5, torch.tensor(partners))
        clips = slice(2 * rank, 2 * rank + 2)
        assert torch.equal(out, whole[clips, ..., : out.shape[3]])
        assert torch.equal(own, labels[clips])


def test_files_are_cropped_after_they_are_masked(monkeypatch):
    """Partners are not; another step or process is cropped otherwise."""
    mel, lengths, targets, of = torch.randn(5, 1, 64, 40), torch.tensor([40, 40, 25, 40, 40]), torch.eye(5), [1]
    mel[2, ..., 25:] = 0
    seen = []
    real = mixup_module.resize_crop
    monkeypatch.setattr(mixup_module, "resize_crop", lambda *args: seen.append(args[0].clone()) or real(*args))
    mixup = FileMixup(0.5, 1, Masks(8, 8, 1))
    out = [mixup(mel.clone(), lengths, targets, step, torch.tensor(of))[0] for step in (0, 0, 1)]
    assert torch.equal(out[0], out[1])
    assert not torch.allclose(out[0], out[2])
    crops = [
        FileMixup(0.5, 1, rank=rank, world=2)(mel.clone(), lengths, targets, 0, torch.zeros(0, dtype=torch.int64))[0]
        for rank in (0, 1)
    ]
    assert not torch.allclose(*crops)
    assert out[0].shape == (4, 1, 64, 40)
    assert not out[0][2, ..., 25:].any()
    assert (seen[0][0, 0] == 0).all(0).any() or (seen[0][0, 0] == 0).all(1).any()


def test_bands_are_masked_within_the_length():
    widths, starts = [], []
    lengths = torch.tensor([30, 12, 3])
    for step in range(200):
        mel = Masks(5, 10, seed=3)(torch.ones(3, 1, 8, 30), lengths, step)
        for row, size in zip(mel[:, 0], lengths.tolist()):
            bins, frames = (row == 0).all(1), (row == 0).all(0)
            assert torch.equal(row == 0, bins[:, None] | frames)  # one band in each direction, nothing else
            assert not frames[size:].any()
            for band in (bins, frames):
                at = band.nonzero().squeeze(1)
                assert not len(at) or torch.equal(at, torch.arange(len(at)) + at[0])
        widths.append([int((mel[0, 0] == 0).all(k).sum()) for k in (1, 0)])
        starts += (mel[0, 0, 0] == 0).nonzero()[:1].flatten().tolist() * (widths[-1][1] > 0)
    bins, frames = map(set, zip(*widths))
    assert bins == set(range(5))
    assert frames == set(range(10))
    assert {min(starts), max(starts)} <= set(range(30))
    assert max(starts) > 24
    only = Masks(0, 10, seed=3)(torch.ones(3, 1, 8, 30), lengths, 0)
    assert torch.equal(only[:, :, :1].expand_as(only), only)


def test_errors():
    with pytest.raises(ValueError, match="Mixup: alpha must be more than 0"):
        Mixup(3, 0, seed=0)
    with pytest.raises(ValueError, match="FileMixup: alpha must be more than 0"):
        FileMixup(0, seed=0)
