"""Lists of rows for the tests of ``select_rows``."""

import torch


def lists(count, listed, places):
    """``listed`` of ``count`` rows in ascending order and the padding, and the inverse."""
    taken = torch.randperm(count)[:listed].sort().values
    rows, inverse = torch.full((places,), -1), torch.full((count,), -1)
    rows[:listed], inverse[taken] = taken, torch.arange(listed)
    return rows, inverse
