import copy
import inspect
import pickle

import pytest
import torch

from atst_fast import nn
from atst_fast.ops.log_mel import log_mel_with, tables
from atst_fast.reference import log_mel as reference
from tests import tolerances as tol
from tests.golden import load
from tests.ops.test_log_mel import speech_like

# audiossl's own settings, as it writes them
ATST = {"sample_rate": 16000, "n_fft": 1024, "hop_length": 160, "f_min": 60.0, "f_max": 7800.0, "n_mels": 64}


@pytest.mark.parametrize("win_length", [1024, 640])
def test_golden(isa, win_length):
    wave, (t, _) = load("mel_waveforms")[0], load(f"mel_n64_w{win_length}")
    mel, decibels = nn.MelSpectrogram(**ATST, win_length=win_length), nn.AmplitudeToDB("power", top_db=80.0)
    assert torch.equal(mel.spectrogram.window, t["out/window"])
    for clip in ("speech_1000", "noise_1000"):
        got = decibels(mel(wave[f"in/{clip}"]))
        torch.testing.assert_close(got, t[f"out/{clip}/db"], rtol=0, atol=10 * tol.MEL_GOLDEN_DB)


def test_golden_floor_of_every_rank(isa):
    t, _ = load("mel_batch")
    both = torch.nn.Sequential(nn.MelSpectrogram(**ATST), nn.AmplitudeToDB(top_db=80.0))
    near = {"rtol": 0, "atol": tol.MEL_GOLDEN_DB}
    torch.testing.assert_close(both(t["in/wave"][:, None]), t["out/db_B1N"], **near)
    # over the whole batch, as torchaudio has it
    torch.testing.assert_close(2 * (both(t["in/wave"]) + 79.6482) / 130.3324 - 1, t["out/BN"], **near)


@pytest.mark.parametrize("n_fft", [512, 1024, 2048])
def test_error_against_float64_is_what_the_docstring_says(isa, n_fft):
    x = speech_like(24000)[None]
    module = nn.MelSpectrogram(n_fft=n_fft, n_mels=64)
    window, fb = module.spectrogram.window.double(), module.mel_scale.fb.double()
    exact = reference.log_mel(x.double(), window, fb, None, n_fft // 2, None, 1.0, 0.0, 1, decibels=False)
    error = ((module(x) - exact).abs() / exact)[exact > 1e-6 * exact.max()]
    assert error.max() <= tol.MEL_ENERGY_RTOL
    assert f"{tol.MEL_ENERGY_RTOL:.0e}".replace("e-0", "e-") in nn.MelSpectrogram.__doc__


def test_energies_and_decibels_are_those_of_the_fused_module(isa):
    x, lengths = speech_like(3 * 5000).reshape(3, 1, 5000), torch.tensor([5000, 0, 3000])
    mel = nn.MelSpectrogram(**ATST)
    fused = nn.LogMelSpectrogram(top_db=None, minmax=None)
    db = nn.AmplitudeToDB()(mel(x))
    torch.testing.assert_close(db, fused(x), rtol=0, atol=tol.MEL_SCALED_DB)
    ragged = mel(x, lengths)
    assert torch.equal(ragged[2, :, :, :19], mel(x[2, :, :3000]))
    assert (ragged[2, :, :, 19:] == 0).all()
    assert (ragged[1] == 0).all()


def test_torchaudios_defaults_and_buffers():
    names = {p.name: p.default for p in inspect.signature(nn.MelSpectrogram).parameters.values()}
    plain = {"sample_rate": 16000, "n_fft": 400, "f_min": 0.0, "pad": 0, "n_mels": 128, "power": 2.0}
    plain |= {"normalized": False, "center": True, "pad_mode": "reflect", "mel_scale": "htk"}
    assert names == plain | {"window_fn": torch.hann_window} | dict.fromkeys(
        ["win_length", "hop_length", "f_max", "wkwargs", "onesided", "norm"]
    )
    module = nn.MelSpectrogram(n_fft=1024, win_length=640)
    shapes = {k: tuple(v.shape) for k, v in module.state_dict().items()}
    assert shapes == {"spectrogram.window": (640,), "mel_scale.fb": (513, 128)}
    assert module.hop_length == 320
    window, fb = tables(16000, 1024, 640, 0.0, 8000.0, 128)
    assert torch.equal(module.mel_scale.fb, fb)
    assert torch.equal(module.spectrogram.window, window)
    wide = {"window_fn": torch.hamming_window, "wkwargs": {"periodic": False, "dtype": torch.float64}}
    assert nn.MelSpectrogram(n_fft=1024, **wide).spectrogram.window.dtype == torch.float32
    assert nn.MelSpectrogram(sample_rate=22051, n_fft=1024, hop_length=1024).f_max == 11025.0
    other = nn.MelSpectrogram(n_fft=1024, window_fn=torch.hamming_window, wkwargs={"periodic": False})
    assert torch.equal(other.spectrogram.window, torch.hamming_window(1024, periodic=False))


def test_copies_pickles_precision_and_the_meta_device():
    x, module = speech_like(4000), nn.MelSpectrogram(**ATST)
    with torch.device("meta"):
        empty = nn.MelSpectrogram(**ATST)
    others = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), copy.deepcopy(module).bfloat16().half()]
    for other in [*others, empty.to_empty(device="cpu")]:
        assert torch.equal(other(x), module(x))
    changed = nn.MelSpectrogram(**ATST)
    changed.load_state_dict({k: 2 * v for k, v in module.state_dict().items()})
    torch.testing.assert_close(changed(x), 8 * module(x))
    changed.reset_parameters()
    assert torch.equal(changed(x), module(x))


