"""Batch norm and ReLU of the heads, of padded rows and of several processes too."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from atst_fast.ops import _checks
from atst_fast.ops._registry import differentiable_once, register, takes_halves
from atst_fast.reference import batch_norm_relu as reference

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def batch_norm_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-5,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    momentum: float = 0.1,
    count: Tensor | None = None,
    group: "dist.ProcessGroup | None" = None,
) -> Tensor:
    """``relu((x - mean) / sqrt(var + eps) * weight + bias)`` with mean and biased variance of each column: training.

    Args:
        x: ``[M, D]``, M at least 2, or 1 with ``count`` or ``group``. On a GPU float32, bfloat16 and float16 run the
            kernel, on a CPU float32 (with weight and bias, without count and group); all else runs plain PyTorch.
        weight, bias: ``[D]``, on a GPU of any of these dtypes. eps: at least 0.
        running_mean, running_var: ``[D]`` (float32 for half precision), moved in place by ``momentum`` (0 to 1) towards
            the mean and the unbiased variance, as torch.nn.BatchNorm1d does.
        count: int64 or int32 scalar on the device of x, which is not read on the host: rows at or past it are padding.
            Whatever they hold, they have no share in the statistics, their results are 0 and so are their gradients.
            Below 0: 0.
        group: the statistics are those of the rows of all its processes, which may hold different numbers of them, and
            so is the gradient of x; the gradients of weight and bias are those of this process, for DDP to average.
            Every process has to call this, and its backward. As torch.nn.SyncBatchNorm.

    Returns ``[M, D]`` in the dtype of x; NaN and unmoved running statistics where count and group leave fewer than 2
    rows. Differentiable in x, weight and bias. The bits depend neither on the number of threads nor on the run. Error
    of float32 against float64: at most 4e-7 of
    ``1 + (|x - mean| + |mean|) / sqrt(var + eps) * |weight| + |bias|``; of bfloat16 and float16 at most twice that of
    torch's batch_norm and relu in the same dtype.
    Matches the BatchNorm1d and ReLU of ``build_mlp`` in audiossl/methods/atstframe/byol.py.

    Raises:
        TypeError: another type or dtype. ValueError: shapes or devices that do not fit, too few rows, eps or
        momentum out of range.
    """
    op = "batch_norm_relu"
    _check(op, x, weight, bias, count, group)
    for name, row in (("running_mean", running_mean), ("running_var", running_var)):
        if row is not None:
            _checks.row(op, name, row, "x", x, _DTYPES)
    for name, value, most in (("eps", eps, float("inf")), ("momentum", momentum, 1)):
        _checks.number(op, name, value, f"from 0 to {most}", 0, most)
    args = x.contiguous(), weight.contiguous(), bias.contiguous()
    if count is not None or group is not None:
        out, moments = _Parts.apply(*args, count, eps, group)
        _move(running_mean, running_var, moments, momentum)
        return out
    dtypes = {t.dtype for t in args}
    if torch.float64 in dtypes or (dtypes != {torch.float32} and not takes_halves(x)):
        # beside float32 statistics torch takes float32 weights, whatever x is
        kept = next((r.dtype for r in (running_mean, running_var) if r is not None), x.dtype)
        return F.relu(F.batch_norm(x, running_mean, running_var, weight.to(kept), bias.to(kept), True, momentum, eps))
    out, mean, variance = torch.ops.atst_fast.batch_norm_relu(*args, eps)
    if running_mean is not None:
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
    if running_var is not None:
        running_var.lerp_((variance * (x.shape[0] / (x.shape[0] - 1))).to(running_var.dtype), momentum)
    return out


def _check(op, x, weight, bias, count, group) -> None:
    _checks.tensor(op, "x", x, "[M, D]", dtypes=_DTYPES)
    least = 2 if count is None and group is None else 1
    if x.dim() != 2 or x.shape[0] < least or x.shape[1] < 1:
        why = "2 rows, to take their variance" if least == 2 else "1 row"
        _checks.fail(op, "x", f"[M, D] with at least {why}", x)
    for name, row in (("bias", bias), ("weight", weight)):
        _checks.row(op, name, row, "x", x, _DTYPES)
    _checks.count(op, count, "x", x)
    if group is not None and not isinstance(group, dist.ProcessGroup):
        _checks.fail(op, "group", "a ProcessGroup of torch.distributed, or None", group, TypeError)


def _move(running_mean: Tensor | None, running_var: Tensor | None, moments: Tensor, momentum: float) -> None:
    """Towards the moments of at least two rows; nothing is asked of the device."""
    n, mean, variance = moments
    for running, value in ((running_mean, mean), (running_var, variance * (n / (n - 1)))):
        if running is not None:
            running.copy_(running.lerp(value.to(running.dtype), momentum).where(n >= 2, running))


def _merged(moments: Tensor, group: "dist.ProcessGroup") -> Tensor:
    """The moments of the rows of all processes, by those of each: the same bits in all of them."""
    gathered = moments.new_empty(dist.get_world_size(group), *moments.shape)
    dist.all_gather(list(gathered), moments, group=group)
    n, mean, variance = gathered.unbind(1)
    total = n.sum(0)
    share = n / total.clamp(min=1)
    # by their distances from one of them, so that nothing large cancels
    common = mean[0] + (share * (mean - mean[0])).sum(0)
    return torch.stack([total, common, (share * (variance + (mean - common).square())).sum(0)])


class _Parts(torch.autograd.Function):
    """The operator in parts, with what processes exchange between them."""

    @staticmethod
    def forward(ctx, x, weight, bias, count, eps, group):
        moments = torch.ops.atst_fast.column_moments(x, count)
        if group is not None:
            moments = _merged(moments, group)
        ctx.eps, ctx.group = eps, group
        ctx.save_for_backward(x, moments, weight, bias, count)
        ctx.mark_non_differentiable(moments)
        return torch.ops.atst_fast.batch_norm_relu_apply(x, moments, weight, bias, count, eps), moments

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        x, moments, weight, bias, count = ctx.saved_tensors
        rest = weight, bias, count, ctx.eps
        grad = grad.contiguous()
        own = sums = torch.ops.atst_fast.batch_norm_relu_sums(grad, x, moments, *rest)
        if ctx.group is not None:
            sums = own.clone()
            dist.all_reduce(sums, group=ctx.group)
        dx = torch.ops.atst_fast.batch_norm_relu_input_grad(grad, x, moments, sums, *rest)
        return dx, own[1].to(weight.dtype), own[0].to(bias.dtype), None, None, None


def _sums_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@torch.library.register_fake("atst_fast::batch_norm_relu")
def _(x, weight, bias, eps):
    mean, variance = (bias.new_empty(bias.shape, dtype=_sums_dtype(x)) for _ in range(2))
    return torch.empty_like(x), mean, variance


@torch.library.register_fake("atst_fast::batch_norm_relu_backward")
def _(grad, x, mean, variance, weight, bias, eps):
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)


@torch.library.register_fake("atst_fast::column_moments")
def _(x, count):
    return x.new_empty(3, x.shape[1], dtype=_sums_dtype(x))


@torch.library.register_fake("atst_fast::batch_norm_relu_apply")
def _(x, moments, weight, bias, count, eps):
    return torch.empty_like(x)


@torch.library.register_fake("atst_fast::batch_norm_relu_sums")
def _(grad, x, moments, weight, bias, count, eps):
    return x.new_empty(2, x.shape[1], dtype=_sums_dtype(x))


@torch.library.register_fake("atst_fast::batch_norm_relu_input_grad")
def _(grad, x, moments, sums, weight, bias, count, eps):
    return torch.empty_like(x)


def _save_norm(ctx, inputs, output):
    x, weight, bias, ctx.eps = inputs
    _, mean, variance = output
    ctx.mark_non_differentiable(mean, variance)
    ctx.save_for_backward(x, mean, variance, weight, bias)


def _norm_backward(ctx, grad, _, __):
    backward = torch.ops.atst_fast.batch_norm_relu_backward
    return *backward(grad.contiguous(), *ctx.saved_tensors, ctx.eps), None


torch.library.register_autograd("atst_fast::batch_norm_relu", _norm_backward, setup_context=_save_norm)
for _op in ("batch_norm_relu", "batch_norm_relu_backward"):
    register(_op, triton="batch_norm_relu", CUDA=getattr(reference, _op))
for _op in ("column_moments", "batch_norm_relu_apply", "batch_norm_relu_sums", "batch_norm_relu_input_grad"):
    register(_op, triton="batch_norm_relu", CPU=getattr(reference, _op), CUDA=getattr(reference, _op))
    differentiable_once(_op)
differentiable_once("batch_norm_relu_backward")
