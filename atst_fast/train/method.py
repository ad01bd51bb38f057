"""The two methods that pretraining knows: the model and the front end of each, from a run's settings."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from atst_fast.models import ATSTClip, ATSTFrame, StudentTeacher
from atst_fast.train.config import RATE
from atst_fast.train.front_end import ClipFrontEnd, FrontEnd
from atst_fast.train.views import Views


class Method(NamedTuple):
    """``title`` for people; ``front_end(settings, samples of each crop)``; ``unused``: whether the model has parameters
    that no loss depends on."""

    title: str
    model: Callable[..., StudentTeacher]
    front_end: Callable[[dict[str, Any], Sequence[int]], Views]
    unused: bool = False


def _frame_views(s: dict[str, Any], samples: Sequence[int]) -> Views:
    return FrontEnd(**mel_settings(s), **{k: s[k] for k in ("mask_ratio", "mask_len", "bank_size", "seed")})


def _clip_views(s: dict[str, Any], samples: Sequence[int]) -> Views:
    return ClipFrontEnd(samples, **mel_settings(s), **{k: s[k] for k in ("bank_size", "seed")})


METHODS = {
    "frame": Method("ATST-Frame", ATSTFrame, _frame_views),
    "clip": Method("ATST-Clip", ATSTClip, _clip_views, unused=True),
}


def mel_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The arguments of ``nn.LogMelSpectrogram``, which belong into a checkpoint."""
    return {"n_mels": settings["n_mels"], "win_length": settings["win_length"]}


def build_model(settings: dict[str, Any], samples: Sequence[int]) -> StudentTeacher:
    """Both networks, with fresh weights and positions for the longest crop, or for ``max_seconds``."""
    longest = max(samples) if settings["max_seconds"] is None else int(settings["max_seconds"] * RATE)
    return METHODS[settings["method"]].model(
        settings["arch"],
        hidden=settings["hidden"],
        drop_path_rate=settings["drop_path"],
        n_mels=settings["n_mels"],
        patch=(settings["n_mels"], 4),
        max_frames=longest // 160 + 1,
    )


def build_front_end(settings: dict[str, Any], samples: Sequence[int]) -> Views:
    return METHODS[settings["method"]].front_end(settings, samples)
