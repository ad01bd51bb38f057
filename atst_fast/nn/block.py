"""A pre-norm transformer block with stochastic depth."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atst_fast import ops
from atst_fast.nn.frame_attention import FrameAttention
from atst_fast.nn.mlp import Mlp
from atst_fast.nn.plain import is_plain
from atst_fast.nn.selection import FixedRows, Selection, take
from atst_fast.nn.stream import Stream, are_shapes_fixed, attended, drop_path_factors


class Block(nn.Module):
    """``x + DropPath(attn(norm1(x)))``, then ``x + DropPath(mlp(norm2(x)))``.

    Keys ``norm1.*``, ``attn.{qkv,proj}.*``, ``norm2.*``, ``mlp.{fc1,fc2}.*``. Args as audiossl's ``Block``
    (``audiossl/modules/transformer.py``): ``drop`` dropout of the projection and the MLP, ``attn_drop`` must be 0,
    ``drop_path`` probability that a sample skips a branch in training (0 <= drop_path < 1), ``norm_layer`` and
    ``act_layer`` builders. The share of a dropped sample is zero, and its branch is not computed: on a CPU it does not
    enter it; on a GPU, where no shape may depend on the draws, its attention is skipped and its rows are not added.
    ``attn`` and ``mlp`` are read part by part: a hook on them does not run, one on their linear layers does.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        act_layer=nn.GELU,
        norm_layer=nn.LayerNorm,
    ):
        super().__init__()
        if not 0.0 <= drop_path < 1.0:
            raise ValueError(f"Block: drop_path must be in [0, 1), got {drop_path}")
        self.drop, self.drop_path = drop, drop_path
        self.norm1 = norm_layer(dim)
        self.attn = FrameAttention(dim, num_heads, qkv_bias, qk_scale, attn_drop, drop)
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=drop)

    def forward(
        self,
        x: Tensor,
        length: Tensor | None = None,
        *,
        padded_queries: Literal["zero", "attend"] = "attend",
        select: Selection | FixedRows | None = None,
        draws: Tensor | None = None,
        fixed_shapes: bool | None = None,
    ) -> Tensor:
        """Tokens ``[B, L, D]`` to ``[B, L, D]``, or to the selected ``[M, D]``; arguments as ``FrameAttention``.

        ``draws`` ``[2, B]`` in [0, 1): a sample keeps a branch (attention, MLP) where floor(1 - drop_path + draw) is 1.
        Drawn when left out. ``fixed_shapes``: whether no shape depends on them, so that nothing waits for ``x``'s
        device; by default so on a GPU, while `torch.compile` or `torch.export` traces, and with ``FixedRows``. Then the
        draws are on that device, else on the CPU.
        """
        if isinstance(select, FixedRows) or (select is None and are_shapes_fixed(x, fixed_shapes)):
            factors = self._factors(x, draws)
            if factors is not None and select is None:
                length = attended(length, factors, x.shape[1])
            return self.advance(Stream(x), length, factors, padded_queries=padded_queries, select=select).sum()
        kept_attn, kept_mlp = self._kept(len(x), draws)
        entering = self.norm1(take(x, kept_attn))
        if select is None:
            length = None if length is None else take(length, kept_attn)
            mixed = self.attn.mix(entering, length, padded_queries=padded_queries)
        else:
            # From here on, the selected rows only. All rows of the kept samples were needed as keys and values.
            x = take(x.flatten(0, 1), select.queries)
            remaining = select
            if kept_attn is not None:
                remaining, kept_attn = select.samples(kept_attn)
            if kept_mlp is not None:
                kept_mlp = select.samples(kept_mlp)[1]
            mixed = self.attn.mix(entering, select=remaining)
        x = self._add(x, kept_attn, mixed, self.attn.proj)
        return self._add(x, kept_mlp, self.mlp.hidden(self.norm2(take(x, kept_mlp))), self.mlp.fc2)

    def advance(
        self,
        stream: Stream,
        length: Tensor | None,
        factors: Tensor | None,
        *,
        padded_queries: Literal["zero", "attend"] = "attend",
        select: FixedRows | None = None,
    ) -> Stream:
        """The same from stream to stream, with the shapes of the arguments alone.

        ``factors`` float32 ``[2, B]`` of both branches (``drop_path_factors``), None: nothing is dropped. ``length`` is
        0 for a sample that drops attention (``attended``). With ``select`` the stream goes on with its rows.
        """
        of_attn, of_mlp = (None, None) if factors is None else factors
        x, entering = stream.norm(self.norm1)
        mixed = self.attn.mix(entering, length, padded_queries=padded_queries, select=select)
        if select is not None:
            x = select.take_queries(x.flatten(0, 1))
            of_attn, of_mlp = (None if f is None else select.queries.per_row(f) for f in (of_attn, of_mlp))
        x, entering = Stream(x, *self._last(mixed, self.attn.proj), of_attn).norm(self.norm2)
        return Stream(x, *self._feed_forward(entering), of_mlp)

    def _factors(self, x: Tensor, draws: Tensor | None) -> Tensor | None:
        if not self.training or not self.drop_path:
            return None
        draws = torch.rand(2, x.shape[0], device=x.device) if draws is None else draws
        return drop_path_factors([self.drop_path], draws.to(x.device, torch.float32)[None])[0]

    def _feed_forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """``mlp(x)`` as ``_last`` gives it."""
        fc1, fc2 = self.mlp.fc1, self.mlp.fc2
        if self.mlp.fuses():
            return ops.mlp(x, fc1.weight, fc1.bias, fc2.weight), fc2.bias
        return self._last(self.mlp.hidden(x), fc2)

    def _last(self, hidden: Tensor, last: nn.Linear) -> tuple[Tensor, Tensor | None]:
        """``last(hidden)`` without its bias, and the bias; or dropped out, and None."""
        if (self.drop and self.training) or not is_plain(last):
            return F.dropout(last(hidden), self.drop, self.training), None
        return F.linear(hidden, last.weight), last.bias

    def _kept(self, batch: int, draws: Tensor | None) -> list[Tensor | None]:
        """The samples that keep each branch, ascending; None: all."""
        if not self.training or not self.drop_path:
            return [None, None]
        if draws is None:
            draws = torch.rand(2, batch, device="cpu")
        keep = (1 - self.drop_path + draws).floor() > 0
        return [None if k.all() else k.nonzero().squeeze(1) for k in keep]

    def _add(self, x: Tensor, kept: Tensor | None, hidden: Tensor, last: nn.Linear) -> Tensor:
        """x with the branch that ends in ``last(hidden)``."""
        # Where nothing is kept, the branch still ran on no samples: its parameters get gradients of zero, as they must,
        # because an optimizer decays what has a gradient and skips what has none.
        alpha = 1 / (1 - self.drop_path) if self.training else 1.0
        kept = None if kept is None else kept.to(x.device, non_blocking=True)
        if (self.drop and self.training) or last.bias is None or not is_plain(last):
            y = F.dropout(last(hidden), self.drop, self.training)
            return ops.add_branch(x, y, y.new_zeros(y.shape[-1]), alpha=alpha, kept=kept)
        return ops.add_branch(x, F.linear(hidden, last.weight), last.bias, alpha=alpha, kept=kept)

    def extra_repr(self) -> str:
        return f"drop_path={self.drop_path:.3g}" if self.drop_path else ""
