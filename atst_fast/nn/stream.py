"""The residual stream as it passes from block to block where all shapes are fixed, and who drops which branch."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from atst_fast import ops
from atst_fast.nn.plain import is_plain
from atst_fast.ops import _checks


class Stream(NamedTuple):
    """``x + scale * (y + bias)``, not yet added up: the LayerNorm that reads it does that in the same pass.

    ``x`` and ``y`` ``[N, ..., D]``; ``bias`` ``[D]`` or None; ``scale`` float32 ``[N]`` or None, the factor of
    stochastic depth, 0 where item n dropped the branch. Without ``y`` there is no branch, and the stream is ``x``.
    """

    x: Tensor
    y: Tensor | None = None
    bias: Tensor | None = None
    scale: Tensor | None = None

    def norm(self, norm: nn.Module) -> tuple[Tensor, Tensor]:
        """The sum, and the sum after ``norm``."""
        if (
            isinstance(norm, nn.LayerNorm)
            and is_plain(norm, nn.LayerNorm)
            and norm.normalized_shape == self.x.shape[-1:]
        ):
            return ops.add_norm(*self, norm.weight, norm.bias, norm.eps)
        x = self.sum()
        return x, norm(x)

    def sum(self) -> Tensor:
        if self.y is None:
            return self.x
        bias = self.y.new_zeros(self.y.shape[-1]) if self.bias is None else self.bias
        return ops.add_branch(self.x, self.y, bias, scale=self.scale)


def are_shapes_fixed(x: Tensor, asked: bool | None) -> bool:
    """Whether no shape may depend on a value: as asked, else where the host cannot look at values, which is on a GPU
    and while `torch.compile` or `torch.export` traces."""
    return not _checks.readable(x) if asked is None else asked


def drop_path_factors(probabilities: list[float], draws: Tensor) -> Tensor:
    """float32 ``[n, 2, B]``: what the branches (attention, MLP) of block i are multiplied by for each sample,
    ``floor(1 - p + draw) / (1 - p)``; ``draws`` ``[n, 2, B]`` in [0, 1). Three launches, however many blocks."""
    factors = draws.clone()
    each = list(factors.unbind())
    keep = [1 - p for p in probabilities]
    torch._foreach_add_(each, keep)
    torch._foreach_floor_(each)
    torch._foreach_div_(each, keep)
    return factors


def attended(length: Tensor | None, factors: Tensor, tokens: int) -> Tensor:
    """int64 ``[..., B]``: the valid tokens (``length`` ``[B]``, None: all), and 0 for the samples that drop attention
    by ``factors`` ``[..., 2, B]``."""
    keep = factors.select(-2, 0) > 0
    return keep * (tokens if length is None else length)
