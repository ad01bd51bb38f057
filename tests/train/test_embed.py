"""atst-fast embed: what comes out, what is skipped, and how much memory it takes."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors import safe_open

from atst_fast.integrations import Embedder, load_checkpoint, save_checkpoint
from atst_fast.models import ClipEncoder, FrameEncoder
from atst_fast.train import audio, cli, embed
from atst_fast.train.config import UserError
from atst_fast.train.embed import EmbedConfig
from tests.tolerances import CHUNKED_FEATURES
from tests.train.conftest import BAD, tone

SIZE = {"dim": 64, "depth": 2, "num_heads": 1}
# seconds, rate, channels: one chunk, several, less than the window, stereo at another rate
FILES = {
    "a/long.flac": (5.31, 16000, 1),
    "a/tiny.wav": (0.01, 16000, 1),
    "mid.wav": (2.0, 44100, 2),
    "next.wav": (1.2, 8000, 1),
    "z.wav": (1.0, 48000, 1),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("audio")
    (folder / "a").mkdir()
    for i, (name, (seconds, rate, channels)) in enumerate(FILES.items()):
        soundfile.write(folder / name, tone(seconds, rate, channels, i), rate)
    return folder


@pytest.fixture(scope="module", params=[FrameEncoder, ClipEncoder])
def checkpoint(request, tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("checkpoint") / f"{request.param.__name__}.pt"
    torch.save(request.param(SIZE).state_dict(), path)
    return path


@pytest.fixture
def weights(tmp_path):
    torch.save(FrameEncoder(SIZE).state_dict(), tmp_path / "weights.pt")
    return tmp_path / "weights.pt"


def read(path):
    with safe_open(path, framework="pt") as f:
        about = f.metadata()
        names = json.loads(about["names"])
        return f.get_tensor("embeddings"), f.get_tensor("offsets").tolist(), names, json.loads(about["about"])


@pytest.mark.parametrize("batch_size", [3, 50])
@pytest.mark.parametrize("timestamps", [False, True])
@torch.no_grad()
def test_files_are_embedded_as_by_the_embedder(folder, checkpoint, tmp_path, timestamps, batch_size):
    out = tmp_path / "new" / "out.safetensors"
    options = {"timestamps": timestamps, "batch_size": batch_size, "chunk_frames": 100, "n_blocks": 1, "device": "cpu"}
    assert embed.embed(EmbedConfig(folder=folder, out=out, checkpoint=checkpoint, **options)) == out
    embeddings, offsets, names, about = read(out)
    assert names == sorted(FILES)
    assert about["kind"] == ("timestamps" if timestamps else "scene")
    assert about.get("hop_ms") == (40.0 if timestamps else None)
    encoder, front_end, *_ = load_checkpoint(checkpoint)
    embedder = Embedder(encoder, front_end, chunk_frames=100, n_blocks=1)
    for name, first, last in zip(names, offsets, offsets[1:]):
        waveform = torch.from_numpy(np.concatenate(list(audio.stream(folder / name))))[None]
        want = embedder.timestamps(waveform)[0][0] if timestamps else embedder.scene(waveform)
        torch.testing.assert_close(embeddings[first:last], want, rtol=0, atol=CHUNKED_FEATURES)
    assert [p.name for p in out.parent.iterdir()] == [out.name]  # nothing temporary stays


def test_a_spectrogram_comes_back_from_anywhere_with_its_loudest_value(tmp_path):
    parts, spectrum = [torch.randn(8, n) for n in (5, 3, 7)], embed.Spectrogram(0, 8, tmp_path)
    parts[1][2, 1] = 9.0
    for part in parts:
        spectrum.add(part)
    assert spectrum.loudest == 9.0
    assert torch.equal(spectrum.read(4, 9), torch.cat(parts, dim=1)[:, 4:13])
    spectrum.close()


@torch.no_grad()
def test_official_cuts_on_request(folder, weights, tmp_path):
    out = tmp_path / "out.safetensors"
    config = EmbedConfig(folder=folder, out=out, checkpoint=weights, chunk_frames=101, official=True, device="cpu")
    embed.embed(config)
    encoder, front_end, *_ = load_checkpoint(weights)
    embedder = Embedder(encoder, front_end, chunk_frames=101, official=True)
    waveform = torch.from_numpy(audio.read(folder / "a/long.flac"))[None]
    torch.testing.assert_close(read(out)[0][:1], embedder.scene(waveform), rtol=0, atol=CHUNKED_FEATURES)


@pytest.mark.parametrize("timestamps", [False, True])
def test_a_file_that_official_cuts_leave_nothing_of_is_named(folder, tmp_path, capsys, timestamps):
    out = tmp_path / "out.safetensors"
    save_checkpoint(tmp_path / "wide.safetensors", FrameEncoder(SIZE, patch=(64, 16)), layout="safetensors")
    options = {"official": True, "timestamps": timestamps, "device": "cpu"}
    embed.embed(EmbedConfig(folder=folder, out=out, checkpoint=tmp_path / "wide.safetensors", **options))
    assert "a/tiny.wav: shorter than a patch (skipped)" in capsys.readouterr().err
    _, offsets, names, _ = read(out)
    assert names == sorted(set(FILES) - {"a/tiny.wav"})
    assert (np.diff(offsets) > 0).all()


@pytest.mark.parametrize("suffix", ["npz", "parquet"])
def test_other_formats(folder, weights, tmp_path, suffix):
    out = tmp_path / f"out.{suffix}"
    if suffix == "parquet":
        parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra parquet")
    embed.embed(EmbedConfig(folder=folder, out=out, checkpoint=weights, device="cpu"))
    names = np.load(out)["names"].tolist() if suffix == "npz" else parquet.read_table(out)["file"].to_pylist()
    assert names == sorted(FILES)


def test_files_that_cannot_be_used_are_named_and_left_out(bad_folder, folder, weights, tmp_path, capsys):
    for name in FILES:
        (bad_folder / name).parent.mkdir(exist_ok=True)
        (bad_folder / name).symlink_to(folder / name)
    out = tmp_path / "out.safetensors"
    arguments = [str(bad_folder), "--out", str(out), "--checkpoint", str(weights), "--device", "cpu"]
    assert cli.main(["embed", *arguments]) == 0
    told = capsys.readouterr().err
    assert "nan.wav: not finite: it contains NaN or infinity (skipped)" in told
    assert "cut.flac: undecodable" in told  # which only decoding finds
    assert f"{len(BAD) - 1} files with a problem" in told  # all but blip.wav, which is short, not bad
    assert read(out)[2] == sorted([*FILES, "blip.wav", "silent.wav"])
    assert read(out)[0].isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "--batch-size must be at least 1, got 0"),
        ({"workers": 0}, "--workers must be at least 1, got 0"),
        ({"n_blocks": 0}, "--n-blocks must be at least 1, got 0"),
        ({"n_blocks": 3}, "--n-blocks must be from 1 to 2, the encoder's depth, got int 3"),
        ({"chunk_frames": 3}, "--chunk-frames must be at least 4, the frames of a token, got int 3"),
        ({"chunk_frames": 2000}, "--chunk-frames must be at most 1001, for which the encoder has positions"),
        ({"device": "tpu"}, "--device"),
        ({"out": Path("out.csv")}, "--out must end in .safetensors, .npz, .parquet, got out.csv"),
        ({"checkpoint": Path("nowhere.pt")}, "nowhere.pt"),
        ({"folder": Path("nowhere")}, "there is no folder nowhere"),
    ],
)
def test_wrong_options_are_one_line(folder, weights, tmp_path, options, message):
    config = {"folder": folder, "out": tmp_path / "o.npz", "checkpoint": weights, "device": "cpu"} | options
    with pytest.raises(UserError, match=message):
        embed.embed(EmbedConfig(**config))
    assert [p.name for p in tmp_path.iterdir()] == ["weights.pt"]


def test_nothing_usable_is_an_error_and_leaves_nothing(weights, tmp_path):
    (tmp_path / "audio").mkdir()
    (tmp_path / "audio" / "empty.wav").touch()
    config = EmbedConfig(folder=tmp_path / "audio", out=tmp_path / "o.npz", checkpoint=weights, device="cpu")
    with pytest.raises(UserError, match=r"none of the 1 audio files in .* can be used; 1 file with a problem: 1 empty"):
        embed.embed(config)
    assert not (tmp_path / "o.npz").exists()


def test_a_full_disk_is_one_line(folder, weights, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(embed.Spectrogram, "add", full)
    config = EmbedConfig(folder=folder, out=tmp_path / "o.npz", checkpoint=weights, device="cpu")
    with pytest.raises(UserError, match=r"cannot write .*o.npz: No space left on device; nothing was left behind"):
        embed.embed(config)


# memory

# A process that may not have more address space than at its start (its libraries, and the threads that a first run
# starts) and so much: what `ulimit -v` sets. Threads get an arena of 64 MB each from glibc; their number is the
# machine's, so it is fixed here.
LIMITED = """
import re, resource, sys
from pathlib import Path
import torch
from atst_fast.train import embed as module
from atst_fast.train.embed import EmbedConfig, embed
module._HELD = 2**20  # so that minutes are long
torch.set_num_threads(2)
first, folder, checkpoint, out, limit, relative, timestamps = sys.argv[1:]
def run(folder):
    embed(EmbedConfig(folder=Path(folder), out=Path(out), checkpoint=Path(checkpoint), device="cpu", workers=1,
                      timestamps=timestamps == "1"))
