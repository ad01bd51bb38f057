"""The configuration of fine-tuning and distillation: two dataclasses, which are the command lines."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from atst_fast.train.config import FREE as PRETRAIN_FREE
from atst_fast.train.config import UserError, refuse_unused

# What older runs did not write down, because they knew nothing else.
FORMER = {"sampler": "shuffle", "mixup_partner": "bank", "mixup_prob": 1.0, "freq_mask": 0, "time_mask": 0}
FREE = PRETRAIN_FREE - {"epochs"} | {"eval_every", "median"}


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """What ``atst-fast finetune`` trains, on what, and where the run is kept."""

    checkpoint: Path
    """the pretrained encoder: folder of a run (its last checkpoint), or a checkpoint"""
    out: Path
    """folder of the run: configuration, log, checkpoints and scores; for torchrun on several machines one that they
    share"""
    data: Path = Path("demo_data")
    """folder with train.jsonl and test.jsonl: {"file", "labels", "events": [{"label", "onset", "offset"}]} per line"""
    level: Literal["clip", "frame"] = "clip"
    """what is labelled: the whole clip, or each token of 40 ms"""
    encoder: Literal["teacher", "student"] = "teacher"
    """which network of the pretrained checkpoint"""
    epochs: int = 50
    """passes over the training files"""
    warmup_epochs: int = 5
    """epochs of linear warm-up"""
    batch_size: int = 32
    """clips per step and process"""
    lr: float | None = None
    """learning rate of the head per 256 clips: the peak is lr * processes * batch_size / 256; default: 1 for clips, 0.5
    for frames, twice that for distillation"""
    final_lr: float = 1e-6
    """learning rate at the end of the cosine"""
    layer_decay: float = 0.75
    """each block's learning rate is that of the block above times this"""
    momentum: float = 0.9
    """of SGD"""
    clip_norm: float = 3.0
    """largest norm of the gradient"""
    drop_path: float = 0.1
    """stochastic depth rate of the last block (linear from 0 in the first)"""
    mixup: bool | None = None
    """mix clips and labels with others, and crop and resize; default: for clips. Their loss is bce then"""
    alpha: float = 0.5
    """mixing weights are drawn from Beta(alpha, alpha); officially 10 for AudioSet-2M"""
    mixup_partner: Literal["bank", "file"] = "bank"
    """what a clip is mixed with: an earlier one, or any other file, read for that (officially for AudioSet-2M)"""
    mixup_prob: float = 1.0
    """share of the clips that are mixed; officially 0.5 for AudioSet-2M"""
    bank_size: int = 5000
    """earlier clips of the same process to mix with, kept in memory and in checkpoints (at most as many as there are
    training files)"""
    freq_mask: int = 0
    """a random band of less than so many mel bins of a clip becomes 0 (SpecAugment; officially 20 for AudioSet-2M)"""
    time_mask: int = 0
    """a random band of less than so many frames of 10 ms of a clip becomes 0 (officially 50 for AudioSet-2M)"""
    sampler: Literal["shuffle", "balanced"] = "shuffle"
    """shuffle: each file once per epoch; balanced: as many draws of all files, the rarer its labels the more often
    (officially for AudioSet-2M)"""
    loss: Literal["auto", "bce", "ce"] = "auto"
    """each label alone, or one of all; auto: ce where each file has one label and nothing is mixed"""
    seconds: float | None = None
    """longest part of a file that is used in training; default: 12 for clips (the middle), 10 for frames (random)"""
    chunk_seconds: float | None = None
    """what goes through the encoder at once; default: 6 for clips of ATST-Clip, else what it was pretrained on"""
    scale_bug: bool = True
    """for clips of ATST-Clip: scale means of longer files as the official code does"""
    validation: float = 0.2
    """share of the training files that is held out: for scores on the way, and thresholds of frames"""
    median: int = 7
    """tokens of the median filter over the decisions, for frames"""
    seed: int = 0
    """everything random follows from it"""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes a GPU if there is one"""
    precision: Literal["auto", "float32", "bf16"] = "float32"
    """what the encoders compute in, also where they are scored (heads, losses, weights and optimizer are float32 in any
    case; officially all is); auto: bf16 on a GPU"""
    workers: int | None = None
    """threads that decode audio; default: one per core"""
    prefetch: int = 4
    """batches prepared ahead"""
    log_every: int = 10
    """steps between two lines of the log"""
    eval_every: int = 10
    """epochs between two scores of the files held out"""
    save_every: int = 10
    """epochs between two checkpoints"""
    keep: int = 1
    """checkpoints to keep (the last one is always among them)"""
    resume: str = "auto"
    """auto: continue what is in out, if anything; never: refuse to touch an earlier run; or a checkpoint's path"""


@dataclass(frozen=True, kw_only=True)
class DistillConfig(FinetuneConfig):
    """What ``atst-fast distill`` trains: a pretrained ATST-Frame on labels and on what a fine-tuned ATST-Clip says."""

    teacher: Path
    """the fine-tuned ATST-Clip: a run of `atst-fast finetune`, or a checkpoint of one; the level must be the same"""
    weight: float = 0.5
    """share of the teacher's answers in the loss; the rest are the labels"""
    teacher_mode: Literal["auto", "train", "eval"] = "auto"
    """train: the teacher drops paths and normalises by batch, as officially for clips; auto: eval for frames"""
    project: int | None = None
    """width of a projector between the student and its answer to the teacher (officially 4096); default: none"""


