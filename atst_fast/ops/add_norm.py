"""The residual stream between two matrix products: bias, stochastic depth, residual and LayerNorm in one pass."""

import math

import torch
from torch import Tensor

from atst_fast.ops import _checks
from atst_fast.ops._registry import differentiable_once, register, takes_halves
from atst_fast.reference import add_norm as reference
from atst_fast.reference.epilogue import add_branch_backward

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_OP = "add_norm"


def add_norm(
    x: Tensor,
    y: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """``sum = x + scale * (y + bias)`` and ``LayerNorm(sum)``: what stands between two branches of a pre-norm block.

    Args:
        x: ``[N, ..., D]``, the residual stream, float32, bfloat16, float16 (statistics and sums over rows in float32)
            or float64 (plain PyTorch).
        y: ``[N, ..., D]``, the branch to be added, whose last matrix product has no bias yet; None: there is none, and
            ``sum`` is x itself.
        bias: ``[D]`` or None: none. scale: float32 ``[N]``, a factor of the branch for each item, or None: 1. Where it
            is 0 the branch is not read.
        weight, norm_bias: ``[D]`` of the LayerNorm, or None: 1 and 0. eps: at least 0, added to the variance.

    y and the parameters are converted to the dtype of x where they have another. A CPU runs plain PyTorch.

    Returns ``(sum, normed)``, both of the shape and dtype of x. Differentiable in x, y, bias, weight and norm_bias;
    where scale is 0 the gradient of y is zero. Deterministic. Largest error against float64, float32 input: 2e-6 of the
    largest value, in both results and in the gradients; bfloat16 and float16 at most twice the error of the same in
    plain PyTorch. Matches the residuals, DropPath and norms of audiossl/modules/transformer.py (Block).

    Raises:
        TypeError: another type or dtype. ValueError: shapes or devices that do not fit, a negative eps, bias or scale
        without y.
    """
    _check(x, y, bias, scale, weight, norm_bias, eps)
    y, bias, weight, norm_bias = (_like(x, t) for t in (y, bias, weight, norm_bias))
    if x.dtype == torch.float64:
        total, normed, _, _ = reference.add_norm(x, y, bias, scale, weight, norm_bias, eps)
        return x if y is None else total, normed
    x, scale = x.contiguous(), None if scale is None else scale.contiguous()
    total, normed, _, _ = torch.ops.atst_fast.add_norm(x, y, bias, scale, weight, norm_bias, eps)
    return x if y is None else total, normed


def _like(x: Tensor, t: Tensor | None) -> Tensor | None:
    return None if t is None else t.to(x.dtype).contiguous()


def _check(x, y, bias, scale, weight, norm_bias, eps) -> None:
    _checks.tensor(_OP, "x", x, "[N, ..., D] (items, ..., width)", dtypes=_DTYPES)
    if x.dim() < 2 or x.shape[-1] < 1:
        _checks.fail(_OP, "x", "[N, ..., D] with at least 2 axes and D at least 1", x)
    if y is not None:
        expected = _checks.Later("of shape {}, as x", list(x.shape))
        _checks.tensor(_OP, "y", y, expected, dtypes=_DTYPES)
        if y.shape != x.shape:
            _checks.fail(_OP, "y", expected, y)
    width = _checks.Later("[{}] (the last axis of x)", x.shape[-1])
    for name, row in (("bias", bias), ("weight", weight), ("norm_bias", norm_bias)):
        if row is not None:
            _checks.tensor(_OP, name, row, width, dim=1, dtypes=_DTYPES)
            if row.shape[0] != x.shape[-1]:
                _checks.fail(_OP, name, width, row)
    if scale is not None:
        items = _checks.Later("[{}] (the items of x)", x.shape[0])
        _checks.tensor(_OP, "scale", scale, items, dim=1, dtypes=(torch.float32,))
        if scale.shape[0] != x.shape[0]:
            _checks.fail(_OP, "scale", items, scale)
    if y is None and (bias is not None or scale is not None):
        _checks.fail(_OP, "y", "a tensor where bias or scale is given", None, ValueError)
    _checks.number(_OP, "eps", eps, "at least 0 and finite", 0, _checks.FINITE)
    _checks.same_device(_OP, "x", x, y=y, bias=bias, scale=scale, weight=weight, norm_bias=norm_bias)


@torch.library.register_fake("atst_fast::add_norm")
def _(x, y, bias, scale, weight, norm_bias, eps):
    rows = math.prod(x.shape[:-1])  # torch.Size.numel would make a number of a symbol
    moments = [x.new_empty(rows, dtype=torch.float32) for _ in range(2)]
    return x.new_empty(0) if y is None else torch.empty_like(x), torch.empty_like(x), *moments


@torch.library.register_fake("atst_fast::add_norm_backward")
def _(d_sum, d_normed, total, mean, rstd, scale, weight, has_norm_bias, has_bias):
    none, width = 0, total.shape[-1]
    dy = total.new_empty(none) if scale is None else torch.empty_like(total)
    rows = [total.new_empty(width if has else none) for has in (has_bias, weight is not None, has_norm_bias)]
    return torch.empty_like(total), dy, *rows


def _save(ctx, inputs, output):
    x, y, bias, scale, weight, norm_bias, _ = inputs
    total, _, mean, rstd = output
    ctx.has_branch, ctx.has_bias, ctx.has_norm_bias = y is not None, bias is not None, norm_bias is not None
    # a gradient that nobody sent is None, so that no zeros are written to be read
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(total if ctx.has_branch else x, mean, rstd, scale, weight)


def _backward(ctx, d_sum, d_normed, *_):
    total, mean, rstd, scale, weight = ctx.saved_tensors
    d_sum = d_sum.contiguous() if d_sum is not None and ctx.has_branch else None
    if d_normed is None:
        return _backward_of_sum(ctx, d_sum, scale)
    dx, dy, dbias, dweight, dnorm_bias = torch.ops.atst_fast.add_norm_backward(
        d_sum, d_normed.contiguous(), total, mean, rstd, scale, weight, ctx.has_norm_bias, ctx.has_bias
    )
    dy = (dx if scale is None else dy) if ctx.has_branch else None
    given = ctx.has_bias, weight is not None, ctx.has_norm_bias
    dbias, dweight, dnorm_bias = (t if has else None for t, has in zip((dbias, dweight, dnorm_bias), given))
    return dx, dy, dbias, None, dweight, dnorm_bias, None


def _backward_of_sum(ctx, d_sum, scale):
    """Where nobody used the norm."""
    if d_sum is None:
        return (None,) * 7
    dy, dbias = d_sum, None
    if scale is not None or ctx.has_bias:
        backward = torch.ops.atst_fast.add_branch_backward if takes_halves(d_sum) else add_branch_backward
        dy, dbias = backward(d_sum, 1.0, None, scale)
    return d_sum, dy, dbias if ctx.has_bias else None, None, None, None, None


torch.library.register_autograd("atst_fast::add_norm", _backward, setup_context=_save)
register("add_norm", CPU=reference.add_norm, CUDA=reference.add_norm, triton="add_norm")
register("add_norm_backward", CPU=reference.add_norm_backward, CUDA=reference.add_norm_backward, triton="add_norm")
differentiable_once("add_norm_backward")
