"""Rows of a matrix by a list of their numbers."""

from torch import Tensor


def select_rows(x: Tensor, rows: Tensor, inverse: Tensor) -> Tensor:
    """``[R, D]`` to ``[C, D]``: row ``rows[i]`` of x at place i, zeros where that is -1."""
    if not x.shape[0]:
        return x.new_zeros(rows.shape[0], x.shape[1])
    return x.index_select(0, rows.clamp(min=0)).masked_fill((rows < 0)[:, None], 0)
