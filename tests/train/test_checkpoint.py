import errno
import os
import resource
import stat
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from atst_fast.models import ATSTFrame, FrameEncoder
from atst_fast.train import checkpoint, files
from atst_fast.train.config import UserError

SIZE = {"dim": 24, "depth": 2, "num_heads": 3}


@pytest.fixture
def model():
    model = ATSTFrame(SIZE, hidden=32, out=16, max_frames=41)
    with torch.no_grad():
        for p in model.teacher.parameters():
            p.add_(0.1)
    return model


def save(run, model, step, keep=2):
    config = {"model": model.config, "front_end": {"n_mels": 64, "win_length": 1024}, "settings": {"seed": 1}}
    state = {"rng": torch.get_rng_state(), "optimizer": {"state": {0: {"step": torch.ones(())}}, "lr": 0.1}}
    return checkpoint.save(run, step, model.state_dict(), state, config, keep)


def test_round_trip(model, tmp_path):
    path = save(tmp_path, model, 7)
    loaded, state = checkpoint.load(path), checkpoint.load_state(path)
    assert loaded.step == state["step"] == 7
    assert loaded.config["settings"] == {"seed": 1}
    assert torch.equal(state["rng"], torch.get_rng_state())
    assert state["optimizer"]["lr"] == 0.1
    other = ATSTFrame(SIZE, hidden=32, out=16, max_frames=41)
    checkpoint.load_model(other, loaded.weights)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))


def test_keys_are_official_and_anybody_can_read_the_file(model, tmp_path):
    path = save(tmp_path, model, 1)
    keys = set(load_file(path))
    assert keys == {f"model.{k}" for k in model.state_dict()}
    assert {"model.teacher.encoder.mask_embed", "model.student.predictor.3.weight"} <= keys
    mask = os.umask(0)
    os.umask(mask)
    for p in (path, checkpoint.state_path(path)):
        assert stat.S_IMODE(p.stat().st_mode) == 0o666 & ~mask


@pytest.mark.parametrize("which", ["teacher", "student"])
def test_load_encoder(model, tmp_path, which):
    path = save(tmp_path, model, 1)
    expected = getattr(model, which).encoder.state_dict()
    (tmp_path / "config.json").write_text("{}")  # as every run has one
    for place in (path, tmp_path, tmp_path / checkpoint.FOLDER, str(path)):
        loaded = checkpoint.load_encoder(place, which)
        encoder, front_end = loaded.encoder, loaded.front_end
        assert not encoder.training
        assert not any(p.requires_grad for p in encoder.parameters())
        assert (front_end["n_mels"], front_end["win_length"], front_end["hop_length"]) == (64, 1024, 160)
        assert encoder.config == model.student.encoder.config
        got = encoder.state_dict()
        assert got.keys() == expected.keys()
        assert all(torch.equal(v, expected[k]) for k, v in got.items())


def test_the_last_ones_are_kept(model, tmp_path):
    for step in (1, 2, 3, 10):
        save(tmp_path, model, step, keep=2)
    names = sorted(p.name for p in (tmp_path / checkpoint.FOLDER).iterdir())
    assert names == [f"step-{s:08d}.{end}" for s in (3, 10) for end in ("safetensors", "state.pt")]
    assert checkpoint.find(tmp_path).name == "step-00000010.safetensors"
    save(tmp_path, model, 11, keep=1)
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["step-00000011.safetensors"]


def test_saving_a_step_again_keeps_it(model, tmp_path):
    save(tmp_path, model, 1, keep=1)
    assert save(tmp_path, model, 1, keep=1).exists()


def test_what_killed_writers_left_is_no_checkpoint_and_goes(model, tmp_path):
    save(tmp_path, model, 1)
    folder = tmp_path / checkpoint.FOLDER
    left = [folder / "step-00000002.state.pt", folder / "step-00000002.safetensors.partial"]
    for path in left:
        path.write_bytes(b"half")
    assert checkpoint.find(tmp_path).name == "step-00000001.safetensors"
    save(tmp_path, model, 3)
    assert not any(path.exists() for path in left)


