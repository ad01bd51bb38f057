"""What surrounds every training loop: where a run goes on, how it is stopped, and its last lines."""

import io
import os
import signal
from pathlib import Path

import pytest
import torch
from rich.console import Console

from atst_fast.train import checkpoint, run
from atst_fast.train.audio import Problems
from atst_fast.train.config import UserError


@pytest.fixture
def out(tmp_path):
    """A run with checkpoints of steps 2, 4 and 6."""
    for step in (2, 4, 6):
        checkpoint.save(tmp_path / "run", step, {"model.x": torch.zeros(1)}, {}, {}, keep=9)
    return tmp_path / "run"


def name(step):
    return f"step-{step:08d}.safetensors"


def test_where_a_run_goes_on(out, tmp_path):
    assert run.to_resume(out, "auto").name == name(6)
    for how in ("auto", "never"):
        assert run.to_resume(tmp_path / "new", how) is None
    with pytest.raises(UserError, match=rf"holds a run \({name(6)}\) and --resume is never; choose another --out"):
        run.to_resume(out, "never")


def test_a_checkpoint_that_is_named(out, tmp_path):
    last = out / "checkpoints" / name(6) if (out / "checkpoints").is_dir() else out / name(6)
    assert run.to_resume(out, str(last)) == last
    early = last.with_name(name(4))
    assert run.to_resume(tmp_path / "new", str(early)) == early
    with pytest.raises(UserError, match=rf"is at step 4, but .* has {name(6)}; delete what is later than it, or"):
        run.to_resume(out, str(early))


def test_what_is_kept(out, tmp_path):
    assert run.kept(out).endswith(name(6))
    assert run.kept(tmp_path / "new") == "there is no checkpoint yet"


def test_other_settings():
    run.refuse_other_settings(Path("a"), [])
    with pytest.raises(UserError, match=r"a belongs to a run of other settings; .*:\n  lr: 1 now, 2 before"):
        run.refuse_other_settings(Path("a"), ["lr: 1 now, 2 before"])


def last_lines(stopped, done, resume="auto", problems=()):
    console, found = Console(file=io.StringIO(), width=200), Problems()
    for problem in problems:
        found.add(*problem)
    code = run.farewell(console, found, stopped, done=done, steps=10, saved=Path("x"), resume=resume)
    return code, console.file.getvalue().splitlines()


def test_last_lines():
    assert last_lines([], 10) == (0, ["done: 10 steps, x"])
    assert last_lines([signal.SIGINT], 10)[0] == 0  # it came after the last step
    code, lines = last_lines([signal.SIGTERM], 4, problems=[("a.wav", "empty: 0 bytes")])
    assert code == 128 + signal.SIGTERM
    assert lines[0] == "1 file with a problem: 1 empty"
    assert lines[1] == "SIGTERM: saved x at step 4 of 10; the same command goes on from there"
    for resume in ("never", "y"):
        told = last_lines([signal.SIGTERM], 4, resume)[1][0]
        assert told.endswith("the same command with --resume auto goes on from there")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_the_second_acts(number):
    seen = []
    before = {s: signal.signal(s, lambda n, _: seen.append(n)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        with run.stop_signals() as stopped:
            os.kill(os.getpid(), number)
            assert (stopped, seen) == ([number], [])
            os.kill(os.getpid(), signal.SIGTERM)
            assert (stopped, seen) == ([number], [signal.SIGTERM])
        with run.stop_signals() as again:
            pass
        os.kill(os.getpid(), number)
        assert (again, seen) == ([], [signal.SIGTERM, number])
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
