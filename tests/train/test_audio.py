import re

import numpy as np
import pytest
import soundfile
import soxr

from atst_fast.train import audio
from atst_fast.train.config import UserError
from tests import tolerances
from tests.train.conftest import BAD, GOOD, tone


@pytest.mark.parametrize("name", GOOD)
def test_everything_becomes_mono_16_khz(good_folder, name):
    seconds, rate, _ = GOOD[name]
    path = good_folder / name
    info, x = audio.probe(path), audio.read(path)
    assert x.dtype == np.int16
    assert x.ndim == 1
    assert info.rate == rate
    assert abs(len(x) - info.samples) <= 1
    assert abs(len(x) / 16000 - seconds) < 0.06  # MP3 comes in frames of 26 to 50 ms
    assert x.std() > 1000


@pytest.mark.parametrize("rate, frames", [(32000, 26733), (32000, 26735), (96000, 30003), (44100, 30000)])
def test_the_header_tells_the_length_to_the_sample(tmp_path, rate, frames):
    soundfile.write(tmp_path / "a.wav", np.zeros(frames, np.int16), rate)
    assert audio.probe(tmp_path / "a.wav").samples == len(audio.read(tmp_path / "a.wav"))


def test_integers_at_16_khz_pass_unchanged(tmp_path):
    x = tone(1.0)
    for name in ("a.wav", "a.flac"):
        soundfile.write(tmp_path / name, x, 16000)
        np.testing.assert_array_equal(audio.read(tmp_path / name), x)


def test_crops_are_those_of_the_whole(good_folder):
    for name in GOOD:
        if name.endswith("MP3"):
            continue  # libmpg123 decodes the first frame after a seek without its predecessor
        whole = audio.read(good_folder / name)
        np.testing.assert_array_equal(audio.read(good_folder / name, 1234, 2000), whole[1234:3234])
        np.testing.assert_array_equal(audio.read(good_folder / name, len(whole) - 10, 2000), whole[-10:])
        assert len(audio.read(good_folder / name, len(whole) + 5, 10)) == 0


def test_stereo_is_averaged_and_resampled_as_soxr_does(tmp_path):
    x = tone(1.0, 44100, 2)
    soundfile.write(tmp_path / "a.wav", x, 44100)
    expected = soxr.resample(x.astype(np.float64).mean(1) / 32768, 44100, 16000, quality="HQ") * 32768
    np.testing.assert_allclose(audio.read(tmp_path / "a.wav"), expected, atol=tolerances.INT16_ROUNDING)


def test_24_bit_and_float_files_are_rounded_and_clipped(tmp_path):
    x = np.linspace(-1.2, 1.2, 2000, dtype=np.float32)
    soundfile.write(tmp_path / "a.wav", x, 16000, subtype="FLOAT")
    expected = np.clip(np.rint(x * np.float32(32768)), -32768, 32767)
    np.testing.assert_array_equal(audio.read(tmp_path / "a.wav"), expected)
    soundfile.write(tmp_path / "b.wav", x / 2, 16000, subtype="PCM_24")
    got = audio.read(tmp_path / "b.wav")
    np.testing.assert_allclose(got, x / 2 * 32768, atol=tolerances.INT16_ROUNDING)


