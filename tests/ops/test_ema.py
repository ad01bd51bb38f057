"""ema_update_, grad_norm and adamw_ema_ against float64 and the reference."""

import math
import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from atst_fast import ops
from atst_fast.ops.ema import grad_norm
from atst_fast.reference import ema as reference
from tests import tolerances

SHAPE = st.sampled_from([(), (0,), (1,), (3,), (15,), (16,), (17,), (31, 5), (257,), (4, 0, 2)])
SHAPES = st.lists(SHAPE, max_size=6)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
MOMENTA = st.sampled_from([0.0, 1.0, 0.5, 0.9996]) | st.floats(0, 1)
OFFSET = st.integers(0, 5)
PER_ISA = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
# more than one piece of work, and a rest that fills no vector
LONG = 3 * 2**16 + 7


def randn(shape, offset=0, dtype=torch.float32):
    """Contiguous, ``offset`` elements after the start of its storage."""
    shape = torch.Size(shape)
    return torch.randn(offset + shape.numel()).to(dtype)[offset:].view(shape)


def clones(tensors):
    return [t.clone() for t in tensors]


def cut(long):
    """Four views that together are the tensor."""
    return long.split([1, 76, 2**16 - 72, LONG - 2**16 - 5])


def same_bits(a, b):
    return all(torch.equal(x.view(torch.int32), y.view(torch.int32)) for x, y in zip(a, b, strict=True))


@given(SHAPES, DTYPES, MOMENTA, OFFSET, OFFSET)
@PER_ISA
def test_update_against_float64(isa, shapes, dtype, momentum, teacher_offset, student_offset):
    teacher = [randn(s, teacher_offset) for s in shapes]
    student = [randn(s, student_offset, dtype) for s in shapes]
    before = clones(student)
    wide = [t.double() for t in teacher]
    bounds = [tolerances.EMA_ULPS * 2**-23 * (t.abs() + s.abs()).double() for t, s in zip(teacher, student)]
    reference.ema_update_(wide, [s.double() for s in student], momentum)
    ops.ema_update_(teacher, student, momentum)
    assert all(torch.equal(s, b) for s, b in zip(student, before))
    for t, w, bound in zip(teacher, wide, bounds):
        assert ((t.double() - w).abs() <= bound).all()


def test_reference_is_the_official_loop():
    teacher, student = [randn((5, 3))], [randn((5, 3))]
    expected = teacher[0].clone().mul_(0.9).add_((1 - 0.9) * student[0])
    reference.ema_update_(teacher, student, 0.9)
    assert torch.equal(teacher[0], expected)


@pytest.mark.parametrize("n", [1, 16, 33, LONG])
def test_update_is_exact_where_nothing_moves(isa, n):
    teacher, student = randn((n,)), randn((n,))
    for momentum, expected in ((1.0, teacher.clone()), (0.0, student)):
        moved = teacher.clone()
        ops.ema_update_([moved], [student], momentum)
        assert torch.equal(moved, expected)
    for momentum in (0.1, 0.5, 0.9996):
        same = student.clone()
        ops.ema_update_([same], [student], momentum)
        assert torch.equal(same, student)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_precision_value(isa, dtype):
    student = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    teacher = torch.zeros(2**16)
    ops.ema_update_([teacher], [student], 0.0)
    finite = student.isfinite()
    assert torch.equal(teacher[finite], student[finite].float())
    assert teacher[~finite].isnan().all()  # inf - inf, as 0 * teacher + 1 * inf would be with an infinite teacher


def test_nan_and_infinity_stay_in_their_element(isa):
    teacher, student = [torch.zeros(40), torch.zeros(3)], [torch.ones(40), torch.ones(3)]
    student[0][7], teacher[0][39], student[0][20] = math.nan, math.nan, math.inf
    ops.ema_update_(teacher, student, 0.75)
    odd = torch.zeros(40, dtype=torch.bool)
    odd[[7, 20, 39]] = True
    assert not teacher[0][odd].isfinite().any()
    assert (teacher[0][~odd] == 0.25).all()
    assert (teacher[1] == 0.25).all()


