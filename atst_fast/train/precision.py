"""Training in bfloat16: a copy that computes, beside the float32 weights that are trained, averaged and saved."""

import copy
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from atst_fast.models import StudentTeacher
from atst_fast.train.schedule import Schedules
from atst_fast.train.step import make_optimizer

PRECISIONS = ("float32", "bf16")
_Model = TypeVar("_Model", bound=nn.Module)


def pick_precision(name: str, device: torch.device) -> str:
    """``auto`` is bf16 on a GPU, whose tensor cores it takes, and float32 on a CPU, where it would only cost time."""
    if name == "auto":
        return "bf16" if device.type == "cuda" else "float32"
    return name


def working_copy(model: _Model, kind: type[nn.Module] = nn.Module) -> tuple[_Model, dict[Tensor, Tensor]]:
    """A copy of ``model`` with bfloat16 parameters in the modules of ``kind``, and the copy of each parameter of
    ``model``.

    Buffers (the running statistics of the heads) are those of ``model`` itself: both modules see one float32 tensor.
    """
    working = copy.deepcopy(model)
    with torch.no_grad():
        for p in (p for module in working.modules() if isinstance(module, kind) for p in module.parameters()):
            p.data = p.data.to(torch.bfloat16, memory_format=torch.contiguous_format)
    for ours, theirs in zip(working.modules(), model.modules(), strict=True):
        for name, buffer in theirs.named_buffers(recurse=False):
            setattr(ours, name, buffer)
    return working, dict(zip(model.parameters(), working.parameters(), strict=True))


def take_gradients(shadows: Mapping[Tensor, Tensor]) -> None:
    """Give each parameter the gradient of its copy, in its own dtype, or none."""
    for source, shadow in shadows.items():
        source.grad = None if shadow.grad is None else shadow.grad.to(source.dtype)


@torch.no_grad()
def rewrite(shadows: Mapping[Tensor, Tensor]) -> None:
    """Write each copy anew from its parameter."""
    for source, shadow in shadows.items():
        shadow.copy_(source)


class Trainee:
    """A model as it is trained, in ``precision`` "float32" or "bf16".

    ``model``: float32 weights, which the optimizer trains and averages; checkpoints hold these and nothing else.
    ``working``: what runs forward and backward. In float32 that is ``model`` itself. In bf16 it is a copy
    (`working_copy`) whose parameters are, after every step, the rounded ones of ``model``: ``optimizer`` writes them in
    the pass in which it trains the others, from the gradients that the copy got.
    """

    def __init__(self, model: StudentTeacher, schedules: Schedules, precision: str = "float32"):
        if precision not in PRECISIONS:
            raise ValueError(f"Trainee: precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
        self.model, self.precision = model, precision
        self.working: StudentTeacher = model
        self.shadows: dict[Tensor, Tensor] = {}
        if precision == "bf16":
            self.working, self.shadows = working_copy(model)
        self.optimizer = make_optimizer(model, schedules, self.shadows)

    def rewrite(self) -> None:
        """Write the copy anew from ``model``, whose weights somebody else has set (a checkpoint was loaded)."""
        rewrite(self.shadows)
