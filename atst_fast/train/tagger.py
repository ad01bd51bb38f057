"""Fine-tuned encoders in files: the official keys, and what it takes to use them again."""

from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from atst_fast.models import Distilled, FineTuned
from atst_fast.train import checkpoint
from atst_fast.train.config import UserError


class Tagger(NamedTuple):
    """``model`` in eval mode; its ``labels`` in order, None where the file does not name them; and the arguments of
    ``nn.LogMelSpectrogram``."""

    model: FineTuned
    labels: list[str] | None
    front_end: dict[str, Any]


def official(model: FineTuned | Distilled) -> dict[str, Tensor]:
    """The weights under the official keys: ``encoder.encoder.*`` and ``head.*``; of a `Distilled`
    ``model.{teacher,student,linear,projector,project_linear}.*``."""
    weights = model.state_dict()
    if isinstance(model, Distilled):
        return {f"model.{k}": v for k, v in weights.items()}
    return {f"encoder.{k}" if k.startswith("encoder.") else k: v for k, v in weights.items()}


def undo_official(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights under the keys of our modules."""
    if any(k.startswith("model.") for k in weights):
        return {k.removeprefix("model."): v for k, v in weights.items()}
    return {k.removeprefix("encoder.") if k.startswith("encoder.") else k: v for k, v in weights.items()}


def pretrained(path: Path, which: str, drop_path: float) -> tuple[Any, dict[str, Any]]:
    """The encoder of a pretrained checkpoint, to be trained with that stochastic depth, and its front end."""
    loaded = checkpoint.load_encoder(path, which)
    config: dict[str, Any] = {**loaded.encoder.config, "drop_path_rate": drop_path}
    encoder = type(loaded.encoder)(**config)
    encoder.load_state_dict(loaded.encoder.state_dict())
    return encoder, loaded.front_end


def load_tagger(path: Path) -> Tagger:
    """The fine-tuned or distilled encoder (the student) of a run or a checkpoint, with its head. UserError where there
    is none."""
    loaded = checkpoint.load_encoder(path, "student")
    name = "linear" if loaded.layout == "distilled" else "head"
    head = {k.removeprefix(f"{name}."): v for k, v in loaded.heads.items() if k.startswith(f"{name}.")}
    if "linear.weight" not in head:
        raise UserError(f"{path} holds no head: expected a run of `atst-fast finetune` or `atst-fast distill`")
    config = loaded.config
    settings = {"level": "clip" if "norm.running_mean" in head else "frame", **config.get("head", {})}
    try:
        model = FineTuned(loaded.encoder, **settings | {"classes": len(head["linear.weight"])})
        model.head.load_state_dict(head)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{path}: its head does not fit its encoder ({reason})") from error
    labels = config.get("labels")
    return Tagger(model.eval().requires_grad_(False), labels and list(map(str, labels)), loaded.front_end)
