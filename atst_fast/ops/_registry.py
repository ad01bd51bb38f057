"""Who runs each operator on each device, and the one fallback: the reference, with one warning."""

import importlib
import importlib.util
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

_OLDEST = (8, 0)  # compute capability that the GPU kernels are written for (csrc/launch.cuh refuses less)
HALVES = {"cuda"}  # devices whose kernels take bfloat16 and float16
_ON_CPU = "run it on the CPU"
_fallbacks: dict[tuple[str, str], str] = {}
_triton: dict[str, str] = {}  # operator: its module in atst_fast.kernels
_plain: set[str] = set()  # operators that are plain PyTorch on a CPU
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


def register(op: str, *, triton: str | None = None, CPU: Callable | None = None, CUDA: Callable) -> None:
    """Enter an operator in build_info(). ``CUDA`` is its reference.

    ``triton`` names the module of atst_fast.kernels whose function ``op`` runs it on a GPU. The reference runs where
    neither it nor the dispatcher has a kernel, and on a GPU that cannot run the kernel that there is. ``CPU`` is what a
    CPU runs where there is no C++ for it: plain PyTorch, which needs no warning.
    """
    _operators.append(op)
    if CPU is not None:
        _plain.add(op)
        _library.impl(op, CPU, "CPU")
    if triton is not None and importlib.util.find_spec("triton") is not None:
        _triton[op] = triton
        _library.impl(op, partial(_run_triton, op, CUDA), "CUDA")
    elif triton is not None:
        fallback(op, "CUDA", CUDA, "triton is not installed", "pip install triton")
    elif not torch._C._dispatch_has_kernel_for_dispatch_key(f"atst_fast::{op}", "CUDA"):
        fallback(op, "CUDA", CUDA, *_why_no_kernel())
    else:
        # as soon as CUDA is in use, or now if it is: asking for the GPUs would initialise it
        torch.cuda._lazy_call(partial(refer_unfit_gpus, op, CUDA))


def _run_triton(op: str, reference: Callable, *args):
    device = _first_tensor(args).device
    if have := _too_old(device.index):
        _warn(op, "CUDA", have, "use a newer GPU")
        return reference(*args)
    with torch.cuda.device(device):  # Triton launches on the current one
        return triton_kernel(op)(*args)


@cache
def triton_kernel(op: str) -> Callable:
    """The launcher of an operator's Triton kernels; it takes the arguments of the operator's schema."""
    return getattr(importlib.import_module(f"atst_fast.kernels.{_triton[op]}"), op)


def triton_operators() -> list[str]:
    """The operators that Triton kernels run on a GPU."""
    return list(_triton)


def takes_halves(x: Tensor) -> bool:
    """Whether the kernels for the device of ``x`` read and write bfloat16 and float16; else they get float32."""
    return x.device.type in HALVES


def _first_tensor(args: tuple, device: str = "cuda") -> Tensor:
    flat = [t for arg in args for t in (arg if isinstance(arg, (list, tuple)) else [arg])]
    return next(t for t in flat if isinstance(t, Tensor) and t.device.type == device)


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
    if old := _too_old(index):
        return old, "use a newer GPU"
    have = torch.cuda.get_device_capability(index)
    built = _C.build_info()["cuda"]
    for ptx, number, exact in re.findall(r"(PTX of )?sm_(\d+)(a?)", built):
        arch = int(number) // 10, int(number) % 10
        if arch == have or (not exact and arch < have and (ptx or arch[0] == have[0])):
            return None
    cure = f"build atst_fast with TORCH_CUDA_ARCH_LIST={have[0]}.{have[1]}"
    return f"{_describe(index)} and this build's CUDA kernels are for {built}", cure


@cache
def _too_old(index: int) -> str | None:
    """Why that GPU can run no kernel at all, or None."""
    if torch.cuda.get_device_capability(index) >= _OLDEST:
        return None
    return f"{_describe(index)} and the GPU kernels need {_OLDEST[0]}.{_OLDEST[1]}"


def _describe(index: int) -> str:
    have = torch.cuda.get_device_capability(index)
    return f"{torch.cuda.get_device_name(index)} has compute capability {have[0]}.{have[1]}"


def refer_unfit_gpus(op: str, reference: Callable, device: str = "CUDA") -> None:
    """Let ``reference`` run the operator on those GPUs that cannot run its kernel; changes nothing if all can."""
    reasons = {i: why for i in range(torch.cuda.device_count()) if (why := unfit(i))}
    if not reasons:
        return
    kernel = torch.library.get_kernel(f"atst_fast::{op}", device)

    def run(keys, *args, **kwargs):
        index = _first_tensor(args, device.lower()).device.index or 0
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
    cpp = f"C++ ({info['isa']})"
    info["operators"] = {
        op: {"cpu": "PyTorch" if op in _plain else cpp, "cuda": _on_cuda(op, info["cuda"])} for op in _operators
    }
    return info | {"torch": torch.__version__, "python": platform.python_version(), "threads": torch.get_num_threads()}


def _on_cuda(op: str, built: str) -> str:
    why = _fallbacks.get((op, "CUDA"))
    if why:
        return f"reference: {why}"
    return f"Triton ({importlib.import_module('triton').__version__})" if op in _triton else f"CUDA ({built})"
