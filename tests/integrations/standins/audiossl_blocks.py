"""The transformer of ``audiossl/modules/transformer.py``: attention that returns its matrix, a dense additive mask,
stochastic depth by sample."""

import torch
from torch import nn


class DropPath(nn.Module):
    def __init__(self, drop_prob):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        if not self.training or self.drop_prob == 0.0:
            return x
        keep = 1 - self.drop_prob
        drawn = torch.rand((x.shape[0],) + (1,) * (x.dim() - 1), dtype=x.dtype, device=x.device)
        return x.div(keep) * (keep + drawn).floor_()


class Mlp(nn.Module):
    def __init__(self, in_features, hidden_features, act_layer=nn.GELU, drop=0.0):
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden_features, in_features)
        self.drop = nn.Dropout(drop)

    def forward(self, x):
        hidden = self.drop(self.act(self.fc1(x)))
        return self.drop(self.fc2(hidden))


class Attention(nn.Module):
    def __init__(self, dim, num_heads=8, qkv_bias=False, qk_scale=None, attn_drop=0.0, proj_drop=0.0):
        super().__init__()
        self.num_heads = num_heads
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x, mask):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT * self.scale
        if mask is not None:
            scores += mask
        weights = self.attn_drop(scores.softmax(-1))
        mixed = (weights @ v).transpose(1, 2).flatten(2)
        return self.proj_drop(self.proj(mixed)), weights


def additive_mask(x, length):
    """-10000 on the keys at or past each length, ``[B, 1, L, L]``."""
    clips, tokens, _ = x.shape
    padded = torch.arange(tokens, device=length.device).expand(clips, tokens) >= length.unsqueeze(1)
    return (-10000.0 * padded[:, None, None]).expand(clips, 1, tokens, tokens).to(x.device)


class Block(nn.Module):
    def __init__(
        self, dim, num_heads, mlp_ratio=4.0, qkv_bias=False, qk_scale=None, drop=0.0, attn_drop=0.0, drop_path=0.0,
        act_layer=nn.GELU, norm_layer=nn.LayerNorm,
    ):  # fmt: skip
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = Attention(dim, num_heads, qkv_bias, qk_scale, attn_drop, drop)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer, drop)

    def forward(self, x, length=None, return_attention=False):
        mask = None if length is None else additive_mask(x, length)
        y, weights = self.attn(self.norm1(x), mask)
        if return_attention:
            return weights
        x = x + self.drop_path(y)
        return x + self.drop_path(self.mlp(self.norm2(x)))
