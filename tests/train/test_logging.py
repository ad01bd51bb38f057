"""What a run tells: its rates, its bottleneck, the time that is left, and errors that name the file."""

import io
import json
import time
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from atst_fast.train import logging as module
from atst_fast.train.config import UserError
from atst_fast.train.logging import RunLog, Stopwatch, forget, read_log

VALUES = {"loss": 1.5, "std_student": 0.06, "std_teacher": 0.06}


def test_rate_bottleneck_and_time_left(tmp_path, monkeypatch):
    now, told = [100.0], io.StringIO()
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    with RunLog(tmp_path, Console(file=told, width=200), 20, 100, batch_size=32) as log:
        now[0] += 5.0
        log.write(30, VALUES, {"data": 0.1, "step": 0.7, "front end": 0.2})  # 10 steps of 32 clips in 5 s, 70 to go
        now[0] += 20.0
        log.write(40, VALUES, {"data": 0.9, "step": 0.1, "front end": 0.0})
    assert [row["clips_per_s"] for row in read_log(tmp_path / "log.jsonl")] == [64.0, 16.0]
    first, second = told.getvalue().splitlines()
    assert first == (
        "step 30/100  loss 1.5000  64.0 clips/s  bottleneck: step (data 10% step 70% front end 20%)  35 s left"
    )
    assert "16.0 clips/s  bottleneck: data" in second
    assert second.endswith("120 s left")


def test_a_log_that_cannot_be_written_is_named(tmp_path):
    def fail(*_):
        raise FileNotFoundError(2, "No such file or directory")

    run = tmp_path / "run"
    run.mkdir()
    with RunLog(run, Console(file=io.StringIO()), 0, 10, 4) as log:
        log._board.close()
        log._board = SimpleNamespace(add_scalar=fail, close=lambda: None)
        with pytest.raises(UserError, match=r"cannot write the log .*run/log\.jsonl: No such file or directory$"):
            log.write(1, VALUES, {"step": 1.0})
        run.rename(tmp_path / "moved")
        with pytest.raises(UserError, match=r"run/log\.jsonl: No such .*; the folder was moved or deleted during"):
            log.write(2, VALUES, {"step": 1.0})


def test_what_is_no_line_of_a_run_is_not_read(tmp_path):
    lines = [json.dumps({"step": 1, **VALUES}), "", "[]", "3", '{"step": 2}', '{"step": 3, "lo']
    (tmp_path / "log.jsonl").write_bytes("\n".join(lines).encode() + b"\xff\0")
    assert [row["step"] for row in read_log(tmp_path / "log.jsonl")] == [1]


def test_forget_drops_what_the_run_will_do_again(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 2}\n{"step": 4}\n{"step": 6}\n{"st')
    forget(log, 4)
    assert log.read_text() == '{"step": 2}\n{"step": 4}\n'
    forget(tmp_path / "none.jsonl", 4)


def test_stopwatch_shares():
    watch = Stopwatch(torch.device("cpu"))
    for part, seconds in (("a", 0.03), ("b", 0.01)):
        with watch(part):
            time.sleep(seconds)
    shares = watch.shares()
    assert 0.6 < shares["a"] < 0.85
    assert sum(shares.values()) == pytest.approx(1)
    assert watch.shares() == {}
