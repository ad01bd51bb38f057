"""What follows the matrix products of a block or a head: bias and GELU, bias and residual, batch norm and ReLU."""

import torch
import torch.nn.functional as F
from torch import Tensor

from atst_fast.ops import _checks
from atst_fast.ops._registry import differentiable_once, register
from atst_fast.reference import epilogue as reference

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def bias_gelu(h: Tensor, bias: Tensor) -> Tensor:
    """``gelu(h + bias)`` with the exact (erf) GELU.

    Args:
        h: ``[..., D]``, a matrix product that has no bias yet. float32 runs the kernel; bfloat16, float16 and float64
            run plain PyTorch.
        bias: ``[D]``.

    Returns ``[..., D]`` in the dtype of h. Differentiable in both; the bits do not depend on the number of threads.
    Largest error against float64, relative to ``max(1, |h + bias|)``: 4e-7 forward, and 2e-6 of the derivative. It is
    small relative to the result too where that is tiny: gelu(-8) is -5e-15 here, and 0 by the usual formula.
    Matches fc1's bias and act of audiossl/modules/transformer.py (Mlp).

    Raises:
        TypeError: not a tensor, another dtype. ValueError: shapes or devices that do not fit.
    """
    _check("bias_gelu", "h", h, bias)
    if h.dtype != torch.float32 or bias.dtype != torch.float32:
        return reference.bias_gelu(h, bias)
    return torch.ops.atst_fast.bias_gelu(h.contiguous(), bias.contiguous())


def add_branch(x: Tensor, y: Tensor, bias: Tensor, *, alpha: float = 1.0, kept: Tensor | None = None) -> Tensor:
    """``x + alpha * (y + bias)``: the residual around a branch whose last matrix product has no bias yet.

    Args:
        x: ``[N, ..., D]``, the residual stream. float32 (with y and bias) runs the kernel; bfloat16, float16 and
            float64 run plain PyTorch.
        y: ``[N, ..., D]``; or, with ``kept``, ``[K, ..., D]``.
        bias: ``[D]``. alpha: factor of the branch; stochastic depth divides by the probability of keeping it.
        kept: int64 ``[K]``, the items along the first axis that have the branch, each at most once; the others stay.

    Returns a new tensor ``[N, ..., D]`` in the dtype of x. Differentiable in x, y and bias; the bits do not depend on
    the number of threads. Error against float64: at most 3e-7 of ``|x| + |alpha| * (|y| + |bias|)``.
    Matches the residuals, the biases before them and DropPath of audiossl/modules/transformer.py (Block).

    Raises:
        TypeError: not a tensor, another dtype. ValueError: shapes or devices that do not fit, an item that x lacks.
    """
    op = "add_branch"
    _check(op, "x", x, bias)
    shape = list(x.shape)
    if kept is not None:
        _checks.tensor(op, "kept", kept, "[K], items along the first axis of x", dim=1, dtypes=(torch.int64,))
        if x.dim() < 2:
            _checks.fail(op, "x", "[N, ..., D] when kept is given", x)
        shape[0] = kept.shape[0]
    _checks.tensor(op, "y", y, f"of shape {shape}", dtypes=_DTYPES)
    if list(y.shape) != shape:
        _checks.fail(op, "y", f"of shape {shape}", y)
    _checks.same_device(op, "x", x, y=y, kept=kept)
    if kept is not None and kept.device.type == "cpu" and not torch.compiler.is_compiling():
        items = kept.tolist()
        if len(set(items)) < len(items) or not all(0 <= item < x.shape[0] for item in items):
            raise ValueError(f"{op}: kept must name items from 0 to {x.shape[0] - 1}, each at most once, got {items}")
    if not x.dtype == y.dtype == bias.dtype == torch.float32:
        return reference.add_branch(x, y, bias, alpha, kept)
    kept = None if kept is None else kept.contiguous()
    return torch.ops.atst_fast.add_branch(x.contiguous(), y.contiguous(), bias.contiguous(), alpha, kept)