def check(config: FinetuneConfig) -> None:
    """Raise UserError for the first value that makes no sense, by the name of its option."""
    c = config
    rules: dict[str, tuple[bool, str]] = {
        "epochs": (c.epochs >= 1, "at least 1"),
        "warmup_epochs": (0 <= c.warmup_epochs <= c.epochs, f"between 0 and the epochs ({c.epochs})"),
        "batch_size": (c.batch_size >= 2, "at least 2, for the statistics of a batch"),
        "lr": (c.lr is None or 0 <= c.lr < math.inf, "finite and 0 or more"),
        "final_lr": (0 <= c.final_lr < math.inf, "finite and 0 or more"),
        "layer_decay": (0 < c.layer_decay <= 1, "more than 0 and at most 1"),
        "momentum": (0 <= c.momentum < 1, "0 or more and less than 1"),
        "clip_norm": (c.clip_norm > 0, "positive"),
        "drop_path": (0 <= c.drop_path < 1, "0 or more and less than 1"),
        "alpha": (0 < c.alpha < math.inf, "positive"),
        "mixup_prob": (0 < c.mixup_prob <= 1, "more than 0 and at most 1"),
        "freq_mask": (c.freq_mask >= 0, "0 or more"),
        "time_mask": (c.time_mask >= 0, "0 or more"),
        "bank_size": (c.bank_size >= 1, "at least 1"),
        "seconds": (c.seconds is None or 0.2 <= c.seconds <= 600, "between 0.2 and 600"),
        "chunk_seconds": (c.chunk_seconds is None or 0.2 <= c.chunk_seconds <= 600, "between 0.2 and 600"),
        "validation": (0 <= c.validation < 1, "0 or more and less than 1"),
        "median": (c.median >= 1 and c.median % 2 == 1, "odd and at least 1"),
        "seed": (0 <= c.seed < 2**63, "0 or more and less than 2^63"),
        "workers": (c.workers is None or c.workers >= 1, "at least 1"),
        "prefetch": (c.prefetch >= 1, "at least 1"),
        "log_every": (c.log_every >= 1, "at least 1"),
        "eval_every": (c.eval_every >= 1, "at least 1"),
        "save_every": (c.save_every >= 1, "at least 1"),
        "keep": (c.keep >= 1, "at least 1"),
    }
    if isinstance(c, DistillConfig):
        rules["weight"] = (0 <= c.weight <= 1, "between 0 and 1")
        rules["project"] = (c.project is None or c.project >= 1, "at least 1")
        if c.project is not None and c.level == "frame":
            raise UserError("--project is for clips alone: it excludes --level frame")
        refuse_unused(c, ("scale_bug",), "on an ATST-Frame; the teacher has that of its own fine-tuning")
    for name, (fine, expected) in rules.items():
        if not fine:
            raise UserError(f"--{name.replace('_', '-')} must be {expected}, got {getattr(c, name)!r}")
    if c.mixup and c.level == "frame":
        raise UserError("--mixup is for clips alone: it excludes --level frame")
    if c.level == "frame":
        refuse_unused(c, ("alpha", "bank_size", "scale_bug"), "at --level frame")
    else:
        refuse_unused(c, ("median",), "at --level clip")
    if c.mixup is False:
        refuse_unused(c, ("alpha", "bank_size"), "without mixup")
    if c.mixup_partner == "file":
        refuse_unused(c, ("bank_size",), "with --mixup-partner file, which remembers no clips")
    if c.validation == 0:
        refuse_unused(c, ("eval_every",), "without files held out: --validation is 0")


def resolve(config: FinetuneConfig, per_epoch: int, single: bool, processes: int = 1) -> dict[str, Any]:
    """Every setting as a plain value; ``single``: each training file has exactly one label. ``peak_lr`` is scaled by
    the batch of all processes, as officially."""
    frame, distill = config.level == "frame", isinstance(config, DistillConfig)
    lr = config.lr if config.lr is not None else (0.5 if frame else 1.0) * (1 + distill)
    mixup = not frame if config.mixup is None else config.mixup
    if not mixup and (config.mixup_partner, config.mixup_prob) != ("bank", 1.0):
        raise UserError("--mixup-partner and --mixup-prob say how clips are mixed, and here nothing is")
    loss = config.loss if config.loss != "auto" else "ce" if single and not mixup and not frame else "bce"
    if loss == "ce" and (mixup or frame or not single):
        reason = "mixed labels" if mixup else "--level frame" if frame else "files of several labels, or none"
        raise UserError(f"--loss ce asks for exactly one label per clip, which excludes {reason}")
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()}
    settings |= {
        "lr": lr,
        "processes": processes,
        "peak_lr": lr * config.batch_size * processes / 256,
        "mixup": mixup,
        "loss": loss,
        "seconds": config.seconds or (10.0 if frame else 12.0),
        "steps": config.epochs * per_epoch,
        "warmup_steps": config.warmup_epochs * per_epoch,
    }
    if isinstance(config, DistillConfig) and config.teacher_mode == "auto":
        settings["teacher_mode"] = "eval" if frame else "train"
    return settings
