"""The fused forward of a pre-norm transformer block, and of an attention module alone."""

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atst_fast import ops
from atst_fast.integrations.accelerate_match import Call, Roles, at, changed
from atst_fast.integrations.accelerate_swap import Fused
from atst_fast.nn import FixedRows, Selection
from atst_fast.nn.plain import is_plain
from atst_fast.nn.selection import take
from atst_fast.nn.stream import Stream, are_shapes_fixed, attended
from atst_fast.ops import _autocast

Queries = Literal["zero", "attend"]
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class BlockPlan(NamedTuple):
    """``form``: what the forward returns, -1 a tensor, n a tuple of it and n times None. ``attention``, ``rest``: what
    is to be fused. ``masked``: whether the block's own attention, where it is left, takes a mask."""

    roles: Roles
    call: Call
    form: int
    attention: bool
    rest: bool
    masked: bool


def plain(linear: Any) -> bool:
    """Whether a linear layer's weight may be read: no subclass, no hook, no distributed or quantised tensor."""
    return isinstance(linear, nn.Linear) and is_plain(linear) and type(linear.weight) in (nn.Parameter, Tensor)


def wrapped(y: Tensor, form: int) -> Any:
    return y if form < 0 else (y, *[None] * form)


def token_lengths(length: Tensor, tokens: int) -> Tensor:
    """Valid tokens from 1 to all of them, as the additive mask of -10000 has it: where it lies on every key, it changes
    nothing, so that a clip of length 0 attends to all."""
    length = length.to(torch.int64)
    return torch.where(length <= 0, tokens, length).clamp(max=tokens)


