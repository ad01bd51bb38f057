"""The CUDA kernels of ema_update_, adamw_ema_ and grad_norm: bit for bit what the CPU's do."""

import math
import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from atst_fast import _C
from atst_fast.ops import ema as on_cpu
from atst_fast.reference import ema as reference
from tests import tolerances
from tests.ops.test_adamw_ema import GRAD_DTYPE, HYPER, STEP, drawn_step, step_arguments, two_parameters
from tests.ops.test_ema import DTYPES, MOMENTA, OFFSET, clones, randn, same_bits

CHUNK, NORM_CHUNK = 8192, 16384  # elements of a block
TABLE, ADAMW_TABLE = 1000, 400  # tensors of a launch
SHAPE = st.sampled_from([(), (0,), (3,), (4,), (31, 5), (1028,), (4099,), (CHUNK,), (CHUNK + 1,), (2 * CHUNK + 4,)])
SHAPES = st.lists(SHAPE, max_size=5)
ORDER = st.sampled_from([("forward", 0), ("reverse", 0), ("shuffled", 1), ("shuffled", 2)])
EXAMPLES = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
FMA = _C.build_info()["isa"] != "portable"  # what the CPU does without it is rounded otherwise


def assert_same(ours, cpu):
    """On the CPU with fused multiply-add the same operations run in the same order."""
    for a, b in zip(ours, cpu, strict=True):
        if FMA:
            torch.testing.assert_close(a.cpu(), b, rtol=0, atol=0, equal_nan=True)
        else:
            torch.testing.assert_close(a.cpu(), b, rtol=tolerances.NO_FMA_RTOL, atol=tolerances.NO_FMA_ATOL)


def move(cuda_ops, lists):
    """Copies of lists of tensors on the device, as far from a 16-byte boundary as the originals."""

    def one(t):
        offset = t.data_ptr() % 16 // t.element_size()
        room = cuda_ops.to(torch.empty(offset + t.numel(), dtype=t.dtype))
        return room[offset:].view(t.shape).copy_(t)

    return [[one(t) for t in tensors] for tensors in lists]


def flat(lists):
    return [t for tensors in lists for t in tensors]


def float64(value):
    return torch.tensor(value, dtype=torch.float64)


@given(SHAPES, DTYPES, MOMENTA, OFFSET, OFFSET, ORDER)
@EXAMPLES
def test_update(cuda_ops, shapes, dtype, momentum, teacher_offset, student_offset, order):
    teacher = [randn(s, teacher_offset) for s in shapes]
    student = [randn(s, student_offset, dtype) for s in shapes]
    ours, same = move(cuda_ops, (teacher, student))
    cuda_ops.schedule(*order)
    cuda_ops.ops.ema_update_(ours, same, cuda_ops.to(float64(momentum)))
    on_cpu.ema_update_(teacher, student, momentum)
    assert_same(ours, teacher)


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("offset", [0, 1])
def test_every_half_precision_value(cuda_ops, dtype, offset):
    room = torch.zeros(2**16 + offset, dtype=dtype)
    room[offset:] = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    student = cuda_ops.to(room)[offset:]
    teacher = cuda_ops.to(torch.zeros(2**16))
    cuda_ops.ops.ema_update_([teacher], [student], cuda_ops.to(torch.tensor(0.0)))
    finite = student.isfinite()
    assert torch.equal(teacher[finite], student[finite].float())
    assert teacher[~finite].isnan().all()
    teacher = cuda_ops.to(torch.zeros(2**16))
    cuda_ops.ops.ema_update_([teacher], [student], cuda_ops.to(torch.tensor(0.5)))
    torch.testing.assert_close(teacher, student.float() / 2, rtol=0, atol=0, equal_nan=True)  # infinity is no NaN


