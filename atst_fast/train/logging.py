"""What a run tells: a progress bar, log.jsonl and TensorBoard; and how its time is shared."""

import contextlib
import json
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from atst_fast.train.config import UserError
from atst_fast.train.files import explain, write_atomically

COLLAPSED = 0.005  # deviation of the outputs; 1/sqrt(256) = 0.06 is healthy, 0.001 is where it cannot fall below


class Stopwatch:
    """Seconds per part of the loop; on a GPU by events, so that measuring does not make it wait."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def __call__(self, part: str, *, host: bool = False) -> Iterator[None]:
        """Time a part; ``host``: what it waits for is not the GPU."""
        if self._cuda and not host:
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            yield
            last.record()
            self._events.append((part, first, last))
        else:
            began = time.perf_counter()
            yield
            self._seconds[part] += time.perf_counter() - began

    def shares(self) -> dict[str, float]:
        """Share of each part since the last call."""
        if self._events:
            torch.cuda.synchronize()
        for part, first, last in self._events:
            self._seconds[part] += first.elapsed_time(last) / 1000
        total = sum(self._seconds.values()) or 1.0
        shares = {part: s / total for part, s in self._seconds.items()}
        self._seconds.clear()
        self._events.clear()
        return shares


class RunLog:
    """log.jsonl, TensorBoard and the console of a run. A context manager; ``first``: steps done before."""

    def __init__(
        self, run: Path, console: Console, first: int, last: int, batch_size: int, *, doing: str = "pretraining"
    ):
        self.console, self._run, self._batch_size = console, run, batch_size
        self._first, self._last = first, last
        self._done, self._since = first, time.perf_counter()
        self._collapsed = False
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[info]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(doing, total=last, completed=first, info="")
        with explain(f"write the log {run / 'log.jsonl'}"):
            forget(run / "log.jsonl", first)
            self._file = open(run / "log.jsonl", "a")  # noqa: SIM115 (closed in __exit__)
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(run / "tensorboard"), purge_step=first)

    def __enter__(self) -> "RunLog":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        with self._explain():
            self._file.close()
            self._board.close()

    def advance(self) -> None:
        self._bar.advance(self._task)

    def write(self, done: int, values: dict[str, float], shares: dict[str, float]) -> None:
        """One line: ``values`` of the step that made it ``done``, clips per second since the last line, and shares."""
        now = time.perf_counter()
        rate = (done - self._done) * self._batch_size / (now - self._since)
        eta = (self._last - done) * self._batch_size / rate
        self._done, self._since = done, now
        line: dict[str, Any] = {"step": done, **values, "clips_per_s": rate}
        with self._explain():
            self._file.write(json.dumps(line | {"shares": {k: round(v, 4) for k, v in shares.items()}}) + "\n")
            self._file.flush()
            for name, value in (*values.items(), ("clips_per_s", rate)):
                self._board.add_scalar(name, value, done)
        slowest = max(shares, key=lambda k: shares[k])
        split = " ".join(f"{k} {v:.0%}" for k, v in shares.items())
        info = f"loss {values['loss']:.4f}  {rate:.1f} clips/s  bottleneck: {slowest} ({split})"
        self._bar.update(self._task, info=info)
        if self._bar.disable:
            self.console.print(f"step {done}/{self._last}  {info}  {eta:.0f} s left", highlight=False, soft_wrap=True)
        self._watch_collapse(done, values)

    @contextlib.contextmanager
    def _explain(self) -> Iterator[None]:
        try:
            with explain(f"write the log {self._run / 'log.jsonl'}"):
                yield
        except UserError as error:
            if self._run.exists():
                raise
            raise UserError(f"{error}; the folder was moved or deleted during the run") from error

    def _watch_collapse(self, done: int, values: dict[str, float]) -> None:
        low = [k for k in ("std_student", "std_teacher") if values.get(k, COLLAPSED) < COLLAPSED]
        if low and not self._collapsed:
            told = ", ".join(f"{k} {values[k]:.4f}" for k in low)
            self.console.print(
                f"step {done}: the outputs collapse ({told}; healthy: about 0.06): the network answers the same to "
                "everything. A lower --lr, a longer warm-up or a higher --momentum are the usual cures.",
                style="bold red",
            )
        self._collapsed = bool(low)


class NoLog(contextlib.nullcontext[None]):
    """In the place of RunLog where another process keeps the log."""

    def advance(self) -> None: ...

    def write(self, done: int, values: dict[str, float], shares: dict[str, float]) -> None: ...


def read_log(log: Path) -> list[dict[str, Any]]:
    """The lines of a run's log.jsonl; half a line, which a full disk or a power cut leaves at its end, is left out."""
    rows = []
    for line in log.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError, AttributeError):
            row = json.loads(line)
            if {"step", "loss", "std_student", "std_teacher"} <= row.keys():
                rows.append(row)
    return rows


def forget(log: Path, steps: int) -> None:
    """Drop the lines of a JSONL log past ``steps`` (and half a line at its end): the run goes on from there."""
    if not log.exists():
        return
    kept = []
    for line in log.read_text().splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            if json.loads(line)["step"] <= steps:
                kept.append(line + "\n")
    write_atomically(log, lambda p: p.write_text("".join(kept)))
