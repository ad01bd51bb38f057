"""Projector and predictor: two linear layers with batch statistics between them."""

from torch import Tensor, nn

from atst_fast import ops


class Head(nn.Sequential):
    """``Linear -> BatchNorm1d -> ReLU -> Linear``, no biases; keys ``0.weight, 1.*, 3.weight``.

    ``[M, dim]`` to ``[M, out]``. The statistics are over all M rows (both views of all clips), and its running mean and
    variance move with every training forward. Upstream: ``build_mlp`` in ``audiossl/methods/atstframe/byol.py``.
    """

    def __init__(self, dim: int, hidden: int = 4096, out: int = 256):
        super().__init__(
            nn.Linear(dim, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, out, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        first, norm, _, last = self
        # anything else (SyncBatchNorm put in its place, evaluation) runs as it is
        plain = type(norm) is nn.BatchNorm1d and norm.affine and norm.track_running_stats and norm.momentum is not None
        if not plain or not norm.training:
            return super().forward(x)
        norm.num_batches_tracked.add_(1)
        running = {"running_mean": norm.running_mean, "running_var": norm.running_var, "momentum": norm.momentum}
        return last(ops.batch_norm_relu(first(x), norm.weight, norm.bias, eps=norm.eps, **running))
