"""Projector and predictor: two linear layers with batch statistics between them."""

from torch import nn


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
