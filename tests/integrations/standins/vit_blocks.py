"""Blocks of other vision transformers: timm's of two ages, DINO's (ASiT) and HuggingFace's AST, with separate layers of
queries, keys and values."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.integrations.standins.audiossl_blocks import DropPath


class TimmDropPath(nn.Module):
    def __init__(self, drop_prob, scale_by_keep=True):
        super().__init__()
        self.drop_prob, self.scale_by_keep = drop_prob, scale_by_keep

    def forward(self, x):
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = 1 - self.drop_prob
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
        return x * (mask.div_(keep) if self.scale_by_keep else mask)


class LayerScale(nn.Module):
    def __init__(self, dim, value=1e-5):
        super().__init__()
        self.gamma = nn.Parameter(value * torch.ones(dim))

    def forward(self, x):
        return x * self.gamma


class TimmAttention(nn.Module):
    """As of timm 1: norms of queries and keys, and a norm of the output, which may be identities."""

    def __init__(self, dim, num_heads, qkv_bias=True, qk_norm=None):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.scale, self.fused_attn = self.head_dim**-0.5, True
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm = qk_norm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = qk_norm(self.head_dim) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(0.0)
        self.norm = nn.Identity()
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(0.0)

    def forward(self, x, attn_mask=None):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, attn_mask=attn_mask)
        return self.proj_drop(self.proj(self.norm(y.transpose(1, 2).flatten(2))))


class TimmMlp(nn.Module):
    def __init__(self, dim, hidden, act_layer=nn.GELU):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = act_layer()
        self.drop1 = nn.Dropout(0.0)
        self.norm = nn.Identity()
        self.fc2 = nn.Linear(hidden, dim)
        self.drop2 = nn.Dropout(0.0)

    def forward(self, x):
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))


class TimmBlock(nn.Module):
    def __init__(self, dim, num_heads, drop_path=0.0, init_values=None, qk_norm=None, act_layer=nn.GELU, scaled=True):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = TimmAttention(dim, num_heads, qk_norm=qk_norm)
        self.ls1 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.drop_path1 = TimmDropPath(drop_path, scaled) if drop_path else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = TimmMlp(dim, 4 * dim, act_layer)
        self.ls2 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.drop_path2 = TimmDropPath(drop_path, scaled) if drop_path else nn.Identity()

    def forward(self, x, attn_mask=None):
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), attn_mask=attn_mask)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class OldAttention(nn.Module):
    """As in timm 0.4.5 (SSAST) and, where it returns its matrix, in DINO (ASiT)."""

    def __init__(self, dim, num_heads, returns_matrix):
        super().__init__()
        self.num_heads, self.returns_matrix = num_heads, returns_matrix
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=True)
        self.attn_drop = nn.Dropout(0.0)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(0.0)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        weights = self.attn_drop((q @ k.mT * self.scale).softmax(-1))
        y = self.proj_drop(self.proj((weights @ v).transpose(1, 2).flatten(2)))
        return (y, weights) if self.returns_matrix else y


class _OldBlock(nn.Module):
    returns_matrix = False

    def __init__(self, dim, num_heads, drop_path=0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = OldAttention(dim, num_heads, self.returns_matrix)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = TimmMlp(dim, 4 * dim)


class SSASTBlock(_OldBlock):
    def forward(self, x):
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class DinoBlock(_OldBlock):
    returns_matrix = True

    def forward(self, x, return_attention=False):
        y, weights = self.attn(self.norm1(x))
        if return_attention:
            return weights
        x = x + self.drop_path(y)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class HFSelfAttention(nn.Module):
    def __init__(self, dim, num_heads, dropout_prob=0.0):
        super().__init__()
        self.num_attention_heads, self.attention_head_size = num_heads, dim // num_heads
        self.dropout_prob = dropout_prob
        self.query, self.key, self.value = (nn.Linear(dim, dim) for _ in range(3))

    def forward(self, hidden_states, head_mask=None, output_attentions=False):
        key, value, query = (
            layer(hidden_states).unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)
            for layer in (self.key, self.value, self.query)
        )
        weights = (query @ key.mT / self.attention_head_size**0.5).softmax(-1)
        weights = F.dropout(weights, self.dropout_prob, self.training)
        context = (weights @ value).transpose(1, 2).flatten(2)
        return (context, weights) if output_attentions else (context,)


class HFDense(nn.Module):
    """Stands for ASTSelfOutput, ASTIntermediate and ASTOutput."""

    def __init__(self, wide, narrow, act=None, residual=False):
        super().__init__()
        self.dense = nn.Linear(wide, narrow)
        self.residual = residual
        if act is not None:
            self.intermediate_act_fn = act
        else:
            self.dropout = nn.Dropout(0.0)

    def forward(self, hidden_states, input_tensor=None):
        y = self.dense(hidden_states)
        y = self.intermediate_act_fn(y) if hasattr(self, "intermediate_act_fn") else self.dropout(y)
        return y + input_tensor if self.residual else y


class GELUActivation(nn.Module):
    """HuggingFace's: no subclass of ``nn.GELU``."""

    def forward(self, x):
        return F.gelu(x)


