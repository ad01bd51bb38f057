"""Projector and predictor, two linear layers with batch statistics between them; and the head of a classifier."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from atst_fast import ops
from atst_fast.ops import _checks


class Head(nn.Sequential):
    """``Linear -> BatchNorm1d -> ReLU -> Linear``, no biases; keys ``0.weight, 1.*, 3.weight``.

    ``[M, dim]`` to ``[M, out]``. The statistics are over all M rows (both views of all clips), and its running mean and
    variance move with every training forward. ``torch.nn.SyncBatchNorm.convert_sync_batchnorm`` makes them those of the
    rows of all processes. On a CPU too: torch's DDP refuses such a module there, so wrap the system first, then convert
    ``replica.module``. Upstream: ``build_mlp`` in ``audiossl/methods/atstframe/byol.py``.
    """

    def __init__(self, dim: int, hidden: int = 4096, out: int = 256):
        super().__init__(
            nn.Linear(dim, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, out, bias=False),
        )

    def forward(self, x: Tensor, count: Tensor | None = None) -> Tensor:
        """``count``: a scalar on the device of x; rows from there on are padding (``ops.batch_norm_relu``). They must
        be numbers all the same, for the gradient of the first layer is a product of them and zeros."""
        norm = self[1]
        if (
            (type(norm) is nn.BatchNorm1d or type(norm) is nn.SyncBatchNorm)
            and norm.training
            and norm.affine
            and norm.momentum is not None
        ):
            return self[3](batch_norm_relu(norm, self[0](x), count))
        if norm.training and count is not None:
            raise ValueError(f"Head: {norm} takes no count: its statistics would be those of the padding too")
        return super().forward(x)


class LinearHead(nn.Module):
    """``BatchNorm1d`` without parameters, then ``Linear`` (weights normal with deviation 0.01, biases 0): features
    ``[..., dim]`` to logits ``[..., classes]``, differentiable. Keys ``norm.{running_mean,running_var,
    num_batches_tracked}``, ``linear.{weight,bias}``. In training the statistics are over all leading axes.

    ``torch.nn.SyncBatchNorm.convert_sync_batchnorm`` makes the statistics those of the rows of all processes, which may
    hold different numbers of them; on a CPU too, as of `Head`.

    ``batch_norm=False`` leaves the first one out, as the heads of sound event detection do. Upstream: ``LinearHead`` in
    ``audiossl/modules/head.py``. Raises ValueError unless ``dim`` and ``classes`` are at least 1 and the last axis of
    the features is ``dim``.
    """

    def __init__(self, dim: int, classes: int, *, batch_norm: bool = True):
        super().__init__()
        for name, value in (("dim", dim), ("classes", classes)):
            if value < 1:
                _checks.fail("LinearHead", name, "at least 1", value)
        self.norm = nn.BatchNorm1d(dim, affine=False) if batch_norm else None
        self.linear = nn.Linear(dim, classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        dim = self.linear.in_features
        if x.dim() < 1 or x.shape[-1] != dim:
            _checks.fail("LinearHead", "x", f"[..., {dim}] (features)", x)
        if self.norm is not None:
            rows, group = x.reshape(-1, dim), _processes(self.norm) if self.norm.training else None
            x = (self.norm(rows) if group is None else _common_norm(self.norm, rows, group)).view_as(x)
        return self.linear(x)


def batch_norm_relu(norm: nn.BatchNorm1d | nn.SyncBatchNorm, x: Tensor, count: Tensor | None = None) -> Tensor:
    """``relu(norm(x))`` of ``[M, D]`` in training, with what it does to the running statistics of ``norm``, which has
    weight, bias and a momentum."""
    assert norm.momentum is not None  # the caller's condition
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    return ops.batch_norm_relu(
        x,
        norm.weight,
        norm.bias,
        eps=norm.eps,
        running_mean=norm.running_mean,
        running_var=norm.running_var,
        momentum=norm.momentum,
        count=count,
        group=_processes(norm),
    )


def _processes(norm: nn.Module) -> "dist.ProcessGroup | None":
    """Whose rows the statistics are over, where they are not those of this process alone."""
    if not isinstance(norm, nn.SyncBatchNorm) or not (dist.is_available() and dist.is_initialized()):
        return None
    group = norm.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def _common_norm(norm: nn.Module, x: Tensor, group: "dist.ProcessGroup") -> Tensor:
    """The training forward of a SyncBatchNorm without parameters, ``[M, D]``: torch's own cannot run on a CPU."""
    assert isinstance(norm, nn.SyncBatchNorm)  # what has a group is one
    # as LinearHead made it
    assert norm.momentum is not None
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    wide = x if x.dtype == torch.float64 else x.float()
    rows = wide.new_full((1,), len(x))
    total, n = _SumOfAll.apply(torch.cat([wide.sum(0), rows]), group).split([x.shape[1], 1])
    mean = total / n
    variance = _SumOfAll.apply((wide - mean).square().sum(0), group) / n
    with torch.no_grad():
        norm.num_batches_tracked.add_(1)
        norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), norm.momentum)
        norm.running_var.lerp_((variance * (n / (n - 1))).to(norm.running_var.dtype), norm.momentum)
    return ((wide - mean) * (variance + norm.eps).rsqrt()).to(x.dtype)


class _SumOfAll(torch.autograd.Function):
    """The sum of all processes' tensors, in each of them. What they all compute from it is added in its gradient."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None
