"""ema_update_: the teacher's update; adamw_ema: AdamW with it in one pass; over the parameters of an encoder.

The peers of the optimizer are torch's fused and foreach ones and apex's, if it is installed, each followed by the
teacher update (and, on a GPU, the bfloat16 copies of both networks) that AdamWEMA makes in the same pass. ``form`` says
where epsilon and the decay enter: "hf" is transformers' AdamW, with which the official code trains, as a Python loop.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from atst_fast import ops
from atst_fast.bench.operator import CUDA, OURS, Operator, Provider, installed
from atst_fast.optim import AdamWEMA
from atst_fast.reference import ema as reference

MOMENTUM, MAX_NORM = 0.9996, 3.0
LR, DECAY, BETAS, EPS = 1e-3, 0.04, (0.9, 0.999), 1e-6
_DEVICES = ("cpu", "cuda")


def shapes(width: int, depth: int) -> list[tuple[int, ...]]:
    """Of an ATST-Frame encoder's parameters."""
    d = width
    block = [(d,), (d,), (3 * d, d), (d, d), (d,), (d,), (d,), (4 * d, d), (4 * d,), (d, 4 * d), (d,)]
    return [(1, 1, d), (1, 251, d), (d, 256), (d,), *(block * depth), (d,), (d,)]


def random(width: int, depth: int, device: str, scale: float) -> list[Tensor]:
    return [torch.randn(shape, device=device) * scale for shape in shapes(width, depth)]


def count(tensors: list[Tensor]) -> int:
    return sum(t.numel() for t in tensors)


class Pair(NamedTuple):
    student: list[Tensor]
    teacher: list[Tensor]


def make_pair(device: str, width: int, depth: int) -> Pair:
    return Pair(random(width, depth, device, 0.02), random(width, depth, device, 0.02))


def loop_update(teacher, student):
    """The official code."""
    for t, s in zip(teacher, student):
        t.mul_(MOMENTUM).add_((1 - MOMENTUM) * s)


def with_apex_lerp(inputs: Pair):
    """apex's axpby: a x + b y over lists of tensors."""
    apply = installed("apex.multi_tensor_apply", "pip install apex, from NVIDIA's source").multi_tensor_applier
    kernel = installed("amp_C", "apex with its kernels").multi_tensor_axpby
    student, teacher = inputs
    overflow = torch.zeros(1, dtype=torch.int, device=teacher[0].device)

    def call():
        apply(kernel, overflow, [teacher, student, teacher], MOMENTUM, 1 - MOMENTUM, -1)
        return teacher

    return call


def updating(update):
    """A provider that changes the teacher and returns it."""
    return lambda inputs: lambda: (update(inputs.teacher, inputs.student), inputs.teacher)[1]


def updated(inputs: Pair) -> list[Tensor]:
    return [MOMENTUM * t.double() + (1 - MOMENTUM) * s.double() for s, t in zip(*inputs)]


SIZES = {
    "tiny": {"width": 64, "depth": 1},
    "small": {"width": 384, "depth": 12},
    "base": {"width": 768, "depth": 12},
}
EMA_UPDATE = Operator(
    "ema_update_",
    sizes=dict.fromkeys(_DEVICES, SIZES),
    make=make_pair,
    providers={
        OURS: Provider(updating(lambda teacher, student: ops.ema_update_(teacher, student, MOMENTUM))),
        "foreach_lerp": Provider(updating(lambda teacher, s: torch._foreach_lerp_(teacher, s, 1 - MOMENTUM))),
        "python_loop": Provider(updating(loop_update)),
        "apex": Provider(with_apex_lerp, CUDA),
    },
    truth=updated,
    work=lambda i: {"bytes": 12 * count(i.teacher), "flops": 3 * count(i.teacher), "parameters": count(i.teacher)},
    curves=dict.fromkeys(_DEVICES, ("small", {"depth": (1, 3, 6, 12, 24)})),
    replayed={"tiny": (OURS, "foreach_lerp")},
    # three roundings; the update itself is some 1e-4 of the largest value
    allowed={"float32": 1e-6},
)


class Training(NamedTuple):
    """Parameters with gradients, their teacher, and copies of both where there are any; what a step changes."""

    params: list[torch.nn.Parameter]
    teacher: list[Tensor]
    copies: list[Tensor]
    form: str
    clip: bool

    def changed(self) -> list[Tensor]:
        return [*(p.detach() for p in self.params), *self.teacher, *self.copies]


def make_training(device: str, width: int, depth: int, form: str, clip: bool) -> Training:
    params = [torch.nn.Parameter(p) for p in random(width, depth, device, 0.02)]
    teacher = random(width, depth, device, 0.02)
    for p in params:
        p.grad = torch.randn_like(p) * 1e-3
    both = [*params, *teacher] if device == "cuda" else []
    return Training(params, teacher, [torch.empty_like(t, dtype=torch.bfloat16).detach() for t in both], form, clip)


