"""FrameAST (``audiossl/methods/atstframe/audio_transformer.py``) and AST (``audiossl/models/atst/``)."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from tests.integrations.standins.audiossl_blocks import Block


class Patches(nn.Module):
    """Stands for einops' layer: ``[B, 1, F, T]`` to ``[B, L, ph * pw]``, time outside, mel bins before frames."""

    def __init__(self, ph, pw):
        super().__init__()
        self.ph, self.pw = ph, pw

    def forward(self, x):
        rows = x[:, 0].unflatten(2, (-1, self.pw)).unflatten(1, (-1, self.ph))
        return rows.permute(0, 3, 1, 2, 4).flatten(3).flatten(1, 2)


class _PatchEmbed(nn.Module):
    def __init__(self, patch_height, patch_width):
        super().__init__()
        self.patch_height, self.patch_width = patch_height, patch_width

    def cut(self, mel):
        height, width = mel.shape[2:]
        return mel[:, :, : height - height % self.patch_height, : width - width % self.patch_width]

    def tokens(self, mel, length):
        if length is None:
            return None
        return (mel.shape[2] // self.patch_height) * ((length - length % self.patch_width) // self.patch_width)


class PatchEmbed_v2(_PatchEmbed):
    def __init__(self, patch_height, patch_width, embed_dim):
        super().__init__(patch_height, patch_width)
        self.patch_maker = Patches(patch_height, patch_width)
        self.patch_embed = nn.Linear(patch_height * patch_width, embed_dim)

    def forward(self, melspec, length=None):
        patch = self.patch_maker(self.cut(melspec))
        return patch, self.patch_embed(patch), self.tokens(melspec, length)


class PatchEmbed(_PatchEmbed):
    def __init__(self, patch_height, patch_width, embed_dim):
        super().__init__(patch_height, patch_width)
        size = (patch_height, patch_width)
        self.proj = nn.Conv2d(1, embed_dim, kernel_size=size, stride=size)

    def forward(self, melspec, length=None):
        return None, self.proj(melspec).squeeze(2).permute(0, 2, 1), self.tokens(melspec, length)


class _Encoder(nn.Module):
    """What the two have in common."""

    def __init__(
        self, embed_dim, depth, num_heads, mlp_ratio=4.0, patch_h=64, patch_w=4, spec_h=64, spec_w=1001,
        pos_type="cut", drop_rate=0.0, attn_drop_rate=0.0, drop_path_rate=0.1, patch_embed="Linear",
    ):  # fmt: skip
        super().__init__()
        self.embed_dim, self.spec_h, self.spec_w = embed_dim, spec_h, spec_w
        self.patch_h, self.patch_w, self.pos_type = patch_h, patch_w, pos_type
        self.patch_embed = (PatchEmbed_v2 if patch_embed == "Linear" else PatchEmbed)(patch_h, patch_w, embed_dim)
        self.mask_embed = nn.Parameter(torch.randn(1, 1, embed_dim) * 0.02)
        self.num_patches = (spec_h // patch_h) * (spec_w // patch_w)
        self.pos_embed = nn.Parameter(torch.randn(1, self.num_patches + 1, embed_dim) * 0.02)
        self.pos_drop = nn.Dropout(drop_rate)
        norm = partial(nn.LayerNorm, eps=1e-6)
        rates = torch.linspace(0, drop_path_rate, depth).tolist()
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, False, None, drop_rate, attn_drop_rate, rate, norm_layer=norm)
            for rate in rates
        )

    def replace(self, x, mask):
        share = mask.unsqueeze(2).expand(x.shape).float()
        return (1 - share) * x + share * self.mask_embed.expand(x.shape)

    def interpolate_pos_encoding(self, x, h, w):
        if x.shape[1] - 1 == self.num_patches and (h, w) == (self.spec_h, self.spec_w):
            return self.pos_embed
        rows, columns = self.spec_h // self.patch_h, self.spec_w // self.patch_w
        scale = ((h // self.patch_h + 0.1) / rows, (w // self.patch_w + 0.1) / columns)
        grid = self.pos_embed[:, 1:].reshape(1, rows, columns, x.shape[-1]).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, scale_factor=scale, mode="bicubic")
        return torch.cat((self.pos_embed[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)), 1)


class FrameAST(_Encoder):
    def __init__(self, nprompt=0, avg_blocks=0, **kwargs):
        super().__init__(**kwargs)
        self.nprompt, self.avg_blocks = nprompt, avg_blocks
        if nprompt:
            self.prompt_embed = nn.Parameter(torch.randn(1, nprompt, self.embed_dim) * 0.02)
        self.norm_frame = nn.LayerNorm(self.embed_dim, eps=1e-6)

    def prepare_tokens(self, x, mask_index, length, mask=True):
        h, w = x.shape[2:]
        patches, x, patch_length = self.patch_embed(x, length)
        if mask_index is not None and mask:
            x = self.replace(x, mask_index)
        if self.pos_type == "cut":
            pos = self.pos_embed[:, 1 : x.shape[1] + 1].expand(len(x), -1, -1)
            x = x + pos
        else:
            pos = self.interpolate_pos_encoding(x, h, w)
            x = x + pos[:, 1:]
        return self.pos_drop(x), pos, patches, h, w, patch_length

    def prompted(self, x):
        return x if not self.nprompt else torch.cat([self.prompt_embed.expand(len(x), -1, -1), x], 1)

    def forward(self, x, mask_index=None, mask_input=True, length=None):
        x, _, _, _, _, patch_length = self.prepare_tokens(x, mask_index, length, mask_input)
        mask_index = mask_index & (torch.arange(x.shape[1], device=x.device) < patch_length.unsqueeze(1))
        x, averaged = self.prompted(x), []
        for i, block in enumerate(self.blocks):
            x = block(x, patch_length + self.nprompt)
            if self.avg_blocks and i >= len(self.blocks) - self.avg_blocks:
                averaged.append(F.instance_norm(x.transpose(1, 2)).transpose(1, 2))
        x = torch.stack(averaged).mean(0) if averaged else self.norm_frame(x)
        return x[:, self.nprompt :][mask_index]

    def get_cls(self, x, length=None):
        x, *_, patch_length = self.prepare_tokens(x, None, length, False)
        x = self.prompted(x)
        for block in self.blocks:
            x = block(x, patch_length + self.nprompt)
        return self.norm_frame(x)[:, : self.nprompt].mean(1)

    def get_intermediate_layers(self, x, length, n=1, scene=True):
        x, *_, patch_length = self.prepare_tokens(x, None, length, False)
        x, output = self.prompted(x), []
        for i, block in enumerate(self.blocks):
            x = block(x, patch_length + self.nprompt)
            if len(self.blocks) - i > n:
                continue
            tokens = self.norm_frame(x)[:, self.nprompt :]
            if scene:
                valid = torch.arange(tokens.shape[1], device=x.device) < patch_length.unsqueeze(1)
                tokens = (tokens * valid.unsqueeze(-1)).sum(1) / (patch_length.unsqueeze(-1) + 1e-6)
            output.append(tokens)
        return torch.cat(output, -1)

    def get_last_selfattention(self, x):
        x, *_ = self.prepare_tokens(x, None, None, False)
        for block in self.blocks[:-1]:
            x = block(x)
        return self.blocks[-1](x, return_attention=True)


class AST(_Encoder):
    def __init__(self, use_cls=True, mask_ratio=0, **kwargs):
        super().__init__(**kwargs)
        self.use_cls, self.mask_ratio = use_cls, mask_ratio
        if use_cls:
            self.cls_token = nn.Parameter(torch.randn(1, 1, self.embed_dim) * 0.02)
        self.norm = nn.LayerNorm(self.embed_dim, eps=1e-6)

    def prepare_tokens(self, x, mask_index, length, mask=True):
        h, w = x.shape[2:]
        patches, x, patch_length = self.patch_embed(x, length)
        if mask_index is not None and mask:
            x = self.replace(x, mask_index)
        if self.use_cls:
            x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), 1)
        if self.pos_type == "cut":
            pos = self.pos_embed[:, : x.shape[1]].expand(len(x), -1, -1)
        else:
            pos = self.interpolate_pos_encoding(x, h, w)
        return self.pos_drop(x + pos), pos, patches, h, w, patch_length

    def forward(self, x, mask_index=None, length=None, avg=False):
        x, _, _, _, _, patch_length = self.prepare_tokens(x, mask_index, length)
        outputs = []
        for block in self.blocks:
            x = block(x, patch_length + self.use_cls)
            outputs.append(x)
        x = torch.stack(outputs[-8:]).mean(0) if avg else self.norm(x)
        if self.use_cls:
            return x[:, 0]
        valid = torch.arange(x.shape[1], device=x.device) < patch_length.unsqueeze(1)
        return (x * valid.unsqueeze(2)).sum(1) / patch_length.unsqueeze(1)

    def get_intermediate_layers(self, x, length, n=1):
        x, *_, patch_length = self.prepare_tokens(x, None, length, False)
        output = []
        for i, block in enumerate(self.blocks):
            x = block(x, length=None if patch_length is None else patch_length + self.use_cls)
            if len(self.blocks) - i <= n:
                output.append(self.norm(x))
        return output

    def get_last_selfattention(self, x):
        x, *_ = self.prepare_tokens(x, None, None, False)
        for block in self.blocks[:-1]:
            x = block(x)
        return self.blocks[-1](x, return_attention=True)
