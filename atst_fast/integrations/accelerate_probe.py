"""Whether a fused forward computes what the original one does: tried out in float64, on a copy with random weights.

A structure alone proves nothing: a module with the right layers may use them in another order, clamp something or add
a bias. So each module is compared with what would replace it, before it is replaced, with weights that are not those of
the model (a table that is still zero would hide what it does), on the CPU, where float64 makes any difference in the
formula stand out. Neither the model nor a random state that it uses is touched.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

# of the largest value: rounding of float64 is 1e-16, another formula far more than this (GELU by tanh: 1e-4)
PROBE_RTOL = 1e-9
# The factors of stochastic depth may be float32, whatever the rest is.
PROBE_FACTORS_RTOL = 2e-7
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
)


_NUMBERS = (bool, int, float, str, tuple)
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


class Unlike(Exception):
    """The two do not compute the same, or could not be compared."""


def hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its forward, or another one than its class has."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module)


def random(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")


def replica(module: nn.Module, replaced: Mapping[int, Any] | None = None, dtype: torch.dtype = torch.float64):
    """A copy of ``module`` on the CPU without its hooks, its parameters random, its buffers as they are.

    ``replaced``: copies of some objects within, by their ids. Works for parameters on any device, also without values.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    memo: dict[int, Any] = dict(replaced or {})
    for child in module.modules():
        if any(is_lazy(tensor) for tensor in [*child.parameters(False), *child.buffers(False)]):
            raise Unlike(f"{type(child).__name__} has no shape before the model has run once")
        memo |= {id(getattr(child, name)): OrderedDict() for name in _HOOKS if hasattr(child, name)}
        for p in child._parameters.values():
            if p is not None and id(p) not in memo:
                width = p.shape[-1] if p.dim() > 1 else 4
                value = (random(generator, *p.shape) * width**-0.5).to(dtype)
                memo[id(p)] = nn.Parameter(value, requires_grad=p.requires_grad)
        for b in child._buffers.values():
            if b is not None and id(b) not in memo:
                value = torch.zeros(b.shape) if b.is_meta else b.detach().cpu().clone()
                memo[id(b)] = value.to(dtype) if b.is_floating_point() else value
    try:
        return copy.deepcopy(module, memo)
    except Exception as error:
        raise Unlike(f"it cannot be copied to be compared: {error}") from error


def run(function: Callable, *args, seed: int = 0, **kwargs):
    """The result without a graph, with draws that begin at ``seed``; an error is raised as `Unlike`."""
    state = torch.get_rng_state()
    try:
        with torch.no_grad(), torch.device("cpu"), torch.autocast("cpu", enabled=False):
            torch.default_generator.manual_seed(seed)
            return function(*args, **kwargs)
    except Exception as error:
        raise Unlike(f"it does not run as expected: {first_line(error)}") from error
    finally:
        torch.set_rng_state(state)


def first_line(error: Exception) -> str:
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0]}" if said else type(error).__name__


def attributes(module: nn.Module) -> dict[str, Any]:
    """Everything that the modules have as attributes of their own, by dotted names."""
    found: dict[str, Any] = {}
    for name, child in module.named_modules():
        own = {key: value for key, value in vars(child).items() if key not in _OF_EVERY_MODULE} | child._buffers
        found |= {f"{name}.{key}" if name else key: value for key, value in own.items()}
    return found


def difference(before: dict[str, Any], after: dict[str, Any]) -> str | None:
    """The name of an attribute that was not there before, or was another object, or another number."""
    for name, value in after.items():
        same = name in before and (before[name] is value or (type(value) in _NUMBERS and before[name] == value))
        if not same:
            return name
    return None


@torch.no_grad()
def compare(what: str, want: Any, got: Any, rtol: float = PROBE_RTOL) -> None:
    """Raise `Unlike` unless two results are the same: tensors, numbers, None, and sequences of them."""
    if isinstance(want, Tensor):
        if not isinstance(got, Tensor) or want.shape != got.shape or want.dtype != got.dtype:
            raise Unlike(f"{what} differs in shape")
        if not want.is_floating_point():
            if not torch.equal(want, got):
                raise Unlike(f"{what} differs")
            return
        size = max(1.0, float(want.abs().max())) if want.numel() else 1.0
        if want.numel() and not float((want - got).abs().max()) <= rtol * size:
            raise Unlike(f"{what} differs")
    elif isinstance(want, (tuple, list)):
        if not isinstance(got, (tuple, list)) or len(want) != len(got):
            raise Unlike(f"{what} differs in form")
        for w, g in zip(want, got):
            compare(what, w, g, rtol)
    elif want != got:
        raise Unlike(f"{what} differs")


def described(module: nn.Module) -> tuple:
    """What two modules of the same behaviour have in common: classes, numbers and shapes all the way down."""
    rows = []
    for name, child in module.named_modules():
        plain: list[tuple] = []
        for key, value in sorted(vars(child).items()):
            if key in _OF_EVERY_MODULE:
                continue
            if key in ("drop_prob", "p") and isinstance(value, float):
                plain.append((key, value > 0))
            elif value is None or isinstance(value, (bool, int, float, str, tuple)):
                plain.append((key, repr(value)))
            else:
                plain.append((key, str(id(value))))
        shapes = [
            (k, None if v is None or is_lazy(v) else tuple(v.shape))
            for k, v in (child._parameters | child._buffers).items()
        ]
        rows.append((name, type(child), hooked(child), tuple(plain), tuple(shapes)))
    return tuple(rows)
