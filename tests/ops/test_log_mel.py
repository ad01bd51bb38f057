import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atst_fast import nn, ops
from atst_fast.ops.log_mel import tables
from atst_fast.reference import log_mel as reference
from tests import tolerances as tol
from tests.golden import FOLDER, load

FILES = [(f"mel_n{n_mels}_w{win_length}", n_mels, win_length) for n_mels in (64, 128) for win_length in (1024, 640)]
MIN, MAX = -79.6482, 50.6842


def cases():
    waves, _ = load("mel_waveforms")
    for name, n_mels, win_length in FILES:
        t, _ = load(name)
        for key in waves:
            clip = key.removeprefix("in/")
            if f"out/{clip}/minmax" in t:
                yield pytest.param(name, n_mels, win_length, clip, id=f"{name}-{clip}")


def check_golden(log_mel, name, n_mels, win_length, clip):
    """Every stage that is stored: normalised, decibels; the reference's rounding noise (f64_diff) sets the bound.

    log_mel: called as ops.log_mel is.
    """
    t, meta = load(name)
    wave = load("mel_waveforms")[0][f"in/{clip}"]
    noise = {k: v.get("f64_diff") or 0 for k, v in json.loads((FOLDER / f"{name}.json").read_text())["tensors"].items()}
    frames = meta["frames"] if clip in meta.get("sub", []) else None
    for stage, minmax in [("minmax", (MIN, MAX)), ("db", None)]:
        key = f"out/{clip}/{stage}"
        if key not in t:
            continue
        y = log_mel(wave, n_mels=n_mels, win_length=win_length, minmax=minmax)
        expected = t[key]
        if frames is not None and expected.shape != y.shape:
            y = y[:, frames]
        bound = tol.MEL_GOLDEN_DB * (1 if minmax is None else 2 / (MAX - MIN)) + 10 * noise[key]
        torch.testing.assert_close(y, expected, rtol=0, atol=bound)


@pytest.mark.parametrize("name, n_mels, win_length, clip", list(cases()))
def test_golden(isa, name, n_mels, win_length, clip):
    check_golden(ops.log_mel, name, n_mels, win_length, clip)


def test_golden_tables():
    for name, n_mels, win_length in FILES:
        t, _ = load(name)
        window, fb = tables(16000, 1024, win_length, 60.0, 7800.0, n_mels)
        assert torch.equal(window, t["out/window"])
        if "out/fb" in t:
            assert torch.equal(fb, t["out/fb"])


def test_golden_floor_of_every_rank(isa):
    t, _ = load("mel_batch")
    x = t["in/wave"]
    near = {"rtol": 0, "atol": tol.MEL_GOLDEN_DB * 2 / (MAX - MIN)}
    torch.testing.assert_close(ops.log_mel(x[:, None]), t["out/B1N"], **near)
    torch.testing.assert_close(ops.log_mel(x), t["out/BN"], **near)
    torch.testing.assert_close(torch.stack([ops.log_mel(row) for row in x]), t["out/each_N"], **near)
    torch.testing.assert_close(ops.log_mel(x[:, None], minmax=None), t["out/db_B1N"], rtol=0, atol=tol.MEL_GOLDEN_DB)
    # any rank: one floor per [C, N]
    five = ops.log_mel(x.reshape(2, 1, 2, 1, 4000))
    torch.testing.assert_close(five.reshape(4, 64, 26), t["out/B1N"][:, 0], **near)
    pairs = ops.log_mel(x.reshape(2, 2, 4000))
    torch.testing.assert_close(pairs[1], ops.log_mel(x[2:]), rtol=0, atol=0)


def speech_like(n, seed=0, dtype=torch.float32):
    """Noise whose spectrum falls by 60 dB and whose loudness moves by 40 dB."""
    rng = np.random.default_rng(seed)
    x = np.cumsum(rng.standard_normal(n)) * 0.02
    x -= x.mean()
    x = x * 10 ** (np.sin(np.arange(n) / 3000.0) - 1)
    return torch.tensor(np.clip(x, -1, 1), dtype=dtype)


