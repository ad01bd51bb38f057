"""Reference of the two layers around a GELU."""

import torch
import torch.nn.functional as F
from torch import Tensor

from atst_fast.reference.epilogue import bias_gelu, bias_gelu_backward


def mlp(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor) -> Tensor:
    """``gelu(x W1^T + b1) W2^T``."""
    return F.linear(bias_gelu(F.linear(x, weight1), bias1), weight2)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, keep_h: bool) -> tuple[Tensor, Tensor]:
    """``gelu(h + bias)`` and ``h = x W^T``, which is empty unless kept."""
    h = F.linear(x, weight)
    return bias_gelu(h, bias), h if keep_h else x.new_empty(0)


def linear_gelu_backward(grad: Tensor, weight2: Tensor, h: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of h and bias by that of ``gelu(h + bias) weight2^T``."""
    return bias_gelu_backward(torch.mm(grad, weight2), h, bias)
