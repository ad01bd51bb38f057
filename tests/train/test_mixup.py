"""The augmentation of fine-tuning: mixed as drawn, with whom, cropped at each clip's own length, continued."""

import pytest
import torch

from atst_fast.train.mixup import Mixup
from tests.train.tiny import assert_equal


@pytest.fixture
def plain(monkeypatch):
    """Without the crop."""
    monkeypatch.setattr(Mixup, "_crop", lambda self, mel, lengths, seed: mel)


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
    monkeypatch.setattr(Mixup, "_mix", lambda self, mel, lengths, targets, draws: (mel.clone(), targets))
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


def test_errors():
    with pytest.raises(ValueError, match="Mixup: alpha must be more than 0"):
        Mixup(3, 0, seed=0)
