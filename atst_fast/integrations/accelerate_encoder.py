"""The fused forward of audiossl's two encoders, FrameAST and AST."""

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from atst_fast import ops
from atst_fast.integrations.accelerate_block import FusedBlock, token_lengths
from atst_fast.integrations.accelerate_match import Unknown
from atst_fast.integrations.accelerate_probe import hooked
from atst_fast.integrations.accelerate_swap import Fused
from atst_fast.nn import FixedRows, Selection
from atst_fast.nn.plain import is_plain
from atst_fast.nn.stream import Stream
from atst_fast.ops import _checks


class EncoderPlan(NamedTuple):
    """``layer``, ``kind``: name and class of the patch layer. ``tokens``, ``rows``: whether the embedding, and the pass
    through the blocks, are to be fused."""

    layer: str
    kind: type[nn.Module]
    tokens: bool
    rows: bool


def encoder_kind(module: nn.Module) -> str | None:
    """``"frame"`` or ``"clip"`` for what has the parameters and layers of such an encoder."""
    parts = {name for name, _ in module.named_children()}
    parts |= {name for name, p in module._parameters.items() if p is not None}
    if not {"patch_embed", "blocks", "pos_embed", "mask_embed"} <= parts or not hasattr(module, "prepare_tokens"):
        return None
    if "norm_frame" in parts:
        return "frame"
    return "clip" if "norm" in parts else None


def check_arguments(module: nn.Module, mixin: type["FusedEncoder"]) -> None:
    """Raise `Unknown` unless the methods that are replaced take what audiossl's do, in the same places."""
    for method in ("forward", "prepare_tokens"):
        theirs, ours = (list(inspect.signature(getattr(kind, method)).parameters) for kind in (type(module), mixin))
        if theirs != ours:
            raise Unknown(f"its {method} takes {', '.join(theirs[1:])}, not {', '.join(ours[1:])}")


def patch_layer(module: nn.Module) -> tuple[str, type[nn.Module]]:
    """Name and class of the layer that embeds a patch; `Unknown` if it is another one."""
    patches = module.patch_embed
    for name, kind in (("patch_embed", nn.Linear), ("proj", nn.Conv2d)):
        layer = getattr(patches, name, None)
        if layer is None:
            continue
        if not is_plain(layer, kind):
            raise Unknown(f"patch_embed.{name} is {type(layer).__name__}, or has a hook")
        ph, pw = (getattr(patches, side, None) for side in ("patch_height", "patch_width"))
        if not isinstance(ph, int) or not isinstance(pw, int) or layer.weight[0].numel() != ph * pw:
            raise Unknown("patch_embed does not say the size of its patches, or has more than one channel")
        return name, kind
    raise Unknown("patch_embed has no layer patch_embed or proj")


