"""What `make gpu` would do, as far as that can be seen without one."""

import os
import re
import subprocess
import sys

import pytest
from _pytest.mark.expression import Expression

from atst_fast.bench.cases import OPERATORS
from tests.cuda.static import CSRC, ROOT


def dry_run(target, python):
    command = ["make", "-n", *target.split(), f"GPU_PYTHON={python}"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_what_compute_sanitizer_runs_is_little_and_meets_every_operator():
    command = [sys.executable, "-m", "pytest", "tests/cuda", "-m", "gpu and sanitize", "--collect-only"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    names = [line for line in said.splitlines() if "::" in line]
    assert {name.partition("::")[0] for name in names} == {
        f"tests/cuda/test_{path.parent.name}.py" for path in CSRC.glob("*/*_cuda.cu")
    }
    assert len(names) <= 100
    assert not [name for name in names if "[gpu" not in name]


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_one_tool_of_compute_sanitizer(tool):
    said = dry_run(f"gpu-{tool}", "python3")
    assert said.count("compute-sanitizer --tool") == 1
    assert f"--tool {tool} --kernel-name kns=4atst --report-api-errors no" in said


def test_the_python_may_be_a_relative_path():
    assert f"{ROOT}/some/python ../setup.py" in dry_run("gpu-build", "some/python")
    assert " python3 ../setup.py" in dry_run("gpu-build", "python3")


@pytest.mark.parametrize(
    "required, path, message",
    [
        ("static", "/nowhere", "--require static: needs nvcc"),
        ("shim", "/nowhere", "--require shim: the shim needs gcc"),
        ("luck", None, "'luck' is none of shim, static"),
    ],
)
def test_what_is_required_must_be_there(required, path, message):
    environment = os.environ | ({"PATH": path, "CUDA_HOME": path} if path else {})
    command = [sys.executable, "-m", "pytest", "tests/test_layout.py", "--collect-only", "--require", required]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 4
    assert message in run.stdout + run.stderr


def test_steps_are_measured_one_size_after_the_other():
    said = dry_run("gpu-bench-step", "python3")
    assert said.index("bench_step.py -k small") < said.index("bench_step.py -k base")
    assert "ProfileConfig(" in dry_run("gpu", "python3")
    assert "-m benchmarks.gpu.tune rows" in dry_run("gpu-tune OPS=rows", "python3")


@pytest.mark.parametrize("operator", OPERATORS)
def test_each_operator_is_measured_by_one_part(operator):
    said = re.findall(r'bench_ops.py -m gpu -k "(.*?)"', dry_run("gpu-bench-ops", "python3"))
    assert len(said) == 3
    assert sum(Expression.compile(part).evaluate(lambda word, **_: word in f"test_{operator}") for part in said) == 1
