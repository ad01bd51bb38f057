"""Demo data: exact labels, the same bits for the same seed, all or nothing on disk."""

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile

from atst_fast.train import demo_data as module
from atst_fast.train.config import UserError
from atst_fast.train.demo_data import INSTRUMENTS, RATE, DemoDataConfig, Player, demo_data, render_scene, trim
from atst_fast.train.files import new_folder

pytest.importorskip("tinysoundfont", reason="needs tinysoundfont")
if importlib.util.find_spec("pretty_midi") is None:
    pytest.skip("needs the extra demo", allow_module_level=True)


@pytest.fixture(scope="module")
def player():
    return Player()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    config = DemoDataConfig(tmp_path_factory.mktemp("demo") / "data", 0.2, train_scenes=3, test_scenes=2, seed=3)
    return config, demo_data(config)


def test_labels_are_exact(player):
    """Each stem is zero outside its events, and sounds right after each onset and right before each offset."""
    for seed in range(5):
        scene = render_scene(np.random.default_rng(seed), player, 10.0)
        assert 1 <= len(scene.stems) <= 4
        assert {label for label, _, _ in scene.events} == set(scene.stems)
        for label, stem in scene.stems.items():
            spans = [(on, off) for other, on, off in scene.events if other == label]
            assert all(off < on for (_, off), (on, _) in pairwise(spans))  # nobody plays with itself
            outside = np.ones(len(stem), bool)
            for on, off in spans:
                outside[on:off] = False
                level = np.sqrt(np.mean(stem[on:off] ** 2))
                assert np.abs(stem[on : on + RATE // 20]).max() > 1e-3 * level
                assert np.sqrt(np.mean(stem[off - 480 : off] ** 2)) > 1e-3 * level
            assert outside.any()
            assert not stem[outside].any()


def test_a_loud_scene_is_scaled_not_wrapped(player, monkeypatch):
    monkeypatch.setattr("atst_fast.train.demo_data.noise", lambda rng, n: np.full(n, 3.0, np.float32))
    scene = render_scene(np.random.default_rng(1), player, 5.0)
    assert 0.97 < np.abs(scene.audio).max() / 32767 <= 0.981
    assert scene.audio.min() > 0


def test_the_stems_and_faint_noise_are_the_audio(player):
    scene = render_scene(np.random.default_rng(1), player, 5.0)
    rest = scene.audio / 32767 - np.sum(list(scene.stems.values()), axis=0)
    assert -70 < 20 * np.log10(np.std(rest)) < -58
    assert scene.audio.dtype == np.int16
    assert len(scene.audio) == 5 * RATE


def test_a_scene_does_not_depend_on_what_was_rendered_before(player):
    scene = render_scene(np.random.default_rng(7), Player(), 4.0)
    render_scene(np.random.default_rng(8), player, 4.0)
    again = render_scene(np.random.default_rng(7), player, 4.0)
    assert np.array_equal(scene.audio, again.audio)
    assert scene.events == again.events
    assert not np.array_equal(scene.audio, render_scene(np.random.default_rng(9), player, 4.0).audio)


def test_every_key_of_every_instrument_sounds(player):
    for label, instrument in INSTRUMENTS.items():
        for program in instrument.programs:
            player.synth.program_select(0, player.font, 0, program)
            for key in range(instrument.low, instrument.high + 1, 4):
                player.synth.noteon(0, key, 60)
                assert player.generate(RATE // 4).any(), f"{label} (program {program}) is silent at key {key}"
                player.silence()


def test_trim_ends_where_the_sound_is_30_db_down():
    sound = np.random.default_rng(0).standard_normal(RATE) * 10 ** (-np.arange(RATE) * 60 / RATE / 20)
    assert len(trim(sound)) / RATE == pytest.approx(0.5, abs=0.03)  # it falls 60 dB in a second
    assert trim(sound)[-1] == 0


def test_files(small):
    config, out = small
    assert out == config.out
    counts = {split: len(list((out / split).glob("*.wav"))) for split in ("pretrain", "train", "test")}
    assert counts == {"pretrain": 2, "train": 3, "test": 2}
    rows = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    tsv = [line.split("\t") for line in (out / "train.tsv").read_text().splitlines()]
    assert tsv[0] == ["filename", "onset", "offset", "event_label"]
    events = [(Path(row["file"]).name, e["label"], e["onset"], e["offset"]) for row in rows for e in row["events"]]
    assert [(f, label) for f, _, _, label in tsv[1:]] == [e[:2] for e in events]
    assert np.allclose([(float(on), float(off)) for _, on, off, _ in tsv[1:]], [e[2:] for e in events], atol=1e-6)
    for row in rows:
        info = soundfile.info(out / row["file"])
        assert (info.samplerate, info.channels, info.subtype) == (RATE, 1, "PCM_16")
        assert info.duration == row["duration"] == config.scene_seconds
        assert row["labels"] == sorted({e["label"] for e in row["events"]})


def test_the_same_seed_gives_the_same_bits(small, tmp_path):
    config, out = small
    again = demo_data(replace(config, out=tmp_path / "again"))
    files = sorted(p.relative_to(out) for p in out.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(again) for p in again.rglob("*") if p.is_file())
    assert all((out / f).read_bytes() == (again / f).read_bytes() for f in files)


def test_a_second_run_says_so_and_changes_nothing(small, capsys):
    config, out = small
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    demo_data(config)
    assert "already there" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    with pytest.raises(FileExistsError, match="another configuration"):
        demo_data(replace(config, seed=4))


def test_an_interrupted_run_leaves_no_folder(tmp_path, monkeypatch):
    config = DemoDataConfig(tmp_path / "data", 0.2, train_scenes=1, test_scenes=1)
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_labels", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            demo_data(config)
    assert not list(tmp_path.iterdir())
    assert len(list((demo_data(config) / "pretrain").iterdir())) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["data"]


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path):
    """For real: the process may write no file beyond 100 kB."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "from atst_fast.train.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["demo-data", "--out", str(tmp_path / "data"), "--minutes", "0.2"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert f"atst-fast demo-data: cannot write the demo data {tmp_path}/data: File too large" in done.stderr
    assert not list(tmp_path.iterdir())


def test_two_processes_do_not_render_into_one_folder(tmp_path):
    config = DemoDataConfig(tmp_path / "data", 0.2, train_scenes=1, test_scenes=1)
    with new_folder(config.out) as first:
        (first / "kept").write_text("")
        with pytest.raises(UserError, match="another process is writing into"):
            demo_data(config)
    assert [p.name for p in config.out.iterdir()] == ["kept"]


def test_a_folder_without_a_name_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="the name of a new folder is needed"):
        demo_data(DemoDataConfig(Path(".")))


def test_foreign_folders_are_left_alone(tmp_path):
    (tmp_path / "mine.wav").write_bytes(b"music")
    with pytest.raises(FileExistsError, match="new or empty folder"):
        demo_data(DemoDataConfig(tmp_path))
    assert (tmp_path / "mine.wav").read_bytes() == b"music"


@pytest.mark.parametrize("change", [{"minutes": -1}, {"scene_seconds": 1.0}, {"seed": -1}, {"minutes": float("nan")}])
def test_impossible_sizes(tmp_path, change):
    with pytest.raises(ValueError, match=f"demo-data: {next(iter(change))} must be"):
        demo_data(replace(DemoDataConfig(tmp_path / "x"), **change))


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pretty_midi is missing; install it: pip install 'atst_fast\[train,demo\]'"):
        Player()
