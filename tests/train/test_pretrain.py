import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from atst_fast.models.encoder import ARCHS
from atst_fast.train import checkpoint, files, pretrain
from atst_fast.train.config import PretrainConfig, UserError
from atst_fast.train.pack import PackConfig, pack
from tests.train.conftest import BAD, write_clips
from tests.train.tiny import assert_equal

STEPS = 10
SIZE = {"dim": 24, "depth": 2, "num_heads": 3}
# The command line, with an encoder small enough for tests.
PROGRAM = f"""
import sys
from atst_fast.models.encoder import ARCHS
from atst_fast.train.cli import main
import torch
torch.set_num_threads(1)
ARCHS["tiny"] = {SIZE}
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module", autouse=True)
def _small_encoder():
    """One thread, as in PROGRAM: two that wait for each other on a busy machine take ten times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as m:
        m.setitem(ARCHS, "tiny", SIZE)
        yield
    torch.set_num_threads(threads)


def settings(data, out):
    """A run of ten steps: more than two epochs, checkpoints at 4, 8 and 10."""
    return PretrainConfig(
        data=data,
        out=out,
        arch="tiny",
        hidden=64,
        batch_size=3,
        clip_seconds=0.6,
        lr=0.1,
        steps=STEPS,
        save_every=4,
        log_every=2,
        workers=2,
        device="cpu",  # bit for bit is a promise for the CPU alone
    )


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Shared by the tests: do not change it."""
    return write_clips(tmp_path_factory.mktemp("clips"))


@pytest.fixture
def config(clips, tmp_path):
    return settings(clips, tmp_path / "run")


@pytest.fixture(scope="module")
def whole(clips, tmp_path_factory):
    """The run without interruption; shared, do not change it."""
    config = settings(clips, tmp_path_factory.mktemp("whole") / "run")
    assert pretrain.pretrain(config) == 0
    return config


def but(config, **changes):
    return dataclasses.replace(config, **changes)


def command(config):
    """The same run as a command line."""
    fields = dataclasses.asdict(config)
    words = []
    for name, value in fields.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        elif value is not None:
            words += [f"--{option}", str(value)]
    return [sys.executable, "-c", PROGRAM, "pretrain", *words]


def final(config):
    path = checkpoint.find(config.out)
    assert path.name == f"step-{config.steps:08d}.safetensors"
    return load_file(path), checkpoint.load_state(path)


def assert_same_run(a, b):
    """Weights, optimizer, front end and random numbers, bit for bit."""
    for what, x, y in zip(("weights", "state"), final(a), final(b)):
        assert_equal(x, y, what)


def lines(config):
    return [json.loads(line) for line in (config.out / "log.jsonl").read_text().splitlines()]


def interrupt_after(monkeypatch, steps, act):
    """Let the training step do ``act`` at the end of step number ``steps``."""
    real = pretrain.Stepper.__call__

    def step(self, waveform, number):
        out = real(self, waveform, number)
        return (act(out) or out) if number == steps else out

    monkeypatch.setattr(pretrain.Stepper, "__call__", step)


def test_a_run_leaves_everything_behind(whole, capsys):
    written = lines(whole)
    assert [line["step"] for line in written] == [2, 4, 6, 8, 10]
    assert all(np.isfinite(line["loss"]) and line["clips_per_s"] > 0 for line in written)
    assert all(abs(sum(line["shares"].values()) - 1) < 1e-3 for line in written)
    assert set(written[0]["shares"]) == {"data", "front end", "step"}
    assert {"std_student", "std_teacher", "lr", "weight_decay", "momentum"} <= set(written[0])
    record = json.loads((whole.out / "config.json").read_text())
    assert record["settings"]["peak_lr"] == 0.1 * 3 / 256
    assert record["settings"]["momentum"] == 0.99
    assert record["clips"]["count"] == 12
    assert record["environment"]["versions"]["torch"] == torch.__version__
    assert [p.name[:13] for p in checkpoint.checkpoints(whole.out)] == ["step-00000008", "step-00000010"]
    assert list((whole.out / "tensorboard").glob("events*"))
    loaded = checkpoint.load_encoder(whole.out)
    encoder, front_end = loaded.encoder, loaded.front_end
    assert encoder(torch.randn(1, 1, 64, 61)).shape == (1, 15, 24)
    assert front_end["n_mels"] == 64


def test_tensorboard_has_the_scalars(whole):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(whole.out / "tensorboard"))
    events.Reload()
    tags = {"loss", "std_student", "std_teacher", "lr", "weight_decay", "momentum", "clips_per_s"}
    assert tags <= set(events.Tags()["scalars"])
    assert [e.step for e in events.Scalars("loss")] == [2, 4, 6, 8, 10]


def test_it_trains(whole):
    weights, _ = final(whole)
    torch.manual_seed(whole.seed)
    alone = pretrain.World(torch.device("cpu"))
    fresh = pretrain.Run(but(whole, out=whole.out.with_name("fresh")), alone, None).model.state_dict()
    moved = [k for k, v in fresh.items() if not torch.equal(weights[f"model.{k}"], v)]
    frozen = {k for k in fresh if k not in moved}
    assert frozen <= {k for k in fresh if "pos_embed" in k}  # rows past the clip may be all that is left


def test_running_it_again_says_complete(whole, capsys):
    before = checkpoint.find(whole.out).stat().st_mtime_ns
    assert pretrain.pretrain(whole) == 0
    assert "complete: 10 of 10 steps" in " ".join(capsys.readouterr().err.split())
    assert checkpoint.find(whole.out).stat().st_mtime_ns == before


def test_the_same_seed_gives_the_same_bits_whatever_the_threads_of_the_loader(config, whole):
    assert pretrain.pretrain(but(config, workers=1, prefetch=1)) == 0
    assert_same_run(whole, config)


def test_a_pack_trains_as_its_folder_does(config, whole, tmp_path):
    packed = pack(PackConfig(src=config.data, dst=tmp_path / "p"))
    assert pretrain.pretrain(but(config, data=packed)) == 0
    assert_same_run(whole, config)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_the_same_command_goes_on(config, whole, monkeypatch, capsys, number, code):
    before = signal.getsignal(number)
    with monkeypatch.context() as m:
        interrupt_after(m, 4, lambda _: signal.raise_signal(number))
        assert pretrain.pretrain(config) == code
    told = " ".join(capsys.readouterr().err.split())
    assert f"{number.name}: saved" in told
    assert "at step 5 of 10; the same command goes on from there" in told
    assert signal.getsignal(number) == before
    assert checkpoint.load(config.out).step == 5
    assert pretrain.pretrain(config) == 0
    assert_same_run(whole, config)
    ours, theirs = lines(config), {line["step"]: line for line in lines(whole)}
    assert [line["step"] for line in ours] == [2, 4, 5, 6, 8, 10]
    assert all(line["loss"] == theirs[line["step"]]["loss"] for line in ours if line["step"] in theirs)


def test_a_signal_after_resuming_from_a_path_says_how_to_go_on(config, whole, monkeypatch, capsys):
    eighth = str(checkpoint.checkpoints(whole.out)[0])
    with monkeypatch.context() as m:
        interrupt_after(m, 8, lambda _: signal.raise_signal(signal.SIGTERM))
        assert pretrain.pretrain(but(config, resume=eighth)) == 143
    told = " ".join(capsys.readouterr().err.split())
    assert f"saved {config.out}/checkpoints/step-00000009.safetensors at step 9 of 10" in told
    assert "the same command with --resume auto goes on from there" in told
    assert pretrain.pretrain(config) == 0
    assert_same_run(whole, config)


def test_what_the_log_says_past_the_checkpoint_is_forgotten(config, monkeypatch):
    """A killed run has logged steps that the next one does again."""
    with monkeypatch.context() as m:
        interrupt_after(m, 6, lambda _: (_ for _ in ()).throw(RuntimeError("killed")))
        with pytest.raises(RuntimeError, match="killed"):
            pretrain.pretrain(config)
    assert [line["step"] for line in lines(config)] == [2, 4, 6]
    assert pretrain.pretrain(config) == 0
    assert [line["step"] for line in lines(config)] == [2, 4, 6, 8, 10]


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.005)


def test_killed_for_real_and_continued(config, whole):
    process = subprocess.Popen(command(config), stderr=subprocess.PIPE, text=True)
    wait_for(lambda: checkpoint.checkpoints(config.out), process)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stderr.close()
    assert pretrain.pretrain(config) == 0
    assert_same_run(whole, config)


def test_sigterm_for_real(config, whole):
    process = subprocess.Popen(command(config), stderr=subprocess.PIPE, text=True)
    log = config.out / "log.jsonl"
    wait_for(lambda: log.exists() and log.stat().st_size, process)
    process.terminate()
    _, told = process.communicate(timeout=60)
    if process.returncode:  # it may have been done just before
        assert process.returncode == 143, told
        assert "SIGTERM: saved" in told
    assert "Traceback" not in told
    assert pretrain.pretrain(config) == 0
    assert_same_run(whole, config)


@pytest.mark.long
def test_killed_again_and_again(config, tmp_path):
    """At random moments, also while a checkpoint is written: every step saves one."""
    config = but(config, save_every=1, steps=60, keep=1)
    whole = but(config, out=tmp_path / "whole")
    assert pretrain.pretrain(whole) == 0
    rng = np.random.default_rng(0)
    for _ in range(12):
        before = len(checkpoint.checkpoints(config.out)) and checkpoint.load(config.out).step
        process = subprocess.Popen(command(config), stderr=subprocess.DEVNULL)
        end = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < end:
            found = checkpoint.checkpoints(config.out)
            if found and int(found[-1].name[5:13]) > before:
                break
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        process.wait()
        checkpoint.load_state(checkpoint.find(config.out))
    assert pretrain.pretrain(config) == 0
    assert_same_run(whole, config)


def test_a_conflicting_configuration_is_refused_by_field(whole, clips_folder):
    with pytest.raises(UserError, match="another --out") as error:
        pretrain.pretrain(but(whole, lr=0.2, mask_len=4, log_every=1))
    told = str(error.value)
    assert "lr: 0.2 now, 0.1 before" in told
    assert "mask_len: 4 now, 5 before" in told
    assert "log_every" not in told
    (clips_folder / "00.flac").unlink()
    with pytest.raises(UserError, match=r"\bclips: other files or lengths than before \(11 now, 12 before\)"):
        pretrain.pretrain(but(whole, data=clips_folder))


def test_resume_never_and_from_a_path(whole, config, capsys):
    with pytest.raises(UserError, match="--resume is never"):
        pretrain.pretrain(but(whole, resume="never"))
    eighth = checkpoint.checkpoints(whole.out)[0]
    assert pretrain.pretrain(but(config, resume=str(eighth))) == 0
    assert "going on after step 8" in capsys.readouterr().err
    assert_same_run(whole, config)
    with pytest.raises(UserError, match=r"at step 8, but .* has step-00000010\.safetensors; delete what is later"):
        pretrain.pretrain(but(whole, resume=str(eighth)))
    with pytest.raises(UserError, match="there is no checkpoint nowhere"):
        pretrain.pretrain(but(config, resume="nowhere"))


def test_bf16_goes_on_bit_for_bit_and_saves_float32(config, monkeypatch, tmp_path):
    config = but(config, precision="bf16")
    once = but(config, out=tmp_path / "once")
    assert pretrain.pretrain(once) == 0
    with monkeypatch.context() as m:
        interrupt_after(m, 4, lambda _: signal.raise_signal(signal.SIGTERM))
        assert pretrain.pretrain(config) == 143
    for other in ("auto", "float32"):
        with pytest.raises(UserError, match="precision: 'float32' now, 'bf16' before"):
            pretrain.pretrain(but(config, precision=other))
    assert pretrain.pretrain(but(config, graph=False)) == 0
    assert_same_run(once, config)
    weights, _ = final(config)
    assert {w.dtype for w in weights.values()} == {torch.float32, torch.int64}


def test_a_run_from_before_there_were_precisions_goes_on(config, whole):
    assert pretrain.pretrain(but(config, steps=STEPS, save_every=8)) == 0
    ninth = checkpoint.checkpoints(config.out)[0]
    loaded, state = checkpoint.load(ninth), checkpoint.load_state(ninth)
    state.pop("step")
    del loaded.config["settings"]["precision"], loaded.config["settings"]["graph"]
    older = but(config, out=config.out.with_name("older"))
    weights = {k.removeprefix("model."): v for k, v in loaded.weights.items()}
    checkpoint.save(older.out, loaded.step, weights, state, loaded.config, 2)
    assert pretrain.pretrain(older) == 0
    assert_same_run(whole, older)


def test_a_loss_that_is_not_finite_stops_with_step_and_files(config, monkeypatch):
    interrupt_after(monkeypatch, 4, lambda out: out._replace(loss=out.loss * float("nan")))
    with pytest.raises(UserError, match=r"step 4: the loss is not finite; the last good checkpoint is .*00000004") as e:
        pretrain.pretrain(config)
    assert sum(name in str(e.value) for name in os.listdir(config.data)) == config.batch_size
    assert checkpoint.load(config.out).step == 4


def test_weights_that_are_not_finite_are_never_saved(config, monkeypatch):
    real = pretrain.Stepper.__call__

    def step(self, waveform, number):
        out = real(self, waveform, number)
        if number == 7:
            with torch.no_grad():
                self.trainee.model.student.encoder.norm_frame.weight[0] = float("inf")
        return out

    monkeypatch.setattr(pretrain.Stepper, "__call__", step)
    with pytest.raises(UserError, match=r"step 7: weights are not finite any more; .*00000004"):
        pretrain.pretrain(config)
    assert checkpoint.load(config.out).step == 4


def test_a_full_disk_stops_clearly_and_the_run_can_go_on(config, whole, monkeypatch):
    real, calls = files.os.fsync, []

    def fsync(fd):
        calls.append(fd)
        if checkpoint.checkpoints(config.out):
            raise OSError(28, "No space left on device")
        real(fd)

    with monkeypatch.context() as m:
        m.setattr(files.os, "fsync", fsync)
        with pytest.raises(UserError, match=r"No space left on device"):
            pretrain.pretrain(config)
    assert checkpoint.load(config.out).step == 4
    assert pretrain.pretrain(config) == 0
    assert_same_run(whole, config)


def test_collapse_is_told_once(config, monkeypatch, capsys):
    real = pretrain.Stepper.__call__
    collapsed = lambda *a: (out := real(*a))._replace(std_teacher=out.std_teacher * 0 + 0.001)  # noqa: E731
    monkeypatch.setattr(pretrain.Stepper, "__call__", collapsed)
    assert pretrain.pretrain(config) == 0
    assert capsys.readouterr().err.count("the outputs collapse (std_teacher 0.0010") == 1


def test_bad_files_are_named_during_the_run_and_counted_at_its_end(config, clips_folder, bad_folder, capsys):
    for path in bad_folder.iterdir():
        path.rename(clips_folder / path.name)
    assert pretrain.pretrain(but(config, data=clips_folder, steps=6)) == 0
    told = capsys.readouterr().err
    for name in BAD:
        assert f"{name}: {BAD[name]}" in told
    assert "files with a problem" in told


def test_places_that_cannot_be_used(config, tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match="cannot make the folder"):
            pretrain.pretrain(but(config, out=out))
    config.out.mkdir()
    (config.out / "config.json").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*config\.json: Is a directory"):
        pretrain.pretrain(config)


def test_a_second_process_is_kept_out(config):
    config.out.mkdir()
    with files.only_one(config.out), pytest.raises(UserError, match="another process is writing into"):
        pretrain.pretrain(config)
