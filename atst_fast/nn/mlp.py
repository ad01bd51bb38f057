"""The feed-forward part of a block."""

import torch.nn.functional as F
from torch import Tensor, nn

from atst_fast import ops
from atst_fast.nn.plain import is_plain


class Mlp(nn.Module):
    """``fc2(gelu(fc1(x)))`` with the exact (erf) GELU; keys ``fc1.*``, ``fc2.*``.

    Args as audiossl's ``Mlp`` (``audiossl/modules/transformer.py``): ``act_layer`` builds the activation, ``drop`` is
    the dropout after both layers.
    """

    fused: bool = False  # ops.mlp in blocks of fixed shapes: off until a GPU has measured that it pays

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer=nn.GELU,
        drop: float = 0.0,
    ):
        super().__init__()
        hidden_features = hidden_features or in_features
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden_features, out_features or in_features)
        self.drop = nn.Dropout(drop) if drop else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        return self.drop(self.fc2(self.hidden(x)))

    def hidden(self, x: Tensor) -> Tensor:
        """What ``fc2`` reads, ``[..., hidden_features]``."""
        if self._reads_fc1():
            return self.drop(ops.bias_gelu(F.linear(x, self.fc1.weight), self.fc1.bias))
        return self.drop(self.act(self.fc1(x)))

    def fuses(self) -> bool:
        """Whether ``ops.mlp`` is to run both layers, and may: it has neither a dropout nor another activation."""
        drops = self.training and not isinstance(self.drop, nn.Identity)
        return self.fused and not drops and self._reads_fc1() and is_plain(self.fc2)

    def _reads_fc1(self) -> bool:
        exact = isinstance(self.act, nn.GELU) and self.act.approximate == "none"
        return exact and self.fc1.bias is not None and is_plain(self.fc1)
