"""The fixture ``measure``, and when the cases of this folder are collected at all."""

from types import SimpleNamespace

import pytest
import torch

import atst_fast
from benchmarks import machine, report
from benchmarks.gpu import timing

if not torch.cuda.is_available() or atst_fast.build_info()["cuda"].startswith("none"):
    collect_ignore_glob = ["bench_*.py"]


@pytest.fixture(scope="session")
def gpu(request):
    """The stopwatch; what the machine is and can do is measured before the first case, whatever becomes of the GPU."""
    request.config.stash[report.GPU_MACHINE] = {"date": report.now(), **machine.describe_gpu()}
    return timing.Cuda()


@pytest.fixture
def measure(request):
    """``measure(call, way="launched", **extra_info)``: call it once, or time it if benchmarks are enabled."""

    def run(call, way="launched", **extra_info):
        if not request.config.getoption("benchmark_enable"):
            call()
            torch.cuda.synchronize()
            return
        keep(request.node, getattr(timing, way)(call, request.getfixturevalue("gpu")), extra_info)

    return run


@pytest.fixture
def measured_apart(request, gpu):
    """``measured_apart(stats, extra_info)``: a case that was measured by a process of its own."""
    return lambda stats, extra_info: keep(request.node, stats, extra_info)


def keep(item, stats, extra_info):
    """Add a case to the result, and write it: a run that is killed, or whose GPU fails, leaves what it has."""
    group = item.get_closest_marker("benchmark").kwargs["group"]
    case = SimpleNamespace(group=group, name=item.name, params=dict(item.callspec.params))
    case.extra_info, case.stats = extra_info, stats
    stash = item.config.stash
    cases = stash.setdefault(report.GPU_CASES, [])
    cases.append(case)
    report.save(report.collect(cases, stash[report.GPU_MACHINE]))