class FusedEncoder(Fused):
    """What FrameAST and AST share: patches, mask token and positions in one operator."""

    plan: EncoderPlan
    fixed_shapes: bool = False  # on any device: as on a GPU

    def prepare_tokens(self, x, mask_index, length, mask=True):
        if not self._embeds(x, mask_index if mask else None):
            return super().prepare_tokens(x, mask_index, length, mask)
        height, width = x.shape[2:]
        tokens, pos = self._embed(x, mask_index if mask else None)
        ph, pw = self.patch_embed.patch_height, self.patch_embed.patch_width
        patches = None
        if self.plan.kind is nn.Linear:  # the other one returns none
            cut = x[:, 0, : height - height % ph, : width - width % pw]
            patches = cut.unflatten(2, (-1, pw)).unflatten(1, (-1, ph)).permute(0, 3, 1, 2, 4).flatten(3).flatten(1, 2)
        return tokens, pos, patches, height, width, self._patch_length(x, length)

    def _embeds(self, x: Tensor, mask: Tensor | None) -> bool:
        """Whether the fused embedding takes this call."""
        layer = getattr(self.patch_embed, self.plan.layer)
        ready = self.plan.tokens and is_plain(layer, self.plan.kind) and not hooked(self.patch_embed)
        if not ready or hooked(self.pos_drop) or (self.pos_drop.training and self.pos_drop.p > 0):
            return False
        ph, pw = self.patch_embed.patch_height, self.patch_embed.patch_width
        if x.dim() != 4 or x.shape[1] != 1 or x.shape[2] < ph or x.shape[3] < pw or not len(x):
            return False
        if x.dtype != layer.weight.dtype or (x.shape[2] // ph != 1 and self.plan.kind is nn.Conv2d):
            return False
        if self._positions(x, self._patches(x)) is None:
            return False
        return mask is None or (mask.dtype == torch.bool and mask.shape == (len(x), self._patches(x)))

    def _positions(self, x: Tensor, tokens: int) -> Any:
        """The positions ``[1, ., D]`` as the official code reads them; None where it would fail."""
        raise NotImplementedError

    def _class_token(self) -> Tensor | None:
        return None

    def _embed(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Tokens with their positions, and the positions as the official code returns them."""
        patches, layer = self.patch_embed, getattr(self.patch_embed, self.plan.layer)
        pos = self._positions(x, self._patches(x))
        first = self._class_token()
        y = ops.patch_embed(
            x,
            layer.weight.flatten(1),
            layer.bias,
            patch=(patches.patch_height, patches.patch_width),
            mask=mask,
            mask_embed=None if mask is None else self.mask_embed,
            pos_embed=pos[:, -self._patches(x) :],
        )
        if first is not None:
            y = torch.cat([(first + pos[:, :1]).expand(len(x), -1, -1), y], 1)
        return y, pos.expand(len(x), -1, -1) if self.pos_type == "cut" else pos

    def _patches(self, x: Tensor) -> int:
        return (x.shape[2] // self.patch_embed.patch_height) * (x.shape[3] // self.patch_embed.patch_width)

    def _patch_length(self, x: Tensor, length: Tensor | None) -> Any:
        if length is None:
            return None
        ph, pw = self.patch_embed.patch_height, self.patch_embed.patch_width
        return (x.shape[2] // ph) * ((length - length % pw) // pw)

    def _prepared(self, x, mask_index, length, mask) -> tuple[Tensor, Any]:
        """Tokens and their valid number per clip, by either embedding."""
        if self._embeds(x, mask_index if mask else None):
            return self._embed(x, mask_index if mask else None)[0], self._patch_length(x, length)
        prepared = super().prepare_tokens(x, mask_index, length, mask)
        return prepared[0], prepared[5]

    def _passes(self, x: Tensor, length: Tensor | None, norm: nn.Module) -> bool:
        """Whether the blocks, as they are now, can be run one into the other."""
        if not self.plan.rows or not isinstance(length, Tensor) or length.dim() != 1 or len(length) != len(x):
            return False
        if length.is_floating_point() or not is_plain(norm, nn.LayerNorm) or not len(self.blocks):
            return False
        width = self.pos_embed.new_empty(1, 1, self.pos_embed.shape[-1])
        for b in self.blocks:
            if not isinstance(b, FusedBlock) or hooked(b) or not b.plan.call.length or not b.fuses(width):
                return False
            # of the rows that are read, a layer with a dropout of its own would draw fewer numbers than of all
            if b.training and not b.draws_nothing():
                return False
        return True

    def _rows(self, x: Tensor, length: Tensor, read: Tensor, norm: nn.Module, count: int, full: bool) -> Tensor:
        """The ``count`` tokens under ``read`` bool ``[B, L]`` after the blocks and the norm. ``full``: whether it is
        known that all tokens are valid.

        The last block computes these rows only: all valid ones are keys and values there, and nothing else is read.
        """
        every = None if full else token_lengths(length.to(x.device), x.shape[1])
        blocks = list(self.blocks)
        if self.fixed_shapes or any(block.is_fixed(x) for block in blocks):
            rows = FixedRows.build(read, every, count)
            stream = Stream(x)
            for block in blocks[:-1]:
                stream = block.advance(stream, every, "zero")
            stream = blocks[-1].advance(stream, every, "zero", rows)
            return stream.norm(norm)[1]
        for block in blocks[:-1]:
            x = block.sequential(x, every, "zero")
        return norm(blocks[-1].sequential(x, every, select=Selection.build(read, every)))


class FusedFrameEncoder(FusedEncoder):
    """FrameAST: patches, mask token and positions in one operator; of the last block the masked tokens alone; block to
    block without adding up the residual in between, on a GPU. Prompts, averages of blocks and the like run the original
    forward over the fused blocks."""

    def _positions(self, x, tokens):
        if self.pos_type == "cut":
            return None if tokens + 1 > self.pos_embed.shape[1] else self.pos_embed[:, 1 : tokens + 1]
        like = self.pos_embed.new_empty(1, 1, 1).expand(1, tokens, self.pos_embed.shape[2])  # it asks for a size only
        return self.interpolate_pos_encoding(like, *x.shape[2:])

    def forward(self, x, mask_index=None, mask_input=True, length=None):
        norm = self.norm_frame
        masked = isinstance(mask_index, Tensor) and mask_index.dtype == torch.bool
        other = getattr(self, "avg_blocks", 0) or getattr(self, "nprompt", 0)
        if other or not masked or not self._passes(x, length, norm):
            return super().forward(x, mask_index=mask_index, mask_input=mask_input, length=length)
        tokens, patches = self._prepared(x, mask_index, length, mask_input)
        patches = patches.to(tokens.device)
        read = mask_index & (torch.arange(tokens.shape[1], device=tokens.device) < patches[:, None])
        # the official code, too, asks the device how many there are
        count, full = torch.stack([read.sum(), (patches >= tokens.shape[1]).all().long()]).tolist()
        if not count:
            return super().forward(x, mask_index=mask_index, mask_input=mask_input, length=length)
        return self._rows(tokens, patches, read, norm, count, bool(full))


class FusedClipEncoder(FusedEncoder):
    """AST: patches and positions in one operator; of the last block the class token alone; block to block as in the
    frame encoder. Without a class token, and for averages of blocks, the original forward runs over the fused
    blocks."""

    def _positions(self, x, tokens):
        rows = tokens + bool(self.use_cls)
        fits = self.pos_type == "cut" and rows <= self.pos_embed.shape[1]
        return self.pos_embed[:, :rows] if fits else None

    def _class_token(self):
        return self.cls_token if self.use_cls else None

    def forward(self, x, mask_index=None, length=None, avg=False):
        special = avg or getattr(self, "mask_ratio", 0) or not self.use_cls
        if special or not self._passes(x, length, self.norm):
            return super().forward(x, mask_index=mask_index, length=length, avg=avg)
        tokens, patches = self._prepared(x, mask_index, length, True)
        read = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        read[:, 0] = True
        # a GPU would be waited for, and a trace has no values to look at
        full = _checks.readable(tokens) and bool((patches >= tokens.shape[1] - 1).all())
        return self._rows(tokens, patches + 1, read, self.norm, len(x), full)
