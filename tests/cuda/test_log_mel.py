"""The CUDA kernel of log_mel, in the host shim and, where there is one, on a GPU: against golden tensors, float64 and
the CPU kernel."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from atst_fast.ops.log_mel import tables
from atst_fast.reference import log_mel as reference
from tests import tolerances as tol
from tests.ops.test_log_mel import MAX, MIN, cases, check_golden, speech_like

NAN = float("nan")


def arguments(wave, *, n_fft=1024, win_length=None, n_mels=64, hop=160, lengths=None, top_db=80.0, minmax=(MIN, MAX)):
    """What atst_fast.ops.log_mel hands to the operator for ``wave [C, N]`` (one floor) or, with lengths, ``[B, N]``."""
    window, fb = tables(16000, n_fft, win_length, 60.0, 7800.0, n_mels)
    left = (n_fft - len(window)) // 2
    window = torch.nn.functional.pad(window, (left, n_fft - len(window) - left))
    scale, bias = 1.0, 0.0
    if minmax is not None:
        scale = 2.0 / (minmax[1] - minmax[0])
        bias = -minmax[0] * scale - 1.0
    group = 1 if lengths is not None else max(wave.shape[0], 1)
    return [wave, window, fb, lengths, hop, top_db, scale, bias, group]


def run(cuda_ops, args):
    return cuda_ops.ops.log_mel(*[cuda_ops.to(a) if isinstance(a, torch.Tensor) else a for a in args]).cpu()


def on_cpu(args):
    return torch.ops.atst_fast.log_mel(*args)


def in_float64(args):
    wide = [a.double() if isinstance(a, torch.Tensor) and a.dtype == torch.float32 else a for a in args]
    return reference.log_mel(*wide)


@pytest.mark.parametrize("name, n_mels, win_length, clip", list(cases()))
def test_golden(cuda_ops, name, n_mels, win_length, clip):
    def log_mel(wave, **settings):
        y = run(cuda_ops, arguments(wave.reshape(-1, wave.shape[-1]), **settings))
        return y.reshape(*wave.shape[:-1], *y.shape[1:])

    check_golden(log_mel, name, n_mels, win_length, clip)


@pytest.mark.sanitize
@pytest.mark.parametrize("n_fft", [512, 1024, 2048])
def test_error_against_float64(cuda_ops, n_fft):
    args = arguments(speech_like(24000)[None], n_fft=n_fft, minmax=None)
    exact = in_float64(args)
    error = (run(cuda_ops, args) - exact).abs()
    assert error.max() <= tol.MEL_80_DB
    assert error[exact > exact.max() - 60].max() <= tol.MEL_60_DB


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 3), st.integers(1, 5000), st.sampled_from([512, 1024, 2048]), st.sampled_from([1, 7, 64, 80, 128]),
    st.sampled_from([160, 160, 100, 77, 512]), st.booleans(), st.sampled_from([None, 80.0, 20.0]), st.booleans(),
    st.integers(0, 2**31),
)  # fmt: skip
def test_random_shapes_against_float64_and_the_cpu(
    cuda_ops, clips, samples, n_fft, n_mels, hop, short, top_db, is_int16, seed
):
    samples += n_fft // 2
    x = torch.stack([speech_like(samples, seed + i) for i in range(clips)])
    if is_int16:
        x = (x * 32767).to(torch.int16)
    args = arguments(
        x, n_fft=n_fft, win_length=n_fft * 5 // 8 if short else None, n_mels=n_mels, hop=hop, top_db=top_db, minmax=None
    )
    y, z, exact = run(cuda_ops, args), on_cpu(args), in_float64(args)
    assert y.shape == z.shape
    # loud: within 60 dB of the strongest bin of the spectra, constant offsets included, as on the CPU
    wave = x.double() / (32768 if is_int16 else 1)
    spectrum = torch.stft(wave, n_fft, hop, n_fft, args[1].double(), pad_mode="reflect", return_complex=True)
    loud = exact > 20 * spectrum.abs().amax(dim=(1, 2)).log10()[:, None, None] - 60
    assert ((y - exact).abs() <= tol.MEL_60_DB)[loud].all()
    assert ((y - z).abs() <= 2 * tol.MEL_60_DB)[loud].all()
    if top_db is not None:
        assert (y - z).abs().max() <= tol.MEL_80_DB


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.one_of(st.just(0), st.integers(513, 6000)), min_size=1, max_size=4), st.booleans())
def test_ragged_clips_are_as_if_alone(cuda_ops, lengths, is_int16):
    x = speech_like(4 * 6000).reshape(4, 6000)[: len(lengths)]
    if is_int16:
        x = (x * 32767).to(torch.int16)
    y = run(cuda_ops, arguments(x, lengths=torch.tensor(lengths)))
    for row, clip, n in zip(y, x, lengths):
        frames = n // 160 + 1 if n else 0
        if n:
            assert torch.equal(row[:, :frames], run(cuda_ops, arguments(clip[None, :n].contiguous()))[0])
        assert (row[:, frames:] == 0).all()


@pytest.mark.sanitize
@pytest.mark.parametrize("n_fft, hop", [(512, 77), (1024, 333), (2048, 1)])
def test_an_odd_hop(cuda_ops, n_fft, hop):
    """A frame's samples are read one at a time, for they may begin anywhere."""
    args = arguments(speech_like(n_fft + 3 * hop)[None], n_fft=n_fft, hop=hop, minmax=None)
    assert (run(cuda_ops, args) - on_cpu(args)).abs().max() <= tol.MEL_80_DB


