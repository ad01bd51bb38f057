import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atst_fast import ops
from atst_fast.ops.kaldi_fbank import kaldi_fbank_with, samples_of, tables
from atst_fast.reference import kaldi_fbank as reference
from tests import tolerances as tol
from tests.golden import FOLDER, load
from tests.ops.test_log_mel import speech_like

# The calls of the three models: SSAST and ASiT (at 16 and 32 kHz) and BEATs.
SSAST = {"htk_compat": True, "use_energy": False, "window_type": "hanning", "num_mel_bins": 128, "dither": 0.0}
SSAST |= {"frame_shift": 10, "sample_frequency": 16000}
ASIT = SSAST | {"sample_frequency": 32000}
BEATS = {"num_mel_bins": 128, "sample_frequency": 16000, "frame_length": 25, "frame_shift": 10}
MEAN, DEVIATION = -4.2677393, 4.5689974
MODELS = {"ssast": SSAST, "asit": ASIT, "beats": BEATS}


def noise_of(key, name="kaldi_fbank"):
    return json.loads((FOLDER / f"{name}.json").read_text())["tensors"][key]["f64_diff"]


def assert_near(got, key, scale=1.0, name="kaldi_fbank", rows=None):
    """Up to the reference's own rounding noise; ``scale`` is what the normalisation divides by."""
    want = load(name)[0][key]
    atol = tol.FBANK_GOLDEN / scale + 10 * noise_of(key, name)
    torch.testing.assert_close(got if rows is None else got[rows], want, rtol=0, atol=atol)


def padded(fbank, frames):
    """Zeros after the last frame, or cut: what the three data pipelines do before they normalise."""
    return torch.nn.functional.pad(fbank, (0, 0, 0, frames - fbank.shape[-2]))


def check_ssast(fbank, clip):
    t, meta = load("kaldi_fbank")
    x = t[f"in/{clip}"]
    got = padded(fbank((x - x.mean())[None], **SSAST)[0], meta["ssast_cases"][clip])
    assert_near(got, f"out/ssast/{clip}/fbank")
    if f"out/ssast/{clip}/norm" in t:
        assert_near((got - MEAN) / (2 * DEVIATION), f"out/ssast/{clip}/norm", 2 * DEVIATION)


CLIPS = ["w16_speech", "w16_noise", "w16_chirp", "w16_silence", "w16_quiet", "w16_dc", "w16_short", "w16_tiny"]


@pytest.mark.parametrize("clip", CLIPS)
def test_golden_ssast(isa, clip):
    check_ssast(ops.kaldi_fbank, clip)


@pytest.mark.parametrize("order", ["mix", "mix_rev"])
def test_golden_ssast_of_a_mixture(isa, order):
    t, meta = load("kaldi_fbank")
    names = meta["mix"] if order == "mix" else meta["mix"][::-1]
    x, other = (t[f"in/{name}"] - t[f"in/{name}"].mean() for name in names)
    other = torch.nn.functional.pad(other, (0, max(len(x) - len(other), 0)))[: len(x)]
    x = meta["mix_lambda"] * x + (1 - meta["mix_lambda"]) * other
    assert_near(padded(ops.kaldi_fbank(x - x.mean(), **SSAST), 40), f"out/ssast/{order}/fbank")


@pytest.mark.parametrize("clip", ["w32_speech", "w32_noise"])
def test_golden_asit(isa, clip):
    t, meta = load("kaldi_fbank")
    x = t[f"in/{clip}"]
    got = padded(ops.kaldi_fbank(x - x.mean(), **ASIT), meta["asit_frames"])
    assert_near(got, f"out/asit/{clip}/fbank")
    assert_near((got - MEAN) / (2 * DEVIATION), f"out/asit/{clip}/norm", 2 * DEVIATION)


def test_golden_beats(isa):
    t, meta = load("kaldi_fbank")
    x = torch.stack([t[f"in/{name}"] for name in meta["beats"]])
    args = meta["beats_args"]
    got = (ops.kaldi_fbank(x * args["scale"], **BEATS) - args["mean"]) / (2 * args["std"])
    assert_near(got, "out/beats/norm", 2 * args["std"])


