"""What tests/triton/interpreter.py puts right and what it notices."""

from pathlib import Path

import pytest
import torch

from tests.triton import interpreter

ROOT = Path(__file__).parents[2]
triton = pytest.importorskip("triton", reason="needs triton")
if not interpreter.enabled():
    pytest.skip("kernels run on the GPU here", allow_module_level=True)
tl = pytest.importorskip("triton.language")
interpreter.install()


@triton.jit
def copy_kernel(p_x, p_y, n, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if MASKED:
        tl.store(p_y + offsets, tl.load(p_x + offsets, mask=offsets < n).to(tl.float32).to(p_y.dtype.element_ty))
    else:
        tl.store(p_y + offsets, tl.load(p_x + offsets))


@triton.jit
def product_kernel(p_a, p_b, p_c, K, N: tl.constexpr):
    i, k = tl.arange(0, N), tl.arange(0, N)
    total = tl.zeros((N, N), tl.float32)
    for start in range(0, K, N):
        a = tl.load(p_a + i[:, None] * K + start + k[None])
        total = tl.dot(a, tl.load(p_b + (start + k)[:, None] * N + i[None]), total)
    tl.store(p_c + i[:, None] * N + i[None], total)


def test_it_is_switched_on_before_any_folder_is_looked_at(request):
    """Whichever folder pytest is given first: one that imports triton would have it compile."""
    plugins = [Path(getattr(p, "__file__", None) or "") for _, p in request.config.pluginmanager.list_name_plugin()]
    assert [p.parent for p in plugins if p.name == "conftest.py"][:1] == [ROOT]


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversions_round_to_nearest(dtype):
    x = torch.cat([torch.randn(1017), torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -(2**-130), 3e38, 0.0, float("inf")])])
    x = torch.cat([x, torch.tensor([float("nan")])])
    y, back = torch.empty(len(x), dtype=dtype), torch.empty(len(x))
    copy_kernel[(1,)](x, y, len(x), BLOCK=1024, MASKED=True)
    copy_kernel[(1,)](y, back, len(x), BLOCK=1024, MASKED=True)
    assert torch.equal(y.nan_to_num(7), x.to(dtype).nan_to_num(7))
    assert torch.equal(back.nan_to_num(7), x.to(dtype).float().nan_to_num(7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products(dtype):
    a, b, c = torch.randn(16, 48).to(dtype), torch.randn(48, 16).to(dtype), torch.empty(16, 16)
    product_kernel[(1,)](a, b, c, 48, N=16)
    torch.testing.assert_close(c, a.float() @ b.float(), rtol=1e-3, atol=1e-3 if dtype == torch.float16 else 1e-5)


def test_an_access_out_of_bounds_is_an_error():
    x, y = torch.randn(100), torch.empty(100)
    with pytest.raises(Exception, match="reads 28 elements out of bounds, the first 0 bytes from the end of p_x"):
        copy_kernel[(2,)](x, torch.empty(128), 100, BLOCK=64, MASKED=False)
    with pytest.raises(Exception, match="writes 28 elements out of bounds, the first 0 bytes from the end of p_y"):
        copy_kernel[(2,)](torch.randn(128), y, 100, BLOCK=64, MASKED=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_a_masked_load_leaves_undefined_is_nan(dtype):
    x, y = torch.randn(10).to(dtype), torch.empty(16)
    copy_kernel[(1,)](x, y, 10, BLOCK=16, MASKED=True)
    assert torch.equal(y[:10], x.float())
    assert y[10:].isnan().all()


def test_poison():
    with interpreter.poison():
        x = torch.randn(3)
        assert x.new_empty(4).isnan().all()
        assert torch.empty_like(x).isnan().all()
        assert torch.empty(2, dtype=torch.int64).shape == (2,)
    assert torch.zeros(3).new_empty(0).shape == (0,)
