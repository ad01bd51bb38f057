"""Patches of a spectrogram to tokens: cut, linear layer, mask token, position."""

import torch
import torch.nn.functional as F
from torch import Tensor


def patches(mel: Tensor, patch: tuple[int, int], stride: tuple[int, int]) -> Tensor:
    """``[B, 1, F, T]`` to ``[B, L, ph*pw]``: time-major order of patches, mel-major within one, rests cut off."""
    if mel.shape[2] < patch[0] or mel.shape[3] < patch[1]:
        return mel.new_zeros(mel.shape[0], 0, patch[0] * patch[1])
    windows = mel[:, 0].unfold(1, patch[0], stride[0]).unfold(2, patch[1], stride[1])  # [B, rows, columns, ph, pw]
    return windows.transpose(1, 2).flatten(3).flatten(1, 2)


def patch_embed(
    mel: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    mask_embed: Tensor | None,
    pos_embed: Tensor | None,
    patch: tuple[int, int],
    stride: tuple[int, int],
) -> Tensor:
    """``[B, 1, F, T]`` to ``[B, L, D]``: ``weight [D, ph*pw]``, tokens under ``mask [B, L]`` replaced by ``mask_embed
    [D]``, then ``pos_embed [L', D]`` (its first L rows) added."""
    tokens = F.linear(patches(mel, patch, stride), weight, bias)
    if mask is not None and mask_embed is not None:
        tokens = torch.where(mask[:, :, None], mask_embed.to(tokens.dtype), tokens)
    if pos_embed is not None:
        tokens = tokens + pos_embed[: tokens.shape[1]]
    return tokens
