"""The configuration of pretraining: one dataclass, which is the command line, and the published recipes behind it."""

import math
from collections.abc import Collection
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

RATE = 16000  # Hz: the only sample rate that the models know


class UserError(ValueError):
    """Something only the user can put right: a path, a value, a full disk. The command line shows it as one line."""


@dataclass(frozen=True)
class Recipe:
    """Published settings of a method and a model size; ``lr`` is per 256 clips of a batch."""

    lr: float
    momentum: float
    epochs: float
    warmup: float  # share of all steps


RECIPES = {
    "frame": {
        "tiny": Recipe(lr=5e-4, momentum=0.99, epochs=100, warmup=1 / 20),
        "small": Recipe(lr=4e-4, momentum=0.997, epochs=300, warmup=1950 / 58500),
        "base": Recipe(lr=8e-5, momentum=0.9996, epochs=200, warmup=19900 / 398000),
    },
    "clip": {
        "tiny": Recipe(lr=5e-4, momentum=0.99, epochs=100, warmup=1 / 20),
        "small": Recipe(lr=5e-4, momentum=0.99, epochs=300, warmup=1300 / 39100),
        # 318,000 batches of 1536 are so many passes over 3,000,000 clips, without incomplete batches
        "base": Recipe(lr=2e-4, momentum=0.9995, epochs=318000 / 1953, warmup=15860 / 318000),
    },
}
# Of a clip's crops, published: ATST-Frame makes both views of one crop, ATST-Clip each of a crop of its own.
SECONDS = {"frame": (10.0,), "clip": (6.0, 6.0)}


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """What ``atst-fast pretrain`` trains, on what, and where the run is kept."""

    data: Path
    """folder of audio files (searched recursively), or what `atst-fast pack` made of one"""
    out: Path
    """folder of the run: configuration, logs and checkpoints; for torchrun on several machines one that they share"""
    method: Literal["frame", "clip"] = "frame"
    """ATST-Frame, which predicts masked patches, or ATST-Clip, which predicts one crop of a clip from another"""
    arch: Literal["tiny", "small", "base"] = "small"
    """size of the encoder"""
    epochs: float | None = None
    """passes over the data, in random crops; default: that of the published recipe"""
    steps: int | None = None
    """training steps, instead of epochs"""
    batch_size: int = 64
    """clips per step and process"""
    lr: float | None = None
    """learning rate per 256 clips: the peak is lr * processes * batch_size / 256; default: the published recipe"""
    final_lr: float = 1e-6
    """learning rate at the end of the cosine"""
    warmup_steps: int | None = None
    """steps of linear warm-up; default: the share of the published recipe"""
    weight_decay: float = 0.04
    """weight decay at the first step"""
    final_weight_decay: float = 0.4
    """weight decay at the last step"""
    momentum: float | None = None
    """teacher momentum at the first step (1 at the last); default: the published recipe"""
    clip_seconds: float | None = None
    """length of the random crop; shorter clips are zero-padded at their end; default: 10, with --method clip 6"""
    positive_seconds: float | None = None
    """--method clip: length of the second random crop, the positive pair of the first; default: 6"""
    max_seconds: float | None = None
    """longest input that the encoder has positions for; default: the longest crop, since those past it stay untrained
    (the official ATST-Clip has 10 s of them at crops of 6, which a checkpoint for its code needs)"""
    n_mels: int = 64
    """mel bands"""
    win_length: int = 1024
    """samples of the analysis window (n_fft is 1024, hop 160)"""
    mask_ratio: float = 0.65
    """--method frame: share of the patches that mask spans are drawn for (they overlap: about 0.5 end up masked)"""
    mask_len: int = 5
    """--method frame: patches of 40 ms in a mask span"""
    bank_size: int = 2000
    """earlier clips that a clip may be mixed with; they are kept in memory and in checkpoints"""
    hidden: int = 4096
    """width of the hidden layer of projector and predictor"""
    drop_path: float = 0.1
    """stochastic depth rate of the last block (linear from 0 in the first)"""
    crops_per_clip: int | None = None
    """crops of a clip per epoch; default: as many as fit into it side by side (at least 1)"""
    subset: int | None = None
    """crops per epoch: each epoch takes the next ones of a fixed random order, round and round"""
    seed: int = 0
    """everything random follows from it"""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes a GPU if there is one"""
    precision: Literal["auto", "float32", "bf16"] = "auto"
    """what the networks compute in (weights and optimizer are float32 in any case); auto: bf16 on a GPU"""
    graph: bool = True
    """run the step as a CUDA graph; without a GPU it does nothing"""
    workers: int | None = None
    """threads that decode audio; default: one per core"""
    prefetch: int = 4
    """batches prepared ahead"""
    log_every: int = 10
    """steps between two lines of the log"""
    save_every: int = 500
    """steps between two checkpoints"""
    keep: int = 2
    """checkpoints to keep (the last one is always among them)"""
    resume: str = "auto"
    """auto: continue what is in out, if anything; never: refuse to touch an earlier run; or a checkpoint's path"""

    @property
    def seconds(self) -> tuple[float, ...]:
        """Of each crop of a clip."""
        given = (self.clip_seconds, self.positive_seconds)
        return tuple(default if own is None else own for default, own in zip(SECONDS[self.method], given))

    @property
    def samples(self) -> tuple[int, ...]:
        """Of each crop of a clip, at 16 kHz."""
        return tuple(int(seconds * RATE) for seconds in self.seconds)


