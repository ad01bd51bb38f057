"""Demo data: scenes of real sampled instruments with exact labels, rendered offline from a General MIDI soundfont.

The samples are those of TimGM6mb.sf2 inside the package pretty_midi; tinysoundfont plays them. In a scene a few
instruments play phrases over each other at different levels, over faint noise. The labels are exact by construction:
every phrase is rendered alone, starts at a sample that is known, and is cut where it has died away.
"""

import importlib.util
import io
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

RATE = 16000
FRAME = 160  # samples, 10 ms: the grid on which the end of a phrase is measured
SOUNDFONT = "TimGM6mb.sf2"
MARKER = "dataset.json"
CURE = "pip install 'atst_fast[train,demo]' && pip install --no-deps tinysoundfont==0.3.7"


@dataclass(frozen=True)
class Instrument:
    """General MIDI programs (counted from 0) that share a label, and the MIDI keys they play."""

    programs: tuple[int, ...]
    low: int
    high: int
    chords: bool = False


# Most ranges overlap: pitch alone does not tell the label.
INSTRUMENTS = {
    "accordion": Instrument((21,), 53, 84),
    "banjo": Instrument((105,), 50, 79),
    "bass": Instrument((32, 33), 33, 55),
    "choir": Instrument((52,), 48, 76, chords=True),
    "clarinet": Instrument((71,), 52, 84),
    "flute": Instrument((73,), 60, 91),
    "guitar": Instrument((24, 25), 45, 79, chords=True),
    "harpsichord": Instrument((6,), 45, 81, chords=True),
    "horn": Instrument((60,), 45, 74),
    "oboe": Instrument((68,), 58, 86),
    "organ": Instrument((16, 19), 45, 81, chords=True),
    "piano": Instrument((0, 1), 40, 86, chords=True),
    "saxophone": Instrument((66, 67), 48, 77),
    "trumpet": Instrument((56,), 54, 82),
    "vibraphone": Instrument((11,), 53, 86),
    "violin": Instrument((40,), 55, 88),
}


@dataclass
class DemoDataConfig:
    """What ``atst-fast demo-data`` renders, and where."""

    out: Path = Path("demo_data")
    """folder to make"""
    minutes: float = 60.0
    """length of the unlabelled part, for pretraining"""
    train_scenes: int = 100
    """labelled scenes to train a probe on"""
    test_scenes: int = 200
    """labelled scenes to test it on"""
    scene_seconds: float = 10.0
    """length of a scene"""
    seed: int = 1
    """the same seed gives the same bits"""


@dataclass
class Scene:
    """One rendered scene: ``audio`` int16 [N] at 16 kHz, ``stems`` label -> float32 [N] (their sum and the noise make
    the audio), ``events`` (label, onset, offset) in samples, in order of onset."""

    audio: np.ndarray
    stems: dict[str, np.ndarray] = field(repr=False)
    events: list[tuple[str, int, int]]


def soundfont_path() -> Path:
    """Where pretty_midi keeps its soundfont; ImportError says what to install when there is none."""
    spec = importlib.util.find_spec("pretty_midi")  # finding is enough: importing it would cost a second
    path = Path(spec.origin).parent / SOUNDFONT if spec and spec.origin else None
    if path is None or not path.is_file():
        raise ImportError(f"demo-data: {SOUNDFONT} of the package pretty_midi is missing; install it: {CURE}")
    return path


