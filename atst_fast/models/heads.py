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
        norm = self[1]
        # anything else (evaluation, SyncBatchNorm put in its place) runs as it is
        if type(norm) is not nn.BatchNorm1d or not norm.training or not norm.affine or norm.momentum is None:
            return super().forward(x)
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
        h = ops.batch_norm_relu(
            self[0](x),
            norm.weight,
            norm.bias,
            eps=norm.eps,
            running_mean=norm.running_mean,
            running_var=norm.running_var,
            momentum=norm.momentum,
        )
        return self[3](h)