@pytest.mark.sanitize
def test_int16_is_the_same_as_its_float(cuda_ops):
    x = (speech_like(5000) * 32767).to(torch.int16)[None]
    assert torch.equal(run(cuda_ops, arguments(x)), run(cuda_ops, arguments(x / 32768)))


def test_energies(cuda_ops):
    """Without the logarithm: what nn.MelSpectrogram asks for."""
    x = speech_like(2 * 5000).reshape(2, 5000)
    args = [*arguments(x, lengths=torch.tensor([5000, 2000]), top_db=None, minmax=None), False]
    y, exact = run(cuda_ops, args), in_float64(args)
    loud = exact > 1e-6 * exact.amax((1, 2), keepdim=True)
    assert (((y - exact).abs() / exact)[loud] <= tol.MEL_ENERGY_RTOL).all()
    assert (y[1, :, 13:] == 0).all()


@pytest.mark.sanitize
@pytest.mark.parametrize("rank", ["first", "last"])
def test_clips_of_a_batch_have_floors_of_their_own(cuda_ops, rank):
    """Far more tiles than blocks; a loud clip must not raise the floor of the others."""
    x = speech_like(6 * 5000).reshape(6, 5000)
    x[0 if rank == "first" else -1] *= 1e3
    args = arguments(x)
    args[-1] = 1
    y = run(cuda_ops, args)
    for row, clip in zip(y, x):
        assert torch.equal(row, run(cuda_ops, arguments(clip[None]))[0])


@pytest.mark.sanitize
@pytest.mark.parametrize("n_mels, dense", [(5, True), (64, True), (300, False), (1024, False)])
def test_any_filterbank(cuda_ops, n_mels, dense):
    """Weights everywhere, more filters than threads, filters without a bin, negative weights."""
    args = arguments(speech_like(3000)[None], top_db=None, minmax=None)
    fb = torch.rand(513, n_mels) + 0.1
    if not dense:
        fb *= torch.rand(513, n_mels) < 0.002
        fb[:, 3] = 0
        fb[:, 4] = -1
    args[2] = fb
    y, z = run(cuda_ops, args), on_cpu(args)
    assert (y - z)[z > z.max() - 60].abs().max() <= tol.MEL_60_DB
    assert (y - z)[z > z.max() - 80].abs().max() <= tol.MEL_80_DB