def test_errors_name_the_file(model, tmp_path):
    path = save(tmp_path, model, 1)
    for place, message in (
        (tmp_path / "nowhere", "there is no checkpoint .*nowhere"),
        (checkpoint.state_path(path), r"state\.pt is damaged or no safetensors file"),
    ):
        with pytest.raises(UserError, match=message):
            checkpoint.load(place)
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match=r"no checkpoint in .*bare"):
        checkpoint.load_encoder(tmp_path / "bare")
    with pytest.raises(ValueError, match="which must be one of teacher, student, got 'both'"):
        checkpoint.load_encoder(path, "both")
    other = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(3)}, other)
    with pytest.raises(UserError, match="was not written by atst-fast pretrain"):
        checkpoint.load(other)


@pytest.mark.parametrize("config", ["null", "[]", "3"])
def test_a_configuration_that_is_none(model, tmp_path, config):
    path = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(3)}, path, {"config": config, "step": "1"})
    with pytest.raises(UserError, match=r"other\.safetensors was not written by atst-fast pretrain"):
        checkpoint.load(path)


@pytest.mark.parametrize(
    "part, change, message",
    [
        ("model", {"arch": "huge"}, "describes no encoder"),
        ("model", {"colour": "red"}, "describes no encoder .*colour"),
        ("model", {"patch": None}, "describes no encoder"),
        ("front_end", {"colour": "red"}, "describes no front end .*colour"),
        ("front_end", {"n_mels": 80}, "64 mel bands in the encoder, 80 in the front end"),
    ],
)
def test_a_configuration_that_describes_no_encoder(model, tmp_path, part, change, message):
    loaded = checkpoint.load(save(tmp_path, model, 1))
    config = loaded.config | {part: loaded.config[part] | change}
    checkpoint.save(tmp_path, 2, model.state_dict(), {}, config, 2)
    with pytest.raises(UserError, match=message):
        checkpoint.load_encoder(tmp_path)


def test_weights_that_are_not_finite_are_no_encoder(model, tmp_path):
    with torch.no_grad():
        model.teacher.encoder.norm_frame.weight[0] = float("nan")
    save(tmp_path, model, 1)
    with pytest.raises(UserError, match=r"the teacher .*: 1 not finite: model\.teacher\.encoder\.norm_frame\.weight"):
        checkpoint.load_encoder(tmp_path)


def test_the_run_of_a_checkpoint(tmp_path, monkeypatch):
    inside = tmp_path / checkpoint.FOLDER / "step-00000001.safetensors"
    inside.parent.mkdir()
    assert checkpoint.run_of(inside) == checkpoint.run_of(tmp_path / "copy.safetensors") == tmp_path
    monkeypatch.chdir(inside.parent)
    assert checkpoint.run_of(type(inside)(inside.name)) == tmp_path


@pytest.mark.parametrize("share", [0.0, 0.1, 0.9])
def test_damaged_files(model, tmp_path, share):
    path = save(tmp_path, model, 1)
    for p in (path, checkpoint.state_path(path)):
        data = p.read_bytes()
        p.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(UserError, match="is damaged"):
        checkpoint.load(path)
    with pytest.raises(UserError, match=r"is damaged .*delete this checkpoint"):
        checkpoint.load_state(path)
    checkpoint.state_path(path).unlink()
    with pytest.raises(UserError, match=r"state.* is missing"):
        checkpoint.load_state(path)


def test_weights_that_do_not_fit_their_configuration(model, tmp_path):
    path = save(tmp_path, model, 1)
    loaded = checkpoint.load(path)
    loaded.config["model"]["arch"] = {**SIZE, "dim": 48}
    checkpoint.save(tmp_path, 2, {k[6:]: v for k, v in loaded.weights.items()}, {}, loaded.config, 2)
    with pytest.raises(
        UserError, match=r"the teacher \(FrameEncoder of width 48, 2 blocks\): 28 misshapen: .* and 23 more"
    ) as error:
        checkpoint.load_encoder(tmp_path)
    assert len(str(error.value)) < 700