if relative == "1":
    run(first)
    peak = int(re.search(r"VmPeak:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
limit = int(limit) + (peak if relative == "1" else 0)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
run(folder)
"""


def run_limited(*arguments):
    environment = {"OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-c", LIMITED, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-2000:]


def write_long(path, seconds, rate, channels):
    """Ten seconds over and over, louder and quieter, never in memory as a whole."""
    path.parent.mkdir()
    block = (0.1 * np.random.default_rng(0).standard_normal((10 * rate, channels))).astype(np.float32)
    block[:, 1:] = 0  # which takes no space
    with soundfile.SoundFile(path, "w", rate, channels) as f:
        for i in range(seconds // 10):
            f.write(block * (0.5 + 0.4 * np.sin(i)))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_length(weights, tmp_path):
    """Four minutes of 48 kHz stereo are 92 MB as float32, and 46 MB of one channel; at most 40 MB more than for ten
    seconds are allowed."""
    write_long(tmp_path / "short" / "a.flac", 10, 48000, 2)
    write_long(tmp_path / "long" / "a.flac", 240, 48000, 2)
    out = tmp_path / "o.safetensors"
    run_limited(tmp_path / "short", tmp_path / "long", weights, out, 40 * 2**20, 1, 1)
    embeddings, offsets, _, about = read(out)
    assert embeddings.shape == (6000, 128)
    assert offsets == [0, 6000]
    assert about["hop_ms"] == 40


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("rate", [16000, 44100])
def test_an_hour_in_two_gigabytes(tmp_path, rate):
    """With the small published size, the process and its libraries included."""
    torch.save(FrameEncoder("small").state_dict(), tmp_path / "small.pt")
    write_long(tmp_path / "hour" / "a.flac", 3600, rate, 2)
    out = tmp_path / "o.safetensors"
    run_limited("", tmp_path / "hour", tmp_path / "small.pt", out, 2 * 10**9, 0, 1)
    embeddings, offsets, _, _ = read(out)
    assert embeddings.shape == (90000, 12 * 384)
    assert offsets == [0, 90000]