def _joined(layers: list[Any]) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the layers side by side."""
    if len(layers) == 1:
        return layers[0].weight, layers[0].bias
    weight = torch.cat([layer.weight for layer in layers])
    if all(layer.bias is None for layer in layers):
        return weight, None
    zeros = (weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias for layer in layers)
    return weight, torch.cat(list(zeros))


def packed_qkv(module: nn.Module, roles: Roles, x: Tensor) -> Tensor:
    """Queries, keys and values of ``x`` side by side."""
    layers = [at(module, path) for path in roles.qkv]
    if all(map(plain, layers)):
        return F.linear(x, *_joined(layers))
    return layers[0](x) if len(layers) == 1 else torch.cat([layer(x) for layer in layers], -1)


def selected_qkv(module: nn.Module, roles: Roles, x: Tensor, select: Selection | FixedRows) -> tuple[Tensor, Tensor]:
    """Of ``x`` ``[B*L, D]`` the queries of the selected rows; keys and values of those they attend to."""
    layers, sizes = [at(module, path) for path in roles.qkv], [roles.dim, 2 * roles.dim]
    if not all(map(plain, layers)):
        q, kv = packed_qkv(module, roles, x).split(sizes, -1)
        return select.take_queries(q), select.take_keys(kv)
    weight, bias = _joined(layers)
    (weight_q, weight_kv), (bias_q, bias_kv) = weight.split(sizes), (None, None) if bias is None else bias.split(sizes)
    return F.linear(select.take_queries(x), weight_q, bias_q), F.linear(select.take_keys(x), weight_kv, bias_kv)


def attend(
    module: nn.Module,
    roles: Roles,
    x: Tensor,
    length: Tensor | None,
    queries: Queries = "attend",
    select: Selection | FixedRows | None = None,
) -> Tensor:
    """What the output layer of the attention reads, of all tokens or of the selected ones."""
    owner = at(module, roles.owner)
    heads = getattr(owner, roles.heads)
    scale = None if roles.scale is None else float(getattr(owner, roles.scale))
    if select is None:
        qkv = packed_qkv(module, roles, x)
        return ops.frame_attention(qkv, heads, lengths=length, scale=scale, padded_queries=queries)
    q, kv = selected_qkv(module, roles, x.flatten(0, 1), select)
    offsets = select.offsets(x.device)
    longest = select.length
    return ops.frame_attention_packed(q, kv, *offsets, heads, max_seqlen_q=longest, max_seqlen_k=longest, scale=scale)


class FusedBlock(Fused):
    """``x + drop_path(attn(norm1(x)))`` and ``x + drop_path(mlp(norm2(x)))`` with the operators of atst_fast.

    Linear layers that are more than ``nn.Linear`` are called, and so is another activation than the exact GELU. Where a
    call asks for something else (the attention matrix, a mask of its own), or a module within has a hook, the forward
    of the original class runs.
    """

    plan: BlockPlan
    fixed_shapes: bool | None = None  # as in models.FrameEncoder

    def forward(self, *args, **kwargs):
        given = self.plan.call.bind(args, kwargs)
        x, length = self._tensors(given)
        if x is None or not self.fuses(x):
            return super().forward(*args, **kwargs)
        if length is not None:
            length = token_lengths(length.to(x.device), x.shape[1])
        if self.is_fixed(x):
            x = self.advance(Stream(x), length).sum()
        else:
            x = self.sequential(x, length)
        return wrapped(x, self.plan.form)

    def _tensors(self, given: dict | None) -> tuple[Tensor | None, Tensor | None]:
        """Tokens and valid tokens of a call; None and None if it has anything else to say."""
        call = self.plan.call
        if given is None or call.names[0] not in given:
            return None, None
        x = given.pop(call.names[0])
        length = given.pop(call.length, None) if call.length else None
        whole = length is None or (isinstance(length, Tensor) and length.dim() == 1 and _is_integral(length))
        if given or not whole or not isinstance(x, Tensor) or x.dim() != 3 or 0 in x.shape or x.dtype not in _DTYPES:
            return None, None
        return (x, length) if length is None or len(length) == len(x) else (None, None)

    def fuses(self, x: Tensor) -> bool:
        """Whether this block, as it is now, may be read part by part."""
        roles = self.plan.roles
        if x.shape[-1] != roles.dim or changed(self, roles):
            return False
        return not any(_drops(at(self, path)) for path in roles.dropouts)

    def is_fixed(self, x: Tensor) -> bool:
        """Whether no shape may depend on the draws of stochastic depth."""
        if not self.plan.attention or not self.plan.rest or not self.draws_nothing():
            return True
        return are_shapes_fixed(x, self.fixed_shapes)

    def draws_nothing(self) -> bool:
        """Whether no layer within draws random numbers of its own, between those of stochastic depth."""
        roles = self.plan.roles
        return all(plain(at(self, path)) for path in (*roles.qkv, roles.proj, roles.fc1, roles.fc2))

    def factor(self, branch: int, x: Tensor) -> Tensor | None:
        """What the block's own stochastic depth multiplies each sample of a branch by, ``[B]``; drawn as it draws."""
        drops = self.plan.roles.drops
        module = at(self, drops[branch]) if drops else None
        if module is None or not module.training or not module.drop_prob:
            return None
        dtype = x.dtype
        if _autocast.is_on(x.device) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(x.device.type)
        return module(torch.ones(len(x), 1, 1, dtype=dtype, device=x.device)).flatten()

    def advance(
        self,
        stream: Stream,
        length: Tensor | None,
        queries: Queries = "attend",
        select: FixedRows | None = None,
    ) -> Stream:
        """From stream to stream with the shapes of the arguments alone; with ``select`` it goes on with its rows."""
        early = self.draws_nothing()
        of_attn = self.factor(0, stream.x) if early else None
        of_mlp = self.factor(1, stream.x) if early else None
        x, entering = stream.norm(at(self, self.plan.roles.norm1))
        clips = x  # of which the factors are, also where x becomes the rows that are read
        if of_attn is not None and self.plan.attention:
            length = attended(length, torch.stack([of_attn, of_attn]), x.shape[1])
        y, bias = self._attention(entering, length, queries, select)
        if not early:
            of_attn = self.factor(0, clips)
        if select is not None:
            x = select.take_queries(x.flatten(0, 1))
            of_attn, of_mlp = (None if f is None else select.queries.per_row(f) for f in (of_attn, of_mlp))
        x, entering = self._stream(x, y, bias, of_attn).norm(at(self, self.plan.roles.norm2))
        y, bias = self._last(self._hidden(entering), self.plan.roles.fc2)
        if not early:
            of_mlp = self.factor(1, clips)
            of_mlp = of_mlp if of_mlp is None or select is None else select.queries.per_row(of_mlp)
        return self._stream(x, y, bias, of_mlp)

    def sequential(
        self,
        x: Tensor,
        length: Tensor | None,
        queries: Queries = "attend",
        select: Selection | None = None,
    ) -> Tensor:
        """The same on a CPU, where samples that drop a branch do not enter it."""
        roles = self.plan.roles
        kept_attn, alpha_attn = _kept(self.factor(0, x))
        kept_mlp, alpha_mlp = _kept(self.factor(1, x))
        entering = at(self, roles.norm1)(take(x, kept_attn))
        if select is None:
            mixed = attend(self, roles, entering, length if length is None else take(length, kept_attn), queries)
        else:
            x = take(x.flatten(0, 1), select.queries)
            remaining = select
            if kept_attn is not None:
                remaining, kept_attn = select.samples(kept_attn)
            if kept_mlp is not None:
                kept_mlp = select.samples(kept_mlp)[1]
            mixed = attend(self, roles, entering, None, queries, remaining)
        x = _add(x, *self._last(mixed, roles.proj), kept_attn, alpha_attn)
        hidden = self._hidden(at(self, roles.norm2)(take(x, kept_mlp)))
        return _add(x, *self._last(hidden, roles.fc2), kept_mlp, alpha_mlp)

    def _attention(self, x, length, queries, select) -> tuple[Tensor, Tensor | None]:
        roles = self.plan.roles
        if self.plan.attention:
            return self._last(attend(self, roles, x, length, queries, select), roles.proj)
        # the block's own, called as the official block does
        owner = at(self, roles.owner.split(".")[0])
        mask = None
        if length is not None:
            padded = torch.arange(x.shape[1], device=x.device) >= length[:, None]
            mask = (-10000.0 * padded[:, None, None, :]).expand(-1, 1, x.shape[1], -1)
        y = owner(x, mask) if self.plan.masked else owner(x)
        y = y[0] if isinstance(y, tuple) else y
        return y if select is None else select.take_queries(y.flatten(0, 1)), None

    def _hidden(self, x: Tensor) -> Tensor:
        """What the last layer of the MLP reads."""
        roles = self.plan.roles
        fc1 = at(self, roles.fc1)
        if roles.gelu and self.plan.rest and plain(fc1) and fc1.bias is not None:
            return ops.bias_gelu(F.linear(x, fc1.weight), fc1.bias)
        x = fc1(x)
        return F.gelu(x) if roles.act is None else at(self, roles.act)(x)

    def _last(self, hidden: Tensor, path: str) -> tuple[Tensor, Tensor | None]:
        """A branch without the bias of its last layer, and that bias."""
        layer = at(self, path)
        if self.plan.rest and plain(layer):
            return F.linear(hidden, layer.weight), layer.bias
        return layer(hidden), None

    def _stream(self, x: Tensor, y: Tensor, bias: Tensor | None, factor: Tensor | None) -> Stream:
        if self.plan.rest:
            return Stream(x, y, bias, None if factor is None else factor.float())
        return Stream(x + (y if factor is None else y * factor.view(-1, *[1] * (y.dim() - 1))))