@pytest.mark.sanitize
def test_more_tensors_than_a_table_holds(cuda_ops):
    n = 2 * TABLE + 3
    teacher, student = [randn((1 + i % 5,)) for i in range(n)], [randn((1 + i % 5,)) for i in range(n)]
    ours, same = move(cuda_ops, (teacher, student))
    cuda_ops.ops.ema_update_(ours, same, cuda_ops.to(float64(0.9)))
    on_cpu.ema_update_(teacher, student, 0.9)
    assert_same(ours, teacher)
    norm = cuda_ops.ops.grad_norm(ours)
    assert norm.item() == pytest.approx(on_cpu.grad_norm(teacher).item(), rel=tolerances.GRAD_NORM_RTOL)


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_off_the_boundary_of_their_vectors(cuda_ops, dtype):
    """Each offset on its own and beside an aligned one: four elements at a time only where both allow it."""
    offsets = [(t, s) for t in range(5) for s in range(5)]
    teacher, student = [randn((77,), t) for t, _ in offsets], [randn((77,), s, dtype) for _, s in offsets]
    ours, same = move(cuda_ops, (teacher, student))
    cuda_ops.ops.ema_update_(ours, same, cuda_ops.to(float64(0.9)))
    on_cpu.ema_update_(teacher, student, 0.9)
    assert_same(ours, teacher)


