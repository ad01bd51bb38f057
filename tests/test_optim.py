"""AdamWEMA against the official code, torch.optim.AdamW and plain re-implementations."""

import copy
import io
import math
import pickle

import pytest
import torch

from atst_fast import ops
from atst_fast.optim import AdamWEMA, param_groups
from atst_fast.reference import ema as reference
from tests import golden, tolerances

SHAPES = [(7, 33), (129,), (), (0, 4), (1,), (64, 64)]
TOLERANCE = dict(rtol=tolerances.ADAMW_RTOL, atol=tolerances.ADAMW_ATOL)


class Named(torch.nn.Module):
    def __init__(self, params):
        super().__init__()
        self.params = params

    def named_parameters(self, *args, **kwargs):
        return iter(self.params.items())


def golden_student():
    """The student's parameters before the golden step with their gradients, and the teacher's tensors, by name."""
    tensors, meta = golden.load("frame_step")
    names = [k.removeprefix("grad/") for k in tensors if k.startswith("grad/") and not k.startswith("grad/asym/")]
    params = {n: torch.nn.Parameter(tensors[f"in/state/student.{n}"].clone()) for n in names}
    for n, p in params.items():
        p.grad = tensors[f"grad/{n}"].clone()
    teacher = {n: tensors[f"in/state/teacher.{n}"].clone() for n in names if not n.startswith("predictor")}
    return params, teacher, tensors, meta


def make(shapes=SHAPES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]
    return params, [p.detach().clone() + 1 for p in params]


def set_grads(params, seed, scale=1e-2):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator) * scale


def steps(optimizer, params, seeds):
    for seed in seeds:
        set_grads(params, seed)
        optimizer.step()


def values(*lists):
    return [t.detach().clone() for tensors in lists for t in tensors]


def assert_same(a, b):
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_golden_step(isa):
    params, teacher, tensors, meta = golden_student()
    assert len(params) == 36
    optimizer = AdamWEMA(
        param_groups(Named(params), meta["wd"]),
        lr=meta["lr"],
        eps=meta["eps"],
        teacher={params[n]: t for n, t in teacher.items()},
        momentum=meta["ema_used"],
    )
    optimizer.step()
    for n, p in params.items():
        torch.testing.assert_close(p.data, tensors[f"out/after_opt/student.{n}"], **TOLERANCE)
    for n, t in teacher.items():
        torch.testing.assert_close(t, tensors[f"out/after_ema/teacher.{n}"], **TOLERANCE)


def test_param_groups_split():
    params, *_ = golden_student()
    params["frozen"] = torch.nn.Parameter(torch.zeros(2, 2), requires_grad=False)
    params["wide.bias"] = torch.nn.Parameter(torch.zeros(2, 2))
    decayed, plain = param_groups(Named(params), 0.04)
    by_id = {id(p): n for n, p in params.items()}
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.04, 0.0)
    assert {"encoder.pos_embed", "encoder.mask_embed"} <= {by_id[id(p)] for p in decayed["params"]}
    assert all(p.ndim > 1 for p in decayed["params"])
    assert [by_id[id(p)] for p in plain["params"] if p.ndim > 1] == ["wide.bias"]
    assert len(decayed["params"]) + len(plain["params"]) == len(params) - 1


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_torch_form_is_torch_adamw(isa, decay):
    (ours, teacher), (theirs, _) = make(), make()
    a = AdamWEMA(ours, lr=1e-3, eps=1e-8, weight_decay=decay, form="torch", teacher=teacher)
    b = torch.optim.AdamW(theirs, lr=1e-3, eps=1e-8, weight_decay=decay)
    for seed in range(5):
        steps(a, ours, [seed])
        steps(b, theirs, [seed])
        for p, q in zip(ours, theirs):
            torch.testing.assert_close(p, q, rtol=(seed + 1) * TOLERANCE["rtol"], atol=(seed + 1) * TOLERANCE["atol"])


