"""The log-mel of audio that comes in pieces, against the front end's of the whole."""

import pytest
import torch

from atst_fast.integrations.mel_stream import floor_and_scale, stream_decibels
from atst_fast.nn import LogMelSpectrogram
from tests.integrations.test_embedding import noise
from tests.tolerances import MEL_CONSTANT


@pytest.mark.parametrize("pieces", [[16000], [1, 512, 1], [700, 40000, 3, 3, 90000], [997] * 57, [160] * 40])
@pytest.mark.parametrize("options", [{}, {"hop_length": 320, "n_fft": 2048}, {"n_fft": 512, "hop_length": 512}])
def test_streamed_decibels_are_those_of_the_whole(pieces, options):
    front_end, waveform = LogMelSpectrogram(top_db=None, minmax=None, **options), noise(sum(pieces))
    if len(waveform) <= front_end.n_fft // 2:
        pytest.skip("too short for this n_fft")
    got = list(stream_decibels(waveform.split(pieces), front_end, frames=20))
    assert torch.equal(torch.cat(got, dim=1), front_end(waveform))
    assert len(got) > 1 or len(waveform) < 22 * front_end.hop_length + front_end.n_fft


def test_decibels_are_streamed_a_few_frames_at_a_time():
    front_end, waveform = LogMelSpectrogram(top_db=None, minmax=None), noise(4000)
    got = list(stream_decibels(waveform.split(160), front_end, frames=1))
    assert torch.equal(torch.cat(got, dim=1), front_end(waveform))
    assert len(got) > 10


@pytest.mark.parametrize("options", [{}, {"top_db": None}, {"minmax": None}, {"top_db": 20.0}, {"top_db": 0.0}])
def test_floor_and_scale_finish_what_the_front_end_does(options):
    front_end, waveform = LogMelSpectrogram(**options), torch.cat([noise(20000), torch.zeros(9000)])
    decibels = torch.cat(list(stream_decibels([waveform], front_end)), dim=1)
    parts = decibels.split(100, dim=1)  # none but the first has the loudest value
    got = torch.cat([floor_and_scale(part, decibels.max().item(), front_end) for part in parts], dim=1)
    torch.testing.assert_close(got, front_end(waveform), rtol=MEL_CONSTANT, atol=MEL_CONSTANT)


@pytest.mark.parametrize("pieces", [[], [torch.zeros(512)]])
def test_too_short_a_stream_is_refused(pieces):
    with pytest.raises(ValueError, match="stream_decibels: pieces must have more than 512 samples together"):
        list(stream_decibels(pieces, LogMelSpectrogram()))
