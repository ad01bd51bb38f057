"""Fused steps for the data transforms that audiossl runs clip by clip: log-mel, and mixup with a random resize crop."""

# ruff: noqa: NPY002 (the originals draw from numpy's global generator, and so does what replaces them)

import copy
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from atst_fast.integrations.accelerate_match import Unknown
from atst_fast.integrations.accelerate_report import Entry, Report
from atst_fast.ops.log_mel import log_mel_with

_SIMPLE = (str, bytes, int, float, bool, type(None), type)
# Two float32 transforms of white noise, in dB. Augmented values near 1 (log-mixup-exp, 16 products of a cubic).
_SAME_DB, _SAME_VIEW = 2e-3, 1e-5


def accelerate_transforms(transform: Any) -> Report:
    """Let the steps of a data transform that atst_fast knows run its operators, in place; returns a report of them.

    In every ``Compose`` (an object with a list ``transforms``) that ``transform`` is or holds, MelSpectrogram,
    AmplitudeToDB and MinMax become one pass over the samples, and Mixup and RandomResizeCrop one over the spectrogram:
    those of torchaudio and audiossl, found by their attributes, each compared with the original first. They draw from
    numpy's and Python's generators what the originals draw, in the same order, so that a seed gives the same views up
    to float32 rounding; the memory bank stays the list that Mixup has. What gets anything but one float32 channel on a
    CPU runs the originals.

    For audiossl: ``accelerate_transforms(datamodule.dataset.transform)``, before the workers start. Calling it again
    changes nothing; `restore_transforms` undoes it.
    """
    report = Report()
    for name, steps in _lists(transform, "", set()):
        for i, step in enumerate(steps):
            for part, fused in (("log_mel", FusedLogMel), ("views", FusedViews)):
                if not fused.begins(step):
                    continue
                originals = [step, *fused.follow(steps[i + 1 :])]
                where = f"{name}[{i}]" if len(originals) == 1 else f"{name}[{i}:{i + len(originals)}]"
                try:
                    made = fused(originals)
                    made.check()
                except Unknown as why:
                    report.append(Entry(where, part, False, str(why)))
                    continue
                steps[i : i + len(originals)] = [made]
                report.append(Entry(where, part, True, " + ".join(type(s).__name__ for s in originals)))
    return report


def restore_transforms(transform: Any) -> int:
    """Put the original steps back into the same lists; returns how many fused ones there were."""
    count = 0
    for _, steps in _lists(transform, "", set()):
        for i in reversed(range(len(steps))):
            if isinstance(steps[i], _FusedStep):
                steps[i : i + 1] = steps[i].originals
                count += 1
    return count


def _lists(thing: Any, name: str, seen: set[int]) -> Iterator[tuple[str, list]]:
    """The lists ``transforms`` of all objects that can be reached by attributes, innermost last."""
    if isinstance(thing, (*_SIMPLE, Tensor, np.ndarray)) or id(thing) in seen:
        return
    seen.add(id(thing))
    for key, value in list(getattr(thing, "__dict__", {}).items()):
        where = f"{name}.{key}" if name else key
        if key == "transforms" and isinstance(value, list):
            if id(value) in seen:
                continue
            seen.add(id(value))
            yield where, value
            for i, step in enumerate(list(value)):
                yield from _lists(step, f"{where}[{i}]", seen)
        elif not isinstance(value, (list, dict, tuple, set)):
            yield from _lists(value, where, seen)


class _FusedStep:
    """Some steps in one; ``originals`` are what `restore_transforms` puts back."""

    originals: list

    def _run_originals(self, x: Any) -> Any:
        for step in self.originals:
            x = step(x)
        return x

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(type(s).__name__ for s in self.originals)})"


def _seeded(step: Any, x: Tensor, seed: int) -> tuple:
    """What a step makes of ``x``, and what both generators draw after it."""
    np.random.seed(seed)
    random.seed(seed)
    return step(x.clone()), np.random.random(), random.random()


def _has(step: Any, *names: str) -> bool:
    return not isinstance(step, _FusedStep) and all(hasattr(step, name) for name in names)


def _require(step: Any, **values: Any) -> None:
    for name, value in values.items():
        if not hasattr(step, name):
            raise Unknown(f"{type(step).__name__} does not say its {name}")
        if getattr(step, name) != value:
            raise Unknown(f"{type(step).__name__} has {name}={getattr(step, name)!r}, not {value!r}")


class FusedLogMel(_FusedStep):
    """``[C, N]`` or ``[N]`` to what MelSpectrogram, AmplitudeToDB and MinMax make of it, with their tables."""

    def __init__(self, originals: list):
        self.originals = originals
        mel, *rest = originals
        if not rest:
            raise Unknown("no AmplitudeToDB follows")
        _require(mel.spectrogram, pad=0, power=2.0, normalized=False, center=True, pad_mode="reflect", onesided=True)
        _require(rest[0], multiplier=10.0, amin=1e-10, db_multiplier=0.0)
        self.hop, self.top_db = mel.spectrogram.hop_length, rest[0].top_db
        self.minmax = (rest[1].min, rest[1].max) if rest[1:] else None

    @staticmethod
    def begins(step: Any) -> bool:
        return _has(step, "spectrogram", "mel_scale")

    @staticmethod
    def follow(steps: list) -> list:
        found = [s for s in steps[:1] if _has(s, "top_db", "multiplier", "amin")]
        numbers = [s for s in steps[1:2] if _has(s, "min", "max") and isinstance(s.min, float)]
        return found + numbers if found else []

    def check(self) -> None:
        wave = torch.randn(1, 8000, generator=torch.Generator().manual_seed(0)) * 0.1
        try:
            want, got = self._run_originals(wave), self._fused(wave)
        except Exception as error:
            raise Unknown(f"it does not run as expected: {error}") from error
        scale = 1.0 if self.minmax is None else (self.minmax[1] - self.minmax[0]) / 2
        if want.shape != got.shape or not float((want - got).abs().max()) * scale <= _SAME_DB:
            raise Unknown("what it computes differs")

    def _fused(self, wave: Tensor) -> Tensor:
        mel = self.originals[0]
        tables = mel.spectrogram.window, mel.mel_scale.fb
        return log_mel_with(wave, *tables, self.hop, top_db=self.top_db, minmax=self.minmax)

    def __call__(self, wave: Any) -> Any:
        usual = isinstance(wave, Tensor) and wave.dtype == torch.float32 and wave.device.type == "cpu"
        return self._fused(wave) if usual else self._run_originals(wave)