def test_five_steps_of_the_huggingface_form(isa):
    """Rates, decay and momentum that change with every step, against the formula written out."""
    params, teacher = make()
    groups = [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.0}]
    optimizer = AdamWEMA(groups, form="hf", teacher=teacher)
    p, t = [x.detach().double() for x in params], [x.double() for x in teacher]
    m, v = ([torch.zeros_like(x) for x in p] for _ in range(2))
    for k in range(1, 6):
        lr, decay, momentum = 1e-3 * k, 0.1 * k, 1 - 0.1 / k
        set_grads(params, seed=k)
        optimizer.param_groups[0].update(lr=lr, weight_decay=decay)
        optimizer.param_groups[1].update(lr=lr)
        optimizer.step(momentum=momentum)
        for i, x in enumerate(params):
            g = x.grad.double()
            m[i] = 0.9 * m[i] + 0.1 * g
            v[i] = 0.999 * v[i] + 0.001 * g * g
            p[i] = p[i] - lr * math.sqrt(1 - 0.999**k) / (1 - 0.9**k) * m[i] / (v[i].sqrt() + 1e-6)
            p[i] = p[i] - lr * (decay if i < 2 else 0) * p[i]
            t[i] = momentum * t[i] + (1 - momentum) * p[i]
        for ours, exact in zip(params, p):
            torch.testing.assert_close(ours.double(), exact, rtol=k * TOLERANCE["rtol"], atol=5 * k * TOLERANCE["atol"])
        for ours, exact in zip(teacher, t):  # of terms of size 8 at most, and may itself be near 0
            torch.testing.assert_close(ours.double(), exact, rtol=0, atol=k * tolerances.EMA_ULPS * 2**-20)


def test_without_gradient_the_teacher_still_moves():
    params, teacher = make([(5,), (6,), (7,)])
    outside, outside_teacher = torch.nn.Parameter(torch.ones(4), requires_grad=False), torch.zeros(4)
    pairs = {params[0]: teacher[0], params[1]: teacher[1], outside: outside_teacher}
    optimizer = AdamWEMA(params, teacher=pairs, momentum=0.75)
    set_grads(params, 0)
    params[0].grad = None
    before = values(params, teacher)
    optimizer.step()
    assert torch.equal(params[0], before[0])
    assert params[0] not in optimizer.state
    for t, s, old in ((teacher[0], before[0], before[3]), (outside_teacher, outside, torch.zeros(4))):
        expected = old.clone()
        reference.ema_update_([expected], [s.detach()], 0.75)
        torch.testing.assert_close(t, expected)
    assert not torch.equal(params[2], before[2])
    assert torch.equal(teacher[2], before[5])
    assert optimizer.state[params[1]]["step"] == 1
    steps(optimizer, params, [1])
    assert [optimizer.state[p]["step"].item() for p in params] == [1, 2, 2]


def test_the_teacher_moves_as_by_ema_update(isa):
    params, teacher = make()
    before = values(teacher)
    steps(AdamWEMA(params, teacher=teacher, momentum=0.9), params, [0])
    ops.ema_update_(before, params, 0.9)
    assert_same(teacher, before)


@pytest.mark.parametrize("form", ["hf", "torch"])
def test_bits_are_the_same_twice_and_on_any_number_of_threads(threads, form):
    results = []
    for count in (1, 2, 2):
        threads(count)
        params, teacher = make([(300, 1000), (17,)])
        steps(AdamWEMA(params, teacher=teacher, form=form, max_grad_norm=0.5), params, range(2))
        results.append(values(params, teacher))
    assert_same(results[0], results[1])
    assert_same(results[1], results[2])


def test_nan_stays_in_its_tensor(isa):
    params, teacher = make([(40,), (40,)])
    set_grads(params, 0)
    params[0].grad[3] = math.nan
    AdamWEMA(params, teacher=teacher).step()
    for tensors in (params, teacher):
        assert tensors[0].isnan().nonzero().tolist() == [[3]]
        assert tensors[1].isfinite().all()


def test_resume_is_bit_for_bit():
    params, teacher = make()
    optimizer = AdamWEMA(params, lr=torch.tensor(1e-2), teacher=teacher, momentum=0.9)
    steps(optimizer, params, range(3))
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "params": params, "teacher": teacher}, file)
    steps(optimizer, params, range(3, 6))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = AdamWEMA(saved["params"], lr=1.0, teacher=saved["teacher"], momentum=0.5)
    again.load_state_dict(saved["optimizer"])
    steps(again, saved["params"], range(3, 6))
    assert_same(values(params, teacher), values(saved["params"], saved["teacher"]))


