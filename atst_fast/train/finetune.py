"""``atst-fast finetune``: the training loop of a pretrained encoder and a head, top to bottom; that of distill too."""

import json
import signal
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from atst_fast.models import Distilled, Encoder, FineTuned, layer_scales, tagging_loss
from atst_fast.nn import LogMelSpectrogram
from atst_fast.train import checkpoint, run
from atst_fast.train.audio import Problems
from atst_fast.train.config import UserError, conflicts, refuse_unused
from atst_fast.train.data import Prefetcher
from atst_fast.train.distributed import World
from atst_fast.train.evaluate import Evaluation, held_out, show
from atst_fast.train.features import Labelled
from atst_fast.train.files import explain, write_atomically
from atst_fast.train.finetune_config import FORMER, FREE, FinetuneConfig, check, resolve
from atst_fast.train.labelled import HOP, LabelledBatch, LabelledBatches, Reader, balanced_weights, fingerprint
from atst_fast.train.logging import NoLog, RunLog, Stopwatch
from atst_fast.train.mixup import FileMixup, Masks, Mixup
from atst_fast.train.precision import pick_precision, rewrite, take_gradients, working_copy
from atst_fast.train.probe import load_task
from atst_fast.train.schedule import cosine_schedule
from atst_fast.train.tagger import official, pretrained, undo_official

SCORES = "scores.json"


def finetune(config: FinetuneConfig) -> int:
    """Train, or go on training, as ``config`` says; returns the exit code: 0, or 128 + the signal that stopped it.

    Under ``torchrun`` this is one of several processes, each of which calls it with the same ``config``.
    """
    check(config)
    return run.execute(FinetuneRun, config)