class AttentionPlan(NamedTuple):
    roles: Roles
    call: Call
    form: int


class FusedAttention(Fused):
    """An attention module of its own with ``ops.frame_attention``; a mask that is not one of lengths runs the original
    forward, and so does a hook within."""

    plan: AttentionPlan

    def forward(self, *args, **kwargs):
        roles, call, form = self.plan
        given = call.bind(args, kwargs)
        x: Any = given.pop(call.names[0], None) if given is not None else None
        ready = isinstance(x, Tensor) and x.dim() == 3 and 0 not in x.shape and x.dtype in _DTYPES and not given
        if not ready or changed(self, roles) or any(_drops(at(self, p)) for p in roles.dropouts):
            return super().forward(*args, **kwargs)
        mixed = attend(self, roles, x, None)
        return wrapped(at(self, roles.proj)(mixed) if roles.proj else mixed, form)


def _drops(dropout: Any) -> bool:
    return dropout.training and dropout.p > 0


def _is_integral(x: Tensor) -> bool:
    return not x.is_floating_point() and not x.is_complex() and x.dtype != torch.bool


def _kept(factor: Tensor | None) -> tuple[Tensor | None, float]:
    """The samples that keep a branch, ascending (None: all), and what it is multiplied by."""
    if factor is None:
        return None, 1.0
    kept = factor.nonzero().squeeze(1)
    alpha = float(factor[kept[0]]) if len(kept) else 1.0
    return (None if len(kept) == len(factor) else kept), alpha


def _add(x: Tensor, y: Tensor, bias: Tensor | None, kept: Tensor | None, alpha: float) -> Tensor:
    # Where nothing is kept, the branch still ran on no samples: its parameters get gradients of zero, as they must,
    # because an optimizer decays what has a gradient and skips what has none.
    bias = y.new_zeros(y.shape[-1]) if bias is None else bias
    return ops.add_branch(x, y, bias, alpha=alpha, kept=kept)
