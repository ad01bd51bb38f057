"""The two layers of a feed-forward part, the GELU between them in the matrix products."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from atst_fast.ops import _autocast, _checks
from atst_fast.ops._registry import differentiable_once, register, takes_halves
from atst_fast.reference import mlp as reference

_OP = "mlp"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_HALVES = (torch.bfloat16, torch.float16)


def mlp(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor) -> Tensor:
    """``gelu(x W1^T + b1) W2^T`` with the exact (erf) GELU; the second bias is left to what adds the result up.

    Args:
        x: ``[..., D]``. float32 runs the operators, and on a GPU bfloat16 and float16 do (summed up in float32), if all
            four have one dtype and there is no autocast; otherwise they run plain PyTorch, as float64 does.
        weight1: ``[H, D]``. bias1: ``[H]``. weight2: ``[O, H]``.

    Returns ``[..., O]`` in the dtype of x. Differentiable in all; the bits are the same in each run. On a GPU a Triton
    kernel makes the first product with bias and GELU, and one the gradient of what the GELU read; torch makes the other
    products. What the backward pass needs is kept only where an input needs a gradient.
    Largest error against float64, float32 input and weights of deviation 1 / sqrt(inputs), relative to the largest
    value: 1e-5, of the gradients too; bfloat16 and float16 on a GPU: at most twice that of plain PyTorch.
    Matches fc1, act and fc2 without its bias of audiossl/modules/transformer.py (Mlp).

    Raises:
        TypeError: not a tensor, another dtype. ValueError: shapes or devices that do not fit.
    """
    _checks.tensor(_OP, "x", x, "[..., D]", dtypes=_DTYPES)
    if x.dim() < 1 or x.shape[-1] < 1:
        _checks.fail(_OP, "x", "[..., D] with D at least 1", x)
    _weight("weight1", weight1, "H", x.shape[-1], "the last axis of x")
    _weight("weight2", weight2, "O", weight1.shape[0], "the first axis of weight1")
    _checks.row(_OP, "bias1", bias1, "weight1.T", weight1.T, _DTYPES)
    _checks.same_device(_OP, "x", x, weight1=weight1, weight2=weight2)
    inputs = x, weight1, bias1, weight2
    if not _kernel_takes(*inputs):
        return reference.mlp(*inputs)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    flat = (t.contiguous() for t in (x.reshape(-1, x.shape[-1]), weight1, bias1, weight2))
    return torch.ops.atst_fast.mlp(*flat, keep)[0].view(*x.shape[:-1], weight2.shape[0])


def _weight(name: str, weight: Tensor, rows: str, columns: int, of: str) -> None:
    expected = _checks.Later("[{}, {}] ({})", rows, columns, of)
    _checks.tensor(_OP, name, weight, expected, dim=2, dtypes=_DTYPES)
    if weight.shape[1] != columns or weight.shape[0] < 1:
        _checks.fail(_OP, name, expected, weight)


def _kernel_takes(x: Tensor, *others: Tensor) -> bool:
    """Whether there is a kernel for these dtypes where they lie."""
    if any(t.dtype != x.dtype for t in others) or _autocast.is_on(x.device):
        return False
    return x.dtype == torch.float32 or (x.dtype in _HALVES and takes_halves(x))


def _forward(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The result; and what the GELU made and read, which are empty unless kept."""
    a, h = torch.ops.atst_fast.linear_gelu(x, weight1, bias1, keep)
    return F.linear(a, weight2), a if keep else x.new_empty(0), h


def _backward(
    grad: Tensor,
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    a: Tensor,
    h: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight1, bias1 and weight2; empty where not needed."""
    dx, dweight1, dbias, dweight2 = (grad.new_empty(0) for _ in range(4))
    if needs[3]:
        dweight2 = torch.mm(grad.T, a)
    if any(needs[:3]):
        dh, dbias = torch.ops.atst_fast.linear_gelu_backward(grad, weight2, h, bias1)
        dx = torch.mm(dh, weight1) if needs[0] else dx
        dweight1 = torch.mm(dh.T, x) if needs[1] else dweight1
    return dx, dweight1, dbias, dweight2


_library = torch.library.Library("atst_fast", "IMPL")
_library.impl("mlp", _forward, "CompositeExplicitAutograd")
_library.impl("mlp_backward", _backward, "CompositeExplicitAutograd")
register("linear_gelu", CPU=reference.linear_gelu, CUDA=reference.linear_gelu, triton="linear_gelu")
register(
    "linear_gelu_backward",
    CPU=reference.linear_gelu_backward,
    CUDA=reference.linear_gelu_backward,
    triton="linear_gelu",
)


@torch.library.register_fake("atst_fast::linear_gelu")
def _(x, weight, bias, keep_h):
    a = x.new_empty(x.shape[0], weight.shape[0])
    return a, torch.empty_like(a) if keep_h else x.new_empty(0)


@torch.library.register_fake("atst_fast::linear_gelu_backward")
def _(grad, weight2, h, bias):
    return torch.empty_like(h), torch.empty_like(bias)


@torch.library.register_fake("atst_fast::mlp")
def _(x, weight1, bias1, weight2, keep):
    out = x.new_empty(x.shape[0], weight2.shape[0])
    if not keep:
        return out, x.new_empty(0), x.new_empty(0)
    return out, *(x.new_empty(x.shape[0], weight1.shape[0]) for _ in range(2))


@torch.library.register_fake("atst_fast::mlp_backward")
def _(grad, x, weight1, bias1, weight2, a, h, needs):
    needs = [*needs[:2], any(needs[:3]), needs[3]]
    return tuple(torch.empty_like(t) if n else grad.new_empty(0) for t, n in zip((x, weight1, bias1, weight2), needs))


def _save(ctx, inputs, output):
    *inputs, keep = inputs
    _, a, h = output
    ctx.mark_non_differentiable(a, h)
    ctx.set_materialize_grads(False)
    if keep:
        ctx.save_for_backward(*inputs, a, h)


def _gradients(ctx, grad, *_):
    if grad is None:
        return None, None, None, None, None
    needs = list(ctx.needs_input_grad[:4])
    found = torch.ops.atst_fast.mlp_backward(grad.contiguous(), *ctx.saved_tensors, needs)
    return *(g if n else None for g, n in zip(found, needs)), None


torch.library.register_autograd("atst_fast::mlp", _gradients, setup_context=_save)
for _op in ("linear_gelu", "linear_gelu_backward", "mlp_backward"):
    differentiable_once(_op)
