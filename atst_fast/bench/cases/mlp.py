"""mlp: both layers of a feed-forward part. ``unfused`` has its products apart from bias and GELU.

"teacher" is the forward pass without a graph, "student" with one, "step" that and the backward pass.
"""

from typing import Any

import torch
import torch.nn.functional as F

from atst_fast import ops
from atst_fast.bench import timing
from atst_fast.bench.cases.epilogue import CURVES, SIZES, leaf
from atst_fast.bench.differentiable import Differentiable, random_like
from atst_fast.bench.operator import CUDA, OURS, Operator, Provider
from atst_fast.reference import mlp as reference


def make(device: str, batch: int, tokens: int, width: int, way: str) -> Differentiable:
    shapes = (batch, tokens, width), (4 * width, width), (4 * width,), (width, 4 * width)
    arguments = [leaf(device, *s) for s in shapes]
    with torch.no_grad():
        for x in arguments[1:]:
            x.mul_(x.shape[-1] ** -0.5)
    return Differentiable(way, arguments)


def timed(function, prepare=lambda function: function):
    def provider(inputs: Differentiable):
        call = prepare(function)
        if inputs.way == "teacher":
            return lambda: torch.no_grad()(call)(*inputs.arguments)
        if inputs.way == "student":
            return lambda: call(*inputs.arguments)
        gradient = random_like([inputs.arguments[0]])
        return lambda: torch.autograd.grad(call(*inputs.arguments), inputs.arguments, gradient)

    return provider


def unfused(x, weight1, bias1, weight2):
    return F.linear(ops.bias_gelu(F.linear(x, weight1), bias1), weight2)


def in_torch(x, weight1, bias1, weight2):
    return F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2)


def truth(inputs: Differentiable) -> list[torch.Tensor]:
    way = "backward" if inputs.way == "step" else "forward"
    return Differentiable(way, inputs.arguments).truth(reference.mlp)


def work(inputs: Differentiable) -> dict[str, Any]:
    """Input, result and both weights; going back also their gradients."""
    x, weight = inputs.arguments[:2]
    products, passes = (6, 4) if inputs.way == "step" else (2, 2)
    moved = passes * x.element_size() * (x.numel() + weight.numel())
    dtype = str(x.dtype).removeprefix("torch.")
    return {"bytes": moved, "flops": products * 2 * x.numel() * len(weight), "dtype": dtype}


OPERATOR = Operator(
    "mlp",
    sizes=SIZES,
    options={device: {"way": ("teacher", "student", "step")} for device in ("cpu", "cuda")},
    make=make,
    providers={
        OURS: Provider(timed(ops.mlp)),
        "atst_fast_unfused": Provider(timed(unfused)),
        "torch": Provider(timed(in_torch)),
        "torch_compiled": Provider(timed(in_torch, lambda function: timing.compiled(function)), CUDA),
    },
    truth=truth,
    work=work,
    curves=CURVES,
    # products of products: of 1,536 terms in the gradient of the first layer
    allowed={"float32": 5e-5},
    runs="linear_gelu",
)
