"""The inspection of Triton kernels, on a small matrix product: no GPU is needed to compile for one."""

import dataclasses

import pytest

from tests.cuda import static

pytest.importorskip("triton", reason="needs triton")
if static.cuobjdump() is None:
    pytest.skip("needs cuobjdump", allow_module_level=True)

from tests.triton import compile
from tests.triton.launches import TENSOR_CORES, Launch
from tests.triton.test_static import complaints


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("static")


@pytest.mark.parametrize("arch, opcode", TENSOR_CORES.items())
def test_a_triton_kernel_is_inspected(arch, opcode, folder, monkeypatch):
    monkeypatch.setattr(compile, "CACHE", folder)
    ((record, threads),) = compile.compiled("_product", arch)["small"]
    assert (record.name, threads) == ("product", 256)
    assert record.count(opcode) > 0, record.code.opcodes
    assert record.spill_stores == record.stack == record.count("STL") == 0
    assert 32 < record.registers <= 255
    assert static.occupancy(record.registers, 256, record.shared, arch) >= 1
    launch = Launch("small", print, products=TENSOR_CORES)
    assert not list(complaints(launch, arch, record, threads))
    for wrong, says in (
        (dataclasses.replace(record, spill_stores=8), "spills"),
        (dataclasses.replace(record, registers=300), "registers"),
        (dataclasses.replace(record, shared=250_000), "shared memory"),
        (dataclasses.replace(record, code=static.Code(0, 0, {})), opcode),
    ):
        assert says in " ".join(complaints(launch, arch, wrong, threads))
