import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from atst_fast.train import audio, files
from atst_fast.train import pack as module
from atst_fast.train.config import UserError
from atst_fast.train.pack import INDEX, META, NAMES, ROWS, Pack, PackConfig, is_pack, pack
from tests.train.conftest import BAD, GOOD


@pytest.fixture
def packed(good_folder, tmp_path):
    return pack(PackConfig(src=good_folder, dst=tmp_path / "packed", shard_gb=1e-4, workers=2))


def test_round_trip(good_folder, packed):
    p = Pack(packed)
    assert p.names == sorted(GOOD)
    for i, name in enumerate(p.names):
        x = audio.read(good_folder / name)
        out = np.full((1, len(x) + 7), 99, np.int16)
        p.take(np.array([i]), np.array([0]), out)
        np.testing.assert_array_equal(out[0], np.pad(x, (0, 7)))
    assert len(p.meta["shards"]) > 1
    assert (p.index["offset"] * 2 % 4096 == 0).all()
    for shard in p.meta["shards"]:
        assert shard["bytes"] == (packed / shard["name"]).stat().st_size
        # only a single clip that is larger may exceed the limit
        assert shard["bytes"] <= 1e5 or (p.index["shard"] == p.meta["shards"].index(shard)).sum() == 1
    source = p.meta["source"]
    assert source["sha256"] == audio.names_hash(p.names, p.samples.tolist())
    assert p.meta["resampler"].startswith("soxr")


def test_packing_twice_gives_the_same_bytes(good_folder, packed, tmp_path):
    again = pack(PackConfig(src=good_folder, dst=tmp_path / "again", shard_gb=1e-4, workers=1))
    assert sorted(p.name for p in packed.iterdir()) == sorted(p.name for p in again.iterdir())
    for path in packed.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name


def test_bad_files_are_skipped_by_name(bad_folder, tmp_path, capsys):
    p = Pack(pack(PackConfig(src=bad_folder, dst=tmp_path / "p")))
    assert p.names == ["silent.wav"]
    assert p.meta["source"]["skipped"] == len(BAD)
    told = capsys.readouterr().err
    for name, reason in BAD.items():
        assert f"{name}: {reason}" in told
    assert "silent.wav: silent" in told
    assert f"{len(BAD) + 1} files with a problem" in told


def test_nothing_usable_leaves_nothing(bad_folder, tmp_path):
    (bad_folder / "silent.wav").unlink()
    with pytest.raises(UserError, match="none of the"):
        pack(PackConfig(src=bad_folder, dst=tmp_path / "p"))
    assert os.listdir(tmp_path) == ["bad"]


def test_a_taken_name_is_refused(good_folder, packed, tmp_path):
    with pytest.raises(UserError, match="already holds a pack"):
        pack(PackConfig(src=good_folder, dst=packed))
    with pytest.raises(UserError, match="is not an empty folder"):
        pack(PackConfig(src=good_folder, dst=good_folder))
    with pytest.raises(UserError, match="is not an empty folder"):
        pack(PackConfig(src=good_folder, dst=good_folder / "long.wav"))
    (tmp_path / "bare").mkdir()
    assert is_pack(pack(PackConfig(src=good_folder, dst=tmp_path / "bare")))


@pytest.mark.parametrize("dst", [".", "nowhere/.."])
def test_a_place_without_a_name_is_refused(good_folder, tmp_path, monkeypatch, dst):
    (tmp_path / "bare").mkdir()
    monkeypatch.chdir(tmp_path / "bare")
    with pytest.raises(UserError, match="the name of a new folder is needed"):
        pack(PackConfig(src=good_folder, dst=Path(dst)))


def test_threads_are_counted_from_one(good_folder, tmp_path):
    for workers in (0, -1):
        with pytest.raises(UserError, match=f"--workers must be at least 1, got {workers}"):
            pack(PackConfig(src=good_folder, dst=tmp_path / "p", workers=workers))


def test_two_processes_do_not_fill_one_pack(good_folder, tmp_path):
    with files.new_folder(tmp_path / "p") as first:
        (first / "kept").write_text("")
        with pytest.raises(UserError, match=r"another process is writing into .*p\.partial"):
            pack(PackConfig(src=good_folder, dst=tmp_path / "p"))
    assert os.listdir(tmp_path / "p") == ["kept"]


def test_a_folder_of_audio_may_have_a_meta_json(good_folder, packed):
    (good_folder / META).write_text('{"title": "my set"}')
    assert not is_pack(good_folder)
    assert is_pack(packed)
    damage(packed, META, lambda b: b[:5])
    assert is_pack(packed)  # and Pack says what is wrong


