"""A teacher for any model: a copy that follows it as a moving average."""

import copy
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from atst_fast.ops import _checks, ema_update_
from atst_fast.ops.ema import here

_NAME = "EMATeacher"
_BUFFERS = ("skip", "copy", "lerp")
_TAKEN = (torch.float32, torch.bfloat16, torch.float16)
_HALVES = (torch.bfloat16, torch.float16)
Momentum = float | Tensor | Callable[[int], float]


class EMATeacher(nn.Module):
    """A copy of ``student`` whose tensors move towards the student's: ``t <- momentum * t + (1 - momentum) * s``, all
    of them in one call of ``ops.ema_update_``.

    Takes the place of timm's ``ModelEmaV3`` (``update``, ``set``, ``.module``) and of ``AveragedModel`` in
    ``torch.optim.swa_utils`` (``update_parameters``, ``.module``, ``.n_averaged``). State-dict keys ``module.*`` and
    ``n_averaged``, as AveragedModel's.

    Args:
        student: any module; wrappers (DistributedDataParallel, torch.compile) are looked through. The copy,
            ``.module``, needs no gradients, and stays in the mode (training or not) that the student is in.
        momentum: a number from 0 to 1, a tensor without axes (on a GPU it is read there, also by a CUDA graph), or a
            function of the number of updates before, such as a schedule.
        include: names of the modules, parameters and buffers to be followed, with dots, such as ``("encoder",
            "projector")``; the copy has nothing else, it has None in its place. By default everything.
        buffers: ``"copy"`` takes them over from the student with each update, ``"lerp"`` averages those of floating
            point and copies the others, ``"skip"`` leaves them to the teacher: running statistics of a teacher that
            itself runs in training mode, as those of ATST do.

    Parameters of bfloat16 or float16 are averaged in float32, in buffers of this module (``average.*``), and rounded:
    near a momentum of 1 a step is below their resolution. Everything else is averaged in its own dtype. Every update
    averages, the first one too (AveragedModel's first one copies; for that call ``set``). Sharded parameters (FSDP2)
    are averaged where they lie, if student and teacher are sharded alike: shard both after this was made.

    Errors and bits as ``ops.ema_update_``; tensors that it does not take (float64, strided) go through torch's lerp.
    Raises ValueError or TypeError that name the argument; ValueError where the student has not the teacher's tensors.
    """

    n_averaged: Tensor

    def __init__(
        self,
        student: nn.Module,
        momentum: Momentum = 0.9999,
        *,
        include: Collection[str] | None = None,
        buffers: str = "copy",
    ):
        super().__init__()
        if not isinstance(student, nn.Module):
            _checks.fail(_NAME, "student", "a torch.nn.Module", student, TypeError)
        if buffers not in _BUFFERS:
            _checks.fail(_NAME, "buffers", "'skip', 'copy' or 'lerp'", buffers)
        if isinstance(include, str):
            _checks.fail(_NAME, "include", "several names, such as ('encoder',)", include, TypeError)
        if not callable(momentum) and not isinstance(momentum, Tensor):
            _check_momentum(momentum)
        self.momentum, self.buffers_follow = momentum, buffers
        student = _unwrapped(student)
        self.module = _copy_of(student, None if include is None else tuple(include))
        self.module.requires_grad_(False)
        self.register_buffer("n_averaged", torch.zeros((), dtype=torch.int64))
        self.average = nn.Module()
        for name, value in self.module.named_parameters():
            if value.dtype in _HALVES:
                self.average.register_buffer(_key(name), value.detach().float())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The copy's."""
        return self.module(*args, **kwargs)

    @torch.no_grad()
    def update(self, student: nn.Module, step: int | None = None) -> None:
        """Move towards the student. ``step``: what ``momentum`` is asked for where it is a function; by default the
        number of updates before this one, which on a GPU is waited for."""
        momentum = self.momentum
        if callable(momentum):
            momentum = _check_momentum(momentum(int(self.n_averaged) if step is None else step))
        averaged, copied = self._pairs(_unwrapped(student))
        fused = [(here(t), here(s)) for t, s in averaged if _is_taken(t, s)]
        if fused:
            ema_update_([t for t, _ in fused], [s for _, s in fused], momentum)
        for t, s in averaged:
            if not _is_taken(t, s):
                t.lerp_(s.to(t), 1 - momentum if isinstance(momentum, float | int) else (1 - momentum).to(t))
        for t, s in [*copied, *self._rounded()]:
            t.copy_(s)
        self.n_averaged += 1

    update_parameters = update

    @torch.no_grad()
    def set(self, student: nn.Module) -> None:
        """Take all tensors over from the student, those of ``buffers="skip"`` as well."""
        student = _unwrapped(student)
        theirs = _by_name(student)
        for name, t in _tensors(self.module):
            t.copy_(_counterpart(name, t, theirs))
        averaged, _ = self._pairs(student)
        for t, s in averaged:
            t.copy_(s)

    def pairs(self, student: nn.Module) -> dict[Tensor, Tensor]:
        """The teacher's tensor of each parameter of the student, what ``optim.AdamWEMA(teacher=...)`` takes: it does
        their part of ``update`` in its step. Parameters are float32."""
        theirs = _by_name(_unwrapped(student))
        return {_counterpart(n, t, theirs): t for n, t in _named(self.module.named_parameters())}

    def _pairs(self, student: nn.Module) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
        """(teacher, student) tensors: those to be averaged and those to be copied."""
        theirs = _by_name(student)
        averaged: list[tuple[Tensor, Tensor]] = []
        copied: list[tuple[Tensor, Tensor]] = []
        for name, t in _named(self.module.named_parameters()):
            s = _counterpart(name, t, theirs)
            if t.dtype in _HALVES:
                t = self.average.get_buffer(_key(name))
            averaged.append((t, s))
        for name, t in _named(self.module.named_buffers()) if self.buffers_follow != "skip" else ():
            lerped = self.buffers_follow == "lerp" and t.is_floating_point()
            (averaged if lerped else copied).append((t, _counterpart(name, t, theirs)))
        return averaged, copied

    def _rounded(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The half-precision parameters and their averages."""
        for name, t in _named(self.module.named_parameters()):
            if t.dtype in _HALVES:
                yield t, self.average.get_buffer(_key(name))

    @torch.no_grad()
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "EMATeacher":
        """``to``, ``half`` and the like: averages stay float32, and there are those of what is in half precision then;
        what no longer is takes over its average."""
        former = dict(self.average.named_buffers())
        exact = {n: former.get(_key(n), p.detach()) for n, p in self.module.named_parameters()}
        super()._apply(fn, recurse)
        moved = dict(self.average.named_buffers())
        self.average._buffers.clear()
        for name, p in self.module.named_parameters():
            key, value = _key(name), exact[name]
            if key not in moved and p.dtype not in _HALVES:
                continue
            average = moved.get(key)
            if average is None or average.dtype != torch.float32:  # there was none, or it was cast with the rest
                value = p.detach() if value.is_meta and not p.is_meta else value
                average = value.to(p.device, torch.float32, copy=True)
            if p.dtype in _HALVES:
                self.average.register_buffer(key, average)
            else:
                p.copy_(average)
        return self

    def extra_repr(self) -> str:
        return f"momentum={self.momentum}, buffers={self.buffers_follow!r}"


def _check_momentum(value: Any) -> float:
    if not isinstance(value, float | int) or not 0 <= value <= 1:
        error = ValueError if isinstance(value, float | int) else TypeError
        _checks.fail(_NAME, "momentum", "a number from 0 to 1, a tensor without axes, or a function", value, error)
    return value


def _unwrapped(module: nn.Module) -> nn.Module:
    inner: Any = module
    while isinstance(inner, nn.parallel.DistributedDataParallel | nn.DataParallel) or hasattr(inner, "_orig_mod"):
        # the latter is what torch.compile returns
        inner = inner._orig_mod if hasattr(inner, "_orig_mod") else inner.module
    return inner


def _copy_of(student: nn.Module, include: tuple[str, ...] | None) -> nn.Module:
    """A copy; of what is not included, no memory is taken."""
    left_out: list[tuple[str, str]] = []
    found: set[str] = set()

    def walk(module: nn.Module, prefix: str) -> None:
        for kind in ("_modules", "_parameters", "_buffers"):
            for name, value in getattr(module, kind).items():
                path = f"{prefix}{name}"
                whole = [i for i in include or () if path == i or path.startswith(f"{i}.")]
                found.update(whole)
                if whole or value is None:
                    continue
                if kind == "_modules" and any(i.startswith(f"{path}.") for i in include or ()):
                    walk(value, f"{path}.")
                else:
                    left_out.append((prefix.removesuffix("."), name))

    if include is not None:
        walk(student, "")
        if missing := [i for i in include if i not in found]:
            has = ", ".join(name for name, _ in student.named_children())
            _checks.fail(_NAME, "include", f"names that the student has ({has}, ...)", missing)
    kept = {id(x) for i in include or () for x in _within(student, i)}
    memo: dict[int, Any] = {}
    for owner, name in left_out:
        if id(left := getattr(student.get_submodule(owner), name)) not in kept:  # under another name
            memo[id(left)] = None  # to deepcopy, something whose copy is None
    return copy.deepcopy(student, memo)


def _within(student: nn.Module, name: str) -> Iterator[object]:
    """What has that name, what it lies in, and all that it holds."""
    found: Any = student
    for part in name.split("."):
        found = getattr(found, part)
        yield found
    if isinstance(found, nn.Module):
        yield from found.modules()
        yield from found.parameters()
        yield from found.buffers()


def _named(tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Names as they are without torch.compile inside."""
    return ((name.replace("_orig_mod.", ""), t) for name, t in tensors)


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from _named(module.named_parameters())
    yield from _named(module.named_buffers())


def _by_name(student: nn.Module) -> dict[str, Tensor]:
    """All tensors, those with several names (tied weights) under each: the copy may have but one of these."""
    tensors = (*student.named_parameters(remove_duplicate=False), *student.named_buffers(remove_duplicate=False))
    return dict(_named(iter(tensors)))


def _key(name: str) -> str:
    return name.replace("_orig_mod.", "").replace(".", "/")


def _counterpart(name: str, t: Tensor, theirs: dict[str, Tensor]) -> Tensor:
    s = theirs.get(name)
    if s is None or s.shape != t.shape:
        _checks.fail(_NAME, "student", f"a module with a tensor {name} of shape {list(t.shape)}", s)
    return s


def _is_taken(t: Tensor, s: Tensor) -> bool:
    """Whether ``ema_update_`` takes the two."""
    same = t.dtype == torch.float32 and s.dtype in _TAKEN and t.device == s.device
    return same and t.is_contiguous() and s.is_contiguous()
