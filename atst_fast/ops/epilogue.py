"""What follows the matrix products of a block: bias and GELU, bias and residual."""

import torch
from torch import Tensor

from atst_fast.ops import _checks
from atst_fast.ops._registry import differentiable_once, register, takes_halves
from atst_fast.reference import epilogue as reference

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_HALVES = (torch.bfloat16, torch.float16)


def bias_gelu(h: Tensor, bias: Tensor) -> Tensor:
    """``gelu(h + bias)`` with the exact (erf) GELU.

    Args:
        h: ``[..., D]``, a matrix product that has no bias yet. float32 runs the kernel, and on a GPU bfloat16 and
            float16 do (computed in float32); otherwise they run plain PyTorch, as float64 does.
        bias: ``[D]``, converted to the dtype of h where it has another, as under autocast.

    Returns ``[..., D]`` in the dtype of h. Differentiable in both; the bits do not depend on the number of threads.
    Largest error against float64, float32 input, relative to ``max(1, |h + bias|)``: 4e-7 forward, and 2e-6 of the
    derivative; bfloat16 and float16 on a GPU: at most twice that of plain PyTorch. It is small relative to the result
    too where that is tiny: gelu(-8) is -5e-15 here, and 0 by the usual formula.
    Matches fc1's bias and act of audiossl/modules/transformer.py (Mlp).

    Raises:
        TypeError: not a tensor, another dtype. ValueError: shapes or devices that do not fit.
    """
    _check("bias_gelu", "h", h, bias)
    bias = bias.to(h.dtype)
    if not _kernel_takes(h):
        return reference.bias_gelu(h, bias)
    return torch.ops.atst_fast.bias_gelu(h.contiguous(), bias.contiguous())


def add_branch(
    x: Tensor,
    y: Tensor,
    bias: Tensor,
    *,
    alpha: float = 1.0,
    kept: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """``x + alpha * scale * (y + bias)``: the residual around a branch whose last matrix product has no bias yet.

    Args:
        x: ``[N, ..., D]``, the residual stream. float32 runs the kernel, and on a GPU bfloat16 and float16 do (computed
            in float32); otherwise they run plain PyTorch, as float64 does. y and bias are converted to the dtype of x
            where they have another, as under autocast.
        y: ``[N, ..., D]``; or, with ``kept``, ``[K, ..., D]``.
        bias: ``[D]``. alpha: factor of the branch; stochastic depth divides by the probability of keeping it.
        kept: int64 ``[K]``, the items along the first axis that have the branch, each at most once; the others stay.
        scale: float32, a further factor for each item of y, which is not read where that is 0. On a CPU it runs plain
            PyTorch.

    Returns a new tensor ``[N, ..., D]`` in the dtype of x. Differentiable in x, y and bias; the bits do not depend on
    the number of threads. Error against float64, float32 input: at most 3e-7 of
    ``|x| + |alpha * scale| * (|y| + |bias|)``; bfloat16 and float16 on a GPU: at most twice that of plain PyTorch.
    Matches the residuals, the biases before them and DropPath of audiossl/modules/transformer.py (Block).

    Raises:
        TypeError: another type or dtype. ValueError: shapes or devices that do not fit, an item that x lacks.
    """
    op = "add_branch"
    _check(op, "x", x, bias)
    _checks.number(op, "alpha", alpha, "a number")
    shape = list(x.shape)
    if kept is not None:
        _checks.tensor(op, "kept", kept, "[K], items along the first axis of x", dim=1, dtypes=(torch.int64,))
        if x.dim() < 2:
            _checks.fail(op, "x", "[N, ..., D] when kept is given", x)
        shape[0] = kept.shape[0]
    of_y = _checks.Later("of shape {}", shape)
    _checks.tensor(op, "y", y, of_y, dtypes=_DTYPES)
    if list(y.shape) != shape:
        _checks.fail(op, "y", of_y, y)
    _checks.same_device(op, "x", x, y=y, kept=kept, scale=scale)
    if scale is not None:
        expected = _checks.Later("[{}] (the items of y)", shape[0])
        _checks.tensor(op, "scale", scale, expected, dim=1, dtypes=(torch.float32,))
        if scale.shape[0] != shape[0] or x.dim() < 2:
            _checks.fail(op, "scale", expected, scale)
    if kept is not None and _checks.readable(kept):
        items = kept.tolist()
        if len(set(items)) < len(items) or not all(0 <= item < x.shape[0] for item in items):
            raise ValueError(f"{op}: kept must name items from 0 to {x.shape[0] - 1}, each at most once, got {items}")
    y, bias = y.to(x.dtype), bias.to(x.dtype)
    if not _kernel_takes(x) or (scale is not None and not takes_halves(x)):
        return reference.add_branch(x, y, bias, alpha, kept, scale)
    kept, scale = (None if t is None else t.contiguous() for t in (kept, scale))
    return torch.ops.atst_fast.add_branch(x.contiguous(), y.contiguous(), bias.contiguous(), alpha, kept, scale)


def _kernel_takes(x: Tensor) -> bool:
    """Whether there is a kernel for this dtype where it lies."""
    return x.dtype == torch.float32 or (x.dtype in _HALVES and takes_halves(x))


def _check(op: str, name: str, x: Tensor, bias: Tensor) -> None:
    _checks.tensor(op, name, x, "[..., D]", dtypes=_DTYPES)
    if x.dim() < 1 or x.shape[-1] < 1:
        _checks.fail(op, name, "[..., D] with D at least 1", x)
    _checks.row(op, "bias", bias, name, x, _DTYPES)


@torch.library.register_fake("atst_fast::bias_gelu")
def _(h, bias):
    return torch.empty_like(h)


@torch.library.register_fake("atst_fast::bias_gelu_backward")
def _(grad, h, bias):
    return torch.empty_like(h), torch.empty_like(bias)


@torch.library.register_fake("atst_fast::add_branch")
def _(x, y, bias, alpha, kept, scale=None):
    return torch.empty_like(x)


@torch.library.register_fake("atst_fast::add_branch_backward")
def _(grad, alpha, kept, scale=None):
    items = grad.shape[:1] if kept is None else kept.shape
    return grad.new_empty(*items, *grad.shape[1:]), grad.new_empty(grad.shape[-1:])


def _save_gelu(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gelu_backward(ctx, grad):
    return torch.ops.atst_fast.bias_gelu_backward(grad.contiguous(), *ctx.saved_tensors)


def _save_branch(ctx, inputs, output):
    _, _, _, ctx.alpha, kept, scale = inputs
    ctx.save_for_backward(kept, scale)


def _branch_backward(ctx, grad):
    kept, scale = ctx.saved_tensors
    if kept is None and scale is None and ctx.alpha == 1.0:
        return grad, grad, grad.reshape(-1, grad.shape[-1]).sum(0), None, None, None
    dy, dbias = torch.ops.atst_fast.add_branch_backward(grad.contiguous(), ctx.alpha, kept, scale)
    return grad, dy, dbias, None, None, None


torch.library.register_autograd("atst_fast::bias_gelu", _gelu_backward, setup_context=_save_gelu)
torch.library.register_autograd("atst_fast::add_branch", _branch_backward, setup_context=_save_branch)
register("bias_gelu", CUDA=reference.bias_gelu, triton="epilogue")
register("bias_gelu_backward", CUDA=reference.bias_gelu_backward, triton="epilogue")
register("add_branch", CUDA=reference.add_branch, triton="epilogue")
register("add_branch_backward", CUDA=reference.add_branch_backward, triton="epilogue")
differentiable_once("bias_gelu_backward")
differentiable_once("add_branch_backward")
