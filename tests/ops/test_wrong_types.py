"""Arguments that are no numbers, ranges or lists: an error that names function and argument, not Python's own."""

import math

import pytest
import torch

from atst_fast import ops
from atst_fast.models import ATSTClip, ATSTFrame

X, ROW, WAVE, MEL = torch.zeros(4, 6), torch.ones(6), torch.zeros(2, 4000), torch.zeros(2, 1, 64, 8)
TOKENS = torch.zeros(2, 3, 12)
SIZES = {"hidden": 8, "out": 4, "max_frames": 9}


def draw(**options):
    return ops.draw_augment((2, 1, 64, 8), None, **options)


def views(draws, banks=None):
    return ops.augment_views(MEL, draws, banks)


def system(kind):
    return kind({"dim": 8, "depth": 1, "num_heads": 1}, **SIZES)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: ops.add_norm(X, eps="a"), "add_norm: eps must be at least 0 and finite, got str 'a'"),
        (
            lambda: ops.batch_norm_relu(X, ROW, ROW, eps=None),
            "batch_norm_relu: eps must be from 0 to inf, got",
        ),
        (
            lambda: ops.batch_norm_relu(X, ROW, ROW, momentum="a"),
            "batch_norm_relu: momentum must be from 0 to",
        ),
        (lambda: ops.batch_norm_relu(X, ROW, ROW, group=3), "batch_norm_relu: group must be a ProcessGroup of torch"),
        (lambda: ops.add_branch(X, X, ROW, alpha="a"), "add_branch: alpha must be a number, got str 'a'"),
        (
            lambda: ops.frame_attention(TOKENS, 2, scale="a"),
            "frame_attention: scale must be positive and finite, got str",
        ),
        (lambda: ops.patch_embed(MEL, X, patch=None), "patch_embed: patch must be two positive integers .*, got None"),
        (
            lambda: ops.patch_embed(MEL, X, patch=(2, 3), stride=2.5),
            "patch_embed: stride must be two positive integers",
        ),
        (lambda: ops.log_mel(WAVE, sample_rate="a"), "log_mel: sample_rate must be a number of Hz, got str 'a'"),
        (lambda: ops.log_mel(WAVE, sample_rate=[1]), r"log_mel: sample_rate must be a number of Hz, got list \[1\]"),
        (lambda: ops.log_mel(WAVE, n_fft=512.0), "log_mel: n_fft must be 512, 1024 or 2048, got float 512.0"),
        (
            lambda: ops.log_mel(WAVE, win_length="a"),
            r"log_mel: win_length must be from 1 to n_fft \(1024\), got str 'a'",
        ),
        (lambda: ops.log_mel(WAVE, hop_length=1.5), r"log_mel: hop_length must be from 1 to n_fft \(1024\), got float"),
        (lambda: ops.log_mel(WAVE, f_max=None), "log_mel: f_max must be a number of Hz, got NoneType None"),
        (lambda: ops.log_mel(WAVE, n_mels=1.5), "log_mel: n_mels must be at least 1, got float 1.5"),
        (lambda: ops.log_mel(WAVE, top_db="a"), "log_mel: top_db must be 0 or more, or None, got str 'a'"),
        (lambda: ops.log_mel(WAVE, minmax=3), "log_mel: minmax must be two dB values, the smaller first, or None, got"),
        (lambda: ops.log_mel(WAVE, minmax=("a", "b")), "log_mel: minmax must be two dB values"),
        (lambda: ops.log_mel(WAVE, minmax=(-80.0, math.inf)), "log_mel: minmax must be two dB values"),
        (
            lambda: ops.kaldi_fbank(WAVE, frame_shift="a"),
            "kaldi_fbank: frame_shift must be a number of milliseconds, got",
        ),
        (
            lambda: ops.kaldi_fbank(WAVE, frame_length=math.nan),
            "kaldi_fbank: sample_frequency, frame_length and frame_shift must be finite and less",
        ),
        (lambda: ops.kaldi_fbank(WAVE, sample_frequency=None), "kaldi_fbank: sample_frequency must be a number of Hz"),
        (lambda: ops.kaldi_fbank(WAVE, low_freq="a"), "kaldi_fbank: low_freq must be a number of Hz, got str 'a'"),
        (
            lambda: ops.kaldi_fbank(WAVE, num_mel_bins=9.5),
            "kaldi_fbank: num_mel_bins must be a whole number, at least 4, got float 9.5",
        ),
        (lambda: ops.kaldi_fbank(WAVE, window_type=["povey"]), "kaldi_fbank: window_type must be 'hanning' or 'povey'"),
        (
            lambda: ops.kaldi_fbank(WAVE, channel="a"),
            "kaldi_fbank: channel must be a whole number or None, got str 'a'",
        ),
        (
            lambda: ops.kaldi_fbank(WAVE, preemphasis_coefficient="a"),
            "kaldi_fbank: preemphasis_coefficient must be from 0 to 1, got str 'a'",
        ),
        (lambda: ops.MemoryBank("a"), "MemoryBank: capacity must be at least 1 clip, got str 'a'"),
        (lambda: ops.draw_augment((2, 64, 8), None), r"draw_augment: shape must be \[B, 1, F, T\]"),
        (lambda: ops.draw_augment((2, 1, 64, 8), 3), "draw_augment: bank must be a MemoryBank or None, got int 3"),
        (lambda: draw(generator=3), "draw_augment: generator must be a Generator or None, got int 3"),
        (lambda: draw(mixup_ratio="a"), "draw_augment: mixup_ratio must be a number, got str 'a'"),
        (lambda: draw(canvas_scale=1.5), "draw_augment: canvas_scale must be two numbers, got float 1.5"),
        (lambda: draw(time_scale=(1, "a")), "draw_augment: time_scale must be two numbers, got str 'a'"),
        (lambda: views(draw()), "augment_views: draws must be a list of AugmentDraws or None, one per view, got"),
        (lambda: views([3]), r"augment_views: draws\[0\] must be AugmentDraws or None, got int 3"),
        (lambda: views([draw()], ops.MemoryBank(2)), "augment_views: banks must be a list of MemoryBank or None"),
        (lambda: views([draw()], [3]), r"augment_views: banks\[0\] must be MemoryBank or None, got int 3"),
        (lambda: system(ATSTFrame)(MEL, None, None, None), "ATSTFrame: view2 must be a tensor .*, got NoneType None"),
        (lambda: system(ATSTFrame)(MEL, MEL, None, None), "ATSTFrame: mask must be a tensor .*, got NoneType None"),
        (
            lambda: system(ATSTFrame)(MEL, MEL, 3, torch.ones(2, 2, dtype=torch.bool)),
            "ATSTFrame: lengths must be a tensor .*, got int 3",
        ),
        (lambda: system(ATSTClip)(3, MEL), "ATSTClip: view1 must be a tensor .*, got int 3"),
    ],
)
def test_the_argument_is_named(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_numbers_of_numpy_are_numbers():
    np = pytest.importorskip("numpy")
    want = ops.log_mel(WAVE, top_db=60.0, hop_length=200)
    assert torch.equal(ops.log_mel(WAVE, top_db=np.float32(60.0), hop_length=np.int64(200)), want)
    bounds = [-80.0, 50.0]
    assert torch.equal(ops.log_mel(WAVE, minmax=tuple(np.float32(bounds))), ops.log_mel(WAVE, minmax=bounds))
    assert torch.equal(ops.add_norm(X, eps=np.float64(1e-6))[1], ops.add_norm(X)[1])


@pytest.mark.filterwarnings("error")
def test_infinity_of_numpy_is_not_finite():
    np = pytest.importorskip("numpy")
    ops.add_norm(X, eps=np.float32(1e-6))
    with pytest.raises(ValueError, match="add_norm: eps must be at least 0 and finite"):
        ops.add_norm(X, eps=np.float32(np.inf))


def test_a_cached_setting_of_another_type_is_refused():
    ops.log_mel(WAVE, n_fft=512)
    with pytest.raises(TypeError, match=r"n_fft must be 512, 1024 or 2048, got float 512\.0"):
        ops.log_mel(WAVE, n_fft=512.0)