def test_golden_ten_seconds(isa):
    wave = load("mel_waveforms")[0]["in/speech_160000"]
    x = wave / 32768 if wave.dtype == torch.int16 else wave
    got = (padded(ops.kaldi_fbank(x - x.mean(), **SSAST), 1024) - MEAN) / (2 * DEVIATION)
    rows = load("kaldi_fbank_10s")[1]["frames"]
    key = "out/ssast/w16_speech10/norm"
    assert_near(got, key, 2 * DEVIATION, "kaldi_fbank_10s", rows)


def in_float64(x, window, fb, shift, preemphasis=0.97, remove_dc_offset=True):
    """Exact values, and which energies are within 60 dB of what bounds their error."""
    x = x.double() / (1 if x.dtype.is_floating_point else 32768)
    window, fb = window.double(), fb.double()
    exact = reference.kaldi_fbank(x, window, fb, None, shift, preemphasis, remove_dc_offset)
    frames = x.unfold(1, len(window), shift)
    offset = (frames.mean(2) * window.sum()).square()
    if remove_dc_offset:
        frames = frames - frames.mean(2, keepdim=True)
    frames = frames - preemphasis * torch.cat([frames[..., :1], frames[..., :-1]], 2)
    strongest = torch.fft.rfft(frames * window, 2 * (len(fb) - 1)).abs().square().amax(2)
    return exact, exact > torch.maximum(strongest, offset).log()[..., None] - 6 * math.log(10)