@pytest.mark.parametrize("n_mels", [40, 64, 80, 128, 256])
@pytest.mark.parametrize("n_fft", [512, 1024, 2048])
def test_triangles_fit_into_shared_memory(n_fft, n_mels):
    """They would be right without, too, but slow: this is mel_weights and what make_mel_tables puts there."""
    _, fb = tables(16000, n_fft, None, 0.0, 8000.0, n_mels)
    floats = 0
    for group in range(0, n_mels, 8):
        longest = 0
        for m in range(group, min(group + 8, n_mels)):
            bins = fb[:, m].nonzero().flatten().tolist()
            if bins:
                start = bins[0] - (bins[0] - m) % 8
                longest = max(longest, (bins[-1] - start + 4) // 4 * 4)
        floats += 8 * longest
    assert floats <= 3 * (n_fft // 2 + 1) + 8 * n_mels


def test_tables_changed_in_place_are_noticed(cuda_ops):
    args = arguments(speech_like(3000)[None], minmax=None, top_db=None)
    window, fb = (cuda_ops.to(t.clone()) for t in args[1:3])
    wave = cuda_ops.to(args[0])
    for change, db in [(None, 0.0), (window, -20 * 0.30103), (fb, -30 * 0.30103)]:
        if change is not None:
            change.mul_(0.5)
        y = cuda_ops.ops.log_mel(wave, window, fb, *args[3:]).cpu()
        loud = on_cpu(args) > -60
        torch.testing.assert_close(y[loud], on_cpu(args)[loud] + db, rtol=0, atol=tol.MEL_60_DB)


@pytest.mark.parametrize("bad", [NAN, float("inf"), -float("inf")])
def test_nan_and_infinity_stay_in_their_clip(cuda_ops, bad):
    x = speech_like(4 * 4000).reshape(4, 4000)
    args = arguments(x)
    args[-1] = 1
    y = run(cuda_ops, args)
    x[2, 1234] = bad
    z = run(cuda_ops, args)
    assert torch.isnan(z[2]).all()  # as torchaudio: the clip's floor is NaN
    assert torch.equal(z[[0, 1, 3]], y[[0, 1, 3]])


@pytest.mark.sanitize
def test_silence(cuda_ops):
    y = run(cuda_ops, arguments(torch.zeros(2, 2000)))
    torch.testing.assert_close(y, torch.full_like(y, 2 * (-100 - MIN) / (MAX - MIN) - 1), rtol=0, atol=tol.MEL_CONSTANT)


@pytest.mark.sanitize
@pytest.mark.parametrize("n_fft", [512, 1024, 2048])
@pytest.mark.parametrize("bad", [3001, 256, 10**6, 2**62, -1, -(2**63)])
def test_an_impossible_length_on_the_device_is_nan_in_its_clip_alone(cuda_ops, n_fft, bad):
    x = speech_like(4 * 3000).reshape(4, 3000)
    y = run(cuda_ops, arguments(x, n_fft=n_fft, lengths=torch.tensor([3000, bad, 2000, bad])))
    assert torch.isnan(y[[1, 3]]).all()
    good = arguments(x[[0, 2]], n_fft=n_fft, lengths=torch.tensor([3000, 2000]))
    assert torch.equal(y[[0, 2]], run(cuda_ops, good))


@pytest.mark.parametrize("n_fft, hop", [(512, 7), (512, 512), (1024, 77), (1024, 1023), (2048, 101), (2048, 2048)])
def test_any_hop(cuda_ops, n_fft, hop):
    args = arguments(speech_like(4001)[None], n_fft=n_fft, hop=hop, minmax=None)
    assert (run(cuda_ops, args) - on_cpu(args)).abs().max() <= tol.MEL_80_DB


@pytest.mark.parametrize("beyond", [-1, 0, 1])
def test_a_clip_that_ends_with_a_tile_ends_there(cuda_ops, beyond):
    """The second tile's samples are the clip's last ones, all but one, or one beyond them."""
    n = 16 * 160 - 512 + 15 * 160 + 1024 - beyond
    x = speech_like(2 * n).reshape(2, n) + torch.tensor([[0.0], [0.5]])
    args = arguments(x)
    args[-1] = 1
    y = run(cuda_ops, args)
    for row, clip in zip(y, x):
        assert torch.equal(row, run(cuda_ops, arguments(clip[None]))[0])


def test_what_lies_past_the_last_frame_is_not_the_loudest(cuda_ops):
    """A click that only a frame after the last one would have in its middle."""
    n = 20 * 160 + 159
    x = torch.zeros(1, 5000)
    x[0, : n - 160] = 1e-4 * torch.randn(n - 160)
    x[0, n - 1] = 1.0
    settings = {"top_db": 20.0, "n_fft": 512}
    y = run(cuda_ops, arguments(x, lengths=torch.tensor([n]), **settings))
    assert torch.equal(y[0, :, :21], run(cuda_ops, arguments(x[:, :n].contiguous(), **settings))[0])


def test_no_clips(cuda_ops):
    args = arguments(torch.zeros(0, 2000))
    assert run(cuda_ops, args).shape == (0, 64, 13)
    args = arguments(torch.zeros(2, 2000))
    args[2] = torch.zeros(513, 0)
    assert run(cuda_ops, args).shape == (2, 0, 13)


def test_same_bits_every_time(cuda_ops):
    args = arguments(speech_like(2 * 9000).reshape(2, 9000), n_fft=512)
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
    (0, WAVE[:, :512].contiguous(), "waveform must have more than n_fft / 2 samples"),
    (1, torch.zeros(400), "window must have 512, 1024 or 2048 values"),
    (1, torch.zeros(1024).double(), "window has the wrong dtype"),
    (2, torch.zeros(512, 64), r"fb must have n_fft / 2 \+ 1 rows"),
    (2, torch.zeros(513, 1025), "fb must have at most 1024 columns"),
    (3, torch.tensor([2000]), "lengths must have one entry per row"),
    (3, torch.tensor([2000, 2000], dtype=torch.int32), "lengths has the wrong dtype"),
    (4, 0, "hop_length must be from 1 to n_fft"),
    (4, 1025, "hop_length must be from 1 to n_fft"),
    (6, -1.0, "scale must be positive"),
    (8, 3, "group must divide the number of rows"),
]


@pytest.mark.parametrize("at, value, message", ERRORS)
def test_errors(cuda_ops, at, value, message):
    args = arguments(WAVE)
    args[at] = value
    with pytest.raises(RuntimeError, match=f"log_mel: {message}"):
        run(cuda_ops, args)