class FusedViews(_FusedStep):
    """``[1, F, T]`` mixed with a former clip, then cropped and resized; either may be absent."""

    def __init__(self, originals: list):
        self.originals = originals
        self.mixup = next((s for s in originals if hasattr(s, "memory_bank")), None)
        self.crop = next((s for s in originals if hasattr(s, "virtual_crop_scale")), None)
        if self.mixup is not None:
            _require(self.mixup, log_mixup_exp=True)
        if self.crop is not None:
            _require(self.crop, interpolation="bicubic")

    @staticmethod
    def begins(step: Any) -> bool:
        return _has(step, "memory_bank", "ratio", "n", "log_mixup_exp") or FusedViews._crops(step)

    @staticmethod
    def follow(steps: list) -> list:
        return [s for s in steps[:1] if FusedViews._crops(s)]

    @staticmethod
    def _crops(step: Any) -> bool:
        return _has(step, "virtual_crop_scale", "freq_scale", "time_scale", "interpolation")

    def check(self) -> None:
        states = np.random.get_state(), random.getstate()
        generator = torch.Generator().manual_seed(0)
        clips = [torch.randn(1, 8, 12 + 3 * (i % 3), generator=generator) for i in range(6)]
        try:
            theirs, ours = (copy.deepcopy(self) for _ in range(2))
            for one in (theirs, ours):
                if one.mixup is not None:
                    one.mixup.memory_bank = []
            for seed, clip in enumerate(clips):
                want, got = (_seeded(one, clip, seed) for one in (theirs._run_originals, ours))
                same = want[0].shape == got[0].shape and float((want[0] - got[0]).abs().max()) <= _SAME_VIEW
                if not same or want[1:] != got[1:]:
                    raise Unknown("what it computes, or draws, differs")
        except Unknown:
            raise
        except Exception as error:
            raise Unknown(f"it does not run as expected: {error}") from error
        finally:
            np.random.set_state(states[0])
            random.setstate(states[1])

    def __call__(self, x: Any) -> Any:
        if not isinstance(x, Tensor) or x.dtype != torch.float32 or x.device.type != "cpu" or x.requires_grad:
            return self._run_originals(x)
        bank = [] if self.mixup is None else self.mixup.memory_bank
        if x.dim() != 3 or len(x) != 1 or any(z.shape[:2] != x.shape[:2] or z.dtype != x.dtype for z in bank[:1]):
            return self._run_originals(x)
        partner, start, alpha = self._draw_partner(x, bank)
        canvas, crop = self._draw_crop(x)
        if self.mixup is not None:
            self.mixup.memory_bank = [*bank, x][-self.mixup.n :]
        mels = x.new_empty(0, x.shape[1], 0) if partner is None else partner.contiguous()
        slots = [] if partner is None else [partner.shape[2]]
        who = torch.tensor([-1 if partner is None else 0])
        weights = torch.tensor([alpha], dtype=torch.float32)
        lengths, place = torch.tensor(slots, dtype=torch.int64), torch.tensor([start])
        y = torch.ops.atst_fast.augment(
            x[None].contiguous(), mels, lengths, who, place, weights, torch.tensor([crop]), list(canvas)
        )
        return y[0]

    def _draw_partner(self, x: Tensor, bank: list) -> tuple[Tensor | None, int, float]:
        """As Mixup draws: the weight, whom, and where one of another width lies."""
        if self.mixup is None:
            return None, 0, 0.0
        alpha = self.mixup.ratio * np.random.random()
        if not bank:
            return None, 0, alpha
        partner = bank[np.random.randint(len(bank))]
        slack = abs(partner.shape[2] - x.shape[2])
        return partner, int(np.random.randint(0, slack)) if slack else 0, alpha

    def _draw_crop(self, x: Tensor) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
        """As RandomResizeCrop draws: the canvas, and first bin, first frame, height and width on it."""
        size = int(x.shape[1]), int(x.shape[2])
        if self.crop is None:
            return size, (0, 0, *size)
        canvas = tuple(int(n * c) for n, c in zip(size, self.crop.virtual_crop_scale))
        scales = self.crop.freq_scale, self.crop.time_scale
        drawn = [int(np.random.uniform(*scale) * n) for scale, n in zip(scales, size)]
        h, w = (min(max(n, 1), most) for n, most in zip(drawn, canvas))
        i, j = (random.randint(0, most - n) if most > n else 0 for n, most in zip((h, w), canvas))
        return (canvas[0], canvas[1]), (i, j, h, w)
