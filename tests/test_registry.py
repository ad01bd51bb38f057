"""Who runs an operator where there is no CUDA kernel, and on a GPU that cannot run the one there is."""

import subprocess
import sys
import warnings

import pytest
import torch

from atst_fast import _C
from atst_fast.ops import _registry

GPUS = {0: (7, 5), 1: (9, 0), 2: (10, 3), 3: (12, 0)}


@pytest.fixture
def gpus(monkeypatch):
    """Let torch see GPUS, whatever there is."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(GPUS))
    monkeypatch.setattr(torch.cuda, "get_device_capability", GPUS.get)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    _registry.unfit.cache_clear()
    _registry._too_old.cache_clear()
    yield
    _registry.unfit.cache_clear()
    _registry._too_old.cache_clear()


@pytest.fixture
def built(monkeypatch):
    """Let the extension say that it was built for something."""
    return lambda says: monkeypatch.setattr(_C, "build_info", lambda: {"cuda": says})


@pytest.fixture
def op(monkeypatch):
    """Operators whose "GPU" is the CPU (device 0). probe adds 1, its reference adds 2; bare has no kernel."""
    library = torch.library.Library("atst_fast", "FRAGMENT")
    library.define("probe(Tensor[] xs, Tensor y) -> Tensor")
    library.impl("probe", lambda xs, y: y + 1, "CPU")
    library.impl("probe", lambda xs, y: torch.empty_like(y), "Meta")
    library.define("bare(Tensor[] xs, Tensor y) -> Tensor")
    own = torch.library.Library("atst_fast", "IMPL")
    monkeypatch.setattr(_registry, "_library", own)
    monkeypatch.setattr(_registry, "_fallbacks", {})
    monkeypatch.setattr(_registry, "_warned", set())
    yield lambda name="probe": getattr(torch.ops.atst_fast, name)([torch.zeros(1)], torch.zeros(2)).tolist()
    own._destroy()
    library._destroy()


@pytest.mark.parametrize(
    "says, fit",
    [
        ("sm_80, sm_90, sm_100, PTX of sm_100", {1, 2, 3}),
        ("sm_80, sm_90", {1}),
        ("sm_90a", {1}),
        ("sm_80", set()),
        ("PTX of sm_80", {1, 2, 3}),
        ("sm_100", {2}),
    ],
)
def test_which_gpus_a_build_fits(gpus, built, says, fit):
    built(says)
    assert {i for i in GPUS if _registry.unfit(i) is None} == fit


def test_what_is_said_about_an_unfit_gpu(gpus, built):
    built("sm_90")
    assert _registry.unfit(0) == (
        "GPU 0 has compute capability 7.5 and the GPU kernels need 8.0",
        "use a newer GPU",
    )
    assert _registry.unfit(3) == (
        "GPU 3 has compute capability 12.0 and this build's CUDA kernels are for sm_90",
        "build atst_fast with TORCH_CUDA_ARCH_LIST=12.0",
    )


def test_an_old_gpu_runs_the_reference_and_says_so_once(gpus, op):
    assert op() == [1, 1]
    _registry.refer_unfit_gpus("probe", lambda xs, y: y + 2, "CPU")
    with pytest.warns(UserWarning, match=r"atst_fast.probe: .* reference on CPU: GPU 0 has compute capability 7.5 and"):
        assert op() == [2, 2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert op() == [2, 2]
        compiled = torch.compile(lambda y: torch.ops.atst_fast.probe([y], y), fullgraph=True, backend="aot_eager")
        assert compiled(torch.zeros(2)).tolist() == [2, 2]
    assert "compute capability 7.5" in _registry._fallbacks["probe", "CPU"]


def test_a_new_gpu_beside_an_old_one_runs_the_kernel(gpus, op, monkeypatch):
    monkeypatch.setitem(GPUS, 0, (8, 0))
    monkeypatch.setitem(GPUS, 1, (7, 0))
    monkeypatch.setattr(_C, "build_info", lambda: {"cuda": "sm_80"})
    _registry.refer_unfit_gpus("probe", lambda xs, y: y + 2, "CPU")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert op() == [1, 1]


def test_gpus_that_can_all_run_it_change_nothing(op, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    _registry.refer_unfit_gpus("probe", lambda xs, y: y + 2, "CPU")
    assert op() == [1, 1]
    assert not _registry._fallbacks


@pytest.mark.parametrize(
    "says, reason",
    [
        ("none: torch had no CUDA when this was built", "torch had no CUDA when this was built; build atst_fast where"),
        ("none: nvcc was not found when this was built", "nvcc was not found when this was built; build atst_fast"),
        ("sm_90", "this version has no CUDA kernel for it yet; run it on the CPU for the fast kernel"),
    ],
)
def test_the_fallback_says_why_there_is_no_kernel(op, built, monkeypatch, says, reason):
    built(says)
    _registry.fallback("bare", "CPU", lambda xs, y: y + 2, *_registry._why_no_kernel())
    with pytest.warns(UserWarning, match=reason):
        assert op("bare") == [2, 2]


def test_importing_does_not_initialise_cuda():
    program = "import torch, atst_fast.ops; assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", program], check=True)