@pytest.mark.parametrize("name", BAD)
def test_bad_files_say_what_is_wrong(bad_folder, name, capfd):
    def use():
        audio.probe(bad_folder / name)
        audio.read(bad_folder / name)

    with pytest.raises(audio.AudioError, match=BAD[name]) as error:
        use()
    assert str(bad_folder) not in str(error.value)  # the name comes from who reports it


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_an_ogg_file_is_whole_or_truncated_wherever_it_is_cut(tmp_path, subtype):
    """Long enough for many pages; libsndfile takes what is left for all there is."""
    path = tmp_path / "a.ogg"
    soundfile.write(path, tone(10.0), 16000, format="OGG", subtype=subtype)
    data = path.read_bytes()
    assert audio.probe(path).samples == 160000
    pages = [m.start() for m in re.finditer(b"OggS", data)]
    for end in (len(data) // 2, len(data) * 9 // 10, pages[-2], pages[-1], pages[-1] + 40, len(data) - 1):
        path.write_bytes(data[:end])
        with pytest.raises(audio.AudioError, match="truncated: the end of the stream is missing"):
            audio.probe(path)


def test_a_streamed_wav_without_its_length_is_whole(tmp_path):
    path = tmp_path / "a.wav"
    soundfile.write(path, tone(1.0), 16000)
    data = bytearray(path.read_bytes())
    data[4:8] = data[40:44] = b"\xff\xff\xff\xff"
    path.write_bytes(data)
    assert len(audio.read(path)) == 16000


def test_find_audio(good_folder, tmp_path):
    (good_folder / "notes.txt").write_text("x")
    assert audio.find_audio(good_folder) == sorted(GOOD)
    with pytest.raises(UserError, match="there is no folder"):
        audio.find_audio(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is a file"):
        audio.find_audio(good_folder / "long.wav")
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match=r"no audio in .*bare: expected files ending in .*\.flac"):
        audio.find_audio(tmp_path / "bare")


def test_links_to_folders_are_followed_once(good_folder, tmp_path):
    set_of_links = tmp_path / "links"
    set_of_links.mkdir()
    (set_of_links / "a").symlink_to(good_folder)
    (set_of_links / "b").symlink_to(good_folder)  # seen already
    (good_folder / "up").symlink_to(set_of_links)  # a loop
    assert audio.find_audio(set_of_links) == sorted(f"a/{name}" for name in GOOD)


def test_problems_are_told_once_and_counted():
    told = []
    problems = audio.Problems(told.append)
    assert problems.summary() == ""
    for name, reason in (("a", "truncated: 1 of 2"), ("a", "truncated: 1 of 2"), ("b", "empty"), ("c", "truncated: 3")):
        problems.add(name, reason)
    assert told == ["a: truncated: 1 of 2", "b: empty", "c: truncated: 3"]
    assert problems.summary() == "3 files with a problem: 2 truncated, 1 empty"


def test_names_that_a_terminal_cannot_show_are_told_in_ascii():
    told = []
    audio.Problems(told.append).add("a\nb\udc80é", "empty")
    assert told == [r"'a\nb\udc80\xe9': empty"]


def test_names_hash_depends_on_names_and_lengths():
    hashes = {audio.names_hash(n, s) for n, s in ((["a"], [1]), (["b"], [1]), (["a"], [2]), (["a\udc80"], [1]))}
    assert len(hashes) == 4


def pieces(path, **options):
    return [np.array(piece) for piece in audio.stream(path, **options)]


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("piece", [2**20, 1000])
def test_a_stream_is_what_the_whole_file_gives(good_folder, name, piece, monkeypatch):
    monkeypatch.setattr(audio, "_PIECE", piece)
    path = good_folder / name
    got = pieces(path)
    assert all(part.dtype == np.float32 for part in got)
    whole = np.concatenate(got)
    assert len(whole) == audio.probe(path).samples
    assert len(got) > 1 or piece == 2**20
    np.testing.assert_allclose(whole * 32768, audio.read(path), atol=tolerances.INT16_ROUNDING)
    if name.endswith("MP3"):
        return  # libmpg123 rounds otherwise after soundfile.read's seek
    x, rate = soundfile.read(path, dtype="float32", always_2d=True)
    mean = audio._average(x)
    np.testing.assert_array_equal(whole, mean if rate == 16000 else soxr.resample(mean, rate, 16000, quality="HQ"))


@pytest.mark.parametrize("rate", [8000, 11025, 44101, 48000, 192000])
def test_a_stream_at_another_rate(tmp_path, rate, monkeypatch):
    monkeypatch.setattr(audio, "_PIECE", 5000)
    x = tone(0.77, rate)
    soundfile.write(tmp_path / "a.wav", x, rate)
    got = np.concatenate(pieces(tmp_path / "a.wav", rate=22050))
    np.testing.assert_array_equal(got, soxr.resample(x / np.float32(32768), rate, 22050, quality="HQ"))


@pytest.mark.parametrize("name", BAD)
def test_a_stream_of_a_bad_file_ends_with_the_reason(bad_folder, name):
    if BAD[name] == "too short":
        assert len(np.concatenate(pieces(bad_folder / name))) == 160
    else:
        with pytest.raises(audio.AudioError, match=BAD[name]):
            pieces(bad_folder / name)


def test_how_short_is_too_short_is_for_the_caller_to_say(bad_folder):
    assert audio.probe(bad_folder / "blip.wav", at_least=160).samples == 160
    with pytest.raises(audio.AudioError, match="too short: 160 samples at 16 kHz, at least 161 needed"):
        audio.probe(bad_folder / "blip.wav", at_least=161)
