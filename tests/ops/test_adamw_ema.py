"""adamw_ema_, the operator behind AdamWEMA, against float64 and the reference."""

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from atst_fast.ops.ema import adamw_ema_
from atst_fast.reference import ema as reference
from tests import tolerances
from tests.ops.test_ema import LONG, MOMENTA, OFFSET, PER_ISA, SHAPE, clones, cut, randn, same_bits


def step_arguments(shapes, present, offset=0, grad_dtype=torch.float32):
    """Arguments of adamw_ema_; ``present`` per parameter: gradient, teacher, student shadow, teacher shadow."""
    none = torch.empty(0)

    def when(flags, make):
        return [make(torch.Size(s)) if all(p[f] for f in flags) else none for s, p in zip(shapes, present)]

    return (
        [randn(s, offset) for s in shapes],
        when([0], lambda s: randn(s, offset + 1, grad_dtype)),
        when([0], lambda s: randn(s, offset)),
        when([0], lambda s: randn(s, offset).square()),
        [torch.tensor(float(i)) if p[0] else none for i, p in enumerate(present)],
        when([1], lambda s: randn(s, offset + 2)),
        when([2], lambda s: randn(s, offset, torch.bfloat16)),
        when([1, 3], lambda s: randn(s, offset, torch.bfloat16)),
    )


GRAD_DTYPE = st.sampled_from([torch.float32, torch.bfloat16])
HYPER = torch.tensor([[1e-2, 0.1, 0.9, 0.999, 1e-6], [1e-3, 0.0, 0.0, 0.95, 1e-3]], dtype=torch.float64)


# what a step is drawn from: shapes and what is present, offset, momentum, factor of the gradients, form, size of the
# first group, dtype of the gradients
STEP = (
    st.lists(st.tuples(SHAPE, st.tuples(*[st.booleans()] * 4)), min_size=1, max_size=5),
    OFFSET,
    MOMENTA,
    st.sampled_from([None, 0.25, -2.0]),
    st.booleans(),
    st.integers(0, 5),
    GRAD_DTYPE,
)


def drawn_step(entries, offset, momentum, scale, first, grad_dtype):
    """The lists of adamw_ema_; hyper, group sizes and momentum; the factor of the gradients."""
    lists = step_arguments([e[0] for e in entries], [e[1] for e in entries], offset, grad_dtype)
    first = min(first, len(entries))
    rest = (HYPER, [first, len(entries) - first], torch.tensor(momentum, dtype=torch.float64))
    return lists, rest, None if scale is None else torch.tensor(scale, dtype=torch.float64)


@given(*STEP)
@PER_ISA
def test_step_against_float64(isa, entries, offset, momentum, scale, hf, first, grad_dtype):
    lists, rest, scale = drawn_step(entries, offset, momentum, scale, first, grad_dtype)
    wide = [[t.double() if k < 6 else t.clone() for t in tensors] for k, tensors in enumerate(lists)]
    bounds = list(step_bounds(wide, scale, rest[1], hf))
    reference.adamw_ema_(*wide, *rest, scale, hf)
    adamw_ema_(*lists, *rest, scale, hf)
    params, _, exp_avgs, exp_avg_sqs, steps, teachers, student_shadows, teacher_shadows = lists
    for i, (bound_p, bound_m, bound_v, bound_t) in enumerate(bounds):
        assert steps[i].tolist() == wide[4][i].tolist()
        for ours, exact, bound in (
            (params[i], wide[0][i], bound_p),
            (exp_avgs[i], wide[2][i], bound_m),
            (exp_avg_sqs[i], wide[3][i], bound_v),
            (teachers[i], wide[5][i], bound_t),
        ):
            if ours.numel():
                assert ((ours.double() - exact).abs() <= bound).all()
        for shadow, source in ((student_shadows[i], params[i]), (teacher_shadows[i], teachers[i])):
            if shadow.numel():
                assert torch.equal(shadow, source.bfloat16())


def step_bounds(wide, scale, sizes, hf):
    """Largest errors of param, exp_avg, exp_avg_sq, teacher: so many roundings of the terms that each is a sum of."""
    rows = [row for row, size in zip(HYPER.tolist(), sizes) for _ in range(size)]
    for p, g, m, v, step, teacher, row in zip(*wide[:6], rows):
        terms, terms_m, terms_v = p.abs(), torch.zeros(()), torch.zeros(())
        if step.numel():
            lr, _, beta1, beta2, eps = row
            t, g = step.item() + 1, g.abs() * abs(1.0 if scale is None else scale.item())
            terms_m, terms_v = beta1 * m.abs() + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
            root = terms_v.sqrt()
            denominator = root + eps if hf else root / math.sqrt(1 - beta2**t) + eps
            terms = terms + lr * (math.sqrt(1 - beta2**t) if hf else 1) / (1 - beta1**t) * terms_m / denominator
        ulp = tolerances.ADAMW_ULPS * 2**-23
        bound_t = (ulp + tolerances.EMA_ULPS * 2**-23) * (terms + teacher.abs()) if teacher.numel() else None
        yield ulp * terms, ulp * terms_m, ulp * terms_v, bound_t


