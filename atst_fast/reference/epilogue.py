"""Reference of what follows the matrix products of a block."""

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