def float64(x, *, n_fft=1024, win_length=None, n_mels=64, top_db=80.0, minmax=(MIN, MAX), group=1):
    window, fb = tables(16000, n_fft, win_length, 60.0, 7800.0, n_mels)
    left = (n_fft - len(window)) // 2
    window = torch.nn.functional.pad(window, (left, n_fft - len(window) - left))
    scale, bias = (
        (1.0, 0.0) if minmax is None else (2 / (minmax[1] - minmax[0]), -2 * minmax[0] / (minmax[1] - minmax[0]) - 1)
    )
    if not x.dtype.is_floating_point:
        x = x.double() / 32768
    return reference.log_mel(x.double(), window.double(), fb.double(), None, 160, top_db, scale, bias, group)


@pytest.mark.parametrize("n_fft", [512, 1024, 2048])
def test_error_against_float64_is_what_the_docstring_says(isa, n_fft):
    x = speech_like(48000)[None]
    exact = float64(x, n_fft=n_fft, minmax=None)
    error = (ops.log_mel(x[:, None], n_fft=n_fft, minmax=None)[:, 0] - exact).abs()
    assert error.max() <= tol.MEL_80_DB
    assert error[exact > exact.max() - 60].max() <= tol.MEL_60_DB
    normalised = (ops.log_mel(x[:, None], n_fft=n_fft)[:, 0] - float64(x, n_fft=n_fft)).abs()
    assert normalised.max() <= tol.MEL_80
    assert normalised[exact > exact.max() - 60].max() <= tol.MEL_60
    doc = ops.log_mel.__doc__
    assert f"{tol.MEL_60_DB} dB, or {tol.MEL_60:.0e}".replace("e-0", "e-") in doc
    assert f"{tol.MEL_80_DB} dB, {tol.MEL_80:.0e}".replace("e-0", "e-") in doc


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 9000), st.sampled_from([512, 1024, 2048]), st.sampled_from([64, 80, 128]),
    st.booleans(), st.sampled_from([None, 80.0, 30.0]), st.booleans(), st.integers(0, 2**31),
)  # fmt: skip
def test_random_shapes_against_float64(clips, samples, n_fft, n_mels, short, top_db, is_int16, seed):
    samples += n_fft // 2
    win_length = n_fft * 5 // 8 if short else None
    x = torch.stack([speech_like(samples, seed + i) for i in range(clips)])
    if is_int16:
        x = (x * 32767).to(torch.int16)
    else:  # any strides
        x = torch.stack([x, x], -1)[..., 0]
    y = ops.log_mel(x, n_fft=n_fft, win_length=win_length, n_mels=n_mels, top_db=top_db, minmax=None)
    z = float64(x, n_fft=n_fft, win_length=win_length, n_mels=n_mels, top_db=top_db, minmax=None, group=clips)
    assert y.shape == (clips, n_mels, samples // 160 + 1)
    window, _ = tables(16000, n_fft, win_length, 60.0, 7800.0, n_mels)
    wave = x.double() / (32768 if is_int16 else 1)
    spectrum = torch.stft(wave, n_fft, 160, len(window), window.double(), pad_mode="reflect", return_complex=True)
    strongest = 20 * spectrum.abs().amax(dim=(1, 2)).log10()
    assert (y - z)[z > strongest[:, None, None] - 60].abs().max() <= tol.MEL_60_DB


@pytest.mark.parametrize("n_fft, hop_length", [(1024, 160), (512, 7), (512, 512), (1024, 333), (2048, 1000)])
def test_any_hop(isa, n_fft, hop_length):
    x = speech_like(9001)
    y = ops.log_mel(x, n_fft=n_fft, hop_length=hop_length, minmax=None)
    window, fb = tables(16000, n_fft, None, 60.0, 7800.0, 64)
    z = reference.log_mel(x.double()[None], window.double(), fb.double(), None, hop_length, 80.0, 1.0, 0.0, 1)[0]
    assert y.shape == z.shape
    assert (y - z).abs().max() <= tol.MEL_80_DB


def test_librosa_agrees():
    """An independent implementation of window, mel scale, power and decibels."""
    librosa = pytest.importorskip("librosa", reason="needs the extra test")
    x = speech_like(32000)
    mel = librosa.feature.melspectrogram(
        y=x.double().numpy(), sr=16000, n_fft=1024, hop_length=160, window="hann", center=True, pad_mode="reflect",
        power=2.0, n_mels=64, fmin=60, fmax=7800, htk=True, norm=None,
    )  # fmt: skip
    db = librosa.power_to_db(mel, ref=1.0, amin=1e-10, top_db=80.0)
    error = np.abs(ops.log_mel(x, minmax=None).numpy() - db)
    assert error.max() <= tol.MEL_LIBROSA_DB


def test_ragged_lengths_equal_each_clip_alone(isa):
    x = speech_like(4 * 5000).reshape(4, 5000)
    lengths = [5000, 0, 513, 3333]
    for batch in (x, x[:, None]):
        y = ops.log_mel(batch, lengths=torch.tensor(lengths)).reshape(4, 64, 32)
        for i, n in enumerate(lengths):
            frames = n // 160 + 1 if n else 0
            if n:
                assert torch.equal(y[i, :, :frames], ops.log_mel(x[i, :n]))
            assert (y[i, :, frames:] == 0).all()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.one_of(st.just(0), st.integers(513, 6000)), max_size=5), st.booleans(), st.sampled_from([1024, 640]))