# What may differ between the two parts of a resumed run: where it runs and how it reports, not what it computes.
FREE = {"data", "out", "epochs", "device", "graph", "workers", "prefetch"}
FREE |= {"log_every", "save_every", "keep", "resume"}


def check(config: PretrainConfig) -> None:
    """Raise UserError for the first value that makes no sense, by the name of its option."""
    rules: dict[str, tuple[bool, str]] = {
        "epochs": (config.epochs is None or 0 < config.epochs < math.inf, "positive"),
        "steps": (config.steps is None or config.steps >= 1, "at least 1"),
        # Batch normalisation in the heads needs at least two rows; one clip alone may have a single masked patch.
        "batch_size": (config.batch_size >= 1, "at least 1"),
        "lr": (config.lr is None or 0 <= config.lr < math.inf, "finite and 0 or more"),
        "final_lr": (0 <= config.final_lr < math.inf, "finite and 0 or more"),
        "warmup_steps": (config.warmup_steps is None or config.warmup_steps >= 0, "0 or more"),
        "weight_decay": (0 <= config.weight_decay < math.inf, "finite and 0 or more"),
        "final_weight_decay": (0 <= config.final_weight_decay < math.inf, "finite and 0 or more"),
        "momentum": (config.momentum is None or 0 <= config.momentum <= 1, "between 0 and 1"),
        "clip_seconds": (0.2 <= config.seconds[0] <= 600, "between 0.2 and 600"),
        "positive_seconds": (0.2 <= config.seconds[-1] <= 600, "between 0.2 and 600"),
        "max_seconds": (
            config.max_seconds is None or max(config.seconds) <= config.max_seconds <= 600,
            f"between {max(config.seconds)} (the longest crop) and 600",
        ),
        "n_mels": (config.n_mels >= 1, "at least 1"),
        "win_length": (1 <= config.win_length <= 1024, "between 1 and 1024 (n_fft)"),
        "mask_ratio": (0 < config.mask_ratio < 1, "between 0 and 1"),
        "mask_len": (config.mask_len >= 1, "at least 1"),
        "bank_size": (config.bank_size >= 1, "at least 1"),
        "hidden": (config.hidden >= 1, "at least 1"),
        "drop_path": (0 <= config.drop_path < 1, "0 or more and less than 1"),
        "crops_per_clip": (config.crops_per_clip is None or config.crops_per_clip >= 1, "at least 1"),
        "subset": (config.subset is None or config.subset >= config.batch_size, "at least batch_size"),
        "seed": (0 <= config.seed < 2**63, "0 or more and less than 2^63"),
        "workers": (config.workers is None or config.workers >= 1, "at least 1"),
        "prefetch": (config.prefetch >= 1, "at least 1"),
        "log_every": (config.log_every >= 1, "at least 1"),
        "save_every": (config.save_every >= 1, "at least 1"),
        "keep": (config.keep >= 1, "at least 1"),
    }
    for name, (fine, expected) in rules.items():
        if not fine:
            raise UserError(f"--{name.replace('_', '-')} must be {expected}, got {getattr(config, name)!r}")
    if config.method == "frame":
        refuse_unused(config, ("positive_seconds",), "without --method clip: ATST-Frame makes both views of one crop")
        _check_masks(config)
    else:
        refuse_unused(config, ("mask_ratio", "mask_len"), "with --method clip: ATST-Clip masks nothing")
    if config.steps is not None and config.epochs is not None:
        raise UserError("--steps and --epochs exclude each other, got both")


