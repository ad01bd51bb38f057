"""What every training run does around its loop: go on where it stopped, stop when asked to, say what it leaves."""

import contextlib
import json
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from atst_fast.train import checkpoint
from atst_fast.train.audio import Problems
from atst_fast.train.config import UserError
from atst_fast.train.distributed import World, join
from atst_fast.train.files import explain, make_folder, only_one, write_atomically
from atst_fast.train.info import environment
from atst_fast.train.memory import keep_freed_memory


def execute(kind: Callable[[Any, World, Console], Any], config: Any) -> int:
    """``kind(config, world, console).train()`` in every process of the run, the first of which holds its folder and
    talks; returns the exit code."""
    keep_freed_memory()
    with join(config.device) as world:
        make_folder(config.out)
        with only_one(config.out) if world.first else contextlib.nullcontext():
            one_folder(world, config.out)
            return kind(config, world, Console(stderr=True, quiet=not world.first)).train()


def one_folder(world: World, folder: Path, patience: float = 10.0) -> None:
    """Wait for all processes, and raise UserError in all of them unless the folder is one and the same for each: its
    checkpoints are written by all, and read again by all. ``patience``: seconds that a network may take to show what
    another machine has written."""
    if world.size == 1:
        return
    path, token = folder / ".shared", world.tell(secrets.token_hex(8))
    try:
        if world.first:
            with explain(f"write into {folder}"):
                path.write_text(token)
        world.wait()
        until = time.monotonic() + patience
        while not (seen := _reads(path) == token) and time.monotonic() < until:
            time.sleep(0.1)
        if world.largest(int(not seen)):
            here = "" if seen else f"; process {world.rank} does not see what the first one writes there"
            raise UserError(f"--out must be a folder that all machines share, got {folder}{here}")
    finally:
        if world.first:
            path.unlink(missing_ok=True)


def _reads(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None


def write_record(out: Path, record: dict[str, Any]) -> None:
    """Write config.json: what the run is, where it runs, and the command."""
    record = record | {"environment": environment(), "command": sys.argv}
    with explain(f"write {out / 'config.json'}"):
        write_atomically(out / "config.json", lambda p: p.write_text(json.dumps(record, indent=1) + "\n"))


def random_state(device: torch.device) -> dict[str, Any]:
    """Where torch's random numbers stand, as a part of a checkpoint's state."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {"rng": torch.get_rng_state(), "cuda_rng": cuda}


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Go on with the random numbers of a `random_state`."""
    torch.set_rng_state(state["rng"])
    if device.type == "cuda" and state["cuda_rng"] is not None:
        torch.cuda.set_rng_state(state["cuda_rng"], device)


def to_resume(out: Path, how: str) -> Path | None:
    """The checkpoint from which ``--resume how`` goes on; None: the run begins. UserError where it may not."""
    found = checkpoint.checkpoints(out)
    if how == "never":
        if found:
            raise UserError(f"{out} holds a run ({found[-1].name}) and --resume is never; choose another --out")
        return None
    if how == "auto":
        return found[-1] if found else None
    path = checkpoint.find(Path(how))
    step = checkpoint.load(path).step
    if found and checkpoint.step_of(found[-1]) > step:
        cure = "delete what is later than it, or choose another --out"
        raise UserError(f"--resume {how} is at step {step}, but {out} has {found[-1].name}; {cure}")
    return path


def refuse_other_settings(path: Path, differing: list[str]) -> None:
    """UserError if there are settings that differ from those of the run of checkpoint ``path``."""
    if differing:
        cure = "give the old values, or another --out for a new run"
        raise UserError(f"{path} belongs to a run of other settings; {cure}:\n  " + "\n  ".join(differing))


def kept(out: Path) -> str:
    """What there is to go back to, for the end of a message."""
    found = checkpoint.checkpoints(out)
    return f"the last good checkpoint is {found[-1]}" if found else "there is no checkpoint yet"


def farewell(
    console: Console,
    problems: Problems,
    stopped: list[signal.Signals],
    *,
    done: int,
    steps: int,
    saved: Path | None,
    resume: str,
) -> int:
    """The last lines of a run, and its exit code: 0, or 128 + the signal that stopped it."""
    if problems.reasons:
        console.print(problems.summary(), style="yellow")
    if done < steps:
        told = f"{stopped[0].name}: saved {saved} at step {done} of {steps}"
        again = "the same command" if resume == "auto" else "the same command with --resume auto"
        console.print(f"{told}; {again} goes on from there", soft_wrap=True)
        return 128 + stopped[0]
    console.print(f"done: {steps} steps, {saved}", soft_wrap=True)
    return 0


@contextlib.contextmanager
def stop_signals() -> Iterator[list[signal.Signals]]:
    """A list that SIGINT and SIGTERM are put into; a second one acts at once, as if nobody had asked for the first."""
    stopped: list[signal.Signals] = []
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def stop(number: int, _: object) -> None:
        stopped.append(signal.Signals(number))
        for s, handler in before.items():
            signal.signal(s, handler)

    for s in before:
        signal.signal(s, stop)
    try:
        yield stopped
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
