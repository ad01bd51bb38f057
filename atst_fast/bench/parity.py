"""Whether a provider computes the operator: its results beside the definition in float64, on the inputs it is timed on.

The error of a tensor is its largest difference from the definition, relative to the largest value of the definition. A
speed counts only where it is at most what ALLOWED says for the tensor's dtype; parity is no test of accuracy, it finds
those who compute something else. The operators' own errors, which are smaller, are in their docstrings and in tests/.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

ALLOWED = {
    # sums of some thousand products in any order, and gradients that are differences of such sums
    "float32": 2e-5,
    # 8 and 11 bits: some ten roundings of intermediate results, as an unfused chain of operators has
    "bfloat16": 3e-2,
    "float16": 4e-3,
    # float32 products of 11 bits, where torch.backends.cuda.matmul.allow_tf32 is set
    "tf32": 4e-3,
}


class ParityError(Exception):
    """A provider whose results are not those of the operator."""


class Parity(NamedTuple):
    """The largest error of all results, as a share of what is allowed the worst of them, and that allowance."""

    error: float
    allowed: float

    @property
    def holds(self) -> bool:
        return self.error <= self.allowed


def check(returned: Any, truth: Sequence[Tensor], dtype: str, own: Mapping[str, float]) -> Parity:
    """The worst of the results by its share of what is allowed; ParityError if it is too far off.

    ``dtype`` is that of the inputs, ``own`` the operator's own allowances.
    """
    results = list(returned) if isinstance(returned, (tuple, list)) else [returned]
    if len(results) != len(truth):
        raise ParityError(f"{len(results)} results, where the operator has {len(truth)}")
    worst = Parity(0.0, allowance(dtype, own))
    for result, want in zip(results, truth):
        if result.numel() != want.numel():
            raise ParityError(f"a result of shape {list(result.shape)}, where the operator has {list(want.shape)}")
        limit = max(allowance(dtype, own), allowance(str(result.dtype).removeprefix("torch."), own))
        found = Parity(distance(result, want), limit)
        if found.error / limit > worst.error / worst.allowed:
            worst = found
    if not worst.holds:
        raise ParityError(f"no parity: its error is {worst.error:.1e}, allowed are {worst.allowed:.0e}")
    return worst


def allowance(dtype: str, own: Mapping[str, float]) -> float:
    return own.get(dtype) or ALLOWED.get(dtype, ALLOWED["float32"])


def dtype_of_products(dtype: str, device: str) -> str:
    """``dtype``, or "tf32" where the GPU multiplies float32 so."""
    if dtype == "float32" and device == "cuda" and torch.backends.cuda.matmul.allow_tf32:
        return "tf32"
    return dtype


def distance(result: Tensor, want: Tensor) -> float:
    """The largest difference relative to the largest value; infinite where one of them is not a number."""
    if not want.numel():
        return 0.0
    want = want.detach()
    difference = (result.detach().reshape(want.shape).to(want.dtype) - want).abs().max().item()
    largest = want.abs().max().item()
    error = difference / largest if largest else difference
    return error if math.isfinite(error) else math.inf
