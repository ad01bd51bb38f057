"""The CUDA kernel of kaldi_fbank, in the host shim and, where there is one, on a GPU: against golden tensors, float64
and the CPU kernel."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from atst_fast.ops.kaldi_fbank import tables
from tests import tolerances as tol
from tests.ops.test_kaldi_fbank import ASIT, CLIPS, assert_near, check_ssast, in_float64, load, padded
from tests.ops.test_log_mel import speech_like


def arguments(
    wave,
    *,
    rate=16000,
    n_mels=128,
    window_type="hanning",
    length=25.0,
    shift=160,
    lengths=None,
    preemphasis=0.97,
    dc=True,
):
    """What atst_fast.ops.kaldi_fbank hands to the operator for ``wave [B, N]``; the shift is in samples."""
    window, fb = tables(rate, length, 20.0, 0.0, n_mels, window_type)
    return [wave, window, fb, lengths, shift, preemphasis, dc]


def run(cuda_ops, args):
    return cuda_ops.ops.kaldi_fbank(*[cuda_ops.to(a) if isinstance(a, torch.Tensor) else a for a in args]).cpu()


def on_cpu(args):
    return torch.ops.atst_fast.kaldi_fbank(*args)


def fbank(cuda_ops):
    """Called as ops.kaldi_fbank is, for the calls of the golden tensors."""
    return lambda x, *, sample_frequency, **_: run(
        cuda_ops, arguments(x.reshape(-1, x.shape[-1]), rate=sample_frequency, shift=sample_frequency // 100)
    )


@pytest.mark.parametrize("clip", CLIPS)
def test_golden_ssast(cuda_ops, clip):
    check_ssast(fbank(cuda_ops), clip)


@pytest.mark.parametrize("clip", ["w32_speech", "w32_noise"])
def test_golden_asit(cuda_ops, clip):
    x = load("kaldi_fbank")[0][f"in/{clip}"]
    assert_near(padded(fbank(cuda_ops)(x - x.mean(), **ASIT)[0], 24), f"out/asit/{clip}/fbank")


@pytest.mark.sanitize
@pytest.mark.parametrize("rate", [16000, 32000, 48000])
def test_error_against_float64(cuda_ops, rate):
    args = arguments(speech_like(24000)[None], rate=rate, shift=rate // 100)
    exact, loud = in_float64(*args[:3], args[4])
    assert ((run(cuda_ops, args) - exact).abs() <= tol.FBANK_60_DB)[loud].all()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 3), st.integers(0, 5000), st.sampled_from([16000, 16001, 22050, 32000, 48000]),
    st.sampled_from([25.0, 32.0, 20.03]), st.sampled_from([4, 23, 80, 128, 131]), st.sampled_from([160, 1, 77, 100]),
    st.sampled_from(["hanning", "povey"]), st.booleans(), st.sampled_from([0.97, 0.0, 1.0]), st.booleans(),
    st.integers(0, 2**31),
)  # fmt: skip
def test_random_shapes_against_float64_and_the_cpu(
    cuda_ops, clips, samples, rate, length, n_mels, shift, window_type, is_int16, preemphasis, dc, seed
):
    samples = samples // (160 // shift) + int(rate * length * 0.001)
    x = torch.stack([speech_like(samples, seed + i) for i in range(clips)])
    if is_int16:
        x = (x * 32767).to(torch.int16)
    args = arguments(x, rate=rate, length=length, n_mels=n_mels, shift=shift, window_type=window_type)
    args[5:] = preemphasis, dc
    exact, loud = in_float64(*args[:3], *args[4:])
    y, z = run(cuda_ops, args), on_cpu(args)
    assert y.shape == z.shape
    assert ((y - exact).abs() <= tol.FBANK_60_DB)[loud].all()
    assert ((y - z).abs() <= 2 * tol.FBANK_60_DB)[loud].all()


@pytest.mark.sanitize
@pytest.mark.parametrize("rate, shift", [(22050, 220), (16040, 401), (48000, 1)])
def test_odd_shifts_and_odd_frames(cuda_ops, rate, shift):
    """A frame's samples are read one at a time where it may begin anywhere; the last pair of an odd one is cut."""
    window, _ = tables(rate, 25.0, 20.0, 0.0, 128, "povey")
    args = arguments(speech_like(len(window) + 5 * shift)[None], rate=rate, shift=shift, window_type="povey")
    args[1] = args[1] + 0.1  # it ends in zeros otherwise, which hide what is there
    exact, loud = in_float64(*args[:3], args[4])
    assert ((run(cuda_ops, args) - exact).abs() <= tol.FBANK_60_DB)[loud].all()


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 7000), min_size=1, max_size=4), st.booleans())
def test_ragged_clips_are_as_if_alone(cuda_ops, lengths, is_int16):
    x = speech_like(4 * 7000).reshape(4, 7000)[: len(lengths)]
    if is_int16:
        x = (x * 32767).to(torch.int16)
    y = run(cuda_ops, arguments(x, lengths=torch.tensor(lengths)))
    for row, clip, n in zip(y, x, lengths):
        frames = (n - 400) // 160 + 1 if n >= 400 else 0
        if frames:
            assert torch.equal(row[:frames], run(cuda_ops, arguments(clip[None, :n].contiguous()))[0])
        assert (row[frames:] == 0).all()