def ours(inputs: Training):
    params, teacher, copies, form, clip = inputs
    optimizer = AdamWEMA(
        params,
        lr=LR,
        betas=BETAS,
        eps=EPS,
        weight_decay=DECAY,
        form=form,
        teacher=teacher,
        momentum=MOMENTUM,
        max_grad_norm=MAX_NORM if clip else None,
        shadows=dict(zip([*params, *teacher], copies)) if copies else None,
    )
    return lambda: (optimizer.step(), inputs.changed())[1]


def followed(inputs: Training, step):
    """A step of an optimizer, then what AdamWEMA does in the same pass."""
    student = [p.detach() for p in inputs.params]

    def call():
        if inputs.clip:
            torch.nn.utils.clip_grad_norm_(inputs.params, MAX_NORM, foreach=True)
        step()
        torch._foreach_lerp_(inputs.teacher, student, 1 - MOMENTUM)
        if inputs.copies:
            torch._foreach_copy_(inputs.copies, [*student, *inputs.teacher])
        return inputs.changed()

    return call


def with_torch(**kind):
    def provider(inputs: Training):
        # in a CUDA graph too, which costs a fused step nothing
        kinds = {**kind, "capturable": True} if "fused" in kind and inputs.params[0].is_cuda else kind
        optimizer = torch.optim.AdamW(inputs.params, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, **kinds)
        return followed(inputs, optimizer.step)

    return provider


def with_apex(inputs: Training):
    apex = installed("apex.optimizers", "pip install apex, from NVIDIA's source")
    optimizer = apex.FusedAdam(inputs.params, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)
    return followed(inputs, optimizer.step)


def python_loop(inputs: Training):
    """The structure of transformers' AdamW, and the official loop over the teacher."""
    m, v = ([torch.zeros_like(p) for p in inputs.params] for _ in range(2))
    grads = [p.grad for p in inputs.params if p.grad is not None]
    (beta1, beta2), t = BETAS, 0

    @torch.no_grad()
    def call():
        nonlocal t
        t += 1
        if inputs.clip:
            torch.nn.utils.clip_grad_norm_(inputs.params, MAX_NORM, foreach=False)
        step_size = LR * math.sqrt(1 - beta2**t) / (1 - beta1**t)
        for p, grad, a, b in zip(inputs.params, grads, m, v):
            a.mul_(beta1).add_(grad, alpha=1 - beta1)
            b.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            p.addcdiv_(a, b.sqrt().add_(EPS), value=-step_size)
            p.add_(p, alpha=-LR * DECAY)
        loop_update(inputs.teacher, inputs.params)
        for copy, source in zip(inputs.copies, [*inputs.params, *inputs.teacher]):
            copy.copy_(source)
        return inputs.changed()

    return call


def trained(inputs: Training) -> list[Tensor]:
    """One tensor at a time, and kept in float32: what that rounds away is a fifteenth of what is allowed."""
    grads = [p.grad for p in inputs.params if p.grad is not None]
    scale = None
    if inputs.clip:
        scale = (MAX_NORM / (reference.grad_norm(grads) + 1e-6)).clamp(max=1)
    hyper = torch.tensor([[LR, DECAY, *BETAS, EPS]], dtype=torch.float64)
    momentum = torch.tensor(MOMENTUM, dtype=torch.float64)
    params, teachers = [], []
    for p, grad, teacher in zip(inputs.params, grads, inputs.teacher):
        wide, t = p.detach().double(), teacher.double()
        m, v, step = torch.zeros_like(wide), torch.zeros_like(wide), torch.zeros((), dtype=torch.float64)
        reference.adamw_ema_(
            [wide], [grad.double()], [m], [v], [step], [t], [], [], hyper, [1], momentum, scale, inputs.form == "hf"
        )
        params.append(wide.float())
        teachers.append(t.float())
    return [*params, *teachers, *([*params, *teachers] if inputs.copies else [])]


def work(inputs: Training) -> dict:
    """Parameter, both moments and teacher are read and written, the gradient is read, two copies are written."""
    parameters = count(inputs.teacher)
    moved = 36 + (4 if inputs.copies else 0) + (4 if inputs.clip else 0)
    return {"bytes": moved * parameters, "flops": (18 + 2 * inputs.clip) * parameters, "parameters": parameters}


FORMS = ("hf", "torch")
ADAMW_EMA = Operator(
    "adamw_ema",
    sizes=dict.fromkeys(_DEVICES, SIZES),
    options={"cpu": {"form": FORMS, "clip": (False,)}, "cuda": {"form": FORMS, "clip": (False, True)}},
    make=make_training,
    providers={
        OURS: Provider(ours),
        "torch_fused": Provider(with_torch(fused=True), where={"form": ("torch",)}),
        "torch_foreach": Provider(with_torch(foreach=True), where={"form": ("torch",)}),
        "python_loop": Provider(python_loop, where={"form": ("hf",)}),
        "apex": Provider(with_apex, CUDA, where={"form": ("torch",)}),
    },
    truth=trained,
    work=work,
    curves=dict.fromkeys(_DEVICES, ("small", {"depth": (1, 3, 6, 12, 24)})),
    replayed={size: (OURS, "torch_fused") for size in ("tiny", "base")},
    # some ten roundings; a step moves a parameter by 1e-3, which is some 1e-2 of the largest value
    allowed={"float32": 1e-6},
    runs="adamw_ema_",
)
