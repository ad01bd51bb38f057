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


def add_branch(
    x: Tensor, y: Tensor, bias: Tensor, alpha: float, kept: Tensor | None, scale: Tensor | None = None
) -> Tensor:
    """``x + alpha * scale * (y + bias)``, where ``kept`` is given only for those items of x; of the dtype of x."""
    y = _scaled((y + bias.to(y.dtype)).to(x.dtype), scale)
    return torch.add(x, y, alpha=alpha) if kept is None else x.index_add(0, kept, y, alpha=alpha)


def add_branch_backward(
    grad: Tensor, alpha: float, kept: Tensor | None, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of y and bias; that of x is ``grad``."""
    dy = _scaled(alpha * (grad if kept is None else grad.index_select(0, kept)), scale)
    return dy, dy.reshape(-1, dy.shape[-1]).sum(0)


def _scaled(y: Tensor, scale: Tensor | None) -> Tensor:
    """Each item of y by its factor; zero where that is 0, whatever y holds."""
    if scale is None:
        return y
    scale = scale.to(y.dtype).view(-1, *[1] * (y.dim() - 1))
    return torch.where(scale != 0, scale * y, 0)