@pytest.mark.sanitize
@pytest.mark.parametrize("rate", [16000, 48000])
def test_an_impossible_length_on_the_device_is_nan_in_its_clip_alone(cuda_ops, rate):
    x = speech_like(7 * 3000).reshape(7, 3000)
    lengths = torch.tensor([3000, 3001, 10**6, 2**62, 2000, -1, -(2**63)])
    y = run(cuda_ops, arguments(x, rate=rate, lengths=lengths))
    assert torch.isnan(y[[1, 2, 3, 5, 6]]).all()
    good = arguments(x[[0, 4]], rate=rate, lengths=torch.tensor([3000, 2000]))
    assert torch.equal(y[[0, 4]], run(cuda_ops, good))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_stay_in_their_frames(cuda_ops, bad):
    x = speech_like(8000)[None]
    y = run(cuda_ops, arguments(x))
    x[0, 4000] = bad
    z = run(cuda_ops, arguments(x))
    first, last = (4000 - 400) // 160 + 1, 4000 // 160
    reads_bins = tables(16000, 25.0, 20.0, 0.0, 128, "hanning")[1].any(0)
    assert torch.isnan(z[0, first : last + 1, reads_bins]).all()
    assert torch.equal(z[0, :first], y[0, :first])
    assert torch.equal(z[0, last + 1 :], y[0, last + 1 :])


@pytest.mark.sanitize
@pytest.mark.parametrize("n_mels, dense", [(5, True), (1024, False)])
def test_any_filterbank(cuda_ops, n_mels, dense):
    """Weights everywhere, more filters than threads, filters without a bin."""
    args = arguments(speech_like(3000)[None])
    args[2] = torch.rand(257, n_mels) + 0.1
    if not dense:
        args[2] *= torch.rand(257, n_mels) < 0.004
        args[2][:, 3] = 0
    exact, loud = in_float64(*args[:3], args[4])
    assert ((run(cuda_ops, args) - exact).abs() <= tol.FBANK_60_DB)[loud].all()


@pytest.mark.parametrize("rate", [16000, 32000, 48000])
@pytest.mark.parametrize("n_mels", [40, 64, 80, 128, 256])
def test_triangles_fit_into_shared_memory(rate, n_mels):
    """They would be right without, too, but slow: this is mel_weights and what make_mel_tables puts there."""
    _, fb = tables(rate, 25.0, 20.0, 0.0, n_mels, "povey")
    floats = 0
    for group in range(0, n_mels, 8):
        longest = 0
        for m in range(group, min(group + 8, n_mels)):
            bins = fb[:, m].nonzero().flatten().tolist()
            if bins:
                start = bins[0] - (bins[0] - m) % 8
                longest = max(longest, (bins[-1] - start + 4) // 4 * 4)
        floats += 8 * longest
    assert floats <= 3 * len(fb) + 8 * n_mels


def test_silence_and_int16(cuda_ops):
    y = run(cuda_ops, arguments(torch.zeros(2, 2000)))
    torch.testing.assert_close(y, torch.full_like(y, -23 * math.log(2)), rtol=0, atol=tol.FBANK_CONSTANT)
    x = (speech_like(5000) * 32767).to(torch.int16)[None]
    assert torch.equal(run(cuda_ops, arguments(x)), run(cuda_ops, arguments(x / 32768)))


def test_no_clips(cuda_ops):
    assert run(cuda_ops, arguments(torch.zeros(0, 2000))).shape == (0, 11, 128)
    args = arguments(torch.zeros(2, 2000))
    args[2] = torch.zeros(257, 0)
    assert run(cuda_ops, args).shape == (2, 11, 0)


def test_same_bits_every_time(cuda_ops):
    args = arguments(speech_like(2 * 9000).reshape(2, 9000))
    results = []
    for order in ("forward", "reverse", "shuffled", "shuffled"):
        cuda_ops.schedule(order, len(results))
        results.append(run(cuda_ops, args))
    assert all(torch.equal(y, results[0]) for y in results)


WAVE = torch.zeros(2, 2000)
ERRORS = [
    (0, WAVE.double(), "waveform must be float32 or int16"),
    (0, WAVE[:, ::2], "waveform must be contiguous"),
    (0, WAVE[0], "waveform must have 2 axes"),
    (0, WAVE[:, :399].contiguous(), "waveform must have at least one frame of samples"),
    (1, torch.zeros(513), "window must have from 1 to n_fft values"),
    (1, torch.zeros(400).double(), "window has the wrong dtype"),
    (2, torch.zeros(256, 64), "fb must have 257, 513 or 1025 rows"),
    (2, torch.zeros(257, 1025), "fb must have at most 1024 columns"),
    (3, torch.tensor([2000]), "lengths must have one entry per row"),
    (3, torch.tensor([2000, 2000], dtype=torch.int32), "lengths has the wrong dtype"),
    (4, 0, "frame_shift must be from 1 to the window's length"),
    (4, 401, "frame_shift must be from 1 to the window's length"),
]


@pytest.mark.parametrize("at, value, message", ERRORS)
def test_errors(cuda_ops, at, value, message):
    args = arguments(WAVE)
    args[at] = value
    with pytest.raises(RuntimeError, match=f"kaldi_fbank: {message}"):
        run(cuda_ops, args)


@pytest.mark.parametrize("at, value, message", [e for e in ERRORS if "1024 columns" not in e[2]])
def test_a_direct_call_on_the_cpu_is_refused_too(at, value, message):
    args = arguments(WAVE)
    args[at] = value
    with pytest.raises(RuntimeError, match=f"kaldi_fbank: {message}"):
        on_cpu(args)


def test_an_impossible_length_on_the_cpu_is_refused():
    with pytest.raises(RuntimeError, match="kaldi_fbank: clip 1 has 2001 samples"):
        on_cpu(arguments(WAVE, lengths=torch.tensor([2000, 2001])))
