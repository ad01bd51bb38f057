"""frame_loss: the loss of ATST-Frame with its diagnostics, on the masked tokens of a batch.

Beside it the definition in torch, and on a GPU that compiled; both get rows without padding.
"""

from atst_fast import ops
from atst_fast.bench.cases.batch_norm_relu import CURVES, wide
from atst_fast.bench.cases.epilogue import OPTIONS, elementwise, in_torch, leaf
from atst_fast.bench.differentiable import Differentiable
from atst_fast.bench.operator import OURS, Operator, Provider
from atst_fast.reference import frame_loss as reference


def make(device: str, batch: int, tokens: int, width: int, way: str) -> Differentiable:
    student, teacher = (leaf(device, 2 * (batch * tokens // 2), width) for _ in range(2))
    # the gradient is that of the loss; the diagnostics have none
    return Differentiable(way, [student, teacher.detach()], outputs=1 if way == "backward" else None)


def definition(student, teacher):
    return reference.frame_loss(student, teacher, None, True)


OPERATOR = Operator(
    "frame_loss",
    sizes=wide(256, 32),
    options=OPTIONS,
    make=make,
    providers={OURS: Provider(lambda inputs: inputs.call(ops.frame_loss)), **in_torch(definition)},
    truth=lambda inputs: inputs.truth(definition),
    # both networks; and the gradient of one
    work=lambda inputs: elementwise(inputs, (2, 3), (14, 14)),
    curves=CURVES,
    replayed={"step": (OURS, "torch")},
)
