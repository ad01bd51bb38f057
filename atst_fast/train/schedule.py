"""Learning rate, weight decay and teacher momentum at every step of pretraining."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from atst_fast.ops._checks import fail


def cosine_schedule(
    base: float, final: float, steps: int, warmup_steps: int = 0, start_warmup: float = 0.0
) -> NDArray[np.float64]:
    """Linear warm-up, then half a cosine: ``[steps]`` float64, one value per step.

    Entries ``0 .. warmup_steps - 1`` run from ``start_warmup`` to ``base``, both included (a warm-up of one step is
    ``start_warmup`` alone); entry ``warmup_steps + i`` is
    ``final + (base - final) / 2 * (1 + cos(pi * i / (steps - warmup_steps)))``, which never quite reaches ``final``.
    Upstream: audiossl/utils/common.py, cosine_scheduler_step.
    Raises ValueError unless ``0 <= warmup_steps <= steps``, ``steps >= 1`` and all values are finite.
    """
    if steps < 1:
        fail("cosine_schedule", "steps", "at least 1", steps)
    if not 0 <= warmup_steps <= steps:
        fail("cosine_schedule", "warmup_steps", f"between 0 and steps ({steps})", warmup_steps)
    for name, value in (("base", base), ("final", final), ("start_warmup", start_warmup)):
        if not np.isfinite(value):
            fail("cosine_schedule", name, "finite", value)
    i = np.arange(steps - warmup_steps)
    cosine = final + 0.5 * (base - final) * (1 + np.cos(np.pi * i / max(len(i), 1)))
    return np.concatenate([np.linspace(start_warmup, base, warmup_steps), cosine])


class Rates(NamedTuple):
    """What one training step uses: ``momentum`` is that of the teacher update after the step."""

    lr: float
    weight_decay: float
    momentum: float


@dataclass(frozen=True, kw_only=True)
class Schedules:
    """The three schedules of ATST pretraining; ``schedules(k)`` gives the Rates of step k (counted from 0).

    ``lr`` is the peak rate (already scaled by the batch: ``lr * batch / 256``), reached at the end of ``warmup_steps``
    and falling to ``final_lr``; weight decay rises from ``weight_decay`` to ``final_weight_decay`` and the teacher's
    momentum from ``momentum`` to ``final_momentum``, both without warm-up. Steps past the end use the last values.

    The official trainer reads the momentum after its step counter moved on, so that the update after step k uses
    entry k + 1 (and fails after the last step, where this clamps); ``momentum_offset=0`` uses entry k.
    """

    steps: int
    lr: float
    warmup_steps: int = 0
    final_lr: float = 1e-6
    weight_decay: float = 0.04
    final_weight_decay: float = 0.4
    momentum: float = 0.996
    final_momentum: float = 1.0
    momentum_offset: int = 1

    def __post_init__(self) -> None:
        tables = (
            cosine_schedule(self.lr, self.final_lr, self.steps, self.warmup_steps),
            cosine_schedule(self.weight_decay, self.final_weight_decay, self.steps),
            cosine_schedule(self.momentum, self.final_momentum, self.steps),
        )
        object.__setattr__(self, "_tables", tables)

    def __call__(self, step: int) -> Rates:
        if step < 0:
            fail("Schedules", "step", "0 or more", step)
        lr, weight_decay, momentum = self._tables  # type: ignore[attr-defined]
        last = self.steps - 1
        i, j = min(step, last), min(step + self.momentum_offset, last)
        return Rates(float(lr[i]), float(weight_decay[i]), float(momentum[j]))