class HFAttention(nn.Module):
    def __init__(self, dim, num_heads, dropout_prob=0.0):
        super().__init__()
        self.attention = HFSelfAttention(dim, num_heads, dropout_prob)
        self.output = HFDense(dim, dim)

    def forward(self, hidden_states, head_mask=None, output_attentions=False):
        context, *weights = self.attention(hidden_states, head_mask, output_attentions)
        return (self.output(context, hidden_states), *weights)


class HFLayer(nn.Module):
    """``ASTLayer``: a tuple out, attention weights in it on request."""

    def __init__(self, dim, num_heads, dropout_prob=0.0):
        super().__init__()
        self.attention = HFAttention(dim, num_heads, dropout_prob)
        self.intermediate = HFDense(dim, 4 * dim, GELUActivation())
        self.output = HFDense(4 * dim, dim, residual=True)
        self.layernorm_before = nn.LayerNorm(dim, eps=1e-12)
        self.layernorm_after = nn.LayerNorm(dim, eps=1e-12)

    def forward(self, hidden_states, head_mask=None, output_attentions=False):
        y, *weights = self.attention(self.layernorm_before(hidden_states), head_mask, output_attentions)
        hidden_states = y + hidden_states
        return (self.output(self.intermediate(self.layernorm_after(hidden_states)), hidden_states), *weights)


class NewHFLayer(nn.Module):
    """The same after its renaming: ``q_proj``, ``mlp.fc1``, no matrix out, a tensor out."""

    class Attention(nn.Module):
        def __init__(self, dim, num_heads):
            super().__init__()
            self.num_heads, self.scaling = num_heads, (dim // num_heads) ** -0.5
            self.k_proj, self.v_proj, self.q_proj, self.o_proj = (nn.Linear(dim, dim) for _ in range(4))

        def forward(self, hidden_states, **kwargs):
            q, k, v = (
                layer(hidden_states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
                for layer in (self.q_proj, self.k_proj, self.v_proj)
            )
            context = F.scaled_dot_product_attention(q, k, v, scale=self.scaling)
            return self.o_proj(context.transpose(1, 2).flatten(2)), None

    class MLP(nn.Module):
        def __init__(self, dim):
            super().__init__()
            self.fc1, self.fc2, self.activation_fn = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim), GELUActivation()

        def forward(self, x):
            return self.fc2(self.activation_fn(self.fc1(x)))

    def __init__(self, dim, num_heads):
        super().__init__()
        self.attention = self.Attention(dim, num_heads)
        self.layernorm_before = nn.LayerNorm(dim, eps=1e-12)
        self.layernorm_after = nn.LayerNorm(dim, eps=1e-12)
        self.mlp = self.MLP(dim)

    def forward(self, hidden_states, **kwargs):
        y, _ = self.attention(self.layernorm_before(hidden_states))
        hidden_states = hidden_states + y
        return hidden_states + self.mlp(self.layernorm_after(hidden_states))
