"""Spectrogram to tokens, half of them masked, forward and backward; 10 s clips, patches of 64 x 4."""

import pytest
import torch
import torch.nn.functional as F

from atst_fast import ops

# clips, frames, width
SIZES = {"tiny": (2, 41, 48), "small": (8, 1001, 384), "base": (4, 1001, 768)}


def plain(mel, weight, bias, mask, mask_embed, pos_embed):
    """The official order: every patch through the layer, then masked tokens replaced, then positions."""
    batch, _, bins, frames = mel.shape
    tokens = frames // 4
    patches = mel[..., : tokens * 4].reshape(batch, bins, tokens, 4).permute(0, 2, 1, 3).reshape(batch, tokens, -1)
    x = F.linear(patches, weight, bias)
    x = torch.where(mask[..., None], mask_embed.expand_as(x), x)
    return x + pos_embed


def ours(mel, weight, bias, mask, mask_embed, pos_embed):
    return ops.patch_embed(mel, weight, bias, mask=mask, mask_embed=mask_embed, pos_embed=pos_embed)


PROVIDERS = {"atst_fast": ours, "plain PyTorch": plain}


@pytest.mark.benchmark(group="patch_embed")
@pytest.mark.parametrize("way", ["forward", "backward"])
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("size", SIZES)
def test_patch_embed(benchmark, provider, size, way):
    batch, frames, width = SIZES[size]
    tokens = frames // 4
    mask = torch.arange(batch * tokens).reshape(batch, tokens) % 10 < 5
    parameters = [torch.randn(s, requires_grad=True) for s in ((width, 256), (width,), (width,), (1, tokens, width))]
    weight, bias, mask_embed, pos_embed = parameters
    arguments = (torch.randn(batch, 1, 64, frames), weight, bias, mask, mask_embed, pos_embed)
    benchmark.extra_info.update(flops=2 * int((~mask).sum()) * 256 * width)
    if way == "forward":
        with torch.no_grad():
            benchmark(PROVIDERS[provider], *arguments)
    else:
        out = PROVIDERS[provider](*arguments)
        grad = torch.randn_like(out)
        benchmark(lambda: torch.autograd.grad(out, parameters, grad, retain_graph=True))