def test_the_state_cannot_run_code(model, tmp_path):
    path = save(tmp_path, model, 1)
    torch.save({"step": os.system}, checkpoint.state_path(path))
    with pytest.raises(UserError, match="is damaged"):
        checkpoint.load_state(path)


WRITER = """
import resource, sys, torch
from pathlib import Path
from atst_fast.train import checkpoint
from atst_fast.train.config import UserError
run, weights, state = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
checkpoint.save(run, 1, {"x": torch.zeros(10)}, {}, {}, 1)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    checkpoint.save(run, 2, {"x": torch.zeros(weights)}, {"y": torch.zeros(state)}, {}, 1)
except UserError as error:
    print(error)
"""


@pytest.mark.parametrize("weights, state", [(100_000, 10), (10, 100_000)])
def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, weights, state):
    """For real, for either of the two files: the process may write no file beyond 100 kB."""
    arguments = [sys.executable, "-c", WRITER, str(tmp_path), str(weights), str(state)]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"cannot write the checkpoint {tmp_path}/checkpoints/step-00000002.safetensors: ")
    assert "File too large" in done.stdout
    assert f"the last good checkpoint is {tmp_path}/checkpoints/step-00000001.safetensors" in done.stdout
    assert checkpoint.load(tmp_path).step == 1
    assert not list((tmp_path / checkpoint.FOLDER).glob("*.partial"))
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 100_000


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a file system needs root")
def test_a_full_file_system(model, tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this container cannot mount a file system")
    try:
        config = {"model": model.config}
        checkpoint.save(tmp_path, 1, {"x": torch.zeros(10)}, {}, config, 2)
        for weights, state in ((100_000, 10), (10, 100_000)):
            with pytest.raises(UserError, match=r"No space left on device.*the last good checkpoint is .*00001"):
                checkpoint.save(tmp_path, 2, {"x": torch.zeros(weights)}, {"y": torch.zeros(state)}, config, 2)
            assert checkpoint.load(tmp_path).step == 1
        checkpoint.save(tmp_path, 2, {"x": torch.zeros(10)}, {}, config, 2)  # there is space again
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_writing_fails_at_the_last_moment(model, tmp_path, monkeypatch):
    save(tmp_path, model, 1)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for name in ("fsync", "replace"):
        with monkeypatch.context() as m:
            m.setattr(files.os, name, full)
            with pytest.raises(UserError, match="No space left on device"):
                save(tmp_path, model, 2)
        assert checkpoint.find(tmp_path).name == "step-00000001.safetensors"
        assert not list((tmp_path / checkpoint.FOLDER).glob("*.partial"))


def test_an_unwritable_folder_is_named(model, tmp_path):
    (tmp_path / checkpoint.FOLDER).write_text("in the way")
    with pytest.raises(UserError, match=r"cannot write the checkpoint .*: File exists; there is no checkpoint yet"):
        save(tmp_path, model, 1)


def test_only_one_process_writes_into_a_folder(tmp_path):
    again = files.only_one(tmp_path)
    with files.only_one(tmp_path), pytest.raises(UserError, match="another process is writing into"):
        again.__enter__()
    with files.only_one(tmp_path):
        pass


def test_load_encoder_reads_the_files_of_others_too(tmp_path):
    encoder = FrameEncoder({"dim": 64, "depth": 1, "num_heads": 1}, max_frames=41)
    torch.save(encoder.state_dict(), tmp_path / "bare.pt")
    loaded = checkpoint.load_encoder(tmp_path / "bare.pt")
    assert torch.equal(loaded.encoder.pos_embed, encoder.pos_embed)
    (tmp_path / "bare.pt").write_bytes(b"half of it, or so")
    with pytest.raises(UserError, match=r"bare\.pt is damaged"):
        checkpoint.load_encoder(tmp_path / "bare.pt")
