"""AdamWEMA on a GPU: what the step computes, and what it uploads when."""

import pytest
import torch

from atst_fast import optim
from atst_fast.ops import ema
from atst_fast.optim import AdamWEMA, param_groups
from tests import tolerances
from tests.cuda.test_ema import assert_same
from tests.test_optim import TOLERANCE, Named, golden_student, make, set_grads

CPU = {name: getattr(ema, name) for name in ("adamw_ema_", "grad_norm")}
SHAPES = [(7, 33), (129,), (), (0, 4), (8192 + 9,)]


@pytest.fixture
def gpu(cuda_ops, monkeypatch):
    """The device; with the shim, optimizers take the CPU for a GPU. ``gpu.capturing``: whether a graph is captured."""
    cuda_ops.capturing, cuda_ops.uploads = False, []
    upload = optim._Numbers._upload

    def counted(table, values):
        cuda_ops.uploads.append(values)
        upload(table, values)

    monkeypatch.setattr(optim._Numbers, "_upload", staticmethod(counted))
    monkeypatch.setattr(optim, "_capturing", lambda: cuda_ops.capturing)
    if cuda_ops.where == "shim":
        monkeypatch.setattr(optim, "_on_gpu", lambda device: True)
        for name in CPU:
            monkeypatch.setattr(ema, name, getattr(cuda_ops.ops, name))
    return cuda_ops


def on(gpu, tensors):
    """Leaves of their own on the device."""
    return [gpu.to(t.detach().clone()).requires_grad_(t.requires_grad) for t in tensors]


