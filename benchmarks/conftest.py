"""Benchmarks: pytest items that time one call of ours beside what one would call otherwise.

Run them:

    pytest benchmarks --benchmark-enable          measure everything; `make bench` calls this
    pytest benchmarks                             run every case of size "tiny" once, untimed (the ordinary test run)
    pytest benchmarks -k "ema and base" --benchmark-enable
    pytest benchmarks/bench_ops.py --curves --benchmark-enable     the curves over frames, tokens, batch, threads too
    python -m benchmarks.plot [FILE]              draw the newest (or that) result

A measured run writes one file per device, benchmarks/results/<device>/<date>-<commit>.json (atst_fast/bench/report.py
says what is in it), and prints one table per group. No benchmark asserts a time.

Operators are not written here: bench_ops.py makes items of the cases of atst_fast.bench, which `atst-fast bench`
measures as well. Their results are checked in every run, and a wrong one is a failure.

What is more than an operator (steps, the front end, the data) is a pytest-benchmark item in bench_<name>.py:

    @pytest.mark.benchmark(group="front_end")
    @pytest.mark.parametrize("size", ["tiny", "batch"])
    @pytest.mark.parametrize("provider", ["atst_fast", "official structure"])
    def test_front_end(benchmark, provider, size):
        call = PROVIDERS[provider](make_inputs(size))     # everything that is not to be timed
        benchmark.extra_info.update(bytes=12 * values)
        benchmark(call)

group: what is measured. provider (a parameter of the item): "atst_fast" is ours, all others are its peers. Items of
one group whose other parameters are equal form one comparison: their ratios to "atst_fast" are in the table. size: only
"tiny" (and items without a size) run when nothing is measured. extra_info, all optional:
    bytes       bytes that the call must at least read and write, each once
    flops       floating-point operations that it must at least do
    dtype       "bfloat16" or "float16", where the operations are tensor-core products: of a GPU, their rate is measured
    peak_flops  the datasheet's rate, of which the result then has the share
    items       what a second rate counts, as (number, unit): (10.0, "s audio")
    note        a few words for the table
Their correctness is the business of tests/. Making inputs and warming up stay outside of the timed call. torch's number
of threads is what the environment sets (OMP_NUM_THREADS).

benchmarks/gpu/ holds the steps of a GPU; its results are written to a file of their own, under the GPU's name, with the
GPU's rates.
"""

import gc
from pathlib import Path

import pytest
import torch

import atst_fast
from atst_fast.bench import machine
from atst_fast.bench import report as results
from atst_fast.bench.session import Measured, Session
from benchmarks import report

if not torch.cuda.is_available() or atst_fast.build_info()["cuda"].startswith("none"):
    collect_ignore_glob = ["gpu/bench_*.py"]

HERE = Path(__file__).parent
CASES = pytest.StashKey[dict]()  # device: the cases that were measured
GPU_MACHINE = pytest.StashKey[dict]()  # with the run's date


def pytest_addoption(parser):
    parser.addoption("--commit", default="", help="what is measured, in a copy of the tree without git")
    parser.addoption("--curves", action="store_true", help="measure the operators over frames, tokens, batch, threads")


def pytest_configure(config):
    machine.name_commit(config.getoption("--commit"))
    config.option.benchmark_quiet = True  # report.py prints the tables
    if config.getoption("benchmark_enable"):
        config.option.benchmark_warmup = True
        config.option.benchmark_warmup_iterations = 3


def pytest_collection_modifyitems(config, items):
    enabled, curves = config.getoption("benchmark_enable"), config.getoption("--curves")
    here = [item for item in items if HERE in item.path.parents]  # pytest hands over those of tests/ as well
    left = [item for item in here if not _wanted(item, enabled, curves)]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if item not in left]


def _wanted(item, enabled, curves):
    params = item.callspec.params if hasattr(item, "callspec") else {}
    case = params.get("case")
    if case is not None and case.kind.startswith("over"):
        return enabled and curves
    return enabled or (params.get("size") if case is None else case.size) in (None, "tiny")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def session():
    return Session()


@pytest.fixture(scope="session")
def gpu(request):
    """What the GPU is and can do is measured before its first case, whatever becomes of it."""
    request.config.stash[GPU_MACHINE] = {**machine.describe_gpu(), "date": results.now()}


@pytest.fixture
def measure(request, session):
    """``measure(case)``: check its results, and time it if benchmarks are enabled."""

    def run(case):
        if not request.config.getoption("benchmark_enable"):
            with machine.timing.on_threads(1):  # so that small cases do not wait for a second core
                session.check(case)
            return
        if case.device == "cuda":
            request.getfixturevalue("gpu")
        keep(request.config.stash, case.device, session.measure(case))
        gc.collect()
        if case.device == "cuda":
            torch.cuda.empty_cache()

    return run


@pytest.fixture
def measured_apart(request, gpu):
    """``measured_apart(stats, extra_info)``: a case of a GPU that was measured by a process of its own."""
    item = request.node
    group = item.get_closest_marker("benchmark").kwargs["group"]
    params = dict(item.callspec.params)
    return lambda stats, extra: keep(item.config.stash, "cuda", Measured(group, item.name, params, extra, stats))


def keep(stash, device, measured):
    """Add a case to the result. That of a GPU is written at once: a run that is killed leaves what it has."""
    cases = stash.setdefault(CASES, {}).setdefault(device, [])
    cases.append(measured)
    if device == "cuda":
        report.save(of_gpu(stash))


def of_gpu(stash):
    return results.collect(stash[CASES]["cuda"], stash[GPU_MACHINE])


def pytest_terminal_summary(terminalreporter, config):
    if not config.getoption("benchmark_enable"):
        return
    session = getattr(config, "_benchmarksession", None)
    cases = config.stash.get(CASES, {})
    on_cpu = [b for b in session.benchmarks if b.stats.data and not b.has_error] if session else []
    on_cpu = [*cases.get("cpu", []), *on_cpu]
    found = []
    if on_cpu:
        terminalreporter.write_line("\nmeasuring this machine's bandwidth and sgemm rate ...")
        threads = {int(case.params["threads"]) for case in on_cpu if "threads" in (case.params or {})}
        found.append(results.collect(on_cpu, machine.describe(threads)))
    if cases.get("cuda"):
        found.append(of_gpu(config.stash))
    for result in found:
        for line in results.tables(result):
            terminalreporter.write_line(line)
        terminalreporter.write_line(f"\nwritten to {report.save(result)}")