class FinetuneRun:
    """Everything a run consists of; built from the configuration, then brought to where the last one stopped.

    What is different in distillation: ``doing``, `build` and `losses`.
    """

    doing = "fine-tuning"

    def __init__(self, config: FinetuneConfig, world: World, console: Console):
        self.config, self.world, self.console = config, world, console
        self.device = world.device
        self.task = load_task(config.data)
        if config.level == "frame" and not self.task.has_events:
            raise UserError(f"--level frame needs the events of every file, which {config.data} does not have")
        held, used = held_out(self.task.train, config.validation, config.seed)
        per_epoch = len(used) // (config.batch_size * world.size)
        if not per_epoch:
            each = f" in each of {world.size} processes" if world.size > 1 else ""
            raise UserError(f"{len(used)} files to train on do not fill one batch{each}: a smaller --batch-size?")
        self.settings = resolve(config, per_epoch, all(len(f.labels) == 1 for f in used), world.size)
        self.settings["precision"] = pick_precision(config.precision, self.device)
        self.settings["files"] = fingerprint([*self.task.train, *self.task.test])
        s, self.steps = self.settings, self.settings["steps"]

        torch.manual_seed(config.seed)
        self.model, self.front_end = self.build()
        self.model.to(self.device)
        self.check_encoder()
        self.place = {"rank": world.rank, "world": world.size}
        self.batches, self.evaluation = self.data(used, held)
        self.log_mel = LogMelSpectrogram(**self.front_end).to(self.device)
        self.masks, self.mixup = self.augmentation(len(used))
        self.rates = cosine_schedule(s["peak_lr"], config.final_lr, self.steps, s["warmup_steps"])
        self.optimizer = make_optimizer(self.model, config)
        is_bf16 = s["precision"] == "bf16"
        working, self.shadows = working_copy(self.model, Encoder) if is_bf16 else (self.model, {})
        self.evaluated = tagger_of(working)
        # nothing trains the mask token, and a process may drop a whole branch
        self.working = world.replicate(working, find_unused=True)
        if not world.first:  # from here on, what is drawn is each process's own
            torch.manual_seed(world.seed(config.seed))
        self.saved: dict[str, Any] = {"model": self.tagger.encoder.config, "head": self.tagger.config}
        self.saved |= {"front_end": self.front_end, "labels": self.task.labels, "settings": s}
        if isinstance(self.model, Distilled):
            networks = {"teacher": self.model.teacher.encoder, "student": self.model.student}
            self.saved["models"] = {name: encoder.config for name, encoder in networks.items()}
        self.done = 0  # steps
        self.last_saved: Path | None = None

    def build(self) -> tuple[FineTuned | Distilled, dict[str, Any]]:
        """The model, and its front end."""
        c = self.config
        encoder, front_end = pretrained(c.checkpoint, c.encoder, c.drop_path)
        chunk, labels = self.chunk_frames, len(self.task.labels)
        return FineTuned(encoder, labels, level=c.level, chunk_frames=chunk, scale_bug=c.scale_bug), front_end

    def data(self, used: list[Labelled], held: list[Labelled]) -> tuple[LabelledBatches, Evaluation]:
        """Batches of the files to train on, and those to score."""
        c, s, labels = self.config, self.settings, self.task.labels
        batches = LabelledBatches(
            Reader(used, c.workers),
            labels,
            c.batch_size,
            s["seconds"],
            c.seed,
            self.tagger.encoder.patch_embed.patch_width if c.level == "frame" else None,
            weights=balanced_weights(used) if c.sampler == "balanced" else None,
            mixed=c.mixup_prob if s["mixup"] and c.mixup_partner == "file" else 0.0,
            **self.place,
        )
        readers = Reader(held, c.workers), Reader(self.task.test, c.workers)
        return batches, Evaluation(*readers, labels, self.front_end, s, self.world)

    def augmentation(self, files: int) -> tuple[Masks | None, Mixup | FileMixup | None]:
        """Of the log-mels of training clips; a mixup has the masks in it, which come before its crop."""
        c, masks = self.config, None
        if c.freq_mask or c.time_mask:
            masks = Masks(c.freq_mask, c.time_mask, c.seed, **self.place)
        if not self.settings["mixup"]:
            return masks, None
        if c.mixup_partner == "file":
            return masks, FileMixup(c.alpha, c.seed, masks, **self.place)
        return masks, Mixup(min(c.bank_size, files), c.alpha, self.world.seed(c.seed), c.mixup_prob, masks)

    def check_encoder(self) -> None:
        encoder, c = self.tagger.encoder, self.config
        if self.tagger.encoder_is_frame:
            refuse_unused(c, ("scale_bug",), "on an ATST-Frame")
        if c.level == "frame" and encoder.grid[0] != 1:
            raise UserError(f"--level frame needs one token at a time; {c.checkpoint} has {encoder.grid[0]}")
        if self.tagger.chunk_frames > encoder.max_frames:
            longest = encoder.max_frames / 100
            raise UserError(f"--chunk-seconds must be at most {longest} with {c.checkpoint}, got {c.chunk_seconds}")

    def losses(self, mel: Tensor, lengths: Tensor, targets: Tensor, valid: Tensor | None) -> dict[str, Tensor]:
        """The loss, by that name, and what it consists of."""
        return {"loss": tagging_loss(self.working(mel, lengths), targets, self.settings["loss"], valid)}

    @property
    def tagger(self) -> FineTuned:
        """What is used when all is done."""
        return tagger_of(self.model)

    @property
    def chunk_frames(self) -> int | None:
        seconds = self.config.chunk_seconds
        return None if seconds is None else int(seconds * 100) + 1

    def train(self) -> int:
        self.resume()
        c, world = self.config, self.world
        if self.done >= self.steps and (c.out / SCORES).exists():
            self.console.print(f"complete: {self.done} of {self.steps} steps, {checkpoint.find(c.out)}")
            return 0
        self.describe()
        watch = Stopwatch(self.device)
        bad = torch.full((), -1, device=self.device)  # the first step whose loss was not finite
        log, stop = self.log(), 0
        prefetcher = Prefetcher(self.batches, self.done, self.steps, ahead=c.prefetch, pin=self.device.type == "cuda")
        with run.stop_signals() as stopped, log, prefetcher as batches:
            while self.done < self.steps and not stop:
                with watch("data", host=True):
                    batch = next(batches)
                with watch("mel"):
                    inputs = self.prepare(batch)
                with watch("step"):
                    out = self.step(batch.step, *inputs)
                bad.masked_fill_((bad < 0) & ~out["loss"].isfinite(), batch.step)
                self.done += 1
                log.advance()
                stop = world.vote(stopped[0] if stopped else 0)
                last = self.done == self.steps or stop > 0
                score, save = last or self.ends(c.eval_every), last or self.ends(c.save_every)
                if score or save or self.done % c.log_every == 0:
                    self.check_finite(world.largest(int(bad)))
                    with watch("score", host=True):
                        scores = self.evaluation.held_out(self.evaluated) if score else {}
                    means = world.mean(torch.stack(list(out.values()))).tolist()
                    values = dict(zip(out, means)) | {"lr": float(self.rates[batch.step])} | scores
                    log.write(self.done, values, watch.shares())
                if save:
                    with watch("save", host=True):
                        self.save()
        if self.done == self.steps:
            self.score()
        left = {"done": self.done, "steps": self.steps, "saved": self.last_saved, "resume": c.resume}
        return run.farewell(self.console, Problems(), [signal.Signals(stop)] if stop else [], **left)

    def log(self) -> RunLog | NoLog:
        if not self.world.first:
            return NoLog()
        clips = self.config.batch_size * self.world.size
        return RunLog(self.config.out, self.console, self.done, self.steps, clips, doing=self.doing)

    def ends(self, epochs: int) -> bool:
        """Whether the last step ended every ``epochs``-th epoch."""
        return self.done % (epochs * self.batches.per_epoch) == 0

    def prepare(self, batch: LabelledBatch) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Mel ``[B, 1, F, T]``, valid frames int64 ``[B]`` on the CPU, targets, and which tokens count."""
        waveform, samples, targets = (x.to(self.device, non_blocking=True) for x in batch[1:4])
        mel, lengths = self.log_mel(waveform, samples)[:, None], batch.lengths // HOP + 1
        if self.masks is not None and self.mixup is None:
            mel = self.masks(mel, lengths, batch.step)
        if self.config.level == "frame":
            tokens = self.tagger.encoder.tokens(lengths).to(self.device)
            return mel, lengths, targets, torch.arange(targets.shape[1], device=self.device) < tokens[:, None]
        if isinstance(self.mixup, FileMixup):
            mel, targets = self.mixup(mel, lengths, targets, batch.step, batch.partner_of)
            lengths = lengths[: len(mel)]
        elif self.mixup is not None:
            mel, targets = self.mixup(mel, lengths, targets, batch.step)
        return mel, lengths, targets.argmax(1) if self.settings["loss"] == "ce" else targets, None

    def step(self, step: int, mel: Tensor, lengths: Tensor, targets: Tensor, valid: Tensor | None) -> dict[str, Tensor]:
        """One step of SGD; what `losses` gave, without a graph."""
        for group in self.optimizer.param_groups:
            group["lr"] = float(self.rates[step]) * group["scale"]
        self.working.train()
        self.working.zero_grad(set_to_none=True)
        out = self.losses(mel, lengths, targets, valid)
        if valid is not None and self.world.size > 1:  # every token counts alike, whichever process has it
            own = valid.sum().clamp(min=1).float()
            mean = self.world.mean(own)
            out = {k: v * own / mean for k, v in out.items()}
        out["loss"].backward()
        take_gradients(self.shadows)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        self.optimizer.step()
        rewrite(self.shadows)
        return {k: v.detach() for k, v in out.items()}

    def resume(self) -> None:
        """Bring everything to where the checkpoint stands, if there is one to go on from."""
        # what torchrun starts anew goes on, however the run began
        path = run.to_resume(self.config.out, "auto" if self.world.restarts else self.config.resume)
        if path is None:
            return
        loaded, state = checkpoint.load(path), checkpoint.load_state(path)
        run.refuse_other_settings(path, conflicts(self.settings, FORMER | loaded.config.get("settings", {}), FREE))
        self.model.load_state_dict(undo_official(loaded.weights))
        rewrite(self.shadows)
        self.optimizer.load_state_dict(state["optimizer"])
        state = checkpoint.load_state(path, self.world.rank) if self.world.rank else state
        if isinstance(self.mixup, Mixup):
            self.mixup.load_state_dict(state["mixup"], self.device)
        run.set_random_state(state, self.device)
        self.done, self.last_saved = loaded.step, path

    def describe(self) -> None:
        """Say what is about to run, and write it to config.json."""
        if not self.world.first:
            return
        s, out = self.settings, self.config.out
        if self.done:
            self.console.print(f"going on after step {self.done}", highlight=False)
        run.write_record(out, self.saved)
        kind = "ATST-Frame" if self.tagger.encoder_is_frame else "ATST-Clip"
        self.console.print(
            f"{self.doing} {kind} at {s['level']} level on {self.device} in {s['precision']}: "
            f"{len(self.batches.reader.files)} files, "
            f"{len(self.task.labels)} labels, {self.steps} steps of {s['batch_size'] * s['processes']} "
            f"({s['epochs']} epochs), {s['loss']}{' with mixup' if s['mixup'] else ''}, "
            f"peak lr {s['peak_lr']:.2e}; run: {out}",
            highlight=False,
            soft_wrap=True,
        )

    def save(self) -> None:
        if not all(bool(p.isfinite().all()) for p in self.model.parameters()):
            raise UserError(f"step {self.done - 1}: weights are not finite any more; {run.kept(self.config.out)}")
        state: dict[str, Any] = {"mixup": self.mixup.state_dict() if isinstance(self.mixup, Mixup) else None}
        state |= run.random_state(self.device)
        c, rank = self.config, self.world.rank
        if rank:
            checkpoint.save_share(c.out, self.done, rank, state)
        self.world.wait()  # what the first process writes now completes the checkpoint
        if not rank:
            weights, state["optimizer"] = official(self.model), self.optimizer.state_dict()
            self.last_saved = checkpoint.save(c.out, self.done, weights, state, self.saved, c.keep, prefix="")

    def score(self) -> None:
        """Test files to the screen and to scores.json: of the last checkpoint, as officially, whichever is the best."""
        out, scores = self.config.out, self.evaluation.test(self.evaluated)
        if not self.world.first:
            return
        record = {"checkpoint": str(self.last_saved), "level": self.config.level, "test": scores}
        with explain(f"write {out / SCORES}"):
            write_atomically(out / SCORES, lambda p: p.write_text(json.dumps(record, indent=1) + "\n"))
        self.console.print(show(scores, len(self.task.test)))

    def check_finite(self, step: int) -> None:
        if step >= 0:
            names = "\n  ".join(self.batches.names(step))
            kept = run.kept(self.config.out)
            raise UserError(f"step {step}: the loss is not finite; {kept}. Clips of the batch:\n  {names}")


def tagger_of(model: FineTuned | Distilled) -> FineTuned:
    """The part of a model that is used when it is trained."""
    return model.tagger if isinstance(model, Distilled) else model


def make_optimizer(model: FineTuned | Distilled, config: FinetuneConfig) -> torch.optim.SGD:
    """SGD as the official code runs it; ``scale`` of a group is what its learning rate is multiplied by."""
    scales, named = layer_scales(model, config.layer_decay, level=config.level), dict(model.named_parameters())
    groups = [
        {"params": [named[name] for name, own in scales.items() if own == scale], "scale": scale}
        for scale in sorted(set(scales.values()))
    ]
    return torch.optim.SGD(groups, lr=0.0, momentum=config.momentum)
