"""Reference of what follows the matrix products of a block or a head."""

import torch
import torch.nn.functional as F
from torch import Tensor


def bias_gelu(h: Tensor, bias: Tensor) -> Tensor:
    """``gelu(h + bias)``, exact (erf)."""
    return F.gelu(h + bias.to(h.dtype))


def bias_gelu_backward(grad: Tensor, h: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of h and bias."""
    dh = torch.ops.aten.gelu_backward(grad, h + bias.to(h.dtype))
    return dh, dh.reshape(-1, dh.shape[-1]).sum(0)


def add_branch(x: Tensor, y: Tensor, bias: Tensor, alpha: float, kept: Tensor | None) -> Tensor:
    """``x + alpha * (y + bias)``, where ``kept`` is given only for those items of x; of the dtype of x."""
    y = (y + bias.to(y.dtype)).to(x.dtype)
    return torch.add(x, y, alpha=alpha) if kept is None else x.index_add(0, kept, y, alpha=alpha)


def add_branch_backward(grad: Tensor, alpha: float, kept: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of y and bias; that of x is ``grad``."""
    dy = alpha * (grad if kept is None else grad.index_select(0, kept))
    return dy, dy.reshape(-1, dy.shape[-1]).sum(0)


def batch_norm_relu(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """``relu(batch_norm(x))`` by the moments of the rows of x ``[M, D]``, their mean, and their biased variance."""
    out = F.relu(F.batch_norm(x, None, None, weight, bias, training=True, eps=eps))
    return out, x.mean(0), x.var(0, correction=0)


def batch_norm_relu_backward(
    grad: Tensor, x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    rstd = (variance + eps).rsqrt()
    normal = (x - mean) * rstd
    grad = torch.where(normal * weight + bias <= 0, 0, grad)
    dweight, dbias = (grad * normal).sum(0), grad.sum(0)
    return weight * rstd * (grad - (dbias + normal * dweight) / len(x)), dweight, dbias