def cpu_step(optimizer, **options):
    """A step of an optimizer on the CPU, whatever the fixture says."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optim, "_on_gpu", lambda device: device.type == "cuda")
        for name, operator in CPU.items():
            patch.setattr(ema, name, operator)
        optimizer.step(**options)


@pytest.mark.parametrize("form", ["hf", "torch"])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_five_steps(gpu, form, clip):
    params, teacher = make(SHAPES)
    cpu = AdamWEMA(params, teacher=teacher, form=form, max_grad_norm=clip)
    ours, our_teacher = on(gpu, params), on(gpu, teacher)
    shadows = {p: torch.zeros_like(p, dtype=torch.bfloat16).detach() for p in [*ours, *our_teacher]}
    optimizer = AdamWEMA(ours, teacher=our_teacher, form=form, max_grad_norm=clip, shadows=shadows)
    for k in range(5):
        set_grads(params, k, scale=10.0 ** (k - 3))
        for p, q in zip(params, ours):
            q.grad = gpu.to(p.grad)
        for o in (cpu, optimizer):
            o.param_groups[0].update(lr=1e-3 * (k + 1), weight_decay=0.1 * k)
        cpu_step(cpu, momentum=1 - 0.1 / (k + 1), grad_scale=0.5)
        optimizer.step(momentum=1 - 0.1 / (k + 1), grad_scale=0.5)
        if clip:
            assert optimizer.grad_norm.item() == pytest.approx(cpu.grad_norm.item(), rel=tolerances.GRAD_NORM_RTOL)
    assert len(gpu.uploads) == 5
    state = [optimizer.state[p][name] for p in ours for name in ("exp_avg", "exp_avg_sq", "step")]
    assert all(t.device == p.device for t, p in zip(state[::3], ours))
    expected = [cpu.state[p][name] for p in params for name in ("exp_avg", "exp_avg_sq", "step")]
    assert_same([*ours, *our_teacher, *state], [*params, *teacher, *expected])
    assert all(torch.equal(shadow, source.bfloat16()) for source, shadow in shadows.items())


def test_golden_step(gpu):
    params, teacher, tensors, meta = golden_student()
    params = {n: torch.nn.Parameter(gpu.to(p.detach())) for n, p in params.items()}
    teacher = {n: gpu.to(t) for n, t in teacher.items()}
    for n, p in params.items():
        p.grad = gpu.to(tensors[f"grad/{n}"].clone())
    AdamWEMA(
        param_groups(Named(params), meta["wd"]),
        lr=meta["lr"],
        eps=meta["eps"],
        teacher={params[n]: t for n, t in teacher.items()},
        momentum=meta["ema_used"],
    ).step()
    for n, p in params.items():
        torch.testing.assert_close(p.detach().cpu(), tensors[f"out/after_opt/student.{n}"], **TOLERANCE)
    for n, t in teacher.items():
        torch.testing.assert_close(t.cpu(), tensors[f"out/after_ema/teacher.{n}"], **TOLERANCE)


@pytest.fixture
def small(gpu):
    """An optimizer of two groups on the GPU, and its parameters with gradients."""
    params, teacher = make([(5,), (6, 2)])
    params, teacher = on(gpu, params), on(gpu, teacher)
    for p in params:
        p.grad = torch.ones_like(p)
    groups = [{"params": [params[0]], "teacher": [teacher[0]]}, {"params": [params[1]], "weight_decay": 0.0}]
    return AdamWEMA(groups, momentum=0.5), params


def test_uploads_only_what_has_changed(gpu, small):
    optimizer, _ = small
    optimizer.step()
    optimizer.step()
    optimizer.refresh()
    none = [0.0] * 5
    assert gpu.uploads == [[1e-3, 0.04, 0.9, 0.999, 1e-6, 1e-3, 0.0, 0.9, 0.999, 1e-6, *none, 0.5]]
    optimizer.param_groups[1]["lr"] = 2e-3
    optimizer.step()
    optimizer.step(momentum=0.25)
    optimizer.refresh()
    assert [(u[5], u[-1]) for u in gpu.uploads[1:]] == [(2e-3, 0.5), (2e-3, 0.25), (2e-3, 0.5)]


def test_nothing_is_uploaded_into_a_graph(gpu, small):
    optimizer, params = small
    optimizer.step()
    before = params[0].detach().clone()
    gpu.capturing = True
    optimizer.param_groups[0]["lr"] = 0.5
    optimizer.step()
    assert len(gpu.uploads) == 1
    gpu.capturing = False
    assert (params[0] - before).abs().max() < 0.01  # by the rate of before
    optimizer.refresh()
    assert gpu.uploads[1][0] == 0.5
    gpu.capturing = True
    optimizer.step()
    assert len(gpu.uploads) == 2
    assert (params[0] - before).abs().max() > 0.1


def test_what_a_graph_cannot_capture(gpu, small):
    optimizer, params = small
    gpu.capturing = True
    with pytest.raises(RuntimeError, match="AdamWEMA: a step must be taken before one is captured"):
        optimizer.step()
    gpu.capturing, params[1].grad = False, None
    optimizer.step()
    gpu.capturing, params[1].grad = True, torch.ones_like(params[1])
    with pytest.raises(RuntimeError, match="AdamWEMA: a step must be taken before one is captured"):
        optimizer.step()
    params[1].grad = None
    with pytest.raises(ValueError, match=r"AdamWEMA: momentum must be a tensor on the GPU.*got float 0\.5"):
        optimizer.step(momentum=0.5)
    gpu.capturing = False
    optimizer.add_param_group({"params": on(gpu, [torch.nn.Parameter(torch.zeros(3))])})
    gpu.capturing = True
    with pytest.raises(RuntimeError, match="AdamWEMA: a step must be taken before one is captured"):
        optimizer.step()


def test_a_refused_first_step_leaves_no_half_state(gpu, small):
    optimizer, _ = small
    gpu.capturing = True
    with pytest.raises(RuntimeError, match="a step must be taken"):
        optimizer.step()
    gpu.capturing = False
    assert optimizer.state_dict()["state"] == {}
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()


def test_what_a_graph_reads_stays_where_it_is(gpu, small):
    optimizer, _ = small
    optimizer.step()
    table = optimizer._numbers._table
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.refresh()
    assert optimizer._numbers._table is table
    optimizer.add_param_group({"params": on(gpu, [torch.nn.Parameter(torch.zeros(3))])})
    optimizer.refresh()
    assert optimizer._numbers._table is not table
    assert any(t is table for t in optimizer._numbers._former)


def test_rates_that_are_tensors_on_the_gpu(gpu):
    params, _ = make([(5,)])
    ours = on(gpu, params)
    lr = gpu.to(torch.tensor(0.5, dtype=torch.float64))
    optimizer = AdamWEMA(ours, lr=lr, betas=(gpu.to(torch.tensor(0.75)), 0.999))
    cpu = AdamWEMA(params, lr=0.5, betas=(0.75, 0.999))
    for k, rate in enumerate((0.5, 0.25)):
        lr.fill_(rate)
        cpu.param_groups[0]["lr"] = rate
        set_grads(params, k)
        ours[0].grad = gpu.to(params[0].grad)
        gpu.capturing = k == 1
        optimizer.step()
        cpu_step(cpu)
    assert len(gpu.uploads) == 1
    assert_same(ours, params)
    lr.fill_(-1.0)
    optimizer.step()
    assert ours[0].isnan().all()
    with pytest.raises(ValueError, match="AdamWEMA: lr of group 0 must be a number or a tensor of one value"):
        AdamWEMA(ours, lr=gpu.to(torch.ones(2)))


@pytest.mark.parametrize("clip", [None, 0.1])
def test_a_gradient_factor_on_the_gpu(gpu, clip):
    params, _ = make([(5,), (300,)])
    ours = on(gpu, params)
    set_grads(params, 0)
    for p, q in zip(params, ours):
        q.grad = gpu.to(p.grad)
    cpu, optimizer = AdamWEMA(params, max_grad_norm=clip), AdamWEMA(ours, max_grad_norm=clip)
    cpu_step(cpu, grad_scale=-0.25)
    optimizer.step(grad_scale=gpu.to(torch.tensor(-0.25)))
    assert_same(ours, params)


def test_gradients_of_bfloat16_copies(gpu):
    params, teacher = make(SHAPES)
    ours, our_teacher = on(gpu, params), on(gpu, teacher)
    shadows = {p: p.detach().bfloat16().requires_grad_() for p in ours}
    for p, q in zip(params, ours):
        gradient = torch.randn(p.shape).bfloat16()
        p.grad, shadows[q].grad = gradient.float(), gpu.to(gradient)
    optimizer = AdamWEMA(ours, teacher=our_teacher, shadows=shadows, max_grad_norm=1.0)
    cpu = AdamWEMA(params, teacher=teacher, max_grad_norm=1.0)
    cpu_step(cpu)
    optimizer.step()
    assert_same([*ours, *our_teacher], [*params, *teacher])
    assert all(torch.equal(shadow, p.bfloat16()) for p, shadow in shadows.items())


def test_resume_is_bit_for_bit(gpu):
    results = []
    for interrupted in (False, True):
        params, teacher = make(SHAPES)
        params, teacher = on(gpu, params), on(gpu, teacher)
        optimizer = AdamWEMA(params, teacher=teacher, momentum=0.9)
        for k in range(4):
            generator = torch.Generator().manual_seed(k)
            for p in params:
                p.grad = gpu.to(torch.randn(p.shape, generator=generator))
            if interrupted and k == 2:
                state = optimizer.state_dict()
                optimizer = AdamWEMA(params, teacher=teacher, lr=1.0)
                optimizer.load_state_dict(state)
                assert all(s["step"].device == p.device for p, s in optimizer.state.items())
            optimizer.step()
        results.append([*params, *teacher])
    assert all(torch.equal(a, b) for a, b in zip(*results))