@pytest.mark.parametrize("momentum", [-0.1, 1.5, math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_momentum_out_of_range_on_the_device_is_seen(cuda_ops, momentum, dtype):
    teacher, student = cuda_ops.to(torch.zeros(9)), cuda_ops.to(torch.zeros(9))
    cuda_ops.ops.ema_update_([teacher], [student], cuda_ops.to(torch.tensor(momentum, dtype=dtype)))
    assert teacher.isnan().all()


def run_step(cuda_ops, lists, rest, order=("forward", 0)):
    """The step on copies: our lists and the CPU's."""
    ours = move(cuda_ops, lists)
    cpu = [clones(tensors) for tensors in lists]
    hyper, sizes, momentum, scale, hf = rest
    cuda_ops.schedule(*order)
    device = [cuda_ops.to(hyper), sizes, cuda_ops.to(momentum), None if scale is None else cuda_ops.to(scale), hf]
    cuda_ops.ops.adamw_ema_(*ours, *device)
    on_cpu.adamw_ema_(*cpu, *rest)
    return ours, cpu


@given(*STEP, ORDER)
@EXAMPLES
def test_step(cuda_ops, entries, offset, momentum, scale, hf, first, grad_dtype, order):
    lists, rest, scale = drawn_step(entries, offset, momentum, scale, first, grad_dtype)
    ours, cpu = run_step(cuda_ops, lists, (*rest, scale, hf), order)
    assert_same(flat(ours), flat(cpu))


@pytest.mark.sanitize
@pytest.mark.parametrize("offset", [0, 1])
def test_a_copy_rounds_every_kind_of_value(cuda_ops, offset):
    """Of a parameter without gradient: its bits as they are, signalling NaN too."""
    n = 1 << 14
    p = torch.zeros(n + offset)[offset:]
    p.view(torch.int32).random_(-(2**31), 2**31)
    special = [0x7F800001, -0x7FFFFF, 0x7F800000, 1, 0x80007FFF - 2**32, 0x7F7FFFFF, 0x3F808000, 0x3F818000, -(2**31)]
    p[: len(special)].view(torch.int32).copy_(torch.tensor(special, dtype=torch.int32))
    none, shadow = torch.empty(0), torch.zeros(n, dtype=torch.bfloat16)
    lists = [[p], [none], [none], [none], [none], [], [shadow], []]
    ours, cpu = run_step(cuda_ops, lists, (HYPER[:1].contiguous(), [1], torch.tensor(0.5), None, True))
    assert torch.equal(ours[6][0].cpu().view(torch.int16), cpu[6][0].view(torch.int16))
    assert torch.equal(ours[6][0].cpu().isnan(), p.isnan())


@pytest.mark.sanitize
@pytest.mark.parametrize("offset", [1, 2, 4])
def test_different_offsets_and_gradients_in_one_launch(cuda_ops, offset):
    """Every pointer once off the 16-byte boundary; float32 gradients beside bfloat16 ones."""
    n, none = 4099, torch.empty(0)
    dtypes = [torch.float32] * 4 + [None, torch.float32, torch.bfloat16, torch.bfloat16]
    lists = [[none if d is None else randn((n,), offset * (i == k), d) for i in range(8)] for k, d in enumerate(dtypes)]
    lists[1] = [g if i % 2 else g.bfloat16() for i, g in enumerate(lists[1])]
    lists[3] = [v.square() for v in lists[3]]
    lists[4] = [torch.tensor(float(10**i)) for i in range(8)]
    ours, cpu = run_step(cuda_ops, lists, (HYPER, [4, 4], torch.tensor(0.9), None, True))
    assert_same(flat(ours), flat(cpu))


def test_more_parameters_than_a_table_holds(cuda_ops):
    n = 2 * ADAMW_TABLE + 1
    shapes = [(1 + i % 7,) if i % 50 else (0,) for i in range(n)]
    lists = step_arguments(shapes, [(i % 3 > 0, i % 2 > 0, True, True) for i in range(n)])
    ours, cpu = run_step(cuda_ops, lists, (HYPER, [7, n - 7], torch.tensor(0.5), None, False))
    assert_same(flat(ours), flat(cpu))
    counts = [s.item() for s in ours[4] if s.numel()]
    assert counts == [i + 1.0 for i in range(n) if i % 3 > 0]


def test_parameters_without_elements_count_their_steps(cuda_ops):
    lists = step_arguments([(0,), (0, 4)], [(True,) * 4] * 2)
    ours, _ = run_step(cuda_ops, lists, (HYPER, [1, 1], torch.tensor(0.5), None, True))
    assert [s.item() for s in ours[4]] == [1.0, 2.0]


@pytest.mark.sanitize
@pytest.mark.parametrize("hf", [False, True])
def test_five_steps(cuda_ops, hf):
    """Chunks, their end and an unaligned tensor, with rates that change, against the CPU."""
    lists = step_arguments([(CHUNK + 77,), (65,), (7,)], [(True,) * 4] * 3)
    ours, cpu = move(cuda_ops, lists), [clones(tensors) for tensors in lists]
    for k in range(5):
        hyper = HYPER * torch.tensor([1.0 + k, 0.5 * k, 1, 1, 1])
        momentum, scale = torch.tensor(1 - 0.1 / (k + 1)), torch.tensor(0.5**k)
        on_cpu.adamw_ema_(*cpu, hyper, [1, 2], momentum, scale, hf)
        on_device = [cuda_ops.to(t) for t in (hyper, momentum, scale)]
        cuda_ops.ops.adamw_ema_(*ours, on_device[0], [1, 2], *on_device[1:], hf)
    assert_same(flat(ours), flat(cpu))
    assert [s.item() for s in ours[4]] == [5.0, 6.0, 7.0]


@pytest.mark.sanitize
def test_same_bits_twice_and_in_any_order(cuda_ops):
    lists = step_arguments([(3 * CHUNK + 5,), (100,)], [(True,) * 4] * 2)
    grads = [randn((5 * NORM_CHUNK + 3,)), randn((99,), dtype=torch.bfloat16)]
    results, norms = [], []
    for order in (("forward", 0), ("forward", 0), ("reverse", 0), ("shuffled", 3)):
        results.append(flat(run_step(cuda_ops, lists, (HYPER, [1, 1], torch.tensor(0.5), None, True), order)[0]))
        norms.append(cuda_ops.ops.grad_norm(move(cuda_ops, [grads])[0]).cpu())
    for k in range(1, 4):
        assert all(torch.equal(a, b) for a, b in zip(results[0], results[k]))
        assert torch.equal(norms[0], norms[k])


def test_cut_up_tensors_give_the_same_bits(cuda_ops):
    """Chunks begin where tensors begin, so other pieces are other chunks: of single elements, vectors and ends."""
    n = 2 * CHUNK + 77
    lists = [[t[:n]] for t in (randn((n,)), randn((n,)), randn((n,)), randn((n,)).square())]
    hyper, none = HYPER[:1].contiguous(), []
    results = []
    for cuts in ([n], [1, 76, CHUNK - 72, CHUNK + 72]):
        (p,), (g,), (m,), (v,) = move(cuda_ops, lists)
        parts = [list(t.split(cuts)) for t in (p, g, m, v)]
        steps = [cuda_ops.to(torch.zeros(())) for _ in cuts]
        momentum = cuda_ops.to(torch.tensor(0.5))
        cuda_ops.ops.adamw_ema_(*parts, steps, none, none, none, cuda_ops.to(hyper), [len(cuts)], momentum, None, False)
        results.append([p, m, v])
    assert same_bits(*results)


@pytest.mark.parametrize("k", range(5))
@pytest.mark.parametrize("value", [-1e-9, math.nan, math.inf])
def test_a_hyper_parameter_out_of_range_is_seen(cuda_ops, k, value):
    hyper = HYPER.clone()
    hyper[1, k] = value
    lists = step_arguments([(5,), (6,)], [(True,) * 4] * 2)
    ours = move(cuda_ops, lists)
    cuda_ops.ops.adamw_ema_(*ours, cuda_ops.to(hyper), [1, 1], cuda_ops.to(torch.tensor(0.5)), None, True)
    for k in (0, 2, 3, 5, 6, 7):
        assert ours[k][0].isfinite().all()
        assert ours[k][1].isnan().all()


@pytest.mark.parametrize("step", [-3.0, 0.5, math.nan, math.inf])
def test_a_step_that_is_none_is_seen(cuda_ops, step):
    lists = step_arguments([(5,)], [(True,) * 4])
    lists[4][0].fill_(step)
    ours, _ = run_step(cuda_ops, lists, (HYPER[:1].contiguous(), [1], torch.tensor(0.5), None, False))
    assert ours[0][0].isnan().all()


@given(st.lists(st.tuples(SHAPE, GRAD_DTYPE), min_size=1, max_size=5), OFFSET, ORDER)
@EXAMPLES
def test_grad_norm(cuda_ops, entries, offset, order):
    grads = [randn(s, offset, dtype) for s, dtype in entries]
    cuda_ops.schedule(*order)
    norm = cuda_ops.ops.grad_norm(move(cuda_ops, [grads])[0])
    assert norm.dim() == 0
    assert norm.dtype == torch.float64
    assert norm.item() == pytest.approx(reference.grad_norm(grads).item(), rel=tolerances.GRAD_NORM_RTOL)


@pytest.mark.sanitize
def test_grad_norm_of_large_and_odd_values(cuda_ops):
    grads = move(cuda_ops, [[randn((NORM_CHUNK + 1,)), torch.full((5,), 1e30), torch.full((3,), 1e-30)]])[0]
    norm = cuda_ops.ops.grad_norm(grads)
    assert norm.item() == pytest.approx(reference.grad_norm(grads).item(), rel=tolerances.GRAD_NORM_RTOL)
    for value in (math.nan, math.inf):
        grads[0][NORM_CHUNK] = value
        assert str(cuda_ops.ops.grad_norm(grads).item()) == str(value)


ZEROS = [torch.zeros(3)]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((ZEROS, [], torch.tensor(0.5)), "student must have as many tensors as teacher (1), got 0"),
        ((ZEROS, [torch.zeros(4)], torch.tensor(0.5)), "student[0] must have the shape of teacher[0]"),
        (([torch.zeros(3).half()], ZEROS, torch.tensor(0.5)), "teacher[0] must be float32"),
        ((ZEROS, [torch.zeros(3).long()], torch.tensor(0.5)), "student[0] must be float32, bfloat16 or float16"),
        (([torch.zeros(2, 3).T], [torch.zeros(3, 2)], torch.tensor(0.5)), "teacher[0] must be contiguous"),
        (([torch.zeros(3, 2)], [torch.zeros(2, 3).T], torch.tensor(0.5)), "student[0] must be contiguous"),
        ((ZEROS, ZEROS, torch.zeros(2)), "momentum must be a tensor of one value"),
        ((ZEROS, ZEROS, torch.tensor(1)), "momentum must be float32 or float64"),
    ],
)
def test_update_errors(cuda_ops, arguments, message):
    teacher, student, momentum = arguments
    with pytest.raises(RuntimeError, match=re.escape(f"ema_update_: {message}")):
        cuda_ops.ops.ema_update_(
            [cuda_ops.to(t) for t in teacher], [cuda_ops.to(t) for t in student], cuda_ops.to(momentum)
        )


