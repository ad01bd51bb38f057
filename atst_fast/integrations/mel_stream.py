"""The log-mel spectrogram of a waveform that is never in memory as a whole."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from atst_fast.nn import LogMelSpectrogram
from atst_fast.ops.log_mel import log_mel_with

_NAME = "stream_decibels"


def stream_decibels(pieces: Iterable[Tensor], front_end: LogMelSpectrogram, frames: int = 2000) -> Iterator[Tensor]:
    """Decibels float32 ``[n_mels, t]`` of one waveform that comes in ``pieces``: side by side they are the frames of
    the whole, bit for bit, before floor and min-max.

    Args:
        pieces: float32 or int16 ``[n]`` each, of any length, together more than n_fft // 2 samples.
        front_end: whose window and triangles are used.
        frames: how many are computed at once, about; besides the pieces no more samples are kept.

    Raises ``ValueError`` where the waveform is too short.
    """
    hop, half = front_end.hop_length, front_end.n_fft // 2
    # a frame reads so many hops to either side; nearer to a cut the reflection would be read instead
    context = -(-half // hop)
    waveform, done = None, 0  # from frame done - context on, or from the start
    for piece in pieces:
        waveform = piece if waveform is None else torch.cat([waveform, piece])
        first = min(done, context)
        whole = (len(waveform) - half) // hop + 1  # frames that end within the samples
        if whole - first < max(frames, 2):  # one alone has nothing to be reflected
            continue
        yield _decibels(waveform[: (whole - 1) * hop + half], front_end)[:, first:whole]
        done += whole - first
        waveform = waveform[(whole - min(done, context)) * hop :].clone()
    if waveform is None or len(waveform) <= half:
        raise ValueError(f"{_NAME}: pieces must have more than {half} samples together")
    yield _decibels(waveform, front_end)[:, min(done, context) :]


def floor_and_scale(decibels: Tensor, loudest: float, front_end: LogMelSpectrogram) -> Tensor:
    """What the front end makes of ``decibels`` of a waveform whose loudest value is ``loudest`` dB."""
    if front_end.top_db is not None:
        decibels = decibels.clamp(min=loudest - front_end.top_db)
    if front_end.minmax is not None:
        low, high = front_end.minmax
        decibels = (decibels - low) * (2 / (high - low)) - 1
    return decibels


def _decibels(waveform: Tensor, front_end: LogMelSpectrogram) -> Tensor:
    window = front_end.spectrogram.get_buffer("window")
    fb = front_end.mel_scale.get_buffer("fb")
    return log_mel_with(waveform, window, fb, front_end.hop_length, top_db=None, minmax=None)