@pytest.mark.parametrize("model", MODELS)
def test_error_against_float64_is_what_the_docstring_says(isa, model):
    x = speech_like(48000)[None]
    window, fb = tables(
        MODELS[model]["sample_frequency"], 25.0, 20.0, 0.0, 128, MODELS[model].get("window_type", "povey")
    )
    shift = MODELS[model]["sample_frequency"] // 100
    exact, loud = in_float64(x, window, fb, shift)
    error = (ops.kaldi_fbank(x, **MODELS[model]) - exact).abs()
    assert loud.float().mean() > 0.5
    assert error[loud].max() <= tol.FBANK_60_DB
    assert f"{tol.FBANK_60_DB:.0e}".replace("e-0", "e-") in ops.kaldi_fbank.__doc__


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 3), st.integers(0, 9000), st.sampled_from([8000 * 1.5, 16000, 22050, 32000, 44100, 48000]),
    st.sampled_from([25.0, 32.0]), st.sampled_from([10.0, 5.0, 12.5, 25.0]), st.sampled_from([4, 23, 80, 128]),
    st.sampled_from(["hanning", "povey"]), st.booleans(), st.sampled_from([0.97, 0.0, 1.0]), st.booleans(),
    st.integers(0, 2**31),
)  # fmt: skip
def test_random_shapes_against_float64(
    clips, samples, rate, length, shift, n_mels, window_type, is_int16, preemphasis, remove_dc_offset, seed
):
    window, fb = tables(rate, length, 20.0, -400.0, n_mels, window_type)
    samples += len(window)
    x = speech_like(max(clips, 1) * samples, seed)[: clips * samples].reshape(clips, samples)
    if is_int16:
        x = (x * 32767).to(torch.int16)
    else:  # any strides
        x = torch.stack([x, x], -1)[..., 0]
    y = ops.kaldi_fbank(
        x, frame_length=length, frame_shift=shift, sample_frequency=rate, num_mel_bins=n_mels, window_type=window_type,
        high_freq=-400.0, preemphasis_coefficient=preemphasis, remove_dc_offset=remove_dc_offset,
    )  # fmt: skip
    hop = samples_of(rate, "frame_shift", shift)
    assert y.shape == (clips, (samples - len(window)) // hop + 1, n_mels)
    if clips:
        exact, loud = in_float64(x, window, fb, hop, preemphasis, remove_dc_offset)
        assert ((y - exact).abs() <= tol.FBANK_60_DB)[loud].all()


def test_every_leading_axis_is_kept_and_a_channel_is_torchaudios(isa):
    x = speech_like(6 * 1000).reshape(2, 3, 1000)
    y = ops.kaldi_fbank(x)
    assert y.shape == (2, 3, 4, 23)
    assert torch.equal(y[1, 2], ops.kaldi_fbank(x[1, 2]))
    assert torch.equal(ops.kaldi_fbank(x[1], channel=-1), y[1, 0])
    assert torch.equal(ops.kaldi_fbank(x[1], channel=2), y[1, 2])


def test_what_has_no_effect_has_none():
    x = speech_like(1000)
    unused = {"blackman_coeff": 0.1, "energy_floor": 0.0, "htk_compat": True, "raw_energy": False}
    assert torch.equal(ops.kaldi_fbank(x, **unused, vtln_high=-100.0, vtln_low=50.0), ops.kaldi_fbank(x))


def test_ragged_lengths_equal_each_clip_alone(isa):
    x = speech_like(6 * 7000).reshape(6, 7000)
    lengths = [7000, 0, 399, 400, 559, 6001]
    for batch in (x, x[:, None]):
        y = ops.kaldi_fbank(batch, **SSAST, lengths=torch.tensor(lengths)).reshape(6, 42, 128)
        for row, clip, n in zip(y, x, lengths):
            frames = (n - 400) // 160 + 1 if n >= 400 else 0
            if frames:
                assert torch.equal(row[:frames], ops.kaldi_fbank(clip[:n], **SSAST))
            assert (row[frames:] == 0).all()


def test_what_lies_past_a_clips_end_is_not_read(isa):
    x = speech_like(2 * 3000).reshape(2, 3000)
    lengths = torch.tensor([2000, 3000])
    y = ops.kaldi_fbank(x, lengths=lengths)
    x[0, 2000:] = float("nan")
    assert torch.equal(ops.kaldi_fbank(x, lengths=lengths), y)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_stay_in_their_frames(isa, bad):
    x = speech_like(8000)
    y = ops.kaldi_fbank(x)
    x[4000] = bad
    z = ops.kaldi_fbank(x)
    first, last = (4000 - 400) // 160 + 1, 4000 // 160
    assert torch.isnan(z[first : last + 1]).all()
    assert torch.equal(z[:first], y[:first])
    assert torch.equal(z[last + 1 :], y[last + 1 :])


def test_an_odd_frame_ends_where_it_ends(isa):
    """Samples are read in pairs: the second one of the last pair is another frame's."""
    x, odd = speech_like(3000), 401 / 16
    y = ops.kaldi_fbank(x, frame_length=odd)
    x[401] = float("nan")
    z = ops.kaldi_fbank(x, frame_length=odd)
    assert torch.equal(z[0], y[0])
    assert z[1].isnan().all()
    offset = ops.kaldi_fbank(torch.full((1000,), 0.5), frame_length=odd)  # all of it is in the mean
    torch.testing.assert_close(offset, torch.full_like(offset, -23 * math.log(2)), rtol=0, atol=tol.FBANK_CONSTANT)


def test_silence_is_the_logarithm_of_epsilon(isa):
    y = ops.kaldi_fbank(torch.zeros(2, 2000))
    torch.testing.assert_close(y, torch.full_like(y, -23 * math.log(2)), rtol=0, atol=tol.FBANK_CONSTANT)


def test_int16_is_the_same_as_its_float(isa):
    x = (speech_like(5000) * 32767).to(torch.int16)
    assert torch.equal(ops.kaldi_fbank(x), ops.kaldi_fbank(x / 32768))


def test_tables_changed_in_place_are_noticed(isa):
    x = speech_like(3000)[None]
    window, fb = (t.clone() for t in tables(16000, 25.0, 20.0, 0.0, 128, "povey"))
    for change, shift, preemphasis in [(None, 160, 0.97), (window, 160, 0.97), (fb, 160, 0.97), (None, 100, 0.5)]:
        if change is not None:
            change.mul_(0.5).add_(
                0.1 * (change.dim() == 1)
            )  # also where a window begins, which is 0 in all that Kaldi has
        exact, loud = in_float64(x, window, fb, shift, preemphasis)
        y = kaldi_fbank_with(x, window, fb, shift, preemphasis=preemphasis)
        assert ((y - exact).abs() <= tol.FBANK_60_DB)[loud].all()


def test_outputs_are_written_in_full(isa):
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    try:
        y = ops.kaldi_fbank(
            speech_like(3 * 3001).reshape(3, 3001), lengths=torch.tensor([3001, 600, 0]), num_mel_bins=5
        )
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.isfinite(y).all()


@pytest.mark.parametrize("clips", [1, 3, 9])
def test_same_bits_on_one_thread_and_two(threads, clips):
    x = speech_like(clips * 20000).reshape(clips, 20000)
    threads(1)
    one = ops.kaldi_fbank(x)
    threads(2)
    assert torch.equal(ops.kaldi_fbank(x), one)


def test_gradient_runs_the_reference():
    x = speech_like(2000).requires_grad_()
    y = ops.kaldi_fbank(x, **SSAST)
    y.sum().backward()
    assert torch.isfinite(x.grad).all()
    torch.testing.assert_close(y.detach(), ops.kaldi_fbank(x.detach(), **SSAST), rtol=0, atol=tol.FBANK_OTHER_WAY)


def test_gradient_of_own_tables_and_under_autocast():
    x, (window, fb) = speech_like(2000), (t.clone() for t in tables(16000, 25.0, 20.0, 0.0, 23, "povey"))
    for leaf in (window, fb):
        leaf.requires_grad_()
        y = kaldi_fbank_with(x, window, fb, 160)
        (grad,) = torch.autograd.grad(y.sum(), leaf)
        assert grad.isfinite().all()
        assert grad.any()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(kaldi_fbank_with(x, window, fb, 160), y)
        leaf.requires_grad_(False)


def test_without_a_graph_the_operator_runs():
    x = speech_like(2000)
    y = ops.kaldi_fbank(x)
    x.requires_grad_()
    assert not torch.equal(ops.kaldi_fbank(x), y)
    with torch.no_grad():
        assert torch.equal(ops.kaldi_fbank(x), y)


def test_reference_gradient():
    x = torch.randn(2, 24, dtype=torch.float64, requires_grad=True)
    window, fb = torch.hann_window(12, dtype=torch.float64), torch.rand(9, 3, dtype=torch.float64)
    for n in (None, torch.tensor([24, 17])):
        assert torch.autograd.gradcheck(lambda x: reference.kaldi_fbank(x, window, fb, n, 5, 0.9, True), (x,))  # noqa: B023


def test_tables_are_made_for_every_caller():
    """Whoever comes first may be in a mode whose tensors no other can use."""
    x = speech_like(2000)
    with torch.inference_mode():
        y = ops.kaldi_fbank(x, num_mel_bins=19)
    with torch.device("meta"):
        ops.kaldi_fbank(x, num_mel_bins=21)
    for bins in (19, 21):
        ops.kaldi_fbank(x.clone().requires_grad_(), num_mel_bins=bins).sum().backward()
    assert torch.equal(ops.kaldi_fbank(x, num_mel_bins=19), y)


def test_samples_are_counted_as_torchaudio_counts_them():
    assert samples_of(11025, "frame_length", 25.0) == 275  # of 275.625
    for milliseconds, n_fft in ((32.0, 512), (32.1, 1024), (64.0, 1024), (128.0, 2048)):
        window, fb = tables(16000, milliseconds, 20.0, 0.0, 23, "povey")
        assert (len(window), len(fb)) == (int(16 * milliseconds), n_fft // 2 + 1)


def test_tables_of_any_strides_and_lengths_of_32_bits(isa):
    x, (window, fb) = speech_like(4000).reshape(2, 2000), tables(16000, 25.0, 20.0, 0.0, 23, "povey")
    lengths = torch.tensor([2000, 900])
    y = kaldi_fbank_with(x, window, fb, 160, lengths=lengths)
    strided = torch.stack([window, window], 1)[:, 0], fb.t().contiguous().t()
    assert not any(t.is_contiguous() for t in strided)
    assert torch.equal(kaldi_fbank_with(x, *strided, 160, lengths=lengths.int()), y)


def test_opcheck():
    window, fb = tables(16000, 25.0, 20.0, 0.0, 23, "povey")
    for x, lengths in [
        (torch.randn(2, 1000), None),
        (torch.zeros(2, 1000, dtype=torch.int16), torch.tensor([1000, 300])),
    ]:
        torch.library.opcheck(torch.ops.atst_fast.kaldi_fbank.default, (x, window, fb, lengths, 160, 0.97, True))


WAVE = torch.zeros(2, 2000)
ONLY = {
    "dither": (0.1, "0.0 .* got float 0.1"),
    "min_duration": (0.5, "0.0"),
    "round_to_power_of_two": (False, "True .* got bool False"),
    "snip_edges": (False, "True"),
    "subtract_mean": (True, "False"),
    "use_energy": (True, "False"),
    "use_log_fbank": (False, "True"),
    "use_power": (False, "True"),
    "vtln_warp": (1.1, "1.0"),
}
ERRORS = [
    *(({name: got}, ValueError, rf"{name} must be {only}") for name, (got, only) in ONLY.items()),
    ({"waveform": [0.0]}, TypeError, r"waveform must be a tensor \[\.\.\., N\] \(N samples\), got list"),
    ({"waveform": WAVE.double()}, TypeError, r"of dtype float32 or int16, got float64 \[2, 2000\]"),
    ({"waveform": torch.tensor(1.0)}, ValueError, r"waveform must be \[\.\.\., N\]"),
    ({"waveform": WAVE[:, :399]}, ValueError, r"at least one frame of 400 samples .*got float32 \[2, 399\]"),
    ({"channel": 2}, ValueError, "channel must be less than the 2 channels of waveform, got int 2"),
    ({"channel": 1.0}, TypeError, "channel must be a whole number or None, got float 1.0"),
    ({"waveform": WAVE[0], "channel": -1}, ValueError, r"waveform must be \[C, N\] \(channels, samples\) when channel"),
    ({"sample_frequency": 8000}, ValueError, "frame_length must be 257 to 2048 samples at 8000 Hz.*got float 25.0"),
    ({"frame_length": 129.0}, ValueError, "frame_length must be 257 to 2048 samples"),
    ({"frame_shift": 0.0}, ValueError, "frame_shift must be from 1 to 400 samples, the length of a frame, got int 0"),
    ({"frame_shift": 26.0}, ValueError, "frame_shift must be from 1 to 400 .* got int 416"),
    ({"window_type": "hamming"}, ValueError, "window_type must be 'hanning' or 'povey', got str 'hamming'"),
    ({"low_freq": -0.5}, ValueError, "low_freq and high_freq must satisfy 0 <= low_freq .*got -0.5 and 0.0"),
    ({"low_freq": 8000.0}, ValueError, "low_freq and high_freq must satisfy .*got 8000.0 and 0.0"),
    ({"high_freq": 9000.0}, ValueError, "low_freq and high_freq must satisfy .*8000.0 Hz"),
    ({"high_freq": -8000.0}, ValueError, "low_freq and high_freq must satisfy"),
    ({"num_mel_bins": 3}, ValueError, "num_mel_bins must be a whole number, at least 4, got int 3"),
    ({"num_mel_bins": 23.5}, TypeError, "num_mel_bins must be a whole number, at least 4, got float 23.5"),
    ({"frame_shift": float("nan")}, ValueError, r"frame_shift must be finite and .* got tuple \(16000.0, nan\)"),
    ({"frame_length": float("inf")}, ValueError, "frame_length and frame_shift must be finite"),
    ({"preemphasis_coefficient": 1.5}, ValueError, "preemphasis_coefficient must be from 0 to 1, got float 1.5"),
    ({"lengths": [2000, 2000]}, TypeError, r"lengths must be a tensor \[B\] = \[2\]"),
    ({"lengths": torch.tensor([2000])}, ValueError, r"lengths must be \[B\] = \[2\].*got int64 \[1\]"),
    ({"lengths": torch.tensor([2000, 2001])}, ValueError, r"lengths\[1\] must be from 0 to N = 2000, got 2001"),
    ({"lengths": torch.tensor([-1, 0])}, ValueError, r"lengths\[0\] must be from 0 to N = 2000, got -1"),
    ({"lengths": torch.zeros(2, dtype=torch.int64, device="meta")}, ValueError, "lengths must be on cpu, as waveform"),
    ({"waveform": WAVE[None], "lengths": torch.tensor([2000])}, ValueError, r"\[B, N\] or \[B, 1, N\] when lengths"),
]


@pytest.mark.parametrize("changed, error, message", ERRORS)
def test_errors(changed, error, message):
    arguments = {"waveform": WAVE, **changed}
    with pytest.raises(error, match="kaldi_fbank: .*" + message):
        ops.kaldi_fbank(arguments.pop("waveform"), **arguments)


@pytest.mark.parametrize(
    "window, fb, message",
    [
        (torch.zeros(400, dtype=torch.float64), torch.zeros(257, 8), r"window must be \[W\] of dtype float32"),
        (torch.zeros(600), torch.zeros(257, 8), r"window must be \[W\] with 1 to n_fft \(512\) values"),
        (torch.zeros(400), torch.zeros(256, 8), "fb must be .* with n_fft 512, 1024 or 2048"),
        (torch.zeros(400), torch.zeros(257), r"fb must be \[n_fft // 2 \+ 1, num_mel_bins\], got"),
    ],
)
def test_errors_of_own_tables(window, fb, message):
    with pytest.raises((TypeError, ValueError), match=f"kaldi_fbank: {message}"):
        kaldi_fbank_with(WAVE, window, fb, 160)
