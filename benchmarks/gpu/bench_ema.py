"""The teacher update, and AdamW with teacher update and bfloat16 copies, over the parameters of an encoder.

The peers are torch's foreach and fused optimizers and apex's, if it is installed, each followed by the teacher update
and the copies that AdamWEMA makes in the same pass.
"""

import pytest
import torch

from atst_fast.optim import AdamWEMA
from benchmarks import bench_ema as cpu

MAX_NORM = 3.0


def tensors(size, device):
    """Student and teacher."""
    student = [p.detach().to(device) for p in cpu.parameters(size)]
    return student, [s.clone() for s in student]


def apex_lerp(teacher, student):
    """apex's axpby: a x + b y over lists of tensors."""
    apex = pytest.importorskip("apex.multi_tensor_apply", reason="apex is not installed")
    kernels = pytest.importorskip("amp_C", reason="apex is installed without its kernels")
    overflow = torch.zeros(1, dtype=torch.int, device=teacher[0].device)
    lists, m = [teacher, student, teacher], cpu.MOMENTUM
    return lambda: apex.multi_tensor_applier(kernels.multi_tensor_axpby, overflow, lists, m, 1 - m, -1)


def updates(name):
    return apex_lerp if name == "apex" else lambda t, s: lambda: cpu.UPDATES[name](t, s)


@pytest.mark.benchmark(group="ema_update_")
@pytest.mark.parametrize("provider", [*cpu.UPDATES, "apex"])
@pytest.mark.parametrize("size", cpu.SIZES)
def test_ema_update(measure, size, provider):
    student, teacher = tensors(size, "cuda")
    call = updates(provider)(teacher, student)
    measure(call, bytes=12 * cpu.count(student), flops=3 * cpu.count(student), parameters=cpu.count(student))


@pytest.mark.benchmark(group="ema_update_")
@pytest.mark.parametrize("provider", ["atst_fast", "foreach_lerp"])
@pytest.mark.parametrize("size", ["tiny"])
def test_ema_update_in_a_graph(measure, size, provider):
    student, teacher = tensors(size, "cuda")
    measure(updates(provider)(teacher, student), way="replayed", bytes=12 * cpu.count(student))


def shadows(tensors):
    return [torch.empty_like(t, dtype=torch.bfloat16) for t in tensors]


def ours(params, teacher, clip):
    pairs = dict(zip([*params, *teacher], shadows([*params, *teacher])))
    limit = MAX_NORM if clip else None
    return AdamWEMA(params, teacher=teacher, momentum=cpu.MOMENTUM, max_grad_norm=limit, shadows=pairs).step


def followed(optimizer, params, teacher, clip):
    """A step of an optimizer, then what AdamWEMA does in the same pass."""
    student = [p.detach() for p in params]
    sources = [*student, *teacher]
    copies = shadows(sources)

    def step():
        if clip:
            torch.nn.utils.clip_grad_norm_(params, MAX_NORM, foreach=True)
        optimizer.step()
        torch._foreach_lerp_(teacher, student, 1 - cpu.MOMENTUM)
        torch._foreach_copy_(copies, sources)

    return step


def with_torch(**kind):
    def make(params, teacher, clip):
        optimizer = torch.optim.AdamW(params, eps=1e-6, weight_decay=0.04, **kind)
        return followed(optimizer, params, teacher, clip)

    return make


def with_apex(params, teacher, clip):
    apex = pytest.importorskip("apex.optimizers", reason="apex is not installed")
    return followed(apex.FusedAdam(params, eps=1e-6, weight_decay=0.04), params, teacher, clip)


STEPS = {
    "atst_fast": ours,
    "torch_fused": with_torch(fused=True),
    "torch_foreach": with_torch(foreach=True),
    "apex": with_apex,
}


STEPS_IN_A_GRAPH = {"atst_fast": ours, "torch_fused": with_torch(fused=True, capturable=True)}


def make_step(provider, size, clip, device, steps=STEPS):
    """The step, and how many parameters it moves."""
    params = [torch.nn.Parameter(p.detach().to(device)) for p in cpu.parameters(size)]
    for p in params:
        p.grad = torch.randn_like(p) * 1e-3
    teacher = [p.detach().clone() for p in params]
    return steps[provider](params, teacher, clip), cpu.count(params)


@pytest.mark.benchmark(group="AdamWEMA")
@pytest.mark.parametrize("provider", STEPS)
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("size", cpu.SIZES)
def test_adamw_ema(measure, size, clip, provider):
    step, parameters = make_step(provider, size, clip, "cuda")
    # parameter, both moments and teacher are read and written, the gradient is read, two copies are written
    moved = (40 + 4 * clip) * parameters
    measure(step, bytes=moved, flops=(18 + 2 * clip) * parameters, parameters=parameters)


@pytest.mark.benchmark(group="AdamWEMA")
@pytest.mark.parametrize("provider", STEPS_IN_A_GRAPH)
@pytest.mark.parametrize("size", ["tiny", "base"])
def test_adamw_ema_in_a_graph(measure, size, provider):
    step, parameters = make_step(provider, size, False, "cuda", STEPS_IN_A_GRAPH)
    measure(step, way="replayed", bytes=40 * parameters, parameters=parameters)
