import pytest
import torch

from atst_fast import ops
from tests.ops.rows import lists


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_rows_and_their_gradient(dtype):
    rows, inverse = lists(count=20, listed=7, places=11)
    x = torch.randn(20, 6, dtype=dtype, requires_grad=True)
    y = ops.select_rows(x, rows, inverse)
    assert y.dtype == dtype
    assert torch.equal(y[:7], x[rows[:7]])
    assert (y[7:] == 0).all()
    grad = torch.randn_like(y)
    y.backward(grad)
    expected = torch.zeros_like(x)
    expected[rows[:7]] = grad[:7]
    assert torch.equal(x.grad, expected)


def test_what_is_not_listed_is_not_read():
    rows, inverse = lists(count=9, listed=4, places=6)
    x = torch.randn(9, 5)
    x[inverse < 0] = float("nan")
    x.requires_grad_()
    y = ops.select_rows(x, rows, inverse)
    assert torch.isfinite(y).all()
    grad = torch.ones_like(y)
    grad[4:] = float("nan")
    y.backward(grad)
    assert torch.equal(x.grad, (inverse >= 0).float()[:, None].expand(9, 5))


@pytest.mark.parametrize("count, places", [(0, 3), (4, 0), (0, 0)])
def test_no_rows(count, places):
    rows, inverse = lists(count, 0, places)
    x = torch.randn(count, 5, requires_grad=True)
    y = ops.select_rows(x, rows, inverse)
    assert torch.equal(y, torch.zeros(places, 5))
    y.sum().backward()
    assert torch.equal(x.grad, torch.zeros(count, 5))


def test_gradients_of_gradients():
    rows, inverse = lists(count=6, listed=3, places=4)
    x = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: ops.select_rows(x, rows, inverse) ** 2, x)
    x = torch.randn(6, 2, requires_grad=True)
    (grad,) = torch.autograd.grad(ops.select_rows(x, rows, inverse).square().sum(), x, create_graph=True)
    grad.sum().backward()
    assert torch.equal(x.grad, 2.0 * (inverse >= 0)[:, None].expand(6, 2))


def test_opcheck_and_compile():
    rows, inverse = lists(count=6, listed=3, places=4)
    x = torch.randn(6, 2, requires_grad=True)
    torch.library.opcheck(torch.ops.atst_fast.select_rows.default, (x, rows, inverse))
    compiled = torch.compile(lambda x: ops.select_rows(x, rows, inverse) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), ops.select_rows(x, rows, inverse) * 2)


X, ROWS, INVERSE = torch.zeros(3, 4), torch.tensor([2, -1]), torch.tensor([-1, -1, 0])
ERRORS = [
    ({"x": X[0]}, ValueError, r"x must be \[R, D\] \(rows, width\), got float32 \[4\]"),
    ({"x": X.int()}, TypeError, "x must be .* of dtype float32 or .*, got int32"),
    ({"rows": ROWS.int()}, TypeError, r"rows must be \[C\] .* of dtype int64, got int32"),
    ({"rows": ROWS[None]}, ValueError, r"rows must be \[C\]"),
    ({"rows": ROWS + 1}, ValueError, "rows must be numbers up to 2, the last row of x, or -1, got 3"),
    ({"inverse": INVERSE[:2]}, ValueError, r"inverse must be \[R\] = \[3\] .*, got int64 \[2\]"),
    ({"inverse": INVERSE.to("meta")}, ValueError, "inverse must be on cpu, as x is"),
]


@pytest.mark.parametrize("changed, error, message", ERRORS)
def test_errors(changed, error, message):
    with pytest.raises(error, match="select_rows: " + message):
        ops.select_rows(**{"x": X, "rows": ROWS, "inverse": INVERSE, **changed})
