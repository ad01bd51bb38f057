"""Weights into a module, all of them or none: what does not fit is listed, and nothing is left as it was drawn."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

SHOWN = 5  # keys of a kind in a message


class CheckpointError(ValueError):
    """A file that holds no usable network; the message names the file and what is wrong with it.

    Where tensors are what is wrong, the message shows the first ones of each kind and these hold all of them, by key:
    ``missing``, ``extra``, ``misshapen`` (shape or dtype) and ``not_finite``.
    """

    def __init__(self, message: str, faults: "Faults | None" = None):
        super().__init__(message)
        self.missing, self.extra, self.misshapen, self.not_finite = faults or Faults((), (), (), ())

    def __reduce__(self):
        return type(self), (str(self), Faults(self.missing, self.extra, self.misshapen, self.not_finite))


class Faults(NamedTuple):
    """Keys of tensors that a module needs and a file lacks, that only the file has, and of unusable ones."""

    missing: tuple[str, ...]
    extra: tuple[str, ...]
    misshapen: tuple[str, ...]
    not_finite: tuple[str, ...]

    def __str__(self) -> str:
        names = ("missing", "extra", "misshapen", "not finite")
        return "; ".join(f"{len(keys)} {name}: {_some(keys)}" for name, keys in zip(names, self) if keys)


def find_faults(
    module: nn.Module, weights: Mapping[str, Tensor], prefix: str = "", extra: Iterable[str] = ()
) -> tuple[Faults, str]:
    """What keeps ``weights`` from being the state of ``module``, under the file's names (``prefix`` + key), and that in
    words. ``extra``: full names of further tensors that nothing can be done with."""
    wanted = module.state_dict()
    misshapen, shapes = [], []
    for key, have in weights.items():
        want = wanted.get(key)
        if want is not None and not _fits(have, want):
            misshapen.append(prefix + key)
            shapes.append(f"{prefix}{key} {_kind(have, want)}, expected {_kind(want, have)}")
    faults = Faults(
        tuple(prefix + key for key in wanted if key not in weights),
        (*(prefix + key for key in weights if key not in wanted), *extra),
        tuple(misshapen),
        tuple(prefix + key for key, x in weights.items() if not is_finite(_as(x, wanted.get(key)))),
    )
    described = faults._replace(misshapen=tuple(shapes))
    return faults, str(described)


def load_weights(
    module: nn.Module, weights: Mapping[str, Tensor], what: str, prefix: str = "", extra: Iterable[str] = ()
) -> None:
    """Make ``weights`` the state of ``module``, which may be on the meta device; it gets tensors of its own, of the
    dtypes that it has.

    ``what`` begins the message of the ``CheckpointError`` that lists what is missing, extra, misshapen or not finite.
    """
    faults, words = find_faults(module, weights, prefix, extra)
    if any(faults):
        raise CheckpointError(f"{what}: {words}", faults)
    wanted = module.state_dict()
    form = torch.contiguous_format  # in memory too they are what the module would have made
    own = {k: weights[k].detach().to(dtype=want.dtype, copy=True, memory_format=form) for k, want in wanted.items()}
    on_meta = any(want.is_meta for want in wanted.values())
    module.load_state_dict(own, assign=on_meta)


def is_finite(x: Tensor) -> bool:
    if x.is_meta:  # it has no values
        return False
    # the indices of a sparse tensor are not to be trusted in a damaged file: it is not read, and fits nowhere
    if not (x.is_floating_point() or x.is_complex()) or x.layout != torch.strided:
        return True
    # 8-bit floats have no isfinite of their own
    return bool((x.float() if x.element_size() == 1 else x).isfinite().all())


def _as(x: Tensor, want: Tensor | None) -> Tensor:
    """In the dtype that it is going to have, which may not reach as far."""
    return x.to(want.dtype) if want is not None and _fits(x, want) else x


def _fits(have: Tensor, want: Tensor) -> bool:
    same_kind = have.is_floating_point() == want.is_floating_point() and have.is_complex() == want.is_complex()
    return have.shape == want.shape and same_kind and have.layout == torch.strided


def _kind(x: Tensor, other: Tensor) -> str:
    """The shape, or the dtype or the layout where the shape is not the difference."""
    kind = x.layout if x.layout != other.layout else x.dtype
    return str(list(x.shape)) if x.shape != other.shape else str(kind).removeprefix("torch.")


def _some(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    return ", ".join(keys[:SHOWN]) + more