def test_loading_copies():
    params, teacher = make()
    optimizer = AdamWEMA(params, teacher=teacher)
    steps(optimizer, params, [0])
    other = AdamWEMA(params, teacher=teacher)
    other.load_state_dict(optimizer.state_dict())
    kept = optimizer.state[params[0]]["exp_avg"].clone()
    steps(other, params, [1])
    assert torch.equal(optimizer.state[params[0]]["exp_avg"], kept)
    assert optimizer.state[params[0]]["step"] == 1


def test_a_state_dict_of_torch_adamw_continues():
    (ours, teacher), (theirs, _) = make(), make()
    a = torch.optim.AdamW(theirs, lr=1e-3, eps=1e-8)
    steps(a, theirs, range(3))
    b = AdamWEMA(ours, lr=1.0, form="torch", teacher=teacher)
    with torch.no_grad():
        for p, q in zip(ours, theirs):
            p.copy_(q)
    b.load_state_dict(a.state_dict())
    steps(a, theirs, [3])
    steps(b, ours, [3])
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q, **TOLERANCE)
    a.load_state_dict({k: v for k, v in b.state_dict().items() if k != "momentum"})


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
def test_copies_go_their_own_way(duplicate):
    params, teacher = make()
    shadows = {params[0]: params[0].detach().bfloat16(), teacher[0]: teacher[0].bfloat16()}
    optimizer = AdamWEMA(params, teacher=teacher, shadows=shadows, momentum=0.9)
    steps(optimizer, params, [0])
    box = duplicate({"o": optimizer, "p": params, "t": teacher, "s": list(shadows.values())})
    before = values(params, teacher)
    steps(box["o"], box["p"], [1])
    assert_same(values(params, teacher), before)
    steps(optimizer, params, [1])
    assert_same(values(params, teacher, shadows.values()), values(box["p"], box["t"], box["s"]))


def test_clipping_is_clip_grad_norm():
    (ours, _), (theirs, _) = make(), make()
    a, b = AdamWEMA(ours, max_grad_norm=0.1), AdamWEMA(theirs)
    for seed, scale in ((0, 1.0), (1, 1e-4)):  # above and below the limit
        for params in (ours, theirs):
            set_grads(params, seed, scale)
        kept = values(p.grad for p in ours)
        norm = torch.nn.utils.clip_grad_norm_(theirs, 0.1)
        a.step()
        b.step()
        torch.testing.assert_close(a.grad_norm.float(), norm)
        assert_same([p.grad for p in ours], kept)
        for p, q in zip(ours, theirs):
            torch.testing.assert_close(p, q, rtol=2 * TOLERANCE["rtol"], atol=2 * TOLERANCE["atol"])


@pytest.mark.parametrize("limit", [None, 0.1])
def test_grad_scale(limit):
    (ours, _), (theirs, _) = make(), make()
    set_grads(ours, 0)
    set_grads(theirs, 0)
    for p in theirs:
        p.grad *= 0.25
    AdamWEMA(ours, max_grad_norm=limit).step(grad_scale=0.25)
    AdamWEMA(theirs, max_grad_norm=limit).step()
    assert_same(ours, theirs)


def test_a_factor_below_zero_and_a_norm_near_nothing():
    """What is compared with the limit is no sign; and the 1e-6 that torch adds to the norm counts where it is small."""
    (ours, _), (theirs, _) = make([(40,)]), make([(40,)])
    set_grads(ours, 0)
    AdamWEMA(ours, max_grad_norm=0.01).step(grad_scale=-0.25)
    theirs[0].grad = -0.25 * ours[0].grad
    torch.nn.utils.clip_grad_norm_(theirs, 0.01)
    AdamWEMA(theirs).step()
    torch.testing.assert_close(ours, theirs, **TOLERANCE)
    optimizer = AdamWEMA(ours, max_grad_norm=1e-6)
    ours[0].grad = torch.zeros(40)
    ours[0].grad[0] = 2e-6
    optimizer.step()
    torch.testing.assert_close(optimizer.state[ours[0]]["exp_avg"][0].item(), 0.1 * 2e-6 / 3, rtol=1e-4, atol=0)