def refuse_unused(config: Any, names: Collection[str], reason: str) -> None:
    """Raise UserError for the first of these options that is not its default, since it would do nothing."""
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name in names and value != field.default:
            option = f"{'no-' if value is False else ''}{field.name.replace('_', '-')}"
            raise UserError(f"--{option} has no effect {reason}")


def _check_masks(config: PretrainConfig) -> None:
    patches = (config.samples[0] // 160 + 1) // 4
    spans = max(2, math.ceil(config.mask_ratio * patches / config.mask_len))  # the most that masks.block_mask draws
    if config.mask_len > patches:
        raise UserError(f"--mask-len must be at most {patches}, the patches of a clip, got {config.mask_len}")
    if spans >= patches:
        raise UserError(f"--mask-ratio and --mask-len ask for {spans} spans; a clip of {patches} patches has no room")


def resolve(config: PretrainConfig, batches_per_epoch: int, processes: int = 1) -> dict[str, Any]:
    """Every setting as a plain value, the recipe's where the user gave none; ``peak_lr`` is scaled by the batch of all
    processes."""
    recipe = RECIPES[config.method][config.arch]
    steps = config.steps
    if steps is None:
        steps = max(1, round((config.epochs or recipe.epochs) * batches_per_epoch))
    lr = recipe.lr if config.lr is None else config.lr
    warmup = round(steps * recipe.warmup) if config.warmup_steps is None else config.warmup_steps
    if warmup > steps:
        raise UserError(f"--warmup-steps must be at most the number of steps ({steps}), got {warmup}")
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()}
    return settings | {
        "epochs": steps / batches_per_epoch,
        "steps": steps,
        "lr": lr,
        "processes": processes,
        "peak_lr": lr * config.batch_size * processes / 256,
        "warmup_steps": warmup,
        "momentum": recipe.momentum if config.momentum is None else config.momentum,
        "clip_seconds": config.seconds[0],
        "positive_seconds": config.seconds[1] if config.method == "clip" else None,
    }


# What older runs did not write down, because they knew nothing else.
FORMER = {"precision": "float32", "processes": 1, "method": "frame", "positive_seconds": None}


def conflicts(now: dict[str, Any], before: dict[str, Any], free: Collection[str] = FREE) -> list[str]:
    """The settings that would make a resumed run another run: "steps: 100 now, 200 before"; ``free`` ones would not."""
    before = {k: v for k, v in FORMER.items() if k in now} | before
    names = [f.name for f in fields(PretrainConfig)]
    names += sorted((now.keys() | before.keys()) - set(names))
    return [
        f"{name}: {now.get(name)!r} now, {before.get(name)!r} before"
        for name in names
        if name not in free and now.get(name) != before.get(name)
    ]
