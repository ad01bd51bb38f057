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
