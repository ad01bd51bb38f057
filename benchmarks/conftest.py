"""Benchmarks: pytest items that time one call of ours beside what one would call otherwise.

Run them:

    pytest benchmarks --benchmark-enable          measure everything; `make bench` calls this
    pytest benchmarks                             run every case of size "tiny" once, untimed (the ordinary test run)
    pytest benchmarks -k "ema and base" --benchmark-enable
    python -m benchmarks.plot [FILE]              draw the newest (or that) result

A measured run writes one file, benchmarks/results/<device>/<date>-<commit>.json (report.py says what is in it), and
prints one table per group. No benchmark asserts a time; correctness is the business of tests/.

Write one, in bench_<op>.py:

    @pytest.mark.benchmark(group="ema_update_")
    @pytest.mark.parametrize("size", ["tiny", "small", "base"])
    @pytest.mark.parametrize("provider", ["atst_fast", "foreach_lerp", "python_loop"])
    def test_ema_update(benchmark, provider, size):
        call = PROVIDERS[provider](make_inputs(size))     # everything that is not to be timed
        benchmark.extra_info.update(bytes=12 * parameters)
        benchmark(call)

group: the operator's name. provider (a parameter of the item): "atst_fast" is ours, all others are its peers. Items of
one group whose other parameters are equal form one comparison: their ratios to "atst_fast" are in the table. size: only
"tiny" (and items without a size) run when nothing is measured. extra_info, all optional:
    bytes       bytes that the call must at least read and write, each once
    flops       floating-point operations that it must at least do
    dtype       "bfloat16" or "float16", where the operations are tensor-core products: of a GPU, their rate is measured
    peak_flops  the datasheet's rate, of which the result then has the share
    items       what the table's rate counts instead of bytes, as (number, unit): (10.0, "s audio")
    note        a few words for the table
The floor of a case is the larger of bytes / the machine's best bandwidth and flops / its sgemm rate, measured in the
same run (machine.py). Making inputs and warming up stay outside of the timed call. torch's number of threads is what
the environment sets (OMP_NUM_THREADS).

benchmarks/gpu/ holds the cases of a GPU, which are collected where there is one; they are written to a file of their
own, under the GPU's name, with the GPU's rates.
"""

import pytest
import torch

from benchmarks import machine, report


def pytest_addoption(parser):
    parser.addoption("--commit", default="", help="what is measured, in a copy of the tree without git")


def pytest_configure(config):
    machine.name_commit(config.getoption("--commit"))
    config.option.benchmark_quiet = True  # report.py prints the tables
    if config.getoption("benchmark_enable"):
        config.option.benchmark_warmup = True
        config.option.benchmark_warmup_iterations = 3


def pytest_collection_modifyitems(config, items):
    if config.getoption("benchmark_enable"):
        return
    heavy = [item for item in items if _size(item) not in (None, "tiny")]
    config.hook.pytest_deselected(items=heavy)
    items[:] = [item for item in items if item not in heavy]


def _size(item):
    callspec = getattr(item, "callspec", None)
    return callspec.params.get("size") if callspec else None


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    if not config.getoption("benchmark_enable"):
        return
    on_cpu = [b for b in session.benchmarks if b.stats.data and not b.has_error] if session else []
    results = []
    if on_cpu:
        terminalreporter.write_line("\nmeasuring this machine's bandwidth and sgemm rate ...")
        results.append(report.collect(on_cpu, machine.describe()))
    if on_gpu := config.stash.get(report.GPU_CASES, []):
        results.append(report.collect(on_gpu, config.stash[report.GPU_MACHINE]))
    for result in results:
        for line in report.tables(result):
            terminalreporter.write_line(line)
        terminalreporter.write_line(f"\nwritten to {report.save(result)}")