def test_step_bits_depend_neither_on_threads_nor_on_the_split(isa, threads):
    lists = step_arguments([(LONG,)], [(True,) * 4])
    hyper, momentum = HYPER[:1].contiguous(), torch.tensor(0.9, dtype=torch.float64)
    results = []
    for count in (1, 2, 2):
        threads(count)
        results.append([clones(tensors) for tensors in lists])
        adamw_ema_(*results[-1], hyper, [1], momentum, None, True)
    parts = [clones(tensors) for tensors in lists]
    cut_up = [cut(t[0]) if t[0].dim() else [t[0].clone() for _ in range(4)] for t in parts]
    adamw_ema_(*cut_up, hyper, [4], momentum, None, True)
    for k in (0, 2, 3, 5):
        assert same_bits([r[k][0] for r in results], [parts[k][0]] * 3)
    for k in (6, 7):
        assert all(torch.equal(r[k][0], parts[k][0]) for r in results)


def test_a_step_that_is_none_is_seen(isa):
    arguments = two_parameters()
    arguments[4] = [torch.tensor(-3.0), torch.tensor(0.5)]
    adamw_ema_(*arguments)
    assert all(p.isnan().all() for p in arguments[0])


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shadows_written_past_the_caches(isa, offset, dtype):
    """Many parameters: the shadows are streamed where they are aligned."""
    n = 2**22 + 100_003
    p, g, t = randn((n,)), randn((n,)), randn((n,))
    shadows = [torch.zeros(n + offset, dtype=torch.bfloat16)[offset:] for _ in range(2)]
    g[5] = math.nan
    adamw_ema_(
        [p], [g.to(dtype)], [torch.zeros(n)], [torch.zeros(n)], [torch.zeros(())], [t], *([s] for s in shadows),
        HYPER[:1].contiguous(), [1], torch.tensor(0.9), None, True,
    )  # fmt: skip
    for shadow, source in zip(shadows, (p, t)):
        assert shadow[5].isnan()
        assert torch.equal(shadow.nan_to_num(7.0), source.bfloat16().nan_to_num(7.0))


def two_parameters():
    lists = step_arguments([(3,), (2, 4)], [(True,) * 4] * 2)
    return [*lists, HYPER.clone(), [1, 1], torch.tensor(0.5), None, True]


@pytest.mark.parametrize(
    "position, value, message",
    [
        (0, [torch.zeros(3).double(), torch.zeros(2, 4)], "params[0] must be float32"),
        (0, [torch.zeros(3), torch.zeros(4, 2).T], "params[1] must be contiguous"),
        (1, [torch.zeros(3)], "grads must have as many tensors as params (2), got 1"),
        (1, [torch.zeros(3), torch.zeros(8)], "grads[1] must have the shape of params[1]"),
        (1, [torch.zeros(3), torch.empty(0)], "grads[1], exp_avgs[1] and exp_avg_sqs[1] must have the shape"),
        (1, [torch.zeros(3), torch.zeros(2, 4).half()], "grads[1] must be float32 or bfloat16"),
        (2, [torch.zeros(3).half(), torch.zeros(2, 4)], "exp_avgs[0] has the wrong dtype"),
        (3, [torch.zeros(3), torch.zeros(4, 2).T], "exp_avg_sqs[1] must be contiguous"),
        (4, [torch.zeros((), dtype=torch.int64), torch.zeros(())], "steps[0] must be float32"),
        (4, [torch.zeros(2), torch.zeros(())], "steps[0] must be a tensor of one value"),
        (5, [torch.zeros(3), torch.zeros(8)], "teachers[1] must have the shape of params[1]"),
        (5, [torch.zeros(3)], "teachers must have as many tensors as params (2), got 1"),
        (5, [], "teacher_shadows[0] must come with a teacher"),
        (6, [torch.zeros(3), torch.zeros(2, 4)], "student_shadows[0] has the wrong dtype"),
        (8, HYPER.float(), "hyper must be float64 [groups, 5]"),
        (8, HYPER[:1].contiguous(), "hyper must be float64 [groups, 5]"),
        (8, HYPER * math.nan, "lr of group 0 must be 0 or more and finite, got nan"),
        (8, HYPER * torch.tensor([1, 1, 1, 2, 1]), "beta2 of group 0 must be 0 or more and less than 1, got 1.998"),
        (9, [3, -1], "group_sizes must be 0 or more, got -1"),
        (9, [1, 2], "group_sizes must add up to the number of params"),
        (10, torch.tensor(math.nan), "momentum must be between 0 and 1, got nan"),
        (10, torch.zeros(2), "momentum must be a tensor of one value on the CPU"),
        (10, torch.tensor(1), "momentum must be float32 or float64"),
        (11, torch.zeros(2), "grad_scale must be a tensor of one value on the CPU"),
    ],
)
def test_a_direct_call_is_checked_before_anything_changes(position, value, message):
    arguments = two_parameters()
    arguments[position] = value
    tensors = [t for a in arguments[:8] for t in a]
    before = clones(tensors)
    with pytest.raises(RuntimeError, match=re.escape(f"adamw_ema_: {message}")):
        adamw_ema_(*arguments)
    assert all(torch.equal(t, b) for t, b in zip(tensors, before))


@pytest.mark.parametrize("hf", [False, True])
def test_opcheck_step(hf):
    torch.library.opcheck(torch.ops.atst_fast.adamw_ema_, (*two_parameters()[:11], torch.tensor(0.5), hf))
