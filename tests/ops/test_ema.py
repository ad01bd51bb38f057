"""ema_update_, grad_norm and adamw_ema_ against float64, the reference and one another."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atst_fast import ops
from atst_fast.reference import ema as reference
from tests import tolerances

SHAPES = st.lists(st.sampled_from([(), (0,), (1,), (3,), (15,), (16,), (17,), (31, 5), (257,), (4, 0, 2)]), max_size=6)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
MOMENTA = st.sampled_from([0.0, 1.0, 0.5, 0.9996]) | st.floats(0, 1)


def randn(shape, offset=0, dtype=torch.float32):
    """Contiguous, ``offset`` elements after the start of its storage."""
    shape = torch.Size(shape)
    return torch.randn(offset + shape.numel(), dtype=torch.float32).to(dtype)[offset:].view(shape)


@given(SHAPES, DTYPES, MOMENTA, st.integers(0, 5), st.integers(0, 5))
@settings(deadline=None, max_examples=60)
def test_against_float64(shapes, dtype, momentum, teacher_offset, student_offset):
    teacher = [randn(s, teacher_offset) for s in shapes]
    student = [randn(s, student_offset, dtype) for s in shapes]
    wide = [t.double() for t in teacher]
    bounds = [tolerances.EMA_ULPS * 2**-23 * (t.abs() + s.abs()).double() for t, s in zip(teacher, student)]
    reference.ema_update_(wide, [s.double() for s in student], momentum)
    ops.ema_update_(teacher, student, momentum)
    for t, w, bound in zip(teacher, wide, bounds):
        assert ((t.double() - w).abs() <= bound).all()