def test_random_lengths_equal_each_clip_alone(lengths, channel, win_length):
    samples = max([600, *lengths])
    x = speech_like(max(len(lengths), 1) * samples)[: len(lengths) * samples].reshape(len(lengths), samples)
    batch = x[:, None] if channel else x
    y = ops.log_mel(batch, lengths=torch.tensor(lengths, dtype=torch.int64), win_length=win_length)
    assert y.shape == (*batch.shape[:-1], 64, samples // 160 + 1)
    for row, clip, n in zip(y, x, lengths):
        frames = n // 160 + 1 if n else 0
        if n:
            assert torch.equal(row.reshape(64, -1)[:, :frames], ops.log_mel(clip[:n], win_length=win_length))
        assert (row[..., frames:] == 0).all()


def test_tables_changed_in_place_are_noticed(isa):
    x, (window, fb) = speech_like(3000), tables(16000, 512, None, 60.0, 7800.0, 64)
    window, fb = window.clone(), fb.clone()

    def both(hop):
        args = (x[None], window, fb, None, hop, None, 1.0, 0.0, 1)
        return torch.ops.atst_fast.log_mel(*args), reference.log_mel(*args)

    for change, hop in [(None, 160), (window, 160), (fb, 160), (None, 100)]:
        if change is not None:
            change.mul_(0.5)
        y, z = both(hop)
        torch.testing.assert_close(y, z, rtol=0, atol=tol.MEL_80_DB)


def test_int16_is_the_same_as_its_float(isa):
    x = (speech_like(5000) * 32767).to(torch.int16)
    assert torch.equal(ops.log_mel(x), ops.log_mel(x / 32768))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_output_is_the_rounded_float32(dtype):
    x = speech_like(5000)
    assert torch.equal(ops.log_mel(x, dtype=dtype), ops.log_mel(x).to(dtype))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_stay_in_their_clip(isa, bad):
    x = speech_like(4 * 4000).reshape(4, 1, 4000)
    y = ops.log_mel(x)
    x[2, 0, 1234] = bad
    z = ops.log_mel(x)
    assert torch.isnan(z[2]).all()  # as torchaudio: the clip's floor is NaN
    assert torch.equal(z[[0, 1, 3]], y[[0, 1, 3]])


def test_silence_and_no_floor(isa):
    y = ops.log_mel(torch.zeros(2, 1, 2000))
    torch.testing.assert_close(y, torch.full_like(y, 2 * (-100 - MIN) / (MAX - MIN) - 1), rtol=0, atol=tol.MEL_CONSTANT)
    x = speech_like(8000)
    x[4000:] = 0
    assert ops.log_mel(x, top_db=None, minmax=None).min() == pytest.approx(-100, abs=1e-4)


def test_no_clips_and_no_channels():
    assert ops.log_mel(torch.zeros(0, 1, 2000)).shape == (0, 1, 64, 13)
    assert ops.log_mel(torch.zeros(3, 0, 2000)).shape == (3, 0, 64, 13)
    assert ops.log_mel(torch.zeros(0, 2000), lengths=torch.zeros(0, dtype=torch.int64)).shape == (0, 64, 13)


def test_outputs_are_written_in_full(isa):
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    try:
        y = ops.log_mel(speech_like(3 * 3001).reshape(3, 3001), lengths=torch.tensor([3001, 600, 0]))
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.isfinite(y).all()


@pytest.mark.parametrize("clips", [1, 3, 9])
def test_same_bits_on_one_thread_and_two(threads, clips):
    x = speech_like(clips * 20000).reshape(clips, 1, 20000)
    threads(1)
    one = ops.log_mel(x)
    threads(2)
    assert torch.equal(ops.log_mel(x), one)


def test_gradient_runs_the_reference():
    x = speech_like(2000).requires_grad_()
    y = ops.log_mel(x)
    y.sum().backward()
    assert torch.isfinite(x.grad).all()
    assert (y - ops.log_mel(x.detach())).abs().max() <= tol.MEL_GOLDEN_DB


def test_gradient_shares_the_floor_of_the_channels():
    x = torch.stack([speech_like(2000), speech_like(2000) * 1e-5])[None]
    torch.testing.assert_close(
        ops.log_mel(x.clone().requires_grad_()).detach(), ops.log_mel(x), rtol=0, atol=tol.MEL_OTHER_WAY
    )


@pytest.mark.parametrize("win_length", [641, 999])
def test_odd_windows_lie_where_stft_puts_them(isa, win_length):
    x = speech_like(3000)
    window, fb = tables(16000, 1024, win_length, 60.0, 7800.0, 64)
    spectrum = torch.stft(x.double(), 1024, 160, win_length, window.double(), return_complex=True)
    z = 10 * torch.log10((fb.double().T @ spectrum.abs().square()).clamp(min=1e-10))
    error = (ops.log_mel(x, win_length=win_length, minmax=None, top_db=None) - z).abs()
    assert error[z > z.max() - 60].max() <= tol.MEL_60_DB


def test_reference_gradient():
    x = torch.randn(2, 40, dtype=torch.float64, requires_grad=True)
    window, fb = torch.hann_window(16, dtype=torch.float64), torch.rand(9, 3, dtype=torch.float64)
    lengths = torch.tensor([40, 23])
    for n in (None, lengths):
        assert torch.autograd.gradcheck(lambda x: reference.log_mel(x, window, fb, n, 5, 80.0, 0.1, 2.0, 1), (x,))  # noqa: B023


def test_opcheck():
    window, fb = tables(16000, 512, None, 60.0, 7800.0, 64)
    for x, lengths in [
        (torch.randn(2, 1000), None),
        (torch.zeros(2, 1000, dtype=torch.int16), torch.tensor([1000, 300])),
    ]:
        torch.library.opcheck(torch.ops.atst_fast.log_mel.default, (x, window, fb, lengths, 160, 80.0, 1.0, 0.0, 1))


def test_compiles_without_a_graph_break():
    module = nn.LogMelSpectrogram()
    x = speech_like(4000)[None]
    compiled = torch.compile(lambda x: module(x) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), module(x) * 2)


