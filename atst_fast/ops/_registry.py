"""Who runs each operator on each device, and the one fallback: the reference, with one warning."""

import platform
import re
import warnings
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor

try:
    import atst_fast._C as _C
except ImportError as error:
    raise ImportError(
        "atst_fast: its compiled extension atst_fast._C cannot be loaded; build it with `make` or "
        f"`pip install --no-build-isolation -e .` in the project's folder ({error})"
    ) from error

_OLDEST = (8, 0)  # compute capability that the CUDA kernels are written for (csrc/launch.cuh refuses less)
_ON_CPU = "run it on the CPU"
_fallbacks: dict[tuple[str, str], str] = {}
_operators: list[str] = []
_warned: set[tuple[str, str]] = set()
_library = torch.library.Library("atst_fast", "IMPL")


def fallback(op: str, device: str, reference: Callable, why: str, cure: str = _ON_CPU) -> None:
    """Let ``reference`` run ``torch.ops.atst_fast.<op>`` on ``device`` ("CUDA"), warning once with reason and cure.

    ``reference`` takes the operator's own arguments (its schema in csrc/library.cpp).
    """
    _fallbacks[op, device] = why

    def run(*args, **kwargs):
        _warn(op, device, why, cure)
        return reference(*args, **kwargs)

    _library.impl(op, run, device)


def _warn(op: str, device: str, why: str, cure: str) -> None:
    if (op, device) not in _warned:
        _warned.add((op, device))
        message = f"atst_fast.{op}: runs its slow PyTorch reference on {device}: {why}; {cure} for the fast kernel"
        warnings.warn(message, stacklevel=4)


def register(op: str, **others: Callable) -> None:
    """Enter an operator in build_info(); ``others`` are references per device, e.g. ``CUDA=reference``.

    A reference runs where the dispatcher has no kernel, and on a GPU that cannot run the kernel that there is.
    """
    _operators.append(op)
    for device, reference in others.items():
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"atst_fast::{op}", device):
            fallback(op, device, reference, *_why_no_kernel())
        elif device == "CUDA":
            # as soon as CUDA is in use, or now if it is: asking for the GPUs would initialise it
            torch.cuda._lazy_call(partial(refer_unfit_gpus, op, reference))


def has_fallback(op: str, device: str) -> bool:
    """Whether ``reference`` runs the operator on that device, or on some GPU of this machine."""
    return (op, device) in _fallbacks


def _why_no_kernel() -> tuple[str, str]:
    built = _C.build_info()["cuda"]
    if built.startswith("none: "):
        return built.removeprefix("none: "), "build atst_fast where torch has CUDA and the same CUDA's nvcc is found"
    return "this version has no CUDA kernel for it yet", _ON_CPU


@cache
def unfit(index: int) -> tuple[str, str] | None:
    """Why that GPU cannot run the CUDA kernels of this build, and the cure; None if it can."""
    have, name = torch.cuda.get_device_capability(index), torch.cuda.get_device_name(index)
    here = f"{name} has compute capability {have[0]}.{have[1]}"
    if have < _OLDEST:
        return f"{here} and the CUDA kernels need {_OLDEST[0]}.{_OLDEST[1]}", "use a newer GPU"
    built = _C.build_info()["cuda"]
    for ptx, number, exact in re.findall(r"(PTX of )?sm_(\d+)(a?)", built):
        arch = int(number) // 10, int(number) % 10
        if arch == have or (not exact and arch < have and (ptx or arch[0] == have[0])):
            return None
    cure = f"build atst_fast with TORCH_CUDA_ARCH_LIST={have[0]}.{have[1]}"
    return f"{here} and this build's CUDA kernels are for {built}", cure


def refer_unfit_gpus(op: str, reference: Callable, device: str = "CUDA") -> None:
    """Let ``reference`` run the operator on those GPUs that cannot run its kernel; changes nothing if all can."""
    reasons = {i: why for i in range(torch.cuda.device_count()) if (why := unfit(i))}
    if not reasons:
        return
    kernel = torch.library.get_kernel(f"atst_fast::{op}", device)

    def run(keys, *args, **kwargs):
        flat = [t for arg in args for t in (arg if isinstance(arg, (list, tuple)) else [arg])]
        index = next(t.device.index or 0 for t in flat if isinstance(t, Tensor) and t.device.type == device.lower())
        if index not in reasons:
            return kernel.call_boxed(keys, *args, **kwargs)
        _warn(op, device, *reasons[index])
        return reference(*args, **kwargs)

    _fallbacks[op, device] = "; ".join(dict.fromkeys(why for why, _ in reasons.values()))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")  # that it overrides is the intention
        _library.impl(op, run, device, with_keyset=True, allow_override=True)


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
    and why), ``isa`` is the CPU instruction set in use (``avx512``, ``avx2`` or ``portable``), ``cuda`` names the GPUs
    that the CUDA kernels were built for, or is ``"none: "`` and why there are none; the rest are versions.
    """
    info = dict(_C.build_info())
    info["operators"] = {op: {"cpu": f"C++ ({info['isa']})", "cuda": _on_cuda(op, info["cuda"])} for op in _operators}
    return info | {"torch": torch.__version__, "python": platform.python_version(), "threads": torch.get_num_threads()}


def _on_cuda(op: str, built: str) -> str:
    why = _fallbacks.get((op, "CUDA"))
    return f"reference: {why}" if why else f"CUDA ({built})"
