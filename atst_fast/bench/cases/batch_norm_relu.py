"""batch_norm_relu: between the matrix products of a head, on the masked tokens of a batch.

Beside it the same in calls of torch, and on a GPU these compiled; all of them get rows without padding.
"""

import torch.nn.functional as F

from atst_fast import ops
from atst_fast.bench.cases.epilogue import OPTIONS, elementwise, in_torch, leaf
from atst_fast.bench.differentiable import Differentiable
from atst_fast.bench.operator import OURS, Curves, Operator, Provider
from atst_fast.reference import batch_norm_relu as reference

EPS = 1e-5
# clips of both views and masked tokens of each
ROWS = {
    "cpu": {"tiny": {"batch": 1, "tokens": 25}, "small": {"batch": 8, "tokens": 120}},
    "cuda": {
        "tiny": {"batch": 1, "tokens": 64},
        "step": {"batch": 288, "tokens": 125},
        "double": {"batch": 576, "tokens": 127},
    },
}
CURVES: Curves = {
    "cpu": ("small", {"tokens": (30, 60, 120, 240), "batch": (2, 4, 8, 16)}),
    "cuda": ("step", {"tokens": (31, 63, 125, 250), "batch": (4, 16, 64, 288)}),
}


def wide(width: int, tiny: int) -> dict:
    """Sizes with a width."""
    return {
        device: {size: {**axes, "width": tiny if size == "tiny" else width} for size, axes in sizes.items()}
        for device, sizes in ROWS.items()
    }


def make(device: str, batch: int, tokens: int, width: int, way: str) -> Differentiable:
    return Differentiable(way, [leaf(device, batch * tokens, width), leaf(device, width), leaf(device, width)])


def chain(x, weight, bias):
    return F.relu(F.batch_norm(x, None, None, weight, bias, True, eps=EPS), inplace=True)


def definition(x, weight, bias):
    return reference.batch_norm_relu(x, weight, bias, EPS)[0]


OPERATOR = Operator(
    "batch_norm_relu",
    sizes=wide(4096, 96),
    options=OPTIONS,
    make=make,
    providers={OURS: Provider(lambda inputs: inputs.call(ops.batch_norm_relu)), **in_torch(chain)},
    truth=lambda inputs: inputs.truth(definition),
    # x twice and the result; x and the gradient twice and the result
    work=lambda inputs: elementwise(inputs, (3, 5), (8, 14)),
    curves=CURVES,
)
