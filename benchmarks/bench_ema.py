"""The teacher update, and AdamW with the teacher update, over the parameters of an ATST-Frame encoder."""

import math

import pytest
import torch

from atst_fast import ops
from atst_fast.optim import AdamWEMA

# width, blocks: the shapes of the encoder's parameters follow
SIZES = {"tiny": (64, 1), "small": (384, 12), "base": (768, 12)}
MOMENTUM = 0.9996


def parameters(size):
    d, depth = SIZES[size]
    block = [(d,), (d,), (3 * d, d), (d, d), (d,), (d,), (d,), (4 * d, d), (4 * d,), (d, 4 * d), (d,)]
    shapes = [(1, 1, d), (1, 251, d), (d, 256), (d,), *(block * depth), (d,), (d,)]
    return [torch.nn.Parameter(torch.randn(shape) * 0.02) for shape in shapes]


def count(tensors):
    return sum(t.numel() for t in tensors)


def loop_update(teacher, student):
    """The official code."""
    for t, s in zip(teacher, student):
        t.mul_(MOMENTUM).add_((1 - MOMENTUM) * s)


UPDATES = {
    "atst_fast": lambda teacher, student: ops.ema_update_(teacher, student, MOMENTUM),
    "foreach_lerp": lambda teacher, student: torch._foreach_lerp_(teacher, student, 1 - MOMENTUM),
    "python_loop": loop_update,
}


@pytest.mark.benchmark(group="ema_update_")
@pytest.mark.parametrize("provider", UPDATES)
@pytest.mark.parametrize("size", SIZES)
def test_ema_update(benchmark, provider, size):
    student = [p.detach() for p in parameters(size)]
    teacher = [s.clone() for s in student]
    benchmark.extra_info.update(bytes=12 * count(student), flops=3 * count(student), parameters=count(student))
    benchmark(UPDATES[provider], teacher, student)


def ours(form):
    def make(params, teacher):
        return AdamWEMA(params, form=form, teacher=teacher, momentum=MOMENTUM).step

    return make


def torch_fused(params, teacher):
    optimizer = torch.optim.AdamW(params, eps=1e-6, weight_decay=0.04, fused=True)
    student = [p.detach() for p in params]

    def step():
        optimizer.step()
        torch._foreach_lerp_(teacher, student, 1 - MOMENTUM)

    return step


def python_loop(params, teacher):
    """The structure of transformers' AdamW, with which the official code trains, and its loop over the teacher."""
    m, v = ([torch.zeros_like(p) for p in params] for _ in range(2))
    lr, wd, beta1, beta2, eps, t = 1e-3, 0.04, 0.9, 0.999, 1e-6, 0

    @torch.no_grad()
    def step():
        nonlocal t
        t += 1
        step_size = lr * math.sqrt(1 - beta2**t) / (1 - beta1**t)
        for p, a, b in zip(params, m, v):
            a.mul_(beta1).add_(p.grad, alpha=1 - beta1)
            b.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
            p.addcdiv_(a, b.sqrt().add_(eps), value=-step_size)
            p.add_(p, alpha=-lr * wd)
        loop_update(teacher, params)

    return step


STEPS = {
    "atst_fast": ours("hf"),
    "atst_fast_torch_form": ours("torch"),
    "torch_fused_and_foreach_lerp": torch_fused,
    "python_loop": python_loop,
}


@pytest.mark.benchmark(group="AdamWEMA")
@pytest.mark.parametrize("provider", STEPS)
@pytest.mark.parametrize("size", SIZES)
def test_adamw_ema(benchmark, provider, size):
    params = parameters(size)
    for p in params:
        p.grad = torch.randn_like(p) * 1e-3
    step = STEPS[provider](params, [p.detach().clone() for p in params])
    benchmark.extra_info.update(bytes=36 * count(params), flops=18 * count(params), parameters=count(params))
    benchmark(step)
