"""What follows the matrix products of a block: bias_gelu, and add_branch (bias, factor, residual).

Beside it the same in calls of torch, and on a GPU these compiled. A factor is that of stochastic depth: on a CPU, which
leaves dropped clips out, one for all; on a GPU one per clip, of which one in twenty drops its branch.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from atst_fast import ops
from atst_fast.bench import timing
from atst_fast.bench.differentiable import WAYS, Differentiable
from atst_fast.bench.operator import CUDA, OURS, Curves, Operator, Provider
from atst_fast.reference import epilogue as reference

ALPHA = 1.05
# rows of 8 clips of 10 s on a CPU; of both views of 144 of them on a GPU
SIZES = {
    "cpu": {
        "tiny": {"batch": 2, "tokens": 25, "width": 48},
        "small": {"batch": 8, "tokens": 250, "width": 384},
        "base": {"batch": 4, "tokens": 250, "width": 768},
    },
    "cuda": {
        "tiny": {"batch": 4, "tokens": 9, "width": 48},
        "small": {"batch": 288, "tokens": 250, "width": 384},
        "base": {"batch": 288, "tokens": 250, "width": 768},
    },
}
OPTIONS = {device: {"way": WAYS} for device in ("cpu", "cuda")}
CURVES: Curves = {
    "cpu": ("small", {"tokens": (25, 63, 125, 250, 500, 1000), "batch": (1, 2, 4, 8, 16)}),
    "cuda": ("base", {"tokens": (63, 125, 250, 500, 1000), "batch": (1, 4, 16, 64, 288)}),
}


def leaf(device: str, *shape: int) -> Tensor:
    """float32 on a CPU, bfloat16 on a GPU."""
    x = torch.randn(shape, device=device)
    return (x.bfloat16() if device == "cuda" else x).requires_grad_()


def elementwise(inputs: Differentiable, passes: tuple[int, int], flops: tuple[int, int]) -> dict[str, Any]:
    """So many passes over the first argument and operations per element, forward and backward."""
    x, way = inputs.arguments[0], WAYS.index(inputs.way)
    moved = passes[way] * x.numel() * x.element_size()
    return {"bytes": moved, "flops": flops[way] * x.numel(), "dtype": str(x.dtype).removeprefix("torch.")}


def in_torch(function):
    """The providers of a function of torch: as it is, and compiled."""
    return {
        "torch": Provider(lambda inputs: inputs.call(function)),
        "torch_compiled": Provider(lambda inputs: inputs.call(timing.compiled(function)), CUDA),
    }


def factors(clips: int, device: str) -> Tensor:
    """Of stochastic depth: one clip in twenty drops its branch."""
    return (torch.arange(clips, device=device) % 20 > 0) / 0.95


def make_gelu(device: str, batch: int, tokens: int, width: int, way: str) -> Differentiable:
    return Differentiable(way, [leaf(device, batch, tokens, 4 * width), leaf(device, 4 * width)])


BIAS_GELU = Operator(
    "bias_gelu",
    sizes=SIZES,
    options=OPTIONS,
    make=make_gelu,
    providers={
        OURS: Provider(lambda inputs: inputs.call(ops.bias_gelu)),
        **in_torch(lambda h, bias: F.gelu(h + bias)),
    },
    truth=lambda inputs: inputs.truth(reference.bias_gelu),
    # an exponential or a logarithm taken as 25
    work=lambda inputs: elementwise(inputs, (2, 3), (35, 40)),
    curves=CURVES,
)


def make_branch(device: str, batch: int, tokens: int, width: int, way: str) -> Differentiable:
    tensors = leaf(device, batch, tokens, width), leaf(device, batch, tokens, width), leaf(device, width)
    return Differentiable(way, [*tensors, factors(batch, device) if device == "cuda" else None])


def our_branch(x, y, bias, scale):
    return ops.add_branch(x, y, bias, alpha=ALPHA) if scale is None else ops.add_branch(x, y, bias, scale=scale)


def torch_branch(x, y, bias, scale):
    if scale is None:
        return torch.add(x, y + bias, alpha=ALPHA)
    return x + (y + bias) * scale.to(y.dtype)[:, None, None]


def branch(x, y, bias, scale):
    return reference.add_branch(x, y, bias, ALPHA if scale is None else 1.0, None, scale)


ADD_BRANCH = Operator(
    "add_branch",
    sizes=SIZES,
    options=OPTIONS,
    make=make_branch,
    providers={OURS: Provider(lambda inputs: inputs.call(our_branch)), **in_torch(torch_branch)},
    truth=lambda inputs: inputs.truth(branch),
    work=lambda inputs: elementwise(inputs, (3, 2), (3, 2)),
    curves=CURVES,
)