def test_an_unwritable_place_is_named(good_folder, tmp_path):
    (tmp_path / "file").write_text("")
    for dst in (tmp_path / "file" / "p", "/proc/p"):
        with pytest.raises(UserError, match=r"cannot write the pack .*no pack was left behind"):
            pack(PackConfig(src=good_folder, dst=type(tmp_path)(dst)))


def test_a_full_disk_leaves_nothing(good_folder, tmp_path):
    """For real: the process may write no file beyond 100 kB."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "from atst_fast.train.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["pack", str(good_folder), str(tmp_path / "p")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "cannot write the pack" in done.stderr
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert os.listdir(tmp_path) == ["good"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 100_000


def test_no_space_at_the_very_end(good_folder, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device; no pack was left behind"):
        pack(PackConfig(src=good_folder, dst=tmp_path / "p"))
    assert os.listdir(tmp_path) == ["good"]


def test_what_a_killed_run_left_is_replaced(good_folder, tmp_path):
    left = tmp_path / "p.partial"
    left.mkdir()
    (left / "data-00007.pcm").write_bytes(b"x")
    p = pack(PackConfig(src=good_folder, dst=tmp_path / "p"))
    assert not left.exists()
    assert not (p / "data-00007.pcm").exists()


def damage(packed, name, change):
    path = packed / name
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("data-00001.pcm", None, "data-00001.pcm is missing"),
        ("data-00000.pcm", lambda b: b[:-4096], "data-00000.pcm has .* bytes, expected"),
        ("data-00000.pcm", lambda b: b + b"x", "data-00000.pcm has .* bytes, expected"),
        (ROWS, None, "index.npy"),
        (ROWS, lambda b: b[:50], "index.npy"),
        (ROWS, lambda b: b"", "index.npy"),
        (NAMES, None, "names.jsonl"),
        (NAMES, lambda b: b"".join(b.splitlines(True)[1:]), "names for"),
        (NAMES, lambda b: b"\xff\xfe" + b, "names.jsonl"),
        (META, lambda b: b[:20], "meta.json"),
        (META, lambda b: b"{}", "meta.json"),
        (META, lambda b: b"[]", "meta.json"),
        (META, lambda b: b.replace(b'"version": 1', b'"version": 9'), "version 9"),
        (META, lambda b: b.replace(b"16000", b"8000"), "8000 Hz"),
        (META, lambda b: b.replace(b"atst_fast pack", b"other"), "no pack of atst_fast"),
    ],
)
def test_a_damaged_pack_is_refused_by_name(packed, name, change, message):
    damage(packed, name, change)
    with pytest.raises(UserError, match=message):
        Pack(packed).names  # noqa: B018


def test_an_index_that_points_outside_is_refused(packed):
    index = np.load(packed / ROWS)
    for field, value in (("shard", 99), ("offset", 10**12), ("samples", 10**12), ("offset", 2**64 - 10)):
        broken = index.copy()
        broken[field][1] = value
        assert broken.dtype == INDEX
        np.save(packed / ROWS, broken)
        with pytest.raises(UserError, match="points outside the shards"):
            Pack(packed)


def test_an_index_with_an_empty_clip_is_refused(packed):
    index = np.load(packed / ROWS)
    index["samples"][1] = 0
    np.save(packed / ROWS, index)
    with pytest.raises(UserError, match="clips without samples"):
        Pack(packed)


def test_names_of_any_bytes_survive(tmp_path, good_folder):
    strange = "a\nb \udc80é.wav"
    (good_folder / "long.wav").rename(good_folder / strange)
    p = pack(PackConfig(src=good_folder, dst=tmp_path / "p"))
    assert strange in Pack(p).names
    assert json.loads((p / META).read_text())["clips"] == len(GOOD)


def test_interrupting_leaves_nothing(good_folder, tmp_path):
    """For real: Ctrl-C while clips are being written."""
    for i in range(300):
        (good_folder / f"copy{i}.flac").symlink_to(good_folder / "deep/er/lossless.flac")
    arguments = [sys.executable, "-m", "atst_fast.train.cli", "pack", str(good_folder), str(tmp_path / "p")]
    # a shell's background jobs, and what they start, ignore the signal otherwise
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen([*arguments, "--workers", "1"], stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    while not list(tmp_path.glob("p.partial/*.pcm")):
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=30)
    assert process.returncode == 130, told
    assert "atst-fast pack: interrupted" in told
    assert os.listdir(tmp_path) == ["good"]
