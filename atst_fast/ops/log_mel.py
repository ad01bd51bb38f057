"""Waveform to normalised log-mel in one pass over the samples."""

import torch
from torch import Tensor

from atst_fast.ops import _autocast, _checks, _tables
from atst_fast.ops._registry import register
from atst_fast.reference import log_mel as reference

_OP = "log_mel"
_AXES = "[..., N] (N samples)"
_CPU = torch.device("cpu")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def log_mel(
    waveform: Tensor,
    *,
    sample_rate: int = 16000,
    n_fft: int = 1024,
    win_length: int | None = None,
    hop_length: int = 160,
    f_min: float = 60.0,
    f_max: float = 7800.0,
    n_mels: int = 64,
    top_db: float | None = 80.0,
    minmax: tuple[float, float] | None = (-79.6482, 50.6842),
    lengths: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Mel spectrogram in decibels, floored and mapped to about [-1, 1]; neither frames nor spectrum reach memory.

    Centred frames with reflect padding, periodic Hann window zero-padded to ``n_fft``, power spectrum, HTK triangles
    without area norm, ``10 log10(max(p, 1e-10))``, floor at the maximum minus ``top_db``, and
    ``2 (x - min) / (max - min) - 1`` without clipping (digital silence is -1.3123).

    Args:
        waveform: ``[..., N]`` in [-1, 1], float32, or int16 that is read as x / 32768; N > n_fft // 2.
        sample_rate: Hz. n_fft: 512, 1024 or 2048. win_length: samples, at most n_fft (the default).
        hop_length: samples, at most n_fft. f_min, f_max: Hz. n_mels: number of triangles.
        top_db: dB below the maximum at which values are floored, or None. The maximum is taken as torchaudio does:
            over all of ``[N]`` or ``[C, N]``, and over each ``[C, N]`` of ``[..., C, N]``. A batch of clips that each
            need their own floor is therefore ``[B, 1, N]``; with ``lengths`` the floor is always per clip.
        minmax: dB values that become -1 and 1, or None to return dB.
        lengths: int64 ``[B]`` for a waveform ``[B, N]`` or ``[B, 1, N]``: valid samples of each clip, 0 or more than
            n_fft // 2. Each clip is transformed as if it ended there; frames past its own ``lengths // hop_length + 1``
            (all of them at length 0) are 0. Lengths on a GPU are not looked at beforehand: where one is impossible,
            the clip is NaN.
        dtype: of the result: float32, float16 or bfloat16.

    Returns:
        ``[..., n_mels, T]`` with ``T = N // hop_length + 1``.

    Differentiable with respect to ``waveform`` if that requires a gradient: then the PyTorch reference runs.
    NaN and infinity spread to all of their floor group, as in torchaudio, and no further. On a GPU it is one launch, at
    most 1024 triangles, and the same bits every time.
    Largest error against float64, within 60 dB of the strongest bin of a clip's spectra (that of a constant offset
    counts, which no triangle reads): 0.002 dB, or 3e-5 on the normalised scale; down to 80 dB: 0.02 dB, 3e-4. The bits
    do not depend on the number of threads.
    Matches audiossl/methods/atstframe/transform.py (torchaudio MelSpectrogram, AmplitudeToDB, MinMax).

    Raises:
        TypeError: an argument of another type or dtype. ValueError: a shape, length or setting out of range.
    """
    device = waveform.device if isinstance(waveform, Tensor) else _CPU
    window, fb = tables(sample_rate, n_fft, win_length, f_min, f_max, n_mels, device=device)
    return log_mel_with(waveform, window, fb, hop_length, top_db=top_db, minmax=minmax, lengths=lengths, dtype=dtype)


def log_mel_with(
    waveform: Tensor,
    window: Tensor,
    fb: Tensor,
    hop_length: int,
    *,
    top_db: float | None = 80.0,
    minmax: tuple[float, float] | None = (-79.6482, 50.6842),
    lengths: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    decibels: bool = True,
) -> Tensor:
    """`log_mel` with tables of your own, float32: ``window [win_length]``, ``fb [n_fft // 2 + 1, n_mels]``.

    Differentiable in both as well. Without ``decibels`` the result is the energies themselves, and top_db and minmax
    must be None.
    """
    _checks.tensor(_OP, "window", window, "[win_length]", dim=1, dtypes=(torch.float32,))
    _checks.tensor(_OP, "fb", fb, "[n_fft // 2 + 1, n_mels]", dim=2, dtypes=(torch.float32,))
    _checks.tensor(_OP, "waveform", waveform, _AXES, dtypes=(torch.float32, torch.int16))
    if waveform.dim() < 1:
        _checks.fail(_OP, "waveform", _AXES, waveform)
    n_fft, samples = 2 * (fb.shape[0] - 1), waveform.shape[-1]
    _check_settings(n_fft, window.shape[0], hop_length, top_db, minmax, dtype)
    if samples <= n_fft // 2:
        expected = f"longer than n_fft // 2 = {n_fft // 2} samples ({_AXES}), which the reflection at its ends needs"
        _checks.fail(_OP, "waveform", expected, waveform)
    if not decibels and (top_db is not None or minmax is not None):
        _checks.fail(_OP, "top_db and minmax", "None without decibels", (top_db, minmax))
    if lengths is not None:
        lengths = _check_lengths(lengths, waveform, n_fft)
    _checks.same_device(_OP, "waveform", waveform, lengths=lengths, window=window, fb=fb)
    group = 1 if lengths is not None else _floor_group(waveform.shape)
    scale, bias = 1.0, 0.0
    if minmax is not None:
        scale = 2.0 / (minmax[1] - minmax[0])
        bias = -minmax[0] * scale - 1.0
    rows = waveform.reshape(-1, samples).contiguous()
    args = (rows, _padded(window, n_fft), fb.contiguous(), lengths, hop_length, top_db, scale, bias, group, decibels)
    if torch.is_grad_enabled() and (waveform.requires_grad or window.requires_grad or fb.requires_grad):
        with _autocast.off(waveform.device):  # no half precision holds 80 dB
            out = reference.log_mel(*args)
    else:
        out = torch.ops.atst_fast.log_mel(*args)
    return out.reshape(*waveform.shape[:-1], *out.shape[1:]).to(dtype)


def make_tables(
    sample_rate: int, n_fft: int, win_length: int | None, f_min: float, f_max: float, n_mels: int
) -> tuple[Tensor, Tensor]:
    """Periodic Hann window ``[win_length]`` and HTK triangles ``[n_fft // 2 + 1, n_mels]``, float32, on the CPU; the
    settings are checked."""
    win_length = n_fft if win_length is None else win_length
    _check_settings(n_fft, win_length, 1, None, None, torch.float32)
    for name, value in (("sample_rate", sample_rate), ("f_min", f_min), ("f_max", f_max)):
        _checks.number(_OP, name, value, "a number of Hz")
    if not 0 <= f_min < f_max <= sample_rate / 2:
        expected = f"0 <= f_min < f_max <= sample_rate / 2 = {sample_rate / 2} Hz"
        raise ValueError(f"{_OP}: f_min and f_max must satisfy {expected}, got {f_min} and {f_max}")
    _checks.number(_OP, "n_mels", n_mels, "at least 1", 1, whole=True)
    window = torch.hann_window(win_length, periodic=True, dtype=torch.float32, device="cpu")
    return window, reference.filterbank(n_fft, sample_rate, f_min, f_max, n_mels)


tables = _tables.cached(
    "log_mel_tables(int sample_rate, int n_fft, int? win_length, float f_min, float f_max, int n_mels, Device device)"
    " -> (Tensor window, Tensor fb)",
    make_tables,
)


def _padded(window: Tensor, n_fft: int) -> Tensor:
    """The window in the middle of ``n_fft`` values, as torch.stft places it."""
    left = (n_fft - window.shape[0]) // 2
    return torch.nn.functional.pad(window, (left, n_fft - window.shape[0] - left)).contiguous()


def _floor_group(shape: torch.Size) -> int:
    """How many consecutive clips of the flattened waveform share one floor."""
    return 1 if len(shape) == 1 else max(shape[-2], 1)


def _check_settings(n_fft, win_length, hop_length, top_db, minmax, dtype) -> None:
    _checks.number(_OP, "n_fft", n_fft, "512, 1024 or 2048", whole=True)
    if n_fft not in (512, 1024, 2048):
        _checks.fail(_OP, "n_fft", "512, 1024 or 2048", n_fft)
    expected = _checks.Later("from 1 to n_fft ({})", n_fft)
    _checks.number(_OP, "win_length", win_length, expected, 1, n_fft, whole=True)
    _checks.number(_OP, "hop_length", hop_length, expected, 1, n_fft, whole=True)
    if top_db is not None:
        _checks.number(_OP, "top_db", top_db, "0 or more, or None", 0)
    if minmax is not None and not _checks.is_range(minmax):
        _checks.fail(_OP, "minmax", "two dB values, the smaller first, or None", minmax)
    if dtype not in _DTYPES:
        _checks.fail(_OP, "dtype", "float32, float16 or bfloat16", dtype, TypeError)


def _check_lengths(lengths: Tensor, waveform: Tensor, n_fft: int) -> Tensor:
    """``lengths`` as int64 ``[B]``; its values are looked at only where that costs no device synchronisation."""
    shape, samples = waveform.shape, waveform.shape[-1]
    if len(shape) != 2 and not (len(shape) == 3 and shape[1] == 1):
        _checks.fail(_OP, "waveform", "[B, N] or [B, 1, N] when lengths is given", waveform)
    expected = _checks.Later("[B] = [{}], the valid samples of each clip", shape[0])
    _checks.tensor(_OP, "lengths", lengths, expected, dim=1, dtypes=(torch.int64, torch.int32))
    if lengths.shape[0] != shape[0]:
        _checks.fail(_OP, "lengths", expected, lengths)
    if _checks.readable(lengths):
        for clip, n in enumerate(lengths.tolist()):
            if n != 0 and not n_fft // 2 < n <= samples:
                possible = f"0, or more than n_fft // 2 = {n_fft // 2} and at most N = {samples}"
                raise ValueError(f"{_OP}: lengths[{clip}] must be {possible}, got {n}")
    return lengths.to(torch.int64).contiguous()


register(_OP, CUDA=reference.log_mel)


@torch.library.register_fake("atst_fast::log_mel")
def _(waveform, window, fb, lengths, hop_length, top_db, scale, bias, group, decibels=True):
    frames = waveform.shape[1] // hop_length + 1
    return waveform.new_empty((waveform.shape[0], fb.shape[1], frames), dtype=torch.float32)
