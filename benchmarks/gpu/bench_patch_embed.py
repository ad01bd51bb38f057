"""Spectrograms to tokens, forward and backward; clips of 10 s, patches of 64 x 4, parameters and result in bfloat16.

"masked" is the student's case (half of the tokens), "whole" the teacher's. The peers are what one would write in
PyTorch: windows, linear layer, where and add, or the layer as a convolution, each plain and compiled. They read mel in
bfloat16, which is counted for them as well as it is for ours: a float32 spectrogram has to be converted by somebody.
"""

import pytest
import torch
import torch.nn.functional as F

from atst_fast import ops
from atst_fast.nn import FixedSelection
from atst_fast.train.masks import block_mask, capacity
from benchmarks.gpu import timing

# clips, frames, width
SIZES = {"tiny": (2, 41, 48), "small": (512, 1001, 384), "base": (288, 1001, 768)}
BINS, FRAMES = 64, 4


def ours(mel, weight, bias, mask, mask_embed, pos_embed):
    return ops.patch_embed(mel, weight, bias, mask=mask, mask_embed=mask_embed, pos_embed=pos_embed)


def finished(x, mask, mask_embed, pos_embed):
    if mask is not None:
        x = torch.where(mask[..., None], mask_embed, x)
    return x + pos_embed


def windows(mel, weight, bias, mask, mask_embed, pos_embed):
    tokens = mel.shape[3] // FRAMES
    patches = mel[:, 0, :, : tokens * FRAMES].to(weight.dtype).unflatten(2, (tokens, FRAMES))
    x = F.linear(patches.transpose(1, 2).flatten(2), weight, bias)
    return finished(x, mask, mask_embed, pos_embed)


def convolution(mel, weight, bias, mask, mask_embed, pos_embed):
    x = F.conv2d(mel.to(weight.dtype), weight.unflatten(1, (1, BINS, FRAMES)), bias, stride=(BINS, FRAMES))
    return finished(x.flatten(2).transpose(1, 2), mask, mask_embed, pos_embed)


PROVIDERS = {
    "atst_fast": lambda: ours,
    "linear": lambda: windows,
    "conv2d": lambda: convolution,
    "linear, compiled": lambda: timing.compiled(windows),
    "conv2d, compiled": lambda: timing.compiled(convolution),
}


def make(size, masked, device):
    """The arguments of a provider."""
    clips, frames, width = SIZES[size]
    tokens = frames // FRAMES

    def parameter(*shape):
        return torch.randn(shape, device=device, dtype=torch.bfloat16).requires_grad_()

    mel = torch.randn(clips, 1, BINS, frames, device=device)
    mask = block_mask(clips, tokens, generator=torch.Generator(device).manual_seed(0)) if masked else None
    return mel, parameter(width, BINS * FRAMES), parameter(width), mask, parameter(width), parameter(tokens, width)


def work(size, masked, backward):
    """Bytes that must move and operations of the products, with half of the tokens masked."""
    clips, frames, width = SIZES[size]
    tokens = clips * (frames // FRAMES)
    live = tokens // 2 if masked else tokens
    # every token's result is written, or its gradient read; mel is float32
    moved = 2 * tokens * width + 4 * live * BINS * FRAMES + 2 * width * BINS * FRAMES * (2 if backward else 1)
    return {"bytes": moved, "flops": 2 * live * BINS * FRAMES * width, "dtype": "bfloat16"}


@pytest.mark.benchmark(group="patch_embed")
@pytest.mark.parametrize("way", ["forward", "backward"])
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "whole"])
@pytest.mark.parametrize("size", SIZES)
def test_patch_embed(measure, size, masked, provider, way):
    arguments = make(size, masked, "cuda")
    call = PROVIDERS[provider]()
    if way == "forward":
        with torch.no_grad():
            measure(lambda: call(*arguments), **work(size, masked, False))
        return
    with torch._functorch.config.patch(donated_buffer=False):  # what is compiled gives its graph away otherwise
        out = call(*arguments)
        grad = torch.randn_like(out)
        wanted = [x for x in arguments if x is not None and x.requires_grad and (masked or x is not arguments[4])]
        measure(lambda: torch.autograd.grad(out, wanted, grad, retain_graph=True), **work(size, masked, True))


@pytest.mark.benchmark(group="patch_embed")
@pytest.mark.parametrize("provider", ["atst_fast", "linear", "linear, compiled"])
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "whole"])
@pytest.mark.parametrize("size", ["tiny", "base"])
def test_patch_embed_in_a_graph(measure, size, masked, provider):
    arguments = make(size, masked, "cuda")
    call = PROVIDERS[provider]()
    with torch.no_grad():
        measure(lambda: call(*arguments), way="replayed", **work(size, masked, False))


def make_rows(size, device):
    clips, frames, width = SIZES[size]
    tokens = frames // FRAMES
    mask = block_mask(clips, tokens, generator=torch.Generator(device).manual_seed(0))
    x = torch.randn(mask.numel(), width, device=device, dtype=torch.bfloat16)
    return x, FixedSelection.build(mask, capacity(clips, tokens))


@pytest.mark.benchmark(group="select_rows")
@pytest.mark.parametrize("provider", ["atst_fast", "index_select"])
@pytest.mark.parametrize("size", SIZES)
def test_select_rows(measure, size, provider):
    """The masked rows of a batch in a list of fixed size; index_select gets the list as long as it need be."""
    x, select = make_rows(size, "cuda")
    listed = select.rows[: int(select.count)]
    call = {
        "atst_fast": lambda: ops.select_rows(x, select.rows, select.inverse),
        "index_select": lambda: x.index_select(0, listed),
    }[provider]
    measure(call, bytes=4 * listed.numel() * x.shape[1] + 8 * listed.numel())
