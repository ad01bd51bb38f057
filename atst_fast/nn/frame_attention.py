"""Multi-head self-attention over tokens: the parameters of ``ops.frame_attention``."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from atst_fast import ops
from atst_fast.nn.plain import is_plain
from atst_fast.nn.selection import FixedRows, Selection


class FrameAttention(nn.Module):
    """``proj(attention(qkv(x)))``; keys ``qkv.weight [3*D, D]``, ``qkv.bias`` (optional), ``proj.{weight, bias}``.

    Args as audiossl's ``Attention`` (``audiossl/modules/transformer.py``): ``qk_scale`` defaults to head_dim**-0.5;
    ``attn_drop`` must be 0, because the attention matrix is never formed; ``proj_drop`` is the dropout after ``proj``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"FrameAttention: num_heads must divide dim ({dim}), got {num_heads}")
        if attn_drop:
            raise ValueError(
                f"FrameAttention: attn_drop must be 0 (the attention matrix is never formed), got {attn_drop}"
            )
        self.num_heads = num_heads
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop) if proj_drop else nn.Identity()

    def forward(
        self,
        x: Tensor,
        length: Tensor | None = None,
        *,
        padded_queries: Literal["zero", "attend"] = "attend",
        select: Selection | FixedRows | None = None,
    ) -> Tensor:
        """Tokens ``[B, L, D]`` to ``[B, L, D]``, or to ``[M, D]`` for the selected ones only.

        ``length`` int64 ``[B]``: valid tokens, the keys that are read. ``padded_queries="attend"`` computes the rows
        past it as audiossl's additive mask does, ``"zero"`` skips them. With ``select``, ``length`` is taken from it.
        """
        return self.proj_drop(self.proj(self.mix(x, length, padded_queries=padded_queries, select=select)))

    def mix(
        self,
        x: Tensor,
        length: Tensor | None = None,
        *,
        padded_queries: Literal["zero", "attend"] = "attend",
        select: Selection | FixedRows | None = None,
    ) -> Tensor:
        """What ``proj`` reads: the heads side by side. Arguments and shapes as ``forward``."""
        if select is None:
            return ops.frame_attention(
                self.qkv(x), self.num_heads, lengths=length, scale=self.scale, padded_queries=padded_queries
            )
        x = x.flatten(0, 1)
        q, kv = self._selected(x, select)
        return ops.frame_attention_packed(
            q,
            kv,
            *select.offsets(x.device),
            self.num_heads,
            max_seqlen_q=select.length,
            max_seqlen_k=select.length,
            scale=self.scale,
        )

    def _selected(self, x: Tensor, select: Selection | FixedRows) -> tuple[Tensor, Tensor]:
        """Queries of the selected rows; keys and values of those they attend to."""
        parts = [x.shape[1], 2 * x.shape[1]]
        if not is_plain(self.qkv):
            q, kv = self.qkv(x).split(parts, dim=1)
            return select.take_queries(q), select.take_keys(kv)
        weight_q, weight_kv = self.qkv.weight.split(parts)
        bias_q, bias_kv = (None, None) if self.qkv.bias is None else self.qkv.bias.split(parts)
        q = F.linear(select.take_queries(x), weight_q, bias_q)
        return q, F.linear(select.take_keys(x), weight_kv, bias_kv)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"