def test_a_state_dict_holds_plain_numbers():
    optimizer = AdamWEMA(make()[0], momentum=torch.tensor(0.5))
    assert type(optimizer.state_dict()["momentum"]) is float
    optimizer.load_state_dict({**optimizer.state_dict(), "state": {0: {}}})
    assert not optimizer.state[optimizer.param_groups[0]["params"][0]]


def test_shadows_follow(isa):
    params, teacher = make()
    shadows = {x: torch.zeros_like(x, dtype=torch.bfloat16) for x in [*params[:3], *teacher[1:]]}
    steps(AdamWEMA(params, teacher=teacher, shadows=shadows), params, [0])
    assert all(torch.equal(shadow, x.detach().bfloat16()) for x, shadow in shadows.items())


def test_a_shadow_brings_its_gradient():
    (ours, teacher), (theirs, other) = make([(70,), (5,)]), make([(70,), (5,)])
    shadows = {p: p.detach().bfloat16().requires_grad_() for p in ours}
    for p, q in zip(ours, theirs):
        gradient = torch.randn(p.shape).bfloat16()
        shadows[p].grad, q.grad = gradient, gradient.float()
    a = AdamWEMA(ours, teacher=teacher, shadows=shadows, max_grad_norm=0.1)
    b = AdamWEMA(theirs, teacher=other, max_grad_norm=0.1)
    a.step()
    b.step()
    assert_same([*ours, *teacher, a.grad_norm], [*theirs, *other, b.grad_norm])
    assert all(torch.equal(shadow, p.bfloat16()) for p, shadow in shadows.items())
    a.zero_grad(set_to_none=False)
    assert all((s.grad == 0).all() for s in shadows.values())
    a.zero_grad()
    assert all(s.grad is None for s in shadows.values())
    set_grads(ours, 1)  # where there is one, it is the parameter's own
    shadows[ours[0]].grad = torch.full((70,), math.nan).bfloat16()
    a.step()
    assert ours[0].isfinite().all()


def test_refresh_is_for_gpus():
    params, teacher = make([(5,)])
    before = values(params, teacher)
    AdamWEMA(params, teacher=teacher).refresh()
    AdamWEMA([{"params": []}]).refresh()
    assert_same(values(params, teacher), before)


def test_closure_scheduler_and_zero_grad():
    p = torch.nn.Parameter(torch.tensor([3.0]))
    optimizer = AdamWEMA([p], lr=0.1, teacher=[torch.zeros(1)])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 0.5**k)

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 9
    assert p.item() < 3
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.05
    optimizer.zero_grad()
    assert p.grad is None


def test_added_groups_have_teachers():
    params, teacher = make([(3,), (4,), (5,)])
    groups = [{"params": [params[0]], "teacher": [teacher[0]]}]
    optimizer = AdamWEMA(groups, momentum=0.0)
    optimizer.add_param_group({"params": params[1:], "lr": 0.5, "teacher": [None, teacher[2]]})
    before = teacher[1].clone()
    steps(optimizer, params, [0])
    assert_same([teacher[0], teacher[1], teacher[2]], [params[0], before, params[2]])


def test_strided_gradients_are_taken_as_they_are():
    (ours, _), (theirs, _) = make([(6, 5)]), make([(6, 5)])
    gradient = torch.randn(5, 6).T
    ours[0].grad, theirs[0].grad = gradient, gradient.contiguous()
    AdamWEMA(ours).step()
    AdamWEMA(theirs).step()
    assert_same(ours, theirs)


def test_parameters_may_move():
    params, teacher = make([(5,)])
    optimizer = AdamWEMA(params, teacher=teacher)
    steps(optimizer, params, [0])
    params[0].data = params[0].data.clone()
    before = params[0].detach().clone()
    steps(optimizer, params, [1])
    assert not torch.equal(params[0], before)