@pytest.mark.parametrize(
    "position, value, message",
    [
        (0, [torch.zeros(3).double(), torch.zeros(2, 4)], "params[0] must be float32"),
        (0, [torch.zeros(3), torch.zeros(4, 2).T], "params[1] must be contiguous"),
        (1, [torch.zeros(3)], "grads must have as many tensors as params (2), got 1"),
        (1, [torch.zeros(3), torch.zeros(8)], "grads[1] must have the shape of params[1]"),
        (1, [torch.zeros(3), torch.zeros(2, 4).half()], "grads[1] must be float32 or bfloat16"),
        (1, [torch.zeros(3), torch.empty(0)], "grads[1], exp_avgs[1] and exp_avg_sqs[1] must have the shape"),
        (2, [torch.zeros(3).half(), torch.zeros(2, 4)], "exp_avgs[0] has the wrong dtype"),
        (3, [torch.zeros(3), torch.zeros(4, 2).T], "exp_avg_sqs[1] must be contiguous"),
        (4, [torch.zeros((), dtype=torch.int64), torch.zeros(())], "steps[0] must be float32"),
        (4, [torch.zeros(2), torch.zeros(())], "steps[0] must be a tensor of one value"),
        (5, [torch.zeros(3), torch.zeros(8)], "teachers[1] must have the shape of params[1]"),
        (5, [], "teacher_shadows[0] must come with a teacher"),
        (6, [torch.zeros(3), torch.zeros(2, 4)], "student_shadows[0] has the wrong dtype"),
        (8, HYPER.float(), "hyper must be float64 [groups, 5]"),
        (8, HYPER[:1].contiguous(), "hyper must be float64 [groups, 5]"),
        (9, [1, 2], "group_sizes must add up to the number of params"),
        (9, [3, -1], "group_sizes must be 0 or more, got -1"),
        (10, torch.zeros(2), "momentum must be a tensor of one value"),
        (11, torch.tensor(1), "grad_scale must be float32 or float64"),
    ],
)
def test_step_errors_come_before_anything_changes(cuda_ops, position, value, message):
    arguments = two_parameters()
    arguments[position] = value

    def on_device(a):
        return [cuda_ops.to(t) for t in a] if isinstance(a, list) and a and isinstance(a[0], torch.Tensor) else a

    arguments = [cuda_ops.to(a) if isinstance(a, torch.Tensor) else on_device(a) for a in arguments]
    tensors = flat(arguments[:8])
    before = clones(tensors)
    with pytest.raises(RuntimeError, match=re.escape(f"adamw_ema_: {message}")):
        cuda_ops.ops.adamw_ema_(*arguments)
    assert all(torch.equal(t, b) for t, b in zip(tensors, before))


def test_grad_norm_errors(cuda_ops):
    for grads, message in (
        ([torch.zeros(3), torch.zeros(3).half()], "grads[1] must be float32 or bfloat16"),
        ([torch.zeros(3, 2).T], "grads[0] must be contiguous"),
    ):
        with pytest.raises(RuntimeError, match=re.escape(f"grad_norm: {message}")):
            cuda_ops.ops.grad_norm([cuda_ops.to(g) for g in grads])
