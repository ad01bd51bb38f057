"""Reference of batch norm and ReLU: in one piece, and in the parts between which processes exchange sums."""

import torch
import torch.nn.functional as F
from torch import Tensor


def batch_norm_relu(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """``relu(batch_norm(x))`` by the moments of the rows of x ``[M, D]``, their mean, and their biased variance."""
    out = F.relu(F.batch_norm(x, None, None, weight, bias, training=True, eps=eps))
    return out, x.mean(0), x.var(0, correction=0)


def batch_norm_relu_backward(
    grad: Tensor, x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    moments = torch.stack([torch.full_like(mean, x.shape[0]), mean, variance])
    sums = batch_norm_relu_sums(grad, x, moments, weight, bias, None, eps)
    dx = batch_norm_relu_input_grad(grad, x, moments, sums, weight, bias, None, eps)
    return dx, sums[1].to(weight.dtype), sums[0].to(bias.dtype)


def column_moments(x: Tensor, count: Tensor | None) -> Tensor:
    """Number, mean and biased variance of the rows of each column of x before ``count``: ``[3, D]``; zeros for none."""
    x, valid = _wide(x), valid_rows(x, count)
    n = valid.sum(0).to(x.dtype).expand(x.shape[1])
    mean = x.where(valid, 0).sum(0) / n.clamp(min=1)
    variance = (x - mean).where(valid, 0).square().sum(0) / n.clamp(min=1)
    return torch.stack([n, mean, variance])


def batch_norm_relu_apply(
    x: Tensor, moments: Tensor, weight: Tensor, bias: Tensor, count: Tensor | None, eps: float
) -> Tensor:
    """``relu((x - mean) / sqrt(variance + eps) * weight + bias)``; zeros from ``count`` on, NaN if n < 2."""
    normal, _ = _normal(x, moments, eps)
    return F.relu(normal * weight + bias).where(valid_rows(x, count), 0).to(x.dtype)


def batch_norm_relu_sums(
    grad: Tensor, x: Tensor, moments: Tensor, weight: Tensor, bias: Tensor, count: Tensor | None, eps: float
) -> Tensor:
    """Sums over the rows of g, the gradient behind the ReLU, and of g times the normalised x: ``[2, D]``."""
    normal, _ = _normal(x, moments, eps)
    g = _behind_relu(grad, normal, weight, bias, count)
    return torch.stack([g.sum(0), (g * normal.where(valid_rows(x, count), 0)).sum(0)])


def batch_norm_relu_input_grad(
    grad: Tensor,
    x: Tensor,
    moments: Tensor,
    sums: Tensor,
    weight: Tensor,
    bias: Tensor,
    count: Tensor | None,
    eps: float,
) -> Tensor:
    """Gradient of x by the sums over all rows, which may be those of several processes as ``moments`` are."""
    normal, rstd = _normal(x, moments, eps)
    g = _behind_relu(grad, normal, weight, bias, count)
    dx = weight * rstd * (g - (sums[0] + normal * sums[1]) / moments[0])
    return dx.where(valid_rows(x, count), 0).to(x.dtype)


def valid_rows(x: Tensor, count: Tensor | None) -> Tensor:
    """Bool ``[M, 1]``: which rows lie before ``count``."""
    row = torch.arange(x.shape[0], device=x.device)[:, None]
    return row >= 0 if count is None else row < count


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _normal(x: Tensor, moments: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The normalised x and one over the deviation."""
    n, mean, variance = moments
    rstd = (variance + eps).rsqrt().where(n >= 2, float("nan"))
    return (_wide(x) - mean) * rstd, rstd


def _behind_relu(grad: Tensor, normal: Tensor, weight: Tensor, bias: Tensor, count: Tensor | None) -> Tensor:
    g = torch.where(normal * weight + bias <= 0, 0, _wide(grad))
    return g.where(valid_rows(grad, count), 0)
