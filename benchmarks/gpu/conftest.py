"""The fixture ``measure``, and when the cases of this folder are collected at all."""

from types import SimpleNamespace

import pytest
import torch

import atst_fast
from benchmarks.gpu import timing
from benchmarks.report import GPU_CASES

if not torch.cuda.is_available() or atst_fast.build_info()["cuda"].startswith("none"):
    collect_ignore_glob = ["bench_*.py"]


@pytest.fixture(scope="session")
def gpu():
    return timing.Cuda()


@pytest.fixture
def measure(request):
    """``measure(call, way="launched", **extra_info)``: call it once, or time it if benchmarks are enabled."""

    def run(call, way="launched", **extra_info):
        if not request.config.getoption("benchmark_enable"):
            call()
            torch.cuda.synchronize()
            return
        stats = getattr(timing, way)(call, request.getfixturevalue("gpu"))
        group = request.node.get_closest_marker("benchmark").kwargs["group"]
        case = SimpleNamespace(group=group, name=request.node.name, params=dict(request.node.callspec.params))
        case.extra_info, case.stats = extra_info, stats
        request.config.stash.setdefault(GPU_CASES, []).append(case)

    return run
