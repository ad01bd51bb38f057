import importlib.util
import os

import pytest
import torch

from atst_fast import _C, build_info
from tests import cuda_shim
from tests.cuda import static
from tests.triton import interpreter

_ISAS = ["portable", "avx2", "avx512"]


def _no_triton():
    return None if importlib.util.find_spec("triton") else "needs triton"


_NEEDS = {"shim": cuda_shim.unavailable, "static": static.missing, "triton": _no_triton}


def pytest_addoption(parser):
    parser.addoption(
        "--require",
        default="",
        metavar="shim,static,triton",
        help="no run where their tests would be skipped for want of tools",
    )


def pytest_configure(config):
    if others := getattr(config, "workerinput", None):  # under pytest-xdist: the cores are for all of its processes
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // others["workercount"]))
    for name in filter(None, config.getoption("--require").split(",")):
        if name not in _NEEDS:
            raise pytest.UsageError(f"--require: {name!r} is none of {', '.join(_NEEDS)}")
        if reason := _NEEDS[name]():
            raise pytest.UsageError(f"--require {name}: {reason}")


def _runs_here(isa):
    try:
        _C.force_isa(isa)
    except ValueError:
        return False
    _C.force_isa("")
    return True


@pytest.fixture(params=[isa for isa in _ISAS if _runs_here(isa)])
def isa(request):
    """Run the test once with the kernels of every CPU instruction set of this machine."""
    _C.force_isa(request.param)
    yield request.param
    _C.force_isa("")


@pytest.fixture
def threads():
    """Set the number of threads for one test: ``threads(2)``."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def _no_gpu():
    """Why the CUDA kernels cannot run on a GPU here, or None."""
    built = build_info()["cuda"]
    if built.startswith("none: "):
        return f"this build has no CUDA kernels ({built.removeprefix('none: ')})"
    return None if torch.cuda.is_available() else "no GPU"


needs_gpu = pytest.mark.skipif(_no_gpu() is not None, reason=_no_gpu() or "")


class CudaOps:
    """Where the CUDA kernels run: .ops, .device, .to(x)."""

    def __init__(self, where):
        self.where = where
        self.ops = torch.ops.atst_fast if where == "gpu" else cuda_shim.load()
        self.device = "cuda" if where == "gpu" else "cpu"

    def to(self, x):
        """On the device, with the same strides."""
        if x.is_contiguous():
            return x.to(self.device)
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=self.device).copy_(x)

    def schedule(self, order, seed=0):
        """The order of blocks and threads for the rest of the test: forward, reverse, shuffled. A GPU has its own."""
        if self.where == "shim":
            cuda_shim.schedule(order, seed)


@pytest.fixture(params=["shim", pytest.param("gpu", marks=pytest.mark.gpu)])
def cuda_ops(request):
    """Run the test with the CUDA kernels on the CPU, every access checked (tests/cuda_shim), and on a GPU."""
    if reason := _no_gpu() if request.param == "gpu" else cuda_shim.unavailable():
        pytest.skip(reason)
    if request.param == "gpu":
        yield CudaOps("gpu")
    else:
        with cuda_shim.nothing_left():
            yield CudaOps("shim")


class TritonOps:
    """Where the Triton kernels run when the public functions are called there: .device, .to(x)."""

    def __init__(self, device):
        self.device = device

    def to(self, x):
        """On the device, with the same strides."""
        if x.is_contiguous():
            return x.to(self.device)
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=self.device).copy_(x)

    poison = staticmethod(interpreter.poison)


@pytest.fixture
def triton_ops():
    """Let the public functions run the Triton kernels: on a GPU if there is one, else on the CPU, interpreted, with
    every access checked (tests/triton/interpreter.py)."""
    if reason := _no_triton():
        pytest.skip(reason)
    if interpreter.enabled():
        with interpreter.on_cpu():
            yield TritonOps("cpu")
    else:
        yield TritonOps("cuda")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
