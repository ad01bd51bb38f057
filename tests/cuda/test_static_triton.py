"""The inspection of Triton kernels, on a small matrix product: no GPU is needed to compile for one."""

import pytest

from tests.cuda import static

triton = pytest.importorskip("triton", reason="needs triton")
if static.cuobjdump() is None:
    pytest.skip("needs cuobjdump", allow_module_level=True)
tl = pytest.importorskip("triton.language")


@triton.jit
def product(a, b, c, K, N: tl.constexpr):
    i, j = tl.arange(0, 128), tl.arange(0, N)
    total = tl.zeros((128, N), tl.float32)
    for k in range(0, K, 64):
        inner = k + tl.arange(0, 64)
        total = tl.dot(tl.load(a + i[:, None] * K + inner[None]), tl.load(b + inner[:, None] * N + j[None]), total)
    tl.store(c + i[:, None] * N + j[None], total)


SIGNATURE = {"a": "*bf16", "b": "*bf16", "c": "*fp32", "K": "i32", "N": "constexpr"}


@pytest.mark.parametrize("arch, opcode", [(80, "HMMA"), (90, "HGMMA"), (100, "UTCHMMA")])
def test_a_triton_kernel_is_inspected(arch, opcode, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    record = static.triton_record(product, SIGNATURE, {"N": 64}, arch, aligned=("a", "b", "c", "K"), num_warps=8)
    assert record.name == "product"
    assert record.count(opcode) > 0, record.code.opcodes
    assert record.spill_stores == record.stack == record.count("STL") == 0
    assert 32 < record.registers <= 255
    assert static.occupancy(record.registers, 256, record.shared, arch) >= 1
