"""Kaldi's log-mel filterbank of a batch of waveforms in one pass over the samples."""

import torch
from torch import Tensor

from atst_fast.ops import _autocast, _checks, _tables
from atst_fast.ops._registry import register
from atst_fast.reference import kaldi_fbank as reference

_OP = "kaldi_fbank"
_AXES = "[..., N] (N samples)"
_CPU = torch.device("cpu")
_SIZES = (512, 1024, 2048)

# Arguments of torchaudio's function that may have one value here.
_FIXED: dict[str, float] = {
    "dither": 0.0,
    "min_duration": 0.0,
    "round_to_power_of_two": True,
    "snip_edges": True,
    "subtract_mean": False,
    "use_energy": False,
    "use_log_fbank": True,
    "use_power": True,
    "vtln_warp": 1.0,
}


def kaldi_fbank(
    waveform: Tensor,
    blackman_coeff: float = 0.42,
    channel: int | None = None,
    dither: float = 0.0,
    energy_floor: float = 1.0,
    frame_length: float = 25.0,
    frame_shift: float = 10.0,
    high_freq: float = 0.0,
    htk_compat: bool = False,
    low_freq: float = 20.0,
    min_duration: float = 0.0,
    num_mel_bins: int = 23,
    preemphasis_coefficient: float = 0.97,
    raw_energy: bool = True,
    remove_dc_offset: bool = True,
    round_to_power_of_two: bool = True,
    sample_frequency: float = 16000.0,
    snip_edges: bool = True,
    subtract_mean: bool = False,
    use_energy: bool = False,
    use_log_fbank: bool = True,
    use_power: bool = True,
    vtln_high: float = -500.0,
    vtln_low: float = 100.0,
    vtln_warp: float = 1.0,
    window_type: str = "povey",
    *,
    lengths: Tensor | None = None,
) -> Tensor:
    """Log-mel energies as ``torchaudio.compliance.kaldi.fbank`` computes them, for a whole batch; no frame is stored.

    Per frame: minus its mean, minus ``preemphasis_coefficient`` times the sample before (the first one's is itself),
    symmetric window, zeros to the next power of two, power spectrum, triangles linear in mel, ``ln(max(e, 2^-23))``.

    Args:
        waveform: ``[..., N]``, float32, or int16 that is read as x / 32768; at least one frame of samples. Subtracting
            the mean of a clip (SSAST, ASiT) or scaling it by 32768 (BEATs) is the caller's, as with torchaudio.
        channel: None keeps every leading axis. A number does as torchaudio, whose default is -1: the waveform is
            ``[C, N]``, and the result ``[T, num_mel_bins]`` is that of one channel (-1: of the first).
        frame_length, frame_shift: milliseconds; of a length from 257 to 2048 samples (25 ms at 16 kHz are 400 of 512,
            at 32 kHz 800 of 1024), the shift at most as long. low_freq, high_freq: Hz; a high_freq of 0 or less counts
            from the Nyquist frequency. num_mel_bins: at least 4. preemphasis_coefficient: from 0 to 1.
            sample_frequency: Hz. window_type: "hanning" or "povey".
        dither, min_duration, round_to_power_of_two, snip_edges, subtract_mean, use_energy, use_log_fbank, use_power,
            vtln_warp: their defaults are what is implemented; anything else is an error.
        blackman_coeff, energy_floor, htk_compat, raw_energy, vtln_high, vtln_low: of no effect with these settings, as
            in torchaudio.
        lengths: int64 ``[B]`` for a waveform ``[B, N]`` or ``[B, 1, N]``: valid samples of each clip, from 0 to N. Each
            clip is transformed as if it ended there; frames past its own last one are 0, and a clip shorter than a
            frame has none. Lengths on a GPU are not looked at beforehand: where one is impossible, the clip is NaN.

    Returns:
        float32 ``[..., T, num_mel_bins]`` with ``T = (N - frame) // shift + 1``, both in samples, rounded down.

    Differentiable with respect to ``waveform`` if that requires a gradient: then the PyTorch reference runs.
    NaN and infinity spread in the frames that hold them, to every triangle that reads a bin. On a GPU it is one launch,
    at most 1024 triangles.
    Largest error against float64, where an energy is within 60 dB of the strongest bin of its frame and of the square
    of its mean: 2e-4. The bits do not depend on the number of threads.
    Matches torchaudio.compliance.kaldi.fbank as ssast, ASiT and BEATs call it.

    Raises:
        TypeError: an argument of another type or dtype. ValueError: a shape, length or setting out of range, or an
            argument whose value is not supported.
    """
    check_fixed(
        dither=dither,
        min_duration=min_duration,
        round_to_power_of_two=round_to_power_of_two,
        snip_edges=snip_edges,
        subtract_mean=subtract_mean,
        use_energy=use_energy,
        use_log_fbank=use_log_fbank,
        use_power=use_power,
        vtln_warp=vtln_warp,
    )
    device = waveform.device if isinstance(waveform, Tensor) else _CPU
    settings = (sample_frequency, frame_length, low_freq, high_freq, num_mel_bins, window_type)
    window, fb = tables(*settings, device=device)
    return kaldi_fbank_with(
        waveform,
        window,
        fb,
        samples_of(sample_frequency, "frame_shift", frame_shift),
        preemphasis=preemphasis_coefficient,
        remove_dc_offset=remove_dc_offset,
        channel=channel,
        lengths=lengths,
    )


