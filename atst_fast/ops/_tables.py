"""What a front end multiplies with, window and triangles, as one node of a graph."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("atst_fast", "FRAGMENT")


def operator(schema: str, tables: Callable[..., tuple[Tensor, Tensor]]) -> Any:
    """``torch.ops.atst_fast.<name>`` of that schema, copies of what ``tables`` gives: its arguments, ``device`` last.

    For `torch.compile`, which cannot look into a cache and would compute the tables in every call. The schema says
    float and int, so that settings are numbers to the graph where it keeps sizes symbolic.
    """
    _library.define(schema)
    name = schema.partition("(")[0]
    _library.impl(name, lambda *settings: tuple(t.clone() for t in tables(*settings)), "CompositeExplicitAutograd")

    @torch.library.register_fake(f"atst_fast::{name}", lib=_library)
    def _(*settings):
        *numbers, device = settings
        return tuple(torch.empty(t.shape, dtype=t.dtype, device=device) for t in tables(*numbers))

    return getattr(torch.ops.atst_fast, name)
