"""patch_embed: spectrograms to tokens, patches of 64 x 4; select_rows: the masked tokens of a batch.

"masked" is the student's case (half of the tokens), the other one the teacher's. The peers are what one would write in
PyTorch: windows, linear layer, where and add, or the layer as a convolution, each plain and compiled. On a GPU
parameters and results are bfloat16; the peers convert a float32 spectrogram, which is counted for nobody.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from atst_fast import ops
from atst_fast.bench import timing
from atst_fast.bench.differentiable import WAYS, Differentiable
from atst_fast.bench.operator import CUDA, OURS, Operator, Provider
from atst_fast.nn import FixedSelection
from atst_fast.reference import patch_embed as reference

BINS, FRAMES = 64, 4


def half(batch: int, tokens: int, device: str) -> Tensor:
    """Bool ``[batch, tokens]``: spans of five tokens over half of them."""
    return (torch.arange(batch * tokens, device=device) % 10 < 5).view(batch, tokens)


class Inputs(NamedTuple):
    """``passes`` of mel, weight, bias, mask, mask_embed, pos_embed."""

    passes: Differentiable
    clips: int
    tokens: int
    width: int
    masked: bool


def make(device: str, batch: int, frames: int, width: int, masked: bool, way: str) -> Inputs:
    tokens = frames // FRAMES
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def parameter(*shape: int, used: bool = True) -> Tensor:
        return torch.randn(shape, device=device).to(dtype).requires_grad_(used)

    mel, mask = torch.randn(batch, 1, BINS, frames, device=device), half(batch, tokens, device) if masked else None
    weight, row = parameter(width, BINS * FRAMES), parameter(width)
    arguments = mel, weight, row, mask, parameter(width, used=masked), parameter(tokens, width)
    return Inputs(Differentiable(way, arguments), batch, tokens, width, masked)


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


def definition(mel, weight, bias, mask, mask_embed, pos_embed):
    patch = BINS, FRAMES
    return reference.patch_embed(mel, weight, bias, mask, mask_embed, pos_embed, patch, patch)


def work(inputs: Inputs) -> dict[str, Any]:
    """Bytes that must move and operations of the products, with half of the tokens masked."""
    weight = inputs.passes.arguments[1]
    backward, size, width = inputs.passes.way == "backward", weight.element_size(), inputs.width
    tokens = inputs.clips * inputs.tokens
    live = tokens - int(inputs.passes.arguments[3].sum()) if inputs.masked else tokens
    # every token's result is written, or its gradient read; mel is float32
    moved = size * width * (tokens + BINS * FRAMES * (2 if backward else 1)) + 4 * live * BINS * FRAMES
    dtype = str(weight.dtype).removeprefix("torch.")
    return {"bytes": moved, "flops": 2 * live * BINS * FRAMES * width, "dtype": dtype}


OPERATOR = Operator(
    "patch_embed",
    sizes={
        "cpu": {
            "tiny": {"batch": 2, "frames": 41, "width": 48},
            "small": {"batch": 8, "frames": 1001, "width": 384},
            "base": {"batch": 4, "frames": 1001, "width": 768},
        },
        "cuda": {
            "tiny": {"batch": 2, "frames": 41, "width": 48},
            "small": {"batch": 512, "frames": 1001, "width": 384},
            "base": {"batch": 288, "frames": 1001, "width": 768},
        },
    },
    options={device: {"masked": (True, False), "way": WAYS} for device in ("cpu", "cuda")},
    make=make,
    providers={
        OURS: Provider(lambda inputs: inputs.passes.call(ours)),
        "linear": Provider(lambda inputs: inputs.passes.call(windows)),
        "conv2d": Provider(lambda inputs: inputs.passes.call(convolution)),
        "linear, compiled": Provider(lambda inputs: inputs.passes.call(timing.compiled(windows)), CUDA),
        "conv2d, compiled": Provider(lambda inputs: inputs.passes.call(timing.compiled(convolution)), CUDA),
    },
    truth=lambda inputs: inputs.passes.truth(definition),
    work=work,
    curves={
        "cpu": ("small", {"frames": (101, 301, 1001, 3001), "batch": (1, 2, 4, 8, 16)}),
        "cuda": ("base", {"frames": (101, 301, 1001, 3001), "batch": (1, 4, 16, 64, 288)}),
    },
    replayed={size: (OURS, "linear", "linear, compiled") for size in ("tiny", "base")},
)


class Rows(NamedTuple):
    """``x [batch * tokens, width]``; the list of fixed size, and the list as long as it need be."""

    x: Tensor
    selection: FixedSelection
    listed: Tensor


def make_rows(device: str, batch: int, frames: int, width: int) -> Rows:
    tokens = frames // FRAMES
    mask = half(batch, tokens, device)
    x = torch.randn(mask.numel(), width, device=device)
    selection = FixedSelection.build(mask, int(0.6 * mask.numel()))
    return Rows(x.bfloat16() if device == "cuda" else x, selection, selection.rows[: int(selection.count)])


def valid_rows(inputs: Rows, returned: Tensor) -> Tensor:
    return returned[: len(inputs.listed)]


SELECT_ROWS = Operator(
    "select_rows",
    sizes=OPERATOR.sizes,
    make=make_rows,
    providers={
        OURS: Provider(lambda i: lambda: ops.select_rows(i.x, i.selection.rows, i.selection.inverse)),
        "index_select": Provider(lambda i: lambda: i.x.index_select(0, i.listed)),
    },
    truth=lambda i: [i.x[i.listed].double()],
    results=valid_rows,
    work=lambda i: {"bytes": len(i.listed) * (2 * i.x.shape[1] * i.x.element_size() + 8)},
    curves={"cpu": ("small", {"batch": (1, 2, 4, 8, 16)}), "cuda": ("base", {"batch": (1, 4, 16, 64, 288)})},
)