def kaldi_fbank_with(
    waveform: Tensor,
    window: Tensor,
    fb: Tensor,
    frame_shift: int,
    *,
    preemphasis: float = 0.97,
    remove_dc_offset: bool = True,
    channel: int | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """`kaldi_fbank` with tables of your own, float32, and the shift in samples.

    ``window [W]`` (of as many samples as a frame) and ``fb [n_fft // 2 + 1, num_mel_bins]``. Differentiable in both as
    well.
    """
    _checks.tensor(_OP, "window", window, "[W]", dim=1, dtypes=(torch.float32,))
    _checks.tensor(_OP, "fb", fb, "[n_fft // 2 + 1, num_mel_bins]", dim=2, dtypes=(torch.float32,))
    _checks.tensor(_OP, "waveform", waveform, _AXES, dtypes=(torch.float32, torch.int16))
    if channel is not None:
        waveform = _channel(waveform, channel)
    if waveform.dim() < 1:
        _checks.fail(_OP, "waveform", _AXES, waveform)
    frame, n_fft, samples = window.shape[0], 2 * (fb.shape[0] - 1), waveform.shape[-1]
    if n_fft not in _SIZES:
        _checks.fail(_OP, "fb", "[n_fft // 2 + 1, num_mel_bins] with n_fft 512, 1024 or 2048", fb)
    if not 1 <= frame <= n_fft:
        _checks.fail(_OP, "window", f"[W] with 1 to n_fft ({n_fft}) values", window)
    expected = _checks.Later("from 1 to {} samples, the length of a frame", frame)
    _checks.number(_OP, "frame_shift", frame_shift, expected, 1, frame, whole=True)
    _checks.number(_OP, "preemphasis_coefficient", preemphasis, "from 0 to 1", 0, 1)
    if samples < frame:
        _checks.fail(_OP, "waveform", f"at least one frame of {frame} samples ({_AXES})", waveform)
    if lengths is not None:
        lengths = _check_lengths(lengths, waveform)
    _checks.same_device(_OP, "waveform", waveform, lengths=lengths, window=window, fb=fb)
    rows = waveform.reshape(-1, samples).contiguous()
    args = (rows, window.contiguous(), fb.contiguous(), lengths, frame_shift, preemphasis, remove_dc_offset)
    if torch.is_grad_enabled() and (waveform.requires_grad or window.requires_grad or fb.requires_grad):
        with _autocast.off(waveform.device):  # no half precision holds 60 dB
            out = reference.kaldi_fbank(*args)
    else:
        out = torch.ops.atst_fast.kaldi_fbank(*args)
    return out.reshape(*waveform.shape[:-1], *out.shape[1:])


def make_tables(
    sample_frequency: float,
    frame_length: float,
    low_freq: float,
    high_freq: float,
    num_mel_bins: int,
    window_type: str,
) -> tuple[Tensor, Tensor]:
    """Window ``[W]`` and triangles ``[n_fft // 2 + 1, num_mel_bins]``, float32, on the CPU; checked settings."""
    frame = samples_of(sample_frequency, "frame_length", frame_length)
    for name, value in (("low_freq", low_freq), ("high_freq", high_freq)):
        _checks.number(_OP, name, value, "a number of Hz")
    n_fft = 1 << max(frame - 1, 0).bit_length()
    if n_fft not in _SIZES:
        expected = f"257 to 2048 samples at {sample_frequency} Hz, in milliseconds"
        _checks.fail(_OP, "frame_length", expected, frame_length)
    if window_type not in ("hanning", "povey"):
        _checks.fail(_OP, "window_type", "'hanning' or 'povey'", window_type)
    nyquist = 0.5 * sample_frequency
    if not 0 <= low_freq < (high_freq if high_freq > 0 else high_freq + nyquist) <= nyquist:
        expected = f"0 <= low_freq < high_freq <= {nyquist} Hz (a high_freq of 0 or less counts from there)"
        raise ValueError(f"{_OP}: low_freq and high_freq must satisfy {expected}, got {low_freq} and {high_freq}")
    _checks.number(_OP, "num_mel_bins", num_mel_bins, "a whole number, at least 4", 4, whole=True)
    window = reference.window_function(window_type, frame)
    return window, reference.filterbank(n_fft, sample_frequency, low_freq, high_freq, num_mel_bins)


tables = _tables.cached(
    "kaldi_fbank_tables(float sample_frequency, float frame_length, float low_freq, float high_freq, int num_mel_bins,"
    " str window_type, Device device) -> (Tensor window, Tensor fb)",
    make_tables,
)


def samples_of(sample_frequency: float, name: str, milliseconds: float) -> int:
    """How many samples the argument of that ``name`` is, rounded down, in torchaudio's order of operations."""
    for argument, value, unit in (("sample_frequency", sample_frequency, "Hz"), (name, milliseconds, "milliseconds")):
        _checks.number(_OP, argument, value, f"a number of {unit}")
    samples = sample_frequency * milliseconds * 0.001
    if not abs(samples) < 2**31:
        given = sample_frequency, milliseconds
        _checks.fail(_OP, "sample_frequency, frame_length and frame_shift", "finite and less than 2^31 samples", given)
    return int(samples)


def check_fixed(**given: float) -> None:
    """Refuse, by name, what torchaudio's function has and this one has not."""
    for name, value in given.items():
        if value != _FIXED[name]:
            _checks.fail(_OP, name, f"{_FIXED[name]} (nothing else is supported)", value)


def _channel(waveform: Tensor, channel: int) -> Tensor:
    expected = "[C, N] (channels, samples) when channel is given"
    if waveform.dim() != 2:
        _checks.fail(_OP, "waveform", expected, waveform)
    _checks.number(_OP, "channel", channel, "a whole number or None", whole=True)
    if max(channel, 0) >= waveform.shape[0]:
        _checks.fail(_OP, "channel", f"less than the {waveform.shape[0]} channels of waveform", channel)
    return waveform[max(channel, 0)]


def _check_lengths(lengths: Tensor, waveform: Tensor) -> Tensor:
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
            if not 0 <= n <= samples:
                raise ValueError(f"{_OP}: lengths[{clip}] must be from 0 to N = {samples}, got {n}")
    return lengths.to(torch.int64).contiguous()


register(_OP, CUDA=reference.kaldi_fbank)


@torch.library.register_fake("atst_fast::kaldi_fbank")
def _(waveform, window, fb, lengths, frame_shift, preemphasis, remove_dc_offset):
    frames = (waveform.shape[1] - window.shape[0]) // frame_shift + 1
    return waveform.new_empty((waveform.shape[0], frames, fb.shape[1]), dtype=torch.float32)
