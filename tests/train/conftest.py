"""Audio files of every kind, good and bad, made on the fly."""

import numpy as np
import pytest

soundfile = pytest.importorskip("soundfile", reason="needs the extra train")


def tone(seconds, rate=16000, channels=1, seed=0):
    """Noise over a tone, int16 [N] or [N, channels]."""
    rng = np.random.default_rng(seed)
    t = np.arange(int(seconds * rate)) / rate
    x = 0.2 * np.sin(2 * np.pi * (200 + 50 * seed) * t)[:, None] + 0.05 * rng.standard_normal((len(t), channels))
    x = np.round(x * 32767).astype(np.int16)
    return x if channels > 1 else x[:, 0]


def truncate(path, share=0.5):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


GOOD = {
    "long.wav": (3.0, 16000, 1),
    "short.wav": (0.5, 16000, 1),
    "stereo.wav": (2.0, 44100, 2),
    "deep/narrow.wav": (2.0, 8000, 1),
    "deep/er/lossless.flac": (2.0, 16000, 1),
    "vorbis.ogg": (2.0, 16000, 1),
    "layer3.MP3": (2.0, 22050, 2),
}
# name -> what its report must say
BAD = {
    "empty.wav": "empty",
    "text.wav": "no audio that can be read",
    "text.mp3": "no audio that can be read",
    "cut.wav": "truncated",
    "cut.flac": "undecodable",
    "cut.ogg": "truncated: the end of the stream",
    "cut.opus": "truncated: the end of the stream",
    "cut.aiff": "truncated",
    "cut.au": "truncated",
    "cut.w64": "truncated",
    "cut.rf64": "truncated",
    "cut.mp3": "truncated",
    "blip.wav": "too short",
    "nan.wav": "not finite",
    "gone.wav": "unreadable",
}


@pytest.fixture
def good_folder(tmp_path):
    """Files of every format, rate and channel count that can be used."""
    folder = tmp_path / "good"
    for i, (name, (seconds, rate, channels)) in enumerate(GOOD.items()):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, tone(seconds, rate, channels, i), rate)
    return folder


@pytest.fixture
def bad_folder(tmp_path):
    """Every kind of file that cannot be used, and a silent one, which can."""
    folder = tmp_path / "bad"
    folder.mkdir()
    for kind in ("wav", "flac", "ogg", "mp3", "opus", "aiff", "au", "w64", "rf64"):
        form = {"opus": {"format": "OGG", "subtype": "OPUS"}}.get(kind, {})
        soundfile.write(folder / f"cut.{kind}", tone(2.0), 16000, **form)
        truncate(folder / f"cut.{kind}", 0.8 if kind == "opus" else 0.5)  # shorter, no opus opens
    (folder / "empty.wav").touch()
    for kind in ("wav", "mp3"):
        (folder / f"text.{kind}").write_text("this is no audio at all\n" * 100)
    soundfile.write(folder / "blip.wav", tone(0.01), 16000)
    soundfile.write(folder / "nan.wav", np.full(16000, np.nan, np.float32), 16000, subtype="FLOAT")
    soundfile.write(folder / "silent.wav", np.zeros(16000, np.int16), 16000)
    (folder / "gone.wav").symlink_to(folder / "nowhere.wav")
    (folder / "notes.txt").write_text("not audio, not looked at")
    return folder


@pytest.fixture
def clips_folder(tmp_path):
    return write_clips(tmp_path / "clips")


def write_clips(folder):
    """Twelve 16 kHz clips of 0.4 to 1.5 s, as WAV and FLAC."""
    folder.mkdir(exist_ok=True)
    for i in range(12):
        soundfile.write(folder / f"{i:02d}.{'wav' if i % 2 else 'flac'}", tone(0.4 + 0.1 * i, seed=i), 16000)
    return folder