def test_gradient_and_compilation():
    x, both = speech_like(3000)[None], torch.nn.Sequential(nn.MelSpectrogram(**ATST), nn.AmplitudeToDB(top_db=80.0))
    y = both(x.clone().requires_grad_())
    torch.testing.assert_close(y, both(x), rtol=0, atol=tol.MEL_OTHER_WAY)
    (grad,) = torch.autograd.grad(y.sum(), both[0].spectrogram.window.requires_grad_(), allow_unused=True)
    assert grad is None
    both[0].spectrogram.window.requires_grad_(False)
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), both(x))


def test_opcheck_of_energies():
    window, fb = tables(16000, 512, None, 60.0, 7800.0, 64)
    args = (torch.randn(2, 1000), window, fb, None, 160, None, 1.0, 0.0, 1, False)
    torch.library.opcheck(torch.ops.atst_fast.log_mel.default, args)


def test_amplitudes_of_every_kind():
    x = torch.tensor([[1.0, 1e-3], [0.0, 1e-20]])
    assert nn.AmplitudeToDB()(x).tolist() == [[0.0, pytest.approx(-30)], [-100.0, -100.0]]
    assert nn.AmplitudeToDB("magnitude")(x)[0, 1] == pytest.approx(-60)
    assert nn.AmplitudeToDB(top_db=20.0)(x).tolist() == [[0.0, -20.0], [-20.0, -20.0]]
    groups = torch.stack([x, 100 * x])[:, None]  # [2, 1, 2, 2]: a maximum each
    assert nn.AmplitudeToDB(top_db=20.0)(groups).amin((1, 2, 3)).tolist() == [-20.0, 0.0]
    assert nn.AmplitudeToDB(top_db=20.0)(groups[:, 0]).amin() == 0  # [C, F, T]: one for all
    assert nn.AmplitudeToDB(top_db=0.0)(x).tolist() == [[0.0, 0.0], [0.0, 0.0]]
    for shape in ((0, 1, 2, 2), (3, 1, 2, 0), (2, 0)):
        assert nn.AmplitudeToDB(top_db=20.0)(torch.zeros(shape)).shape == shape


ERRORS = [
    ({}, "n_fft must be 512, 1024 or 2048, got int 400"),
    ({"pad": 3}, r"pad must be 0 \(nothing else is supported\), got int 3"),
    ({"power": 1.0}, "power must be 2.0 .* got float 1.0"),
    ({"power": None}, "power must be 2.0"),
    ({"normalized": True}, "normalized must be False"),
    ({"center": False}, "center must be True"),
    ({"pad_mode": "constant"}, "pad_mode must be 'reflect'"),
    ({"onesided": False}, "onesided must be None or True"),
    ({"norm": "slaney"}, "norm must be None"),
    ({"mel_scale": "slaney"}, "mel_scale must be 'htk'"),
    ({"n_fft": 1024, "hop_length": 1025}, r"hop_length must be from 1 to n_fft \(1024\), got int 1025"),
    ({"n_fft": 1024, "win_length": 1025}, "win_length must be from 1 to n_fft"),
    ({"n_fft": 1024, "f_min": 9000.0}, "f_min and f_max must satisfy"),
    ({"n_fft": 1024, "n_mels": 0}, "n_mels must be at least 1"),
    ({"n_fft": 1024, "window_fn": lambda n: torch.ones(n + 1)}, r"window_fn must be a function that returns \[1024\]"),
    ({"n_fft": 1024, "window_fn": lambda n: torch.ones(n, 1)}, r"window_fn must be a function that returns \[1024\]"),
]


@pytest.mark.parametrize("arguments, message", ERRORS)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=f"MelSpectrogram: {message}"):
        nn.MelSpectrogram(**arguments)


@pytest.mark.parametrize("name", ["n_fft", "win_length", "hop_length", "n_mels"])
def test_sizes_are_whole_numbers(name):
    with pytest.raises(TypeError, match=f"MelSpectrogram: {name} must be a whole number, got float 64.5"):
        nn.MelSpectrogram(**{"n_fft": 512, name: 64.5})


def test_errors_of_decibels():
    with pytest.raises(ValueError, match="AmplitudeToDB: stype must be 'power' or 'magnitude', got str 'energy'"):
        nn.AmplitudeToDB("energy")
    with pytest.raises(ValueError, match=r"AmplitudeToDB: top_db must be 0 or more, or None, got float -1\.0"):
        nn.AmplitudeToDB(top_db=-1.0)
    with pytest.raises(ValueError, match=r"AmplitudeToDB: x must be \[\.\.\., F, T\]"):
        nn.AmplitudeToDB()(torch.ones(3))
    with pytest.raises(ValueError, match="log_mel: top_db and minmax must be None without decibels"):
        log_mel_with(torch.zeros(2000), *tables(16000, 512, None, 60.0, 7800.0, 64), 160, decibels=False)
