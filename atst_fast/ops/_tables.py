"""What a front end multiplies with, window and triangles: cached, and one node of a graph."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

_library = torch.library.Library("atst_fast", "FRAGMENT")
_CPU = torch.device("cpu")


def cached(schema: str, make: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """``tables(*settings, device=...)``: what ``make(*settings)`` gives, on that device (default: the CPU). They are
    cached: do not write into them.

    `torch.compile`, which cannot look into a cache and would compute them in every call, gets copies from an operator
    of that schema: the settings, then ``device``. It says float and int, so that settings are numbers to the graph
    where it keeps sizes symbolic.
    """

    @lru_cache(maxsize=32, typed=True)  # 512.0 is refused also where 512 has been
    def made(device: torch.device, *settings: Any) -> tuple[Tensor, ...]:
        # of ordinary tensors whatever mode the first caller is in: inference, fake tensors, another default device
        with torch.inference_mode(False), _disable_current_modes():
            return tuple(t.to(device) for t in make(*settings))

    _library.define(schema)
    name = schema.partition("(")[0]
    _library.impl(name, lambda *args: tuple(t.clone() for t in made(args[-1], *args[:-1])), "CompositeExplicitAutograd")

    @torch.library.register_fake(f"atst_fast::{name}", lib=_library)
    def _(*args):
        *settings, device = args
        return tuple(torch.empty(t.shape, dtype=t.dtype, device=device) for t in made(_CPU, *settings))

    traced = getattr(torch.ops.atst_fast, name)

    def tables(*settings: Any, device: torch.device = _CPU) -> Any:
        if torch.compiler.is_compiling():
            return traced(*settings, device)
        try:
            return made(device, *settings)
        except TypeError:
            make(*settings)  # says which setting it is that cannot be looked up
            raise

    return tables
