"""Audio files to mono 16 kHz int16, and a record of those that cannot be used."""

import os
import re
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile
from numpy.typing import NDArray

from atst_fast.train.config import RATE, UserError

SUFFIXES = {".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".w64", ".rf64", ".au"}
MIN_SAMPLES = 513  # what the reflect padding of n_fft 1024 needs; the least that makes a patch of 40 ms
_PIECE = 2**20  # samples of all channels that `stream` has in memory at once
SILENT = "silent (every sample is 0; kept)"
_INTEGER = {"PCM_S8", "PCM_U8", "PCM_16"}  # read as int16 without loss; the rest goes through float32
# What libsndfile notes when a file ends before its header says. Sizes from 2^31 on are those of streamed WAV files,
# whose writer could not know the length.
_CUT = re.compile(r"^ *(?:data|SSND|Data Size|riff|Riff size) *: (\d+) \(should be (\d+)\)", re.MULTILINE)
# Cut between the pages of an Ogg file, or within one (also the last, whose header it reads before it misses the rest).
_CUT_OGG = re.compile("without an End-Of-Stream flag|Last page lacks an end-of-stream bit|Junk after the last page")


class AudioError(Exception):
    """A file that gives no usable audio; the message is the reason, without the file's name."""


class Info(NamedTuple):
    """What the header says: ``frames`` at the file's own ``rate``."""

    rate: int
    frames: int

    @property
    def samples(self) -> int:
        """Length at 16 kHz, half a sample rounded up as soxr does."""
        return (2 * self.frames * RATE + self.rate) // (2 * self.rate)


class Problems:
    """Files that were skipped or need a remark: told once each by name, counted at the end. Safe between threads."""

    def __init__(self, tell: Any = None):
        self.reasons: dict[str, str] = {}
        self._tell = tell
        self._lock = threading.Lock()

    def add(self, name: str, reason: str) -> None:
        with self._lock:
            if name in self.reasons:
                return
            self.reasons[name] = reason
        if self._tell is not None:
            self._tell(f"{name if name.isprintable() else ascii(name)}: {reason}")

    def summary(self) -> str:
        """ "3 files had problems: 2 truncated, 1 empty", or nothing at all."""
        if not self.reasons:
            return ""
        counts = Counter(re.split(r"[:(]", reason)[0].strip() for reason in self.reasons.values())
        listed = ", ".join(f"{n} {reason}" for reason, n in counts.most_common())
        n = len(self.reasons)
        return f"{n} file{'s' if n > 1 else ''} with a problem: {listed}"


def find_audio(folder: Path) -> list[str]:
    """The audio files below ``folder``, by suffix: sorted relative names with forward slashes.

    Links to folders are followed; a folder that is reached in several ways is searched once.
    """
    if not folder.exists():
        raise UserError(f"there is no folder {folder}")
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; expected a folder of audio files or one made by `atst-fast pack`")
    names, seen = [], set()
    for root, folders, files in os.walk(folder, followlinks=True):
        status = os.stat(root)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders.sort()  # which way comes first must not depend on the file system
        below = Path(root).relative_to(folder)
        names += [(below / name).as_posix() for name in files if Path(name).suffix.lower() in SUFFIXES]
    if not names:
        raise UserError(f"no audio in {folder}: expected files ending in {' '.join(sorted(SUFFIXES))}")
    return sorted(names)


def probe(path: Path, at_least: int = MIN_SAMPLES) -> Info:
    """Rate and length from the header; AudioError when the file is empty, no audio, truncated or too short: of less
    than ``at_least`` samples at 16 kHz."""
    with _open(path) as f:
        info = Info(f.samplerate, f.frames)
    if info.samples < at_least:
        raise AudioError(f"too short: {info.samples} samples at 16 kHz, at least {at_least} needed")
    return info


def read(path: Path, start: int = 0, samples: int | None = None) -> NDArray[np.int16]:
    """Mono int16 at 16 kHz: ``samples`` from sample ``start`` on, both at 16 kHz (fewer where the file ends).

    Channels are averaged; other rates go through soxr HQ, whole. Files at 16 kHz are read only where needed.
    Raises AudioError with the reason.
    """
    with _open(path) as f:
        at_rate = f.samplerate == RATE
        frames = f.frames
        wanted = frames
        try:
            if at_rate:
                wanted = max(0, min(frames - start, frames if samples is None else samples))
                if start and wanted:
                    f.seek(start)
            x = f.read(wanted, dtype="int16" if f.subtype in _INTEGER else "float32", always_2d=True)
        except (soundfile.LibsndfileError, RuntimeError) as error:
            raise AudioError(f"undecodable: {_reason(error)}") from error
        if len(x) < wanted:
            raise AudioError(f"truncated: {len(x)} of {wanted} samples can be decoded")
        mono = _mono(x, f.samplerate)
    return mono if at_rate else mono[start : None if samples is None else start + samples]


def stream(path: Path, rate: int = RATE) -> Iterator[NDArray[np.float32]]:
    """Mono float32 in [-1, 1] at ``rate`` Hz, in pieces of at most four million bytes at the file's rate: of any file,
    however long, with the channels averaged and resampled (soxr HQ) as the whole would be, bit for bit.

    Raises AudioError with the reason, perhaps after some pieces.
    """
    import soxr

    with _open(path) as f:
        resampler = None
        if f.samplerate != rate:
            resampler = soxr.ResampleStream(f.samplerate, rate, 1, dtype="float32", quality="HQ")
        # bounded before and after resampling
        size = max(1, min(_PIECE // f.channels, _PIECE * f.samplerate // rate))
        left = f.frames
        while left:
            try:
                x = f.read(min(size, left), dtype="float32", always_2d=True)
            except (soundfile.LibsndfileError, RuntimeError) as error:
                raise AudioError(f"undecodable: {_reason(error)}") from error
            if not len(x):
                raise AudioError(f"truncated: {f.frames - left} of {f.frames} samples can be decoded")
            left -= len(x)
            mono = _average(x)
            yield mono if resampler is None else resampler.resample_chunk(mono, last=not left)


def _mono(x: NDArray[Any], rate: int) -> NDArray[np.int16]:
    """[frames, channels] int16 or float32 to mono int16 at 16 kHz."""
    channels = x.shape[1]
    if x.dtype == np.int16 and channels == 1 and rate == RATE:
        return x[:, 0]
    mono = _average(x)
    if rate != RATE:
        import soxr

        mono = soxr.resample(mono, rate, RATE, quality="HQ")
    return np.clip(np.rint(mono * 32768), -32768, 32767).astype(np.int16)


def _average(x: NDArray[Any]) -> NDArray[np.float32]:
    """[frames, channels] int16 or float32 to mono in [-1, 1]."""
    if not np.isfinite(x).all():
        raise AudioError("not finite: it contains NaN or infinity")
    mono = x[:, 0].astype(np.float32)
    for c in range(1, x.shape[1]):  # ten times as fast as mean(axis=1)
        mono += x[:, c]
    mono *= (1 / 32768 if x.dtype == np.int16 else 1) / x.shape[1]
    return mono


def _open(path: Path) -> soundfile.SoundFile:
    try:
        if path.stat().st_size == 0:
            raise AudioError("empty: 0 bytes")
        f = soundfile.SoundFile(os.fsencode(path))  # names need not be UTF-8
    except OSError as error:
        raise AudioError(f"unreadable: {error.strerror or error}") from error
    except (soundfile.LibsndfileError, RuntimeError, TypeError) as error:
        raise AudioError(f"no audio that can be read: {_reason(error)}") from error
    cut = _CUT.search(f.extra_info)
    if cut and int(cut[2]) < int(cut[1]) < 2**31 - 4096:
        f.close()
        raise AudioError(f"truncated: {cut[2]} of {cut[1]} bytes are there")
    if _CUT_OGG.search(f.extra_info):
        f.close()
        raise AudioError("truncated: the end of the stream is missing")
    return f


def _reason(error: Exception) -> str:
    """libsndfile's own words, without the path that its message repeats."""
    return getattr(error, "error_string", str(error)).removeprefix("Error : ").rstrip(".")


def names_hash(names: Sequence[str], samples: Sequence[int]) -> str:
    """sha256 over clip names and lengths: what tells one clip list from another."""
    import hashlib

    h = hashlib.sha256()
    for name, n in zip(names, samples, strict=True):
        h.update(f"{name}\0{n}\n".encode(errors="surrogateescape"))
    return h.hexdigest()
