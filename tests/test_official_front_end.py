"""The front end that the benchmarks compare with computes what the official one does."""

import pytest
import torch

from benchmarks.official_front_end import FrontEnd, collate, mel_matrix
from tests.golden import load


def test_mel_matrix():
    torch.testing.assert_close(mel_matrix(), load("mel_n64_w1024")[0]["out/fb"], rtol=0, atol=1e-5)


def test_log_mel():
    waveform = load("mel_waveforms")[0]["in/noise_16000"].float().flatten() / 32768
    want = load("mel_n64_w1024")[0]["out/noise_16000/minmax"]
    got = FrontEnd().log_mel(waveform[None])[0]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_views_and_masks():
    front_end = FrontEnd()
    clips = [front_end(torch.randn(16000)) for _ in range(40)]
    view1, view2, lengths, masks = collate(clips)
    assert view1.shape == view2.shape == (40, 1, 64, 101)
    assert lengths.tolist() == [101] * 40
    assert masks.shape == (40, 25)
    assert masks.float().mean().item() == pytest.approx(0.5, abs=0.08)
    assert not torch.equal(view1, view2)
    assert len(front_end.bank) == 40
    assert view2.isfinite().all()
