"""Rows of a matrix by a list of their numbers, with a gradient that adds nothing up."""

import torch
from torch import Tensor

from atst_fast.ops import _checks
from atst_fast.ops._registry import register
from atst_fast.reference import rows as reference

_OP = "select_rows"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def select_rows(x: Tensor, rows: Tensor, inverse: Tensor) -> Tensor:
    """The listed rows of ``x``, zeros where the list has -1; the list goes both ways, so the gradient is a list too.

    Args:
        x: ``[R, D]``, float32, bfloat16, float16 or float64.
        rows: int64 ``[C]``, each number from 0 to R - 1 at most once, or -1. inverse: int64 ``[R]``, the place of each
            row of x in ``rows``, or -1 (``nn.FixedSelection`` has both). That they belong together is not checked. A
            number past R - 1 is refused on a CPU; on a GPU, where nobody looks, it gives a row of NaN.

    Returns ``[C, D]`` in the dtype of x: copies, exact to the bit. Differentiable in x, any number of times; rows that
    are not listed get zeros.

    Raises:
        TypeError: another dtype. ValueError: a shape, a device or a number that does not fit.
    """
    _checks.tensor(_OP, "x", x, "[R, D] (rows, width)", dim=2, dtypes=_DTYPES)
    _checks.tensor(_OP, "rows", rows, "[C] (the rows to take, or -1)", dim=1, dtypes=(torch.int64,))
    expected = _checks.Later("[R] = [{}] (the place of each row of x in rows, or -1)", x.shape[0])
    _checks.tensor(_OP, "inverse", inverse, expected, dim=1, dtypes=(torch.int64,))
    if inverse.shape[0] != x.shape[0]:
        _checks.fail(_OP, "inverse", expected, inverse)
    _checks.same_device(_OP, "x", x, rows=rows, inverse=inverse)
    if _checks.readable(rows) and len(rows):
        last = int(rows.max())
        if last >= len(x):
            raise ValueError(f"{_OP}: rows must be numbers up to {len(x) - 1}, the last row of x, or -1, got {last}")
    if x.dtype == torch.float64:
        return reference.select_rows(x, rows, inverse)
    return torch.ops.atst_fast.select_rows(x, rows, inverse)


register(_OP, CPU=reference.select_rows, CUDA=reference.select_rows, triton="rows")


@torch.library.register_fake("atst_fast::select_rows")
def _(x, rows, inverse):
    return x.new_empty(rows.shape[0], x.shape[1])


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx, grad):
    rows, inverse = ctx.saved_tensors
    return torch.ops.atst_fast.select_rows(grad, inverse, rows), None, None


torch.library.register_autograd("atst_fast::select_rows", _backward, setup_context=_save)