class Player:
    """Plays phrases of one instrument at a time through tinysoundfont."""

    def __init__(self) -> None:
        path = soundfont_path()
        try:
            from tinysoundfont import Synth
        except ImportError as error:
            raise ImportError(f"demo-data: the package tinysoundfont is missing; install it: {CURE}") from error
        self.synth = Synth(samplerate=RATE)
        self.font = self.synth.sfload(str(path))

    def silence(self) -> None:
        """Let every voice end, so that nothing of one phrase sounds in the next."""
        self.synth.sounds_off()
        for _ in range(100):
            if not self.generate(RATE // 10).any():
                return
        raise RuntimeError("demo-data: tinysoundfont kept sounding for 10 s after sounds_off")

    def generate(self, samples: int) -> np.ndarray:
        """The next samples, mono float32."""
        return np.frombuffer(self.synth.generate(samples), np.float32).reshape(-1, 2).mean(axis=1)

    def phrase(self, rng: np.random.Generator, instrument: Instrument) -> np.ndarray:
        """A legato melody of one to four seconds, until it has died away: float32 [N], peak RMS 1.

        The end is the last 10 ms frame within 30 dB of the loudest one, plus a fade of 10 ms.
        """
        self.synth.program_select(0, self.font, 0, int(rng.choice(instrument.programs)))
        pieces: list[np.ndarray] = []
        key = int(rng.integers(instrument.low, instrument.high + 1))
        length = int(rng.uniform(1, 4) * RATE)
        while sum(len(piece) for piece in pieces) < length:
            size = rng.integers(2, 5) if instrument.chords and rng.random() < 0.5 else 1
            keys = [key, *(key + 3 * k + int(rng.integers(0, 3)) for k in range(1, size))]
            velocity = int(rng.integers(50, 128))
            for k in keys:
                self.synth.noteon(0, k, velocity)
            pieces.append(self.generate(int(rng.uniform(0.12, 0.45) * RATE)))
            for k in keys:
                self.synth.noteoff(0, k)
            key = int(rng.integers(instrument.low, instrument.high + 1))
        pieces.append(self.generate(2 * RATE))
        self.silence()
        return trim(np.concatenate(pieces))


def trim(sound: np.ndarray, range_db: float = 30.0) -> np.ndarray:
    """Cut ``sound`` where it has died away, with a 10 ms fade, and scale its loudest 10 ms to RMS 1."""
    frames = sound[: len(sound) // FRAME * FRAME].reshape(-1, FRAME)
    rms = np.sqrt(np.mean(frames.astype(np.float64) ** 2, axis=1))
    last = np.flatnonzero(rms >= rms.max() * 10 ** (-range_db / 20))[-1]
    sound = (frames[: last + 2] / rms.max()).astype(np.float32).reshape(-1)
    sound[-FRAME:] *= np.linspace(1, 0, FRAME, dtype=np.float32)
    return sound


def render_scene(rng: np.random.Generator, player: Player, seconds: float) -> Scene:
    """Two to four instruments that take turns: the next one enters before the last has ended, or after a short rest.

    From note to note pitch and velocity change freely: what lasts, and what a model can predict, is who plays.
    """
    n = int(seconds * RATE)
    labels = [str(label) for label in rng.choice(sorted(INSTRUMENTS), size=rng.integers(2, 5), replace=False)]
    stems, free = {label: np.zeros(n, np.float32) for label in labels}, dict.fromkeys(labels, 0)
    events, start = [], int(rng.uniform(0, 0.5) * RATE)
    # What the end of the scene leaves of the last phrase must be long enough to be an event.
    while start < n - RATE // 2:
        label = str(rng.choice([label for label in labels if free[label] <= start]))
        sound = player.phrase(rng, INSTRUMENTS[label])[: n - start]
        end = start + len(sound)
        stems[label][start:end] = 10 ** (rng.uniform(-21, -19) / 20) * sound
        events.append((label, start, end))
        free[label] = end + RATE // 4
        start = max(end + int(rng.uniform(-0.8, 0.5) * RATE), start + RATE // 2, min(free.values()))
    stems = {label: stem for label, stem in stems.items() if stem.any()}
    mix = np.sum(list(stems.values()), axis=0) + noise(rng, n)
    scale = min(1.0, 0.98 / np.abs(mix).max())
    audio = np.round(mix * scale * 32767).astype(np.int16)
    return Scene(audio, {k: v * np.float32(scale) for k, v in stems.items()}, sorted(events, key=lambda e: e[1:]))


def noise(rng: np.random.Generator, n: int, rms: float = 1e-3) -> np.ndarray:
    """Noise whose power falls by 3 dB per octave: float32 [n].

    The same level and colour in every scene: where they differ they are the easiest thing to predict about a scene,
    and pretraining learns them first.
    """
    spectrum = np.fft.rfft(rng.standard_normal(n))
    spectrum *= np.maximum(np.arange(len(spectrum)), len(spectrum) / 400) ** -0.5
    sound = np.fft.irfft(spectrum, n)
    return (sound * rms / np.sqrt(np.mean(sound**2))).astype(np.float32)


def scenes(config: DemoDataConfig) -> Iterator[tuple[str, int, Scene]]:
    """(split, index, scene) of the whole data set; every scene has its own generator, from seed, split and index."""
    player = Player()
    for s, (split, count) in enumerate(counts(config).items()):
        for i in range(count):
            yield split, i, render_scene(np.random.default_rng([config.seed, s, i]), player, config.scene_seconds)


def counts(config: DemoDataConfig) -> dict[str, int]:
    pretrain = int(np.ceil(config.minutes * 60 / config.scene_seconds))
    return {"pretrain": pretrain, "train": config.train_scenes, "test": config.test_scenes}


def demo_data(config: DemoDataConfig) -> Path:
    """Render the data set into the folder ``config.out`` and return it; does nothing when it is already there.

    ``pretrain/``, ``train/`` and ``test/`` hold 16 kHz int16 WAV files. ``train.jsonl`` and ``test.jsonl`` have one
    line per file, ``{"file", "duration", "labels", "events": [{"label", "onset", "offset"}]}`` in seconds, and
    ``train.tsv``, ``test.tsv`` the same events in DESED's columns (filename, onset, offset, event_label). The folder
    appears whole or not at all. Raises ValueError for impossible sizes, FileExistsError when the folder holds
    something else, ImportError naming what to install, UserError when the disk is full or another process renders.
    """
    from rich.console import Console
    from rich.progress import track

    from atst_fast.train.files import explain, new_folder

    console = Console()
    check(config)
    out = Path(config.out)
    if (out / MARKER).is_file():
        same(out, config)
        console.print(f"demo-data: {out} is already there, nothing to do")
        return out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"demo-data: out must be a new or empty folder, got {out}, which holds something else")
    sizes = counts(config)
    rows: dict[str, list[dict]] = {split: [] for split in sizes}
    with explain(f"write the demo data {out}", "nothing of it was left behind"), new_folder(out) as partial:
        for split in sizes:
            (partial / split).mkdir()
        todo = track(scenes(config), "rendering scenes", total=sum(sizes.values()), console=console)
        for split, i, scene in todo:
            rows[split].append(write_scene(partial, f"{split}/scene_{i:05d}.wav", scene))
        for split in ("train", "test"):
            write_labels(partial, split, rows[split])
        (partial / MARKER).write_text(json.dumps(description(config), indent=1) + "\n")
    minutes = {split: round(n * config.scene_seconds / 60, 1) for split, n in sizes.items()}
    console.print(f"demo-data: {out}: " + ", ".join(f"{split} {m} minutes" for split, m in minutes.items()))
    return out


def check(config: DemoDataConfig) -> None:
    for name, low in {"minutes": 0.0, "train_scenes": 0, "test_scenes": 0, "scene_seconds": 2.0, "seed": 0}.items():
        value = getattr(config, name)
        if not value >= low or value == float("inf"):
            raise ValueError(f"demo-data: {name} must be a finite number of at least {low}, got {value!r}")


def description(config: DemoDataConfig) -> dict:
    sizes = {k: v for k, v in asdict(config).items() if k != "out"}
    return {"config": sizes, "sample_rate": RATE, "labels": sorted(INSTRUMENTS), "scenes": counts(config)}


def same(out: Path, config: DemoDataConfig) -> None:
    found, wanted = json.loads((out / MARKER).read_text()), description(config)
    if found != wanted:
        raise FileExistsError(
            f"demo-data: {out} holds demo data of another configuration ({found['config']}); "
            f"delete it or choose another out for {wanted['config']}"
        )


def write_scene(root: Path, name: str, scene: Scene) -> dict:
    """Write the audio and return the scene's line of the labels file."""
    import soundfile

    wav = io.BytesIO()  # in memory, because libsndfile does not say why it cannot write a file
    soundfile.write(wav, scene.audio, RATE, format="WAV", subtype="PCM_16")
    (root / name).write_bytes(wav.getvalue())
    events = [{"label": label, "onset": on / RATE, "offset": off / RATE} for label, on, off in scene.events]
    duration = len(scene.audio) / RATE
    return {"file": name, "duration": duration, "labels": sorted(scene.stems), "events": events}


def write_labels(root: Path, split: str, rows: list[dict]) -> None:
    with open(root / f"{split}.jsonl", "w") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)
    with open(root / f"{split}.tsv", "w") as f:
        f.write("filename\tonset\toffset\tevent_label\n")
        for row in rows:
            name = Path(row["file"]).name
            f.writelines(f"{name}\t{e['onset']:.6f}\t{e['offset']:.6f}\t{e['label']}\n" for e in row["events"])