def batch_norm_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-5,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    momentum: float = 0.1,
) -> Tensor:
    """``relu((x - mean) / sqrt(var + eps) * weight + bias)`` with mean and biased variance of each column: training.

    Args:
        x: ``[M, D]``, M at least 2. float32 (with weight and bias) runs the kernel; bfloat16, float16 and float64 run
            plain PyTorch.
        weight, bias: ``[D]``. eps: at least 0.
        running_mean, running_var: ``[D]``, moved in place by ``momentum`` (0 to 1) towards the mean and the unbiased
            variance, as torch.nn.BatchNorm1d does.

    Returns ``[M, D]`` in the dtype of x. Differentiable in x, weight and bias; the bits do not depend on the number of
    threads. Error against float64: at most 4e-7 of ``1 + (|x - mean| + |mean|) / sqrt(var + eps) * |weight| + |bias|``.
    Matches the BatchNorm1d and ReLU of ``build_mlp`` in audiossl/methods/atstframe/byol.py.

    Raises:
        TypeError: not a tensor, another dtype. ValueError: shapes or devices that do not fit, fewer than 2 rows, eps or
        momentum out of range.
    """
    op = "batch_norm_relu"
    _check(op, "x", x, bias)
    if x.dim() != 2 or x.shape[0] < 2:
        _checks.fail(op, "x", "[M, D] with at least 2 rows, to take their variance", x)
    _check_row(op, "weight", weight, "x", x)
    for name, row in (("running_mean", running_mean), ("running_var", running_var)):
        if row is not None:
            _check_row(op, name, row, "x", x)
    for name, value, most in (("eps", eps, float("inf")), ("momentum", momentum, 1)):
        if not 0 <= value <= most:
            _checks.fail(op, name, f"from 0 to {most}", value)
    if not x.dtype == weight.dtype == bias.dtype == torch.float32:
        return F.relu(F.batch_norm(x, running_mean, running_var, weight, bias, True, momentum, eps))
    args = x.contiguous(), weight.contiguous(), bias.contiguous(), eps
    out, mean, variance = torch.ops.atst_fast.batch_norm_relu(*args)
    if running_mean is not None:
        running_mean.lerp_(mean, momentum)
    if running_var is not None:
        running_var.lerp_(variance * (len(x) / (len(x) - 1)), momentum)
    return out


def _check(op: str, name: str, x: Tensor, bias: Tensor) -> None:
    _checks.tensor(op, name, x, "[..., D]", dtypes=_DTYPES)
    if x.dim() < 1 or x.shape[-1] < 1:
        _checks.fail(op, name, "[..., D] with D at least 1", x)
    _check_row(op, "bias", bias, name, x)


def _check_row(op: str, name: str, row: Tensor, of: str, x: Tensor) -> None:
    expected = f"[{x.shape[-1]}] (the last axis of {of})"
    _checks.tensor(op, name, row, expected, dim=1, dtypes=_DTYPES)
    if row.shape[0] != x.shape[-1]:
        _checks.fail(op, name, expected, row)
    _checks.same_device(op, of, x, **{name: row})


@torch.library.register_fake("atst_fast::bias_gelu")
def _(h, bias):
    return torch.empty_like(h)


@torch.library.register_fake("atst_fast::bias_gelu_backward")
def _(grad, h, bias):
    return torch.empty_like(h), torch.empty_like(bias)


@torch.library.register_fake("atst_fast::add_branch")
def _(x, y, bias, alpha, kept):
    return torch.empty_like(x)


@torch.library.register_fake("atst_fast::add_branch_backward")
def _(grad, alpha, kept):
    items = grad.shape[:1] if kept is None else kept.shape
    return grad.new_empty(*items, *grad.shape[1:]), grad.new_empty(grad.shape[-1:])


@torch.library.register_fake("atst_fast::batch_norm_relu")
def _(x, weight, bias, eps):
    return torch.empty_like(x), torch.empty_like(bias), torch.empty_like(bias)


@torch.library.register_fake("atst_fast::batch_norm_relu_backward")
def _(grad, x, mean, variance, weight, bias, eps):
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)


def _save_gelu(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gelu_backward(ctx, grad):
    return torch.ops.atst_fast.bias_gelu_backward(grad.contiguous(), *ctx.saved_tensors)


def _save_branch(ctx, inputs, output):
    _, _, _, ctx.alpha, kept = inputs
    ctx.save_for_backward(kept)


def _branch_backward(ctx, grad):
    (kept,) = ctx.saved_tensors
    if kept is None and ctx.alpha == 1.0:
        return grad, grad, grad.reshape(-1, grad.shape[-1]).sum(0), None, None
    dy, dbias = torch.ops.atst_fast.add_branch_backward(grad.contiguous(), ctx.alpha, kept)
    return grad, dy, dbias, None, None


def _save_norm(ctx, inputs, output):
    x, weight, bias, ctx.eps = inputs
    _, mean, variance = output
    ctx.mark_non_differentiable(mean, variance)
    ctx.save_for_backward(x, mean, variance, weight, bias)


def _norm_backward(ctx, grad, _, __):
    backward = torch.ops.atst_fast.batch_norm_relu_backward
    return *backward(grad.contiguous(), *ctx.saved_tensors, ctx.eps), None


torch.library.register_autograd("atst_fast::bias_gelu", _gelu_backward, setup_context=_save_gelu)
torch.library.register_autograd("atst_fast::add_branch", _branch_backward, setup_context=_save_branch)
torch.library.register_autograd("atst_fast::batch_norm_relu", _norm_backward, setup_context=_save_norm)
register("bias_gelu", CUDA=reference.bias_gelu)
register("bias_gelu_backward", CUDA=reference.bias_gelu_backward)
register("add_branch", CUDA=reference.add_branch)
register("add_branch_backward", CUDA=reference.add_branch_backward)
register("batch_norm_relu", CUDA=reference.batch_norm_relu)
register("batch_norm_relu_backward", CUDA=reference.batch_norm_relu_backward)
differentiable_once("bias_gelu_backward")
differentiable_once("add_branch_backward")
differentiable_once("batch_norm_relu_backward")