def test_update_bits_depend_neither_on_threads_nor_on_the_split(isa, threads):
    teacher, student = randn((LONG,)), randn((LONG,))
    results = []
    for count in (1, 2, 2):
        threads(count)
        results.append(teacher.clone())
        ops.ema_update_([results[-1]], [student], 0.9)
    parts = teacher.clone()
    ops.ema_update_(cut(parts), cut(student), 0.9)
    assert same_bits(results, [parts] * 3)


def test_momentum_as_a_tensor():
    teacher, student = randn((50,)), randn((50,))
    expected = teacher.clone()
    ops.ema_update_([expected], [student], 0.75)
    for dtype in (torch.float32, torch.float64):
        moved = teacher.clone()
        ops.ema_update_([moved], [student], torch.tensor(0.75, dtype=dtype))
        assert torch.equal(moved, expected)


def test_update_is_seen_by_autograd():
    teacher, student = torch.ones(3), torch.nn.Parameter(torch.zeros(3))
    x = torch.ones(3, requires_grad=True)
    product = (x * teacher).sum()
    ops.ema_update_([teacher], [student], 0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    assert not teacher.requires_grad


def test_empty_lists():
    ops.ema_update_([], [], 0.5)
    assert grad_norm([]) == 0


def cross_device(t):
    return torch.empty(t.shape, device="meta")


@pytest.mark.parametrize(
    "change, error, message",
    [
        (
            lambda t, s: (t[0], s, 0.5),
            TypeError,
            "ema_update_: teacher must be a list of tensors, got float32 [2, 3] on",
        ),
        (
            lambda t, s: (t, s[0], 0.5),
            TypeError,
            "ema_update_: student must be a list of tensors, got float32 [2, 3] on",
        ),
        (
            lambda t, s: (t, s[:1], 0.5),
            ValueError,
            "ema_update_: student must have as many tensors as teacher (2), got 1",
        ),
        (
            lambda t, s: (t, [s[0], 3.0], 0.5),
            TypeError,
            "ema_update_: student[1] must be a tensor, got float 3.0",
        ),
        (
            lambda t, s: ([t[0], t[1].bfloat16()], s, 0.5),
            TypeError,
            "ema_update_: teacher[1] must be float32, got bfloat16 [4] on cpu",
        ),
        (
            lambda t, s: (t, [s[0].double(), s[1]], 0.5),
            TypeError,
            "ema_update_: student[0] must be float32 or bfloat16 or float16, got float64 [2, 3] on cpu",
        ),
        (
            lambda t, s: ([t[0].T.contiguous().T, t[1]], s, 0.5),
            ValueError,
            "ema_update_: teacher[0] must be contiguous, got float32 [2, 3] on cpu with strides (1, 2)",
        ),
        (
            lambda t, s: (t, [s[0].to_sparse(), s[1]], 0.5),
            ValueError,
            "ema_update_: student[0] must be contiguous, got float32 [2, 3] on cpu with layout torch.sparse_coo",
        ),
        (
            lambda t, s: (t, [s[0], s[1][:3]], 0.5),
            ValueError,
            "ema_update_: student[1] must be of shape [4] on cpu, as its counterpart is, got float32 [3] on cpu",
        ),
        (
            lambda t, s: (t, [cross_device(s[0]), s[1]], 0.5),
            ValueError,
            "ema_update_: student[0] must be of shape [2, 3] on cpu, as its counterpart is, got float32 [2, 3] on meta",
        ),
        (lambda t, s: (t, s, 1.5), ValueError, "ema_update_: momentum must be between 0 and 1, got float 1.5"),
        (lambda t, s: (t, s, math.nan), ValueError, "ema_update_: momentum must be between 0 and 1, got float nan"),
        (
            lambda t, s: (t, s, torch.tensor(-1.0)),
            ValueError,
            "ema_update_: momentum must be between 0 and 1, got float -1",
        ),
        (
            lambda t, s: (t, s, torch.ones(1)),
            TypeError,
            "ema_update_: momentum must be a number or a float32 or float64 tensor without axes, got float32 [1]",
        ),
        (
            lambda t, s: (t, s, "0.9"),
            TypeError,
            "ema_update_: momentum must be a number or a float32 or float64 tensor without axes, got str '0.9'",
        ),
    ],
)
def test_update_errors(change, error, message):
    teacher, student = [torch.zeros(2, 3), torch.zeros(4)], [torch.ones(2, 3), torch.ones(4)]
    with pytest.raises(error, match=re.escape(message)):
        ops.ema_update_(*change(teacher, student))
    assert all((t == 0).all() for t in teacher)


@given(st.lists(st.tuples(SHAPE, st.sampled_from([torch.float32, torch.bfloat16])), max_size=6), OFFSET)
@PER_ISA
def test_grad_norm_against_float64(isa, entries, offset):
    grads = [randn(s, offset, dtype) for s, dtype in entries]
    expected = math.sqrt(sum(g.double().square().sum().item() for g in grads))
    assert grad_norm(grads).item() == pytest.approx(expected, rel=tolerances.GRAD_NORM_RTOL)


def test_grad_norm_of_long_tensors(isa, threads):
    grads = [randn((LONG,)), torch.full((5,), 1e30), randn((9,))]
    norms = []
    for count in (1, 2, 2):
        threads(count)
        norms.append(grad_norm(grads).item())
    assert norms[0] == norms[1] == norms[2]
    assert norms[0] == pytest.approx(reference.grad_norm(grads).item(), rel=tolerances.GRAD_NORM_RTOL)
    grads[0][LONG - 1] = math.nan
    assert math.isnan(grad_norm(grads))


def test_grad_norm_errors():
    with pytest.raises(
        TypeError, match=re.escape("grad_norm: grads must be a list of tensors, got float32 [3] on cpu")
    ):
        grad_norm(torch.ones(3))
    with pytest.raises(TypeError, match=re.escape("grad_norm: grads[1] must be float32 or bfloat16, got float64")):
        grad_norm([torch.ones(3), torch.ones(3).double()])
    with pytest.raises(
        ValueError, match=re.escape("grad_norm: grads[0] must be contiguous, got float32 [3, 2] on cpu")
    ):
        grad_norm([torch.ones(2, 3).T])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([torch.zeros(3)], [], torch.tensor(0.5)), "student must have as many tensors as teacher (1), got 0"),
        (([torch.zeros(3)], [torch.zeros(4)], torch.tensor(0.5)), "student[0] must have the shape of teacher[0]"),
        (([torch.zeros(3).half()], [torch.zeros(3)], torch.tensor(0.5)), "teacher[0] must be float32"),
        (
            ([torch.zeros(3)], [torch.zeros(3).long()], torch.tensor(0.5)),
            "student[0] must be float32, bfloat16 or float16",
        ),
        (([torch.zeros(2, 3).T], [torch.zeros(3, 2)], torch.tensor(0.5)), "teacher[0] must be contiguous"),
        (([torch.zeros(3)], [torch.zeros(3)], torch.tensor(2.0)), "momentum must be between 0 and 1, got 2"),
    ],
)
def test_a_direct_update_is_checked(arguments, message):
    with pytest.raises(RuntimeError, match=re.escape(f"ema_update_: {message}")):
        torch.ops.atst_fast.ema_update_(*arguments)


def test_opcheck_update():
    teacher, student = [randn((3, 5)), randn((7,))], [randn((3, 5)), randn((7,), dtype=torch.bfloat16)]
    torch.library.opcheck(torch.ops.atst_fast.ema_update_, (teacher, student, torch.tensor(0.9, dtype=torch.float64)))


def test_opcheck_norm():
    torch.library.opcheck(torch.ops.atst_fast.grad_norm, ([randn((3, 5)), randn((7,))],))


def test_compiled_update():
    teacher, student = [randn((40,))], [randn((40,))]
    expected = clones(teacher)
    ops.ema_update_(expected, student, 0.75)
    torch.compile(ops.ema_update_, backend="aot_eager", fullgraph=True)(teacher, student, 0.75)
    assert torch.equal(teacher[0], expected[0])
