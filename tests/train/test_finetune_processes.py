"""Fine-tuning and distillation in two processes on a CPU, against one process with the same batches."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from atst_fast.train import checkpoint, mixup
from atst_fast.train.config import UserError
from atst_fast.train.distill import DistillRun
from atst_fast.train.distributed import World, join
from atst_fast.train.finetune import FinetuneRun, finetune
from atst_fast.train.labelled import LabelledBatches, Reader
from atst_fast.train.probe import load_task
from tests.processes import run_two
from tests.tolerances import PROCESSES_RTOL
from tests.train.test_finetune import (
    AUDIOSET,
    distillation,
    scores,
    settings,
    starting_points,
)
from tests.train.tiny import assert_equal

# Process 1 kills itself after step 3, once.
PROGRAM = """
import os, signal, sys
from pathlib import Path
import torch
from atst_fast.train.cli import main
from atst_fast.train.finetune import FinetuneRun

torch.set_num_threads(1)
real, marker = FinetuneRun.step, Path(__file__).with_name("marker")

def step(self, number, *inputs):
    out = real(self, number, *inputs)
    if os.environ["RANK"] == "1" and number == 3 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return out

FinetuneRun.step = step
sys.exit(main(sys.argv[1:]))
"""
KINDS = ("clip", "frame", "distill", "mixed")


def configs(folder):
    """Of each kind, for a batch of four in one process: nothing in them is drawn by a process for itself."""
    plain = {"epochs": 2, "lr": 2.0, "drop_path": 0.0, "mixup": False, "save_every": 1, "eval_every": 1, "log_every": 1}
    clip = settings(folder / "data", folder / "clip", folder / "one-clip", **plain)
    frame = settings(folder / "data", folder / "frame", folder / "one-frame", level="frame", **plain)
    student = dataclasses.replace(frame, level="clip", out=folder / "one-distill")
    distill = distillation(student, folder / "one-clip", project=8)
    mixed = dataclasses.replace(clip, out=folder / "one-mixed", mixup=True, **AUDIOSET)
    return {"clip": clip, "frame": frame, "distill": distill, "mixed": mixed}


def halved(config):
    return dataclasses.replace(config, batch_size=2, out=config.out.with_name(config.out.name.replace("one", "two")))


def drawn(folder):
    """What each process draws for itself: paths that are dropped, partners, crops. In bfloat16."""
    options = {"epochs": 2, "save_every": 1, "precision": "bf16"}
    return halved(settings(folder / "data", folder / "frame", folder / "one-drawn", **options))


def start(config, world):
    config.out.mkdir(exist_ok=True)
    kind = DistillRun if "distill" in config.out.name else FinetuneRun
    with pytest.MonkeyPatch.context() as m:
        if "mixed" in config.out.name:  # each process draws its own crops
            m.setattr(mixup, "resize_crop", lambda mel, *_: mel)
        return kind(config, world, Console(quiet=True)).train()


def one_of_two(rank, port, folder):
    torch.set_num_threads(1)
    given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({k: str(v) for k, v in given.items()})
    with join("cpu") as world:
        assert [list(world.share(n)) for n in (0, 1, 5)] == ([[], [], [0, 1]], [[], [0], [2, 3, 4]])[rank]
        assert world.gather([rank, "x"]) == ([] if rank else [0, "x", 1, "x"])
        codes = [start(halved(config), world) for config in configs(folder).values()]
        whole = drawn(folder)
        parts = dataclasses.replace(whole, out=folder / "two-parts")
        codes.append(start(whole, world))
        real = FinetuneRun.step

        def stop(self, step, *inputs):
            if step == 2 and rank:
                os.kill(os.getpid(), signal.SIGTERM)
            return real(self, step, *inputs)

        FinetuneRun.step = stop
        codes.append(start(parts, world))
        FinetuneRun.step = real
        world.vote(0)  # what they said after the last step was to nobody
        codes.append(start(parts, world))
    assert codes == [0, 0, 0, 0, 0, 128 + signal.SIGTERM, 0]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder of all runs, complete; do not change it."""
    folder = starting_points(tmp_path_factory.mktemp("processes"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for config in configs(folder).values():
        assert start(config, World(torch.device("cpu"))) == 0
    torch.set_num_threads(threads)
    run_two(one_of_two, folder)
    return folder


def rows_of(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_are_one(kind, runs):
    """Losses, weights, momenta, running statistics and scores of six steps."""
    one, two = runs / f"one-{kind}", runs / f"two-{kind}"
    assert scores(one) == scores(two)
    logs = rows_of(one), rows_of(two)
    assert len(logs[0]) == len(logs[1]) == 6
    for a, b in zip(*logs):
        for key in a.keys() - {"clips_per_s", "shares"}:
            assert b[key] == pytest.approx(a[key], rel=PROCESSES_RTOL), key
    a, b = (checkpoint.find(run) for run in (one, two))
    assert a.name == b.name == "step-00000006.safetensors"
    before, after = checkpoint.load(a).weights, checkpoint.load(b).weights
    for name, want in before.items():
        assert_close(after[name], want, name)
    before, after = (checkpoint.load_state(path)["optimizer"]["state"] for path in (a, b))
    for key, state in before.items():
        assert_close(after[key]["momentum_buffer"], state["momentum_buffer"], f"momentum {key}")


def assert_close(got, want, what):
    atol = PROCESSES_RTOL * max(want.abs().max().item(), 1e-3)
    torch.testing.assert_close(got.double(), want.double(), rtol=0, atol=atol, msg=lambda m: f"{what}: {m}")


def state_of(path, rank):
    """Without what is in the bank past the end of a clip, which is anything."""
    state = checkpoint.load_state(path, rank)
    bank = state["mixup"]["bank"]
    bank["mels"] = [mel[:, :length] for mel, length in zip(bank["mels"], state["mixup"]["lengths"])]
    return state


def test_a_run_of_two_goes_on_after_a_signal_to_one(runs):
    """Bit for bit, with what each of them draws and remembers."""
    whole, parts = (checkpoint.find(runs / name) for name in ("two-drawn", "two-parts"))
    assert whole.name == parts.name == "step-00000006.safetensors"
    assert_equal(checkpoint.load(whole).weights, checkpoint.load(parts).weights, "weights")
    shares = [state_of(whole, rank) for rank in (0, 1)]
    for rank, share in enumerate(shares):
        assert_equal(share, state_of(parts, rank), f"state {rank}")
    assert "optimizer" not in shares[1]
    assert not torch.equal(shares[0]["rng"], shares[1]["rng"])
    assert shares[0]["mixup"]["bank"]["count"] == shares[1]["mixup"]["bank"]["count"] == 12
    assert not torch.equal(shares[0]["mixup"]["labels"], shares[1]["mixup"]["labels"])
    assert scores(runs / "two-drawn") == scores(runs / "two-parts")


def test_settings_of_two_processes(runs):
    record = json.loads((runs / "two-clip/config.json").read_text())["settings"]
    assert (record["processes"], record["batch_size"], record["steps"]) == (2, 2, 6)
    assert record["peak_lr"] == pytest.approx(2.0 * 4 / 256)
    with pytest.raises(UserError, match="processes: 1 now, 2 before"):
        finetune(halved(configs(runs)["clip"]))
    few = dataclasses.replace(configs(runs)["clip"], batch_size=7)
    world = SimpleNamespace(device=torch.device("cpu"), rank=0, size=2)
    with pytest.raises(UserError, match="13 files to train on do not fill one batch in each of 2 processes: a smaller"):
        FinetuneRun(few, world, Console(quiet=True))
    with pytest.raises(UserError, match="3 training files do not fill one batch of 2 in each of 2 processes; give a"):
        LabelledBatches(Reader(load_task(runs / "data").train[:3]), ["high"], 2, 1.0, 0, world=2)


@pytest.mark.long
def test_torchrun_starts_a_run_anew(runs, tmp_path):
    """The command line; a process dies in the second epoch."""
    (tmp_path / "program.py").write_text(PROGRAM)
    config = dataclasses.replace(drawn(runs), out=tmp_path / "run")
    given = {k: v for k, v in dataclasses.asdict(config).items() if v is not None and not isinstance(v, bool)}
    options = [word for k, v in given.items() for word in (f"--{k.replace('_', '-')}", str(v))]
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    done = subprocess.run(
        [sys.executable, "-m", *torchrun, tmp_path / "program.py", "finetune", *options],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()},
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "marker").exists()
    assert "going on after step 3" in done.stderr
    assert done.stderr.count("6 test files") == 1  # one process tells
    whole, again = (checkpoint.find(run) for run in (runs / "two-drawn", config.out))
    assert_equal(checkpoint.load(whole).weights, checkpoint.load(again).weights, "weights")
    assert scores(config.out) == scores(runs / "two-drawn")
