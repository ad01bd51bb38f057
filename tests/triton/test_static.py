"""The Triton kernels' machine code for each architecture: no spills, tensor cores by name, shared memory that fits."""

import ast
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.cuda import static
from tests.cuda.static import ROOT

pytest.importorskip("triton", reason="needs triton")
if static.cuobjdump() is None:
    pytest.skip("needs cuobjdump", allow_module_level=True)

from tests.triton import launches
from tests.triton.compile import compiled, wanted

# kernels that fill the registers are laid out anew by each compiler; another one's may spill
COMPILER = sys.modules["triton"].__version__
pytestmark = pytest.mark.skipif(
    not COMPILER.startswith("3.6."), reason=f"holds the code of triton 3.6, this is {COMPILER}"
)
MODULES = sorted(p.stem for p in Path(launches.__file__).parent.glob("[!_]*.py"))
MOST_SHARED = {
    80: 163 << 10,
    86: 99 << 10,
    90: 227 << 10,
    100: 227 << 10,
}  # of one block


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
    if arch == 80 and 86 in launch.archs and record.shared > MOST_SHARED[86]:
        yield f"{record.shared} bytes of shared memory, too many for 86, 89 and 120"
    if record.shared <= MOST_SHARED[arch] and not static.occupancy(record.registers, threads, record.shared, arch):
        yield f"no block of {threads} threads with {record.registers} registers fits a multiprocessor"
    if launch.only in (None, record.name):
        wanted = dict(launch.opcodes)
        if launch.products:
            wanted[launch.products[arch]] = launches.SOME
        for opcode, (least, most) in wanted.items():
            if not least <= (n := record.count(opcode)) <= (float("inf") if most is None else most):
                yield f"{n} {opcode}"


@pytest.mark.parametrize("candidates", [False, pytest.param(True, marks=pytest.mark.long)])
# a minute and a half each on two cores: that of the H200 in every run, the others with the candidates
@pytest.mark.parametrize("arch", [90, *(pytest.param(arch, marks=pytest.mark.long) for arch in (80, 100))])
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


def test_every_gpu_has_a_configuration():
    """For each kind of GPU, dtype, head dim and length, one that is compiled for that kind."""
    from atst_fast.kernels import frame_attention as forward
    from atst_fast.kernels import frame_attention_backward as backward
    from atst_fast.kernels.sequences import family

    kinds = {80: 80, 86: 86, 87: 80, 89: 86, 90: 90, 100: 100, 103: 100, 110: 100, 120: 86, 121: 86}
    assert {arch: family(arch) for arch in kinds} == kinds
    for kernels in (forward, backward):
        for arch, kind in kinds.items():
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                for head_dim in (1, 32, 33, 64, 80, 128, 200, 256):
                    for n in (0, 1, 64, 65, 128, 129, 256, 257, 72_000):
                        assert kind in kernels.candidates(head_dim, dtype, n, arch)[0].archs


def test_patches_fit_into_small_shared_memory(monkeypatch):
    from atst_fast.kernels import patch_embed, patch_embed_backward

    for arch, small in ((80, False), (86, True), (90, False), (100, False), (120, True)):
        for kernels in (patch_embed, patch_embed_backward):
            monkeypatch.setattr(kernels, "architecture", lambda arch=arch: arch)
        weight = torch.empty(768, 256, dtype=torch.bfloat16)
        assert (patch_embed.choose(weight) == patch_embed.SMALL_CONFIG) == small
        assert (patch_embed_backward.choose(weight) in patch_embed_backward.SMALL_CONFIGS) == (small or arch == 80)
