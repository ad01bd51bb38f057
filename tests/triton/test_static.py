"""The Triton kernels' machine code for each architecture: no spills, tensor cores by name, shared memory that fits."""

import ast
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest

from tests.cuda import static
from tests.cuda.static import ROOT

pytest.importorskip("triton", reason="needs triton")
if static.cuobjdump() is None:
    pytest.skip("needs cuobjdump", allow_module_level=True)

from tests.triton import launches
from tests.triton.compile import compiled, wanted

MODULES = sorted(p.stem for p in Path(launches.__file__).parent.glob("[!_]*.py"))
MOST_SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # of one block: what a multiprocessor has, less 1 KB


@pytest.fixture(scope="module")
def compilers():
    """As many at a time as there are cores: module, architecture and whether of candidates -> future."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield cache(lambda *which: pool.submit(compiled, *which))


def complaints(launch, arch, record, threads):
    """What a compiled kernel does wrong, in words."""
    if record.spill_stores or record.spill_loads or record.stack or record.count("STL") or record.count("LDL"):
        yield f"spills {record.spill_stores} bytes, stack {record.stack}"
    if record.registers > launch.registers:
        yield f"{record.registers} registers"
    if record.shared > MOST_SHARED[arch]:
        yield f"{record.shared} bytes of shared memory"
    elif not static.occupancy(record.registers, threads, record.shared, arch):
        yield f"no block of {threads} threads with {record.registers} registers fits a multiprocessor"
    if launch.only in (None, record.name):
        wanted = dict(launch.opcodes)
        if launch.products:
            wanted[launch.products[arch]] = launches.SOME
        for opcode, (least, most) in wanted.items():
            if not least <= (n := record.count(opcode)) <= (float("inf") if most is None else most):
                yield f"{n} {opcode}"


@pytest.mark.parametrize("candidates", [False, pytest.param(True, marks=pytest.mark.long)])
@pytest.mark.parametrize("arch", static.ARCHS)
@pytest.mark.parametrize("module", MODULES)
def test_machine_code(module, arch, candidates, compilers):
    for other in MODULES:  # all of them are begun with the first that is asked for
        compilers(other, arch, candidates)
    found, by_name, wrong = compilers(module, arch, candidates).result(), wanted(module, arch, candidates), []
    assert set(found) == set(by_name)
    for name, kernels in found.items():
        assert kernels, f"{name} launches nothing"
        for record, threads in kernels:
            problems = ", ".join(complaints(by_name[name], arch, record, threads))
            wrong += [f"{name}: {record.name}: {problems}"] if problems else []
    assert not wrong, "\n".join(wrong)


def jitted(path):
    """Names of the kernels of a module: what @triton.jit decorates and whose name says so."""
    for node in ast.parse(path.read_text()).body:
        decorated = isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in node.decorator_list)
        if decorated and node.name.endswith("_kernel"):
            yield node.name


def test_every_kernel_is_compiled():
    here = {name for path in (ROOT / "kernels").glob("*.py") for name in jitted(path)}
    launched = {record.name for m in MODULES for kernels in compiled(m, 90).values() for record, _ in kernels}
    assert here == launched
