"""``torchrun ... -m atst_fast.train.cli pretrain``: two processes on a CPU, one of which is asked to stop, and dies."""

import json
import os
import subprocess
import sys

import pytest
import torch
from rich.console import Console

from atst_fast.models import ATSTClip
from atst_fast.models.encoder import ARCHS
from atst_fast.train import checkpoint, distributed, pretrain, run
from atst_fast.train.config import UserError
from atst_fast.train.distributed import World, join
from tests.train.conftest import write_clips
from tests.train.test_pretrain import PROGRAM, SIZE, assert_same_run, but, command, final, settings
from tests.train.tiny import assert_equal

# Process 1 gets a SIGTERM after step 3, and kills itself after step 6, each once.
BROKEN = """
import os, signal
from pathlib import Path
from atst_fast.train import pretrain

real = pretrain.Stepper.__call__

def step(self, waveform, number):
    out = real(self, waveform, number)
    marker = Path(os.environ["MARKERS"]) / str(number)
    if os.environ["RANK"] == "1" and number in (3, 6) and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGTERM if number == 3 else signal.SIGKILL)
    return out

pretrain.Stepper.__call__ = step
"""


def torchrun(config, program, *, processes=2, restarts=0, out=None):
    words = ["--standalone", "--nproc-per-node", str(processes), "--max-restarts", str(restarts), str(program)]
    options = [out if out and word == str(config.out) else word for word in command(config)[3:]]
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *words, *options],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "MARKERS": str(config.out.parent), "PYTHONPATH": os.getcwd()},
    )


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return write_clips(tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="module")
def whole(clips, tmp_path_factory):
    """A run of two processes without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "program.py").write_text(PROGRAM)
    config = settings(clips, folder / "run")
    done = torchrun(config, folder / "program.py")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("step 10/10") == 1  # one process tells
    return config


def test_two_processes_make_one_run(whole):
    record = json.loads((whole.out / "config.json").read_text())["settings"]
    assert record["processes"] == 2
    assert record["peak_lr"] == pytest.approx(0.1 * 2 * 3 / 256)
    written = [json.loads(line) for line in (whole.out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in written] == [2, 4, 6, 8, 10]
    path = checkpoint.find(whole.out)
    first, second = checkpoint.load_state(path), checkpoint.load_state(path, 1)
    assert "optimizer" not in second
    assert not torch.equal(first["rng"], second["rng"])
    banks = [s["front_end"]["_extra_state"]["banks"][1]["mels"] for s in (first, second)]
    assert not torch.equal(*banks)
    names = {p.name for p in path.parent.iterdir()}
    steps = ("step-00000008", "step-00000010")
    assert names == {f"{s}{e}" for s in steps for e in (".safetensors", ".state.pt", ".1.state.pt")}


def test_a_run_goes_on_after_a_signal_and_a_death(whole, clips, tmp_path):
    """The signal stops both at one step; after the death torchrun starts both anew. Bit for bit the same run."""
    (tmp_path / "program.py").write_text(BROKEN + PROGRAM)
    config = settings(clips, tmp_path / "run")
    stopped = torchrun(config, tmp_path / "program.py")
    assert stopped.returncode != 0
    assert "SIGTERM: saved" in stopped.stderr, stopped.stderr
    assert (tmp_path / "3").exists()
    at = checkpoint.step_of(checkpoint.find(config.out))
    assert at == 5  # one step later all know
    done = torchrun(config, tmp_path / "program.py", restarts=1)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "6").exists()
    assert f"going on after step {at}" in done.stderr
    assert_same_run(config, whole)
    assert_equal(*(checkpoint.load_state(checkpoint.find(c.out), 1) for c in (config, whole)), "of process 1")


@pytest.mark.long
def test_one_process_of_torchrun_is_a_plain_run(clips, tmp_path):
    config = but(settings(clips, tmp_path / "under"), steps=3)
    plain = but(config, out=tmp_path / "plain")
    (tmp_path / "program.py").write_text(PROGRAM)
    for done in (torchrun(config, tmp_path / "program.py", processes=1), subprocess.run(command(plain))):
        assert done.returncode == 0, done.stderr
    assert_same_run(config, plain)


@pytest.mark.long
def test_atst_clip_in_two_processes(clips, tmp_path):
    """Its mask token belongs to no loss: nothing moves it, neither decay nor the teacher."""
    config = but(settings(clips, tmp_path / "run"), method="clip", positive_seconds=0.6, steps=3)
    (tmp_path / "program.py").write_text(PROGRAM)
    done = torchrun(config, tmp_path / "program.py")
    assert done.returncode == 0, done.stderr
    weights, _ = final(config)
    pair = [weights[f"model.{who}.encoder.mask_embed"] for who in ("student", "teacher")]
    assert torch.equal(*pair)


class Alone(World):
    """Process ``rank`` of two, whose other one agrees with it; ``said`` is what the first one tells."""

    def __init__(self, rank, said="a token"):
        super().__init__(torch.device("cpu"))
        self.rank, self.size, self.said = rank, 2, said

    def tell(self, item):
        return self.said


def test_a_folder_that_is_not_shared_is_refused(tmp_path):
    run.one_folder(Alone(0), tmp_path)
    assert not list(tmp_path.iterdir())
    shared = tmp_path / ".shared"
    shared.write_text("a token")
    run.one_folder(Alone(1), tmp_path)
    for left in ("of another run", None):
        shared.write_text(left) if left else shared.unlink()
        with pytest.raises(
            UserError, match=f"--out must be a folder that all machines share, got {tmp_path}; process 1"
        ):
            run.one_folder(Alone(1), tmp_path, patience=0.2)
    first = Alone(0)
    first.largest = lambda x: 1  # as the other one says
    with pytest.raises(UserError, match=f"--out must be a folder that all machines share, got {tmp_path}$"):
        run.one_folder(first, tmp_path)
    assert not shared.exists()


@pytest.mark.long
def test_two_folders_of_one_name_are_refused(clips, tmp_path):
    """As two machines with disks of their own have them."""
    (tmp_path / "program.py").write_text(
        "import os, pathlib\nhome = pathlib.Path(os.environ['MARKERS'], os.environ['RANK'])\nhome.mkdir()\n"
        "os.chdir(home)\n" + PROGRAM
    )
    config = settings(clips, tmp_path / "run")
    done = torchrun(config, tmp_path / "program.py", out="run")
    assert done.returncode != 0
    assert "--out must be a folder that all machines share, got run" in done.stderr, done.stderr
    assert not any("checkpoints" in str(p) for p in tmp_path.rglob("*"))
    assert not (tmp_path / "0/run/.shared").exists()


def test_what_is_started_anew_goes_on(clips, tmp_path, monkeypatch):
    """Also where the run itself was to be a new one."""
    monkeypatch.setitem(ARCHS, "tiny", SIZE)
    config = but(settings(clips, tmp_path / "run"), steps=2, resume="never")
    assert pretrain.pretrain(config) == 0
    for restarts, done in ((1, 2), (0, None)):
        run = pretrain.Run(config, World(torch.device("cpu"), restarts=restarts), Console(quiet=True))
        if done is None:
            with pytest.raises(UserError, match="--resume is never"):
                run.resume()
        else:
            run.resume()
            assert run.done == done


def test_another_number_of_processes_is_another_run(whole, monkeypatch):
    monkeypatch.setitem(ARCHS, "tiny", SIZE)
    with pytest.raises(UserError, match="processes: 1 now, 2 before"):
        pretrain.pretrain(whole)


@pytest.mark.parametrize(
    "environment, device, told",
    [
        ({"RANK": "0"}, "cpu", "has RANK but not LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT: start it with"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "cpu", "has RANK, WORLD_SIZE but not LOCAL_RANK"),
        ({"WORLD_SIZE": "2"}, "cpu", "has WORLD_SIZE but not RANK, LOCAL_RANK"),
        ({"MASTER_ADDR": "localhost"}, "tpu", "--device"),  # it alone is not torchrun's
        (
            {"RANK": "a", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"},
            "cpu",
            "has RANK=a, LOCAL_RANK=0, WORLD_SIZE=1, which are not all numbers: start it with torchrun",
        ),
        ({}, "tpu", "--device"),
    ],
)
def test_errors(monkeypatch, environment, device, told):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=told), join(device):
        pass


def test_gpus_under_torchrun(monkeypatch):
    """Each process has the GPU of its number; one that is named, or that is not there, is refused."""
    monkeypatch.setattr(distributed, "pick_device", lambda name: torch.device(name))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert distributed._own_device("cuda", 1) == torch.device("cuda", 1)
    with pytest.raises(UserError, match=r"--device must be auto, cpu or cuda under torchrun .*, got cuda:1"):
        distributed._own_device("cuda:1", 0)
    with pytest.raises(UserError, match="--nproc-per-node must be at most 2, the GPUs of this machine"):
        distributed._own_device("cuda", 2)


def test_a_world_of_one():
    world = World(torch.device("cpu"))
    x = torch.randn(3)
    assert world.mean(x) is x
    assert (world.largest(3), world.vote(5), world.seed(7)) == (3, 5, 7)
    assert len({World(torch.device("cpu"), rank).seed(7) for rank in range(4)}) == 4
    model = ATSTClip({"dim": 8, "depth": 1, "num_heads": 1}, hidden=8, out=4, max_frames=40)
    assert world.replicate(model) is model
    world.wait()
