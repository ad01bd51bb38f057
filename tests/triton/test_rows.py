import pytest
import torch

from atst_fast import ops
from atst_fast.reference import rows as reference
from tests.ops.rows import lists

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count, listed, places, width", [
    (40, 17, 20, 48), (5, 5, 5, 1), (33, 0, 3, 130), (70, 30, 30, 384), (3, 3, 40, 257), (0, 0, 2, 8), (2, 0, 0, 8),
])  # fmt: skip
def test_equals_the_reference_to_the_bit(triton_ops, dtype, count, listed, places, width):
    rows, inverse = map(triton_ops.to, lists(count, listed, places))
    x = triton_ops.to(torch.randn(count, width).to(dtype)).requires_grad_()
    with triton_ops.poison():
        y = ops.select_rows(x, rows, inverse)
        grad = triton_ops.to(torch.randn(places, width).to(dtype))
        y.backward(grad)
    assert torch.equal(y, reference.select_rows(x, rows, inverse))
    assert torch.equal(x.grad, reference.select_rows(grad, inverse, rows))


def test_strided_rows_and_what_is_not_listed(triton_ops):
    rows, inverse = lists(20, 9, 12)
    x = torch.randn(20, 100)[:, 10:42]
    x[inverse < 0] = float("nan")
    strided = triton_ops.to(x)
    rows, inverse = triton_ops.to(rows), triton_ops.to(inverse)
    expected = reference.select_rows(triton_ops.to(x.contiguous()), rows, inverse)
    assert torch.isfinite(expected).all()
    assert torch.equal(ops.select_rows(strided, rows, inverse), expected)
    columns = torch.randn(12, 32).t().contiguous().t()  # and a gradient whose columns lie together
    leaf = triton_ops.to(torch.randn(20, 32)).requires_grad_()
    ops.select_rows(leaf, rows, inverse).backward(triton_ops.to(columns))
    assert torch.equal(leaf.grad, reference.select_rows(triton_ops.to(columns.contiguous()), inverse, rows))


def test_a_number_past_the_rows_is_not_read_and_shows(triton_ops):
    x, inverse = triton_ops.to(torch.ones(4, 8)), triton_ops.to(torch.full((4,), -1))
    # the public function refuses it where it can look, on a CPU
    y = torch.ops.atst_fast.select_rows(x, triton_ops.to(torch.tensor([1, 4, -1])), inverse)
    assert (y[0] == 1).all()
    assert y[1].isnan().all()
    assert (y[2] == 0).all()
