"""``atst-fast pretrain``: the training loop of both methods, top to bottom."""

import signal
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from atst_fast.train import checkpoint
from atst_fast.train.audio import Problems
from atst_fast.train.config import PretrainConfig, UserError, check, conflicts, resolve
from atst_fast.train.data import Batches, Prefetcher, open_source
from atst_fast.train.distributed import World
from atst_fast.train.graph import CudaGraph, Stepper
from atst_fast.train.logging import NoLog, RunLog, Stopwatch
from atst_fast.train.method import METHODS, build_front_end, build_model, mel_settings
from atst_fast.train.precision import Trainee, pick_precision
from atst_fast.train.run import (
    execute,
    farewell,
    kept,
    random_state,
    refuse_other_settings,
    set_random_state,
    stop_signals,
    to_resume,
    write_record,
)
from atst_fast.train.schedule import Schedules
from atst_fast.train.upload import upload


def pretrain(config: PretrainConfig) -> int:
    """Train, or go on training, as ``config`` says; returns the exit code: 0, or 128 + the signal that stopped it.

    Under ``torchrun`` this is one of several processes, each of which calls it with the same ``config``.
    """
    check(config)
    return execute(Run, config)


class Run:
    """Everything a run consists of; built from the configuration, then brought to where the last one stopped."""

    def __init__(self, config: PretrainConfig, world: World, console: Console):
        self.config, self.world, self.console = config, world, console
        self.device = world.device
        self.problems = Problems(lambda text: console.print(text, style="yellow", highlight=False, markup=False))
        source = open_source(config.data, config.workers, self.problems)
        self.batches = Batches(
            source,
            config.batch_size,
            config.samples,
            config.seed,
            crops_per_clip=config.crops_per_clip,
            subset=config.subset,
            rank=world.rank,
            world=world.size,
        )
        self.clips = {"count": len(source.names), "sha256": self.batches.fingerprint()}
        self.settings = resolve(config, self.batches.per_epoch, world.size)
        self.settings |= {"clips": self.clips["sha256"], "precision": pick_precision(config.precision, self.device)}
        self.steps = self.settings["steps"]

        torch.manual_seed(config.seed)
        s = self.settings
        self.model = build_model(s, config.samples).to(self.device)
        self.front_end = build_front_end(s | {"seed": world.seed(config.seed)}, config.samples).to(self.device)
        self.schedules = Schedules(
            steps=self.steps,
            lr=s["peak_lr"],
            warmup_steps=s["warmup_steps"],
            final_lr=s["final_lr"],
            weight_decay=s["weight_decay"],
            final_weight_decay=s["final_weight_decay"],
            momentum=s["momentum"],
        )
        self.trainee = Trainee(self.model, self.schedules, s["precision"])
        self.trainee.working = world.replicate(self.trainee.working, find_unused=METHODS[s["method"]].unused)
        if not world.first:  # from here on, what is drawn is each process's own
            torch.manual_seed(world.seed(config.seed))
        self.saved = {"model": self.model.config, "front_end": mel_settings(s), "settings": s, "clips": self.clips}
        self.done = 0  # steps
        self.last_saved: Path | None = None

    def train(self) -> int:
        self.resume()
        if self.done >= self.steps:
            self.console.print(f"complete: {self.done} of {self.steps} steps, {checkpoint.find(self.config.out)}")
            return 0
        if self.done:
            self.console.print(f"going on after step {self.done}", highlight=False)
        self.describe()
        watch, log_every = Stopwatch(self.device), self.config.log_every
        gpu = self.device.type == "cuda"
        # DistributedDataParallel in a graph has never been tried
        graph = CudaGraph(self.device) if gpu and self.config.graph and self.world.size == 1 else None
        stepper = Stepper(self.front_end, self.trainee, self.schedules, graph=graph, watch=watch)
        bad = torch.full((), -1, device=self.device)  # the first step whose loss was not finite
        log = self.log()
        prefetcher = Prefetcher(self.batches, self.done, self.steps, ahead=self.config.prefetch, pin=gpu)
        with stop_signals() as stopped, log, prefetcher as prepared:
            batches, last, stop = upload(prepared, self.device), False, 0
            while not last:
                with watch("data", host=True):
                    batch = next(batches)
                out = stepper(batch.waveform, batch.step)
                bad.masked_fill_((bad < 0) & ~out.loss.isfinite(), batch.step)
                self.done += 1
                log.advance()
                stop = self.world.vote(stopped[0] if stopped else 0)
                last, save = self.done == self.steps or stop > 0, self.done % self.config.save_every == 0
                if last or save or self.done % log_every == 0:
                    self.check_finite(self.world.largest(int(bad)))
                    means = self.world.mean(torch.stack(out[:3])).tolist()
                    log.write(self.done, dict(zip(out._fields, means)) | out.rates._asdict(), watch.shares())
                if last or save:
                    with watch("save", host=True):
                        self.save()
        return farewell(
            self.console,
            self.problems,
            [signal.Signals(stop)] if stop else [],
            done=self.done,
            steps=self.steps,
            saved=self.last_saved,
            resume=self.config.resume,
        )

    def log(self) -> RunLog | NoLog:
        if not self.world.first:
            return NoLog()
        clips = self.config.batch_size * self.world.size
        return RunLog(self.config.out, self.console, self.done, self.steps, clips)

    def resume(self) -> None:
        """Bring everything to where the checkpoint stands, if there is one to go on from."""
        # what torchrun starts anew goes on, however the run began
        path = to_resume(self.config.out, "auto" if self.world.restarts else self.config.resume)
        if path is None:
            return
        loaded, state = checkpoint.load(path), checkpoint.load_state(path)
        differing = conflicts(self.settings, loaded.config.get("settings", {}))
        before = loaded.config.get("clips", {}).get("count", "unknown")
        counts = f"clips: other files or lengths than before ({self.clips['count']} now, {before} before)"
        refuse_other_settings(path, [counts if line.startswith("clips: ") else line for line in differing])
        checkpoint.load_model(self.model, loaded.weights)
        self.trainee.rewrite()
        self.trainee.optimizer.load_state_dict(state["optimizer"])
        state = checkpoint.load_state(path, self.world.rank) if self.world.rank else state
        self.front_end.load_state_dict(state["front_end"])
        set_random_state(state, self.device)
        self.done = loaded.step

    def describe(self) -> None:
        """Say what is about to run, and write it to config.json."""
        if not self.world.first:
            return
        s, out = self.settings, self.config.out
        write_record(out, self.saved)
        title, clips = METHODS[s["method"]].title, s["batch_size"] * s["processes"]
        self.console.print(
            f"{title} {s['arch']} on {self.device} in {s['precision']}: {self.clips['count']} clips, {self.steps} "
            f"steps of {clips} ({s['epochs']:.1f} epochs), peak lr {s['peak_lr']:.2e}; run: {out}",
            highlight=False,
            soft_wrap=True,
        )

    def save(self) -> None:
        if not all(bool(p.isfinite().all()) for p in self.model.parameters()):
            raise UserError(f"step {self.done - 1}: weights are not finite any more; {kept(self.config.out)}")
        state: dict[str, Any] = {"front_end": self.front_end.state_dict()} | random_state(self.device)
        c, rank = self.config, self.world.rank
        if rank:
            checkpoint.save_share(c.out, self.done, rank, state)
        self.world.wait()  # what the first process writes now completes the checkpoint
        if not rank:
            state["optimizer"] = self.trainee.optimizer.state_dict()
            self.last_saved = checkpoint.save(c.out, self.done, self.model.state_dict(), state, self.saved, c.keep)

    def check_finite(self, step: int) -> None:
        if step >= 0:
            names = "\n  ".join(["Clips of the batch:", *self.batches.names(step)])
            raise UserError(f"step {step}: the loss is not finite; {kept(self.config.out)}. {names}")
