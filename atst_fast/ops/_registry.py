"""Who runs each operator on each device, and the one fallback: the reference, with one warning."""

import platform
import warnings
from collections.abc import Callable

import torch

try:
    import atst_fast._C as _C
except ImportError as error:
    raise ImportError(
        "atst_fast: its compiled extension atst_fast._C cannot be loaded; build it with `make` or "
        f"`pip install --no-build-isolation -e .` in the project's folder ({error})"
    ) from error

_NO_CUDA = "this version has no CUDA kernel for it yet"
_fallbacks: dict[tuple[str, str], str] = {}
_operators: list[str] = []
_warned: set[tuple[str, str]] = set()


def fallback(op: str, device: str, reference: Callable, why: str = _NO_CUDA, cure: str = "run it on the CPU") -> None:
    """Let ``reference`` run ``torch.ops.atst_fast.<op>`` on ``device`` ("CUDA"), warning once with reason and cure.

    ``reference`` takes the operator's own arguments (its schema in csrc/library.cpp).
    """
    _fallbacks[op, device] = why

    def run(*args, **kwargs):
        if (op, device) not in _warned:
            _warned.add((op, device))
            message = f"atst_fast.{op}: runs its slow PyTorch reference on {device}: {why}; {cure} for the fast kernel"
            warnings.warn(message, stacklevel=3)
        return reference(*args, **kwargs)

    torch.library.impl(f"atst_fast::{op}", device)(run)


def register(op: str, **others: Callable) -> None:
    """Enter an operator in build_info(); ``others`` are fallbacks per device, e.g. ``CUDA=reference``."""
    _operators.append(op)
    for device, reference in others.items():
        fallback(op, device, reference)


def differentiable_once(op: str) -> None:
    """Let a gradient of the gradients that ``torch.ops.atst_fast.<op>`` computes be an error, not silently zero."""

    def refuse(*_):
        raise RuntimeError(
            f"atst_fast.{op}: gradients of gradients are not implemented; float64 input runs the PyTorch reference, "
            "which has them"
        )

    torch.library.register_autograd(f"atst_fast::{op}", refuse)


def build_info() -> dict:
    """What this build contains and who runs each operator.

    Returns a dict: ``operators`` maps each name to ``{"cpu": ..., "cuda": ...}`` (the implementation, or the reference
    and why), ``isa`` is the CPU instruction set in use (``avx512``, ``avx2`` or ``portable``); the rest are versions.
    """
    info = dict(_C.build_info())
    info["operators"] = {
        op: {
            "cpu": f"C++ ({info['isa']})",
            "cuda": f"reference: {_fallbacks[op, 'CUDA']}" if (op, "CUDA") in _fallbacks else "no kernel",
        }
        for op in _operators
    }
    return info | {"torch": torch.__version__, "python": platform.python_version(), "threads": torch.get_num_threads()}