WAVE = torch.zeros(2, 2000)
ERRORS = [
    ({"waveform": [0.0]}, TypeError, r"waveform must be a tensor \[\.\.\., N\] \(N samples\), got list"),
    ({"waveform": WAVE.double()}, TypeError, r"of dtype float32 or int16, got float64 \[2, 2000\]"),
    ({"waveform": torch.tensor(1.0)}, ValueError, r"waveform must be \[\.\.\., N\]"),
    ({"waveform": WAVE[:, :512]}, ValueError, r"longer than n_fft // 2 = 512 samples .*got float32 \[2, 512\]"),
    ({"waveform": WAVE[:, :0]}, ValueError, "longer than n_fft // 2"),
    ({"n_fft": 400}, ValueError, "n_fft must be 512, 1024 or 2048, got int 400"),
    ({"win_length": 1025}, ValueError, r"win_length must be from 1 to n_fft \(1024\), got int 1025"),
    ({"win_length": 0}, ValueError, "win_length must be"),
    ({"hop_length": 0}, ValueError, r"hop_length must be from 1 to n_fft \(1024\), got int 0"),
    ({"hop_length": 1025}, ValueError, "hop_length must be"),
    ({"f_min": 8000.0}, ValueError, "f_min and f_max must satisfy .*got 8000.0 and 7800.0"),
    ({"f_max": 9000.0}, ValueError, "f_min and f_max must satisfy .*8000.0 Hz"),
    ({"n_mels": 0}, ValueError, "n_mels must be at least 1, got int 0"),
    ({"top_db": -1.0}, ValueError, "top_db must be 0 or more, or None, got float -1.0"),
    ({"minmax": (1.0, 1.0)}, ValueError, "minmax must be two dB values"),
    ({"dtype": torch.float64}, TypeError, "dtype must be float32, float16 or bfloat16"),
    ({"lengths": [2000, 2000]}, TypeError, r"lengths must be a tensor \[B\] = \[2\]"),
    ({"lengths": torch.tensor([2000])}, ValueError, r"lengths must be \[B\] = \[2\].*got int64 \[1\]"),
    ({"lengths": torch.tensor([2000, 2001])}, ValueError, r"lengths\[1\] must be 0, or more than .* 512 .*got 2001"),
    ({"lengths": torch.tensor([512, 0])}, ValueError, r"lengths\[0\] must be 0, or more than .*got 512"),
    ({"waveform": WAVE[None], "lengths": torch.tensor([2000])}, ValueError, r"\[B, N\] or \[B, 1, N\] when lengths"),
]


@pytest.mark.parametrize("changed, error, message", ERRORS)
def test_errors(changed, error, message):
    arguments = {"waveform": WAVE, **changed}
    with pytest.raises(error, match="log_mel: .*" + message if "f_min" not in message else message):
        ops.log_mel(arguments.pop("waveform"), **arguments)


def test_a_direct_call_with_bad_input_is_refused_too():
    window, fb = tables(16000, 512, None, 60.0, 7800.0, 64)
    op = torch.ops.atst_fast.log_mel
    for args in [
        (WAVE.double(), window, fb, None, 160, None, 1.0, 0.0, 1),
        (WAVE, window[:400], fb, None, 160, None, 1.0, 0.0, 1),
        (WAVE, window, fb, None, 0, None, 1.0, 0.0, 1),
        (WAVE, window, fb, None, 160, None, 1.0, 0.0, 3),
        (WAVE[:, :100].contiguous(), window, fb, None, 160, None, 1.0, 0.0, 1),
        (WAVE, window, fb, torch.tensor([2000, 3000]), 160, None, 1.0, 0.0, 1),
    ]:
        with pytest.raises(RuntimeError, match="log_mel: "):
            op(*args)
