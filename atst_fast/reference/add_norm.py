"""Reference of the residual stream between two matrix products: branch added, then LayerNorm."""

import torch
import torch.nn.functional as F
from torch import Tensor


def add_norm(
    x: Tensor,
    y: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``sum = x + scale * (y + bias)`` (empty without y), its LayerNorm, and the rows' mean and 1 / deviation."""
    total = x
    if y is not None:
        total = (_wide(x) + branch(_wide(y), bias, scale)).to(x.dtype)
    wide = _wide(total)
    mean = wide.mean(-1)
    variance = (wide - mean[..., None]).square().mean(-1)
    gain, shift = (None if t is None else t.to(wide.dtype) for t in (weight, norm_bias))
    normed = F.layer_norm(wide, wide.shape[-1:], gain, shift, eps).to(x.dtype)
    return x.new_empty(0) if y is None else total, normed, mean.flatten(), (variance + eps).rsqrt().flatten()


def branch(y: Tensor, bias: Tensor | None, scale: Tensor | None) -> Tensor:
    """``scale * (y + bias)``, scale being one factor per item; zero where it is 0, whatever y holds."""
    if bias is not None:
        y = y + bias.to(y.dtype)
    if scale is None:
        return y
    scale = scale.to(y.dtype).view(-1, *[1] * (y.dim() - 1))
    return torch.where(scale != 0, scale * y, 0)


def add_norm_backward(
    d_sum: Tensor | None,
    d_normed: Tensor,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    scale: Tensor | None,
    weight: Tensor | None,
    has_norm_bias: bool,
    has_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, y (empty without scale: that of x), bias, weight and norm_bias (empty where there is none)."""
    none, dtype = total.new_empty(0), total.dtype
    grad = _wide(d_normed)
    column = [*total.shape[:-1], 1]
    normal = (_wide(total) - mean.view(column)) * rstd.view(column)
    g = grad if weight is None else grad * weight
    inner = g - g.mean(-1, keepdim=True) - normal * (g * normal).mean(-1, keepdim=True)
    dx = rstd.view(column) * inner
    if d_sum is not None:
        dx = dx + d_sum
    dy = dx if scale is None else branch(dx, None, scale)
    dbias = _over_rows(dy).to(dtype) if has_bias else none
    dweight = none if weight is None else _over_rows(grad * normal).to(weight.dtype)
    dnorm_bias = _over_rows(grad).to(dtype) if has_norm_bias else none
    return dx.to(dtype), none.clone() if scale is None else dy.to(dtype), dbias.clone(), dweight, dnorm_bias.clone()


def _over_rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).sum(0)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
