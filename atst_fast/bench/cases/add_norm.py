"""add_norm: bias, stochastic depth, residual and LayerNorm, in one pass, beside the same in calls of torch."""

import torch.nn.functional as F

from atst_fast import ops
from atst_fast.bench.cases.epilogue import CURVES, OPTIONS, SIZES, elementwise, factors, in_torch, leaf
from atst_fast.bench.differentiable import Differentiable
from atst_fast.bench.operator import OURS, Operator, Provider
from atst_fast.reference import add_norm as reference

EPS = 1e-6


def make(device: str, batch: int, tokens: int, width: int, way: str) -> Differentiable:
    wide = leaf(device, batch, tokens, width), leaf(device, batch, tokens, width)
    bias, weight, norm_bias = (leaf(device, width) for _ in range(3))
    return Differentiable(way, [*wide, bias, factors(batch, device), weight, norm_bias])


def chain(x, y, bias, scale, weight, norm_bias):
    total = x + (y + bias) * scale.to(y.dtype)[:, None, None]
    return total, F.layer_norm(total, total.shape[-1:], weight, norm_bias, EPS)


def definition(x, y, bias, scale, weight, norm_bias):
    return reference.add_norm(x, y, bias, scale, weight, norm_bias, EPS)[:2]


OPERATOR = Operator(
    "add_norm",
    sizes=SIZES,
    options=OPTIONS,
    make=make,
    providers={OURS: Provider(lambda inputs: inputs.call(ops.add_norm)), **in_torch(chain)},
    truth=lambda inputs: inputs.truth(definition),
    # x, y, sum, normed; both gradients, sum, dx, dy
    work=lambda inputs: elementwise(inputs, (4, 5), (11, 16)),
    curves=CURVES,
)
