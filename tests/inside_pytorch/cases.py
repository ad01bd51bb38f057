"""Every module and model that has parameters or buffers, tiny, and what it is called with for a batch of B clips."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from atst_fast import models
from atst_fast import nn as fast

TINY = {"dim": 24, "depth": 2, "num_heads": 3}
FRAMES, TOKENS = 41, 10
_LENGTHS = (41, 30, 20, 9, 5)


class Case(NamedTuple):
    make: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Tensor, ...]]


class WaveformEncoder(nn.Module):
    """Front end and encoder, as they are exported together."""

    def __init__(self, encoder: nn.Module | None = None):
        super().__init__()
        self.front_end = fast.LogMelSpectrogram()
        self.encoder = encoder or models.FrameEncoder(TINY, **_encoder(0.0))

    def forward(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:
        mel = self.front_end(waveform[:, None], lengths)
        return self.encoder(mel, None if lengths is None else lengths // self.front_end.hop_length + 1)


def first(out) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def loss(out) -> Tensor:
    return first(out).float().square().mean()


def _encoder(drop_path):
    return {"mlp_ratio": 2.0, "max_frames": FRAMES, "drop_path_rate": drop_path}


def lengths(clips):
    return torch.tensor(_LENGTHS[:clips])


def _mel(clips):
    return torch.randn(clips, 1, 64, FRAMES)


def _tokens(clips):
    return torch.randn(clips, TOKENS, 24), lengths(clips) // 4


def mask(clips):
    masked = torch.zeros(clips, TOKENS, dtype=torch.bool)
    masked[:, [0, 2]] = True
    return masked


def _wave(clips):
    return torch.randn(clips, 6400), lengths(clips) * 100 + 500


def cases(drop_path: float = 0.0) -> dict[str, Case]:
    heads = {"hidden": 40, "out": 16}
    encoder = _encoder(drop_path)
    return {
        "Block": Case(lambda: fast.Block(24, 3, 2.0, drop_path=drop_path), _tokens),
        "FrameAttention": Case(lambda: fast.FrameAttention(24, 3), _tokens),
        "Mlp": Case(lambda: fast.Mlp(24, 48), lambda b: _tokens(b)[:1]),
        "PatchEmbed": Case(lambda: fast.PatchEmbed(64, 4, 24), lambda b: (_mel(b),)),
        "LogMelSpectrogram": Case(fast.LogMelSpectrogram, lambda b: (_wave(b)[0][:, None], _wave(b)[1])),
        "KaldiFbank": Case(fast.KaldiFbank, _wave),
        "MelSpectrogram": Case(lambda: fast.MelSpectrogram(n_fft=512), _wave),
        "FrameEncoder": Case(lambda: models.FrameEncoder(TINY, **encoder), lambda b: (_mel(b), lengths(b), mask(b))),
        "ClipEncoder": Case(lambda: models.ClipEncoder(TINY, **encoder), lambda b: (_mel(b), lengths(b))),
        "ATSTFrame": Case(
            lambda: models.ATSTFrame(TINY, **heads, **encoder), lambda b: (_mel(b), _mel(b), lengths(b), mask(b))
        ),
        "ATSTClip": Case(
            lambda: models.ATSTClip(TINY, **heads, **encoder),
            lambda b: (_mel(b), _mel(b), lengths(b), lengths(b) - 4),
        ),
        "WaveformEncoder": Case(WaveformEncoder, _wave),
    }


CASES = cases()
NAMES = list(CASES)
FRONT_ENDS = ["LogMelSpectrogram", "KaldiFbank", "MelSpectrogram"]  # no parameters, float32 throughout
# without the compositions of the others, where a case costs seconds
SINGLE = [name for name in NAMES if name not in ("ATSTFrame", "ATSTClip", "WaveformEncoder")]


def make(name: str, drop_path: float = 0.0) -> nn.Module:
    """With weights that are no longer the first ones: biases of 0 would hide one that is left out."""
    torch.manual_seed(0)
    module = cases(drop_path)[name].make()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return module


def inputs(name: str, clips: int = 3) -> tuple[Tensor, ...]:
    torch.manual_seed(clips)
    return CASES[name].inputs(clips)
