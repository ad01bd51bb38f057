"""Error messages of the public functions: operator, argument, what was expected and what came."""

import math
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

FINITE = sys.float_info.max  # a bound that leaves infinity out


class Later:
    """``template.format(*values)``, put together only where it is shown: to put a size into a string makes a number of
    it, and a trace would hold for that size alone."""

    def __init__(self, template: str, *values: Any):
        self.template, self.values = template, values

    def __str__(self) -> str:
        return self.template.format(*self.values)


def describe(value: Any) -> str:
    """A value as an error message shows it: tensors as dtype, shape and device."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} on {value.device}"
    return f"{type(value).__name__} {value!r}"


def fail(op: str, name: str, expected: str | Later, got: Any, error: type[Exception] = ValueError) -> NoReturn:
    """Raise ``<op>: <name> must be <expected>, got <got>``."""
    raise error(f"{op}: {name} must be {expected}, got {describe(got)}")


def tensor(
    op: str, name: str, value: Any, expected: str | Later, *, dim: int | None = None, dtypes: Sequence[torch.dtype] = ()
) -> None:
    """Check that ``value`` is a tensor of that rank and one of those dtypes; ``expected`` gives the axes in words."""
    if not isinstance(value, Tensor):
        fail(op, name, f"a tensor {expected}", value, TypeError)
    traced = value.dtype != torch.float64 and forward_ad._current_level >= 0  # float64 runs plain PyTorch
    if traced and forward_ad.unpack_dual(value).tangent is not None:
        raise NotImplementedError(f"{op}: {name} has a forward-mode tangent, which this operator does not propagate")
    if dtypes and value.dtype not in dtypes:
        names = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        fail(op, name, f"{expected} of dtype {names}", value, TypeError)
    if dim is not None and value.dim() != dim:
        fail(op, name, expected, value)


def is_integer(value: Any) -> bool:
    """Whether it is a whole number, or a size that a trace keeps symbolic."""
    return isinstance(value, int | torch.SymInt)


def number(
    op: str,
    name: str,
    value: Any,
    expected: str | Later,
    least: float = -math.inf,
    most: float = math.inf,
    *,
    whole: bool = False,
) -> None:
    """Check that ``value`` is a number from ``least`` to ``most``, with ``whole`` an integer; ``expected`` says it in
    words. Without bounds nobody looks at the value, which a trace may keep symbolic."""
    if not _is_number(value, whole):
        fail(op, name, expected, value, TypeError)
    if (least > -math.inf or most < math.inf) and not least <= _plain(value) <= most:
        fail(op, name, expected, value)


def _plain(value: Any) -> Any:
    """A number of Python: numpy compares in its own dtype, in which FINITE may be infinity."""
    return value.item() if hasattr(type(value), "item") else value


def _is_number(value: Any, whole: bool = False) -> bool:
    kinds = (int, torch.SymInt) if whole else (int, float, torch.SymInt, torch.SymFloat)
    # numbers of numpy have either method
    return isinstance(value, kinds) or hasattr(type(value), "__index__" if whole else "__float__")


def is_range(value: Any) -> bool:
    """Whether these are two finite numbers, the smaller first."""
    pair = isinstance(value, Sequence) and len(value) == 2 and all(_is_number(x) for x in value)
    return pair and -FINITE <= _plain(value[0]) < _plain(value[1]) <= FINITE


def readable(x: Tensor) -> bool:
    """Whether the host may look at the values of ``x`` without waiting, and there are any: not while `torch.compile` or
    `torch.export` traces, nor in a tensor that only describes one (meta, fake)."""
    # a subclass of Tensor may be anything; those that trace are subclasses
    return not torch.compiler.is_compiling() and x.device.type == "cpu" and type(x) is Tensor


def same_device(op: str, first: str, a: Tensor, **others: Tensor | None) -> None:
    """Check that all ``others`` (by argument name) lie on the device of ``a``."""
    for name, b in others.items():
        if b is not None and b.device != a.device:
            fail(op, name, f"on {a.device}, as {first} is", b)


def row(op: str, name: str, value: Any, of: str, x: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    """Check that ``value`` is ``[D]``, one number for each place of the last axis of ``x`` (the argument ``of``)."""
    expected = Later("[{}] (the last axis of {})", x.shape[-1], of)
    tensor(op, name, value, expected, dim=1, dtypes=dtypes)
    if value.shape[0] != x.shape[-1]:
        fail(op, name, expected, value)
    same_device(op, of, x, **{name: value})


def count(op: str, value: Any, of: str, x: Tensor) -> None:
    """Check that ``value`` is None or a scalar on the device of ``x`` (the argument ``of``). It is not read."""
    if value is not None:
        expected = f"[] (how many rows of {of} are valid)"
        tensor(op, "count", value, expected, dim=0, dtypes=(torch.int64, torch.int32))
        same_device(op, of, x, count=value)
