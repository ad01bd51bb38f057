"""The teacher update, and the optimizer step that contains it (its public form is atst_fast.optim.AdamWEMA)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from atst_fast.ops import _checks
from atst_fast.ops._registry import has_fallback, register
from atst_fast.reference import ema as reference

_STUDENT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_GRAD_DTYPES = (torch.float32, torch.bfloat16)


@torch.no_grad()
def ema_update_(teacher: Sequence[Tensor], student: Sequence[Tensor], momentum: float | Tensor) -> None:
    """Move every teacher tensor towards its student: ``t <- momentum * t + (1 - momentum) * s``, all in one call.

    Args:
        teacher: float32 tensors of any shapes, contiguous, on one device, changed in place. (Not bfloat16 or float16:
            with a momentum near 1 the change is below their resolution, and the teacher would stand still.)
        student: as many tensors with the same shapes, contiguous, on the same device; float32, bfloat16 or float16.
        momentum: a number between 0 and 1, or a float32 or float64 tensor without axes, on the CPU or on the device of
            the teacher. On a GPU it is read by the kernel, so that a CUDA graph follows its value, and nobody waits for
            it; outside of [0, 1] it cannot be refused there and makes all of the teacher NaN.

    Nothing is differentiable. Computed in float32 with an error of at most ``1.5 * 2^-23 * (|t| + |s|)``. The bits
    depend neither on the number of threads nor on how the values are shared out among tensors, and are the same on a
    GPU and on a CPU that has fused multiply-add. A NaN stays in its element. Empty lists and empty tensors are fine. No
    memory may occur twice in ``teacher``, or in both lists: tensors are updated at the same time.
    Matches audiossl/methods/atstframe/model.py (update_teacher): the official loop over parameters.

    Raises:
        ValueError: lists of different lengths; a shape, device or layout that does not fit; a momentum outside [0, 1].
        TypeError: not a sequence of tensors; a dtype other than the above.
    """
    op = "ema_update_"
    teacher, student = _list(op, "teacher", teacher), _list(op, "student", student)
    value = momentum_tensor(op, momentum)

    def explain() -> None:
        if len(teacher) != len(student):
            raise ValueError(f"{op}: student must have as many tensors as teacher ({len(teacher)}), got {len(student)}")
        for i, (t, s) in enumerate(zip(teacher, student)):
            check_entry(op, f"teacher[{i}]", t)
            _same_device(op, f"teacher[{i}]", t, "teacher[0]", teacher[0])
            check_entry(op, f"student[{i}]", s, like=t, dtypes=_STUDENT_DTYPES)
        if teacher and value.device.type != "cpu":
            _same_device(op, "momentum", value, "teacher[0]", teacher[0])

    _call(op, explain, [*teacher, *student], teacher, student, value)
    _mark_changed(teacher)


@torch.no_grad()
def grad_norm(grads: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of all elements of all tensors together: float64, a tensor without axes.

    ``grads``: contiguous float32 or bfloat16 tensors of any shapes on one device, on which the result is, and nobody
    waits for it; an empty list gives 0 on the CPU. Summed in float64, so its relative error is below 1e-12; the bits do
    not depend on the number of threads (those of a GPU and a CPU differ within that error). Not differentiable. The
    norm of sharded tensors (DTensors, as FSDP2 makes them) is of all processes' shards, summed by torch in float32.
    Raises ValueError or TypeError for other layouts, dtypes and different devices.
    """
    grads = _list("grad_norm", "grads", grads)
    if not grads:
        return torch.zeros((), dtype=torch.float64)
    if is_sharded(grads[0]):
        return torch.nn.utils.get_total_norm(grads).full_tensor()  # type: ignore[attr-defined]

    def explain() -> None:
        for i, g in enumerate(grads):
            check_entry("grad_norm", f"grads[{i}]", g, dtypes=_GRAD_DTYPES)
            _same_device("grad_norm", f"grads[{i}]", g, "grads[0]", grads[0])

    return _call("grad_norm", explain, grads, grads)


@torch.no_grad()
def adamw_ema_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    teachers: Sequence[Tensor],
    student_shadows: Sequence[Tensor],
    teacher_shadows: Sequence[Tensor],
    hyper: Tensor,
    group_sizes: Sequence[int],
    momentum: Tensor,
    grad_scale: Tensor | None,
    hf: bool,
) -> None:
    """One step of AdamWEMA for lists of equally many tensors; the checks for its user are in atst_fast.optim.

    Entry i of each list belongs to ``params[i]`` and has its shape (``steps[i]``: no axes). A tensor without elements
    stands for "there is none": no ``steps[i]``, no AdamW step; no ``teachers[i]``, no teacher update; the shadows are
    bfloat16 copies to be written, and gradients are float32 or bfloat16. The lists of teachers and shadows may be
    empty. The gradient is multiplied by ``grad_scale`` first. ``hyper`` is float64 ``[groups, 5]`` (lr, weight_decay,
    beta1, beta2, eps), row g for the next ``group_sizes[g]`` parameters.

    On a GPU ``hyper`` and ``steps`` must be there, ``momentum`` and ``grad_scale`` may be (or on the CPU: then a CUDA
    graph keeps their value). What is there is read by the kernel and cannot be refused: a momentum outside of [0, 1]
    makes the teachers NaN; a row of ``hyper`` out of range makes its parameters and moments NaN, and so does a step
    that is not a whole number its parameter. No tensor may occur twice.
    """
    tensors = (params, grads, exp_avgs, exp_avg_sqs, steps, teachers, student_shadows, teacher_shadows)
    torch.ops.atst_fast.adamw_ema_.default(*tensors, hyper, group_sizes, momentum, grad_scale, hf)
    _mark_changed([*params, *teachers, *student_shadows, *teacher_shadows])


def momentum_tensor(op: str, momentum: float | Tensor) -> Tensor:
    """A checked momentum as the float64 (or given) tensor without axes that the operators take."""
    if isinstance(momentum, Tensor):
        if momentum.dim() or momentum.dtype not in (torch.float32, torch.float64):
            _checks.fail(op, "momentum", "a number or a float32 or float64 tensor without axes", momentum, TypeError)
        # its value stays where it is: reading it would wait for the device, or break a graph that is being traced
        if not _checks.readable(momentum):
            return momentum
    elif not isinstance(momentum, (int, float)):
        _checks.fail(op, "momentum", "a number or a float32 or float64 tensor without axes", momentum, TypeError)
    if not 0 <= float(momentum) <= 1:
        _checks.fail(op, "momentum", "between 0 and 1", float(momentum))
    return momentum if isinstance(momentum, Tensor) else torch.scalar_tensor(momentum, dtype=torch.float64)


def here(t: Tensor) -> Tensor:
    """The part of a sharded tensor (a DTensor, as FSDP2 makes them) that this process has; any other as it is."""
    return t.to_local() if is_sharded(t) else t  # type: ignore[attr-defined]


def is_sharded(t: Tensor) -> bool:
    return hasattr(t, "to_local")


def check_entry(
    op: str, name: str, t: Tensor, *, like: Tensor | None = None, dtypes: Sequence[torch.dtype] = (torch.float32,)
) -> None:
    """Check one tensor of a list: dense, contiguous, of one of those dtypes, with the shape and device of ``like``."""
    if not isinstance(t, Tensor):
        _checks.fail(op, name, "a tensor", t, TypeError)
    if t.dtype not in dtypes:
        _checks.fail(op, name, " or ".join(str(d).removeprefix("torch.") for d in dtypes), t, TypeError)
    if t.layout != torch.strided or not t.is_contiguous():
        layout = f"strides {t.stride()}" if t.layout == torch.strided else f"layout {t.layout}"
        raise ValueError(f"{op}: {name} must be contiguous, got {_checks.describe(t)} with {layout}")
    if like is None:
        return
    if t.shape != like.shape or t.device != like.device:
        _checks.fail(op, name, f"of shape {list(like.shape)} on {like.device}, as its counterpart is", t)
    if _layout(t) != _layout(like):
        raise ValueError(f"{op}: {name} must be sharded as its counterpart is ({_layout(like)}), got {_layout(t)}")


def _layout(t: Tensor) -> object:
    """Which part of a sharded tensor lies where."""
    return (t.placements, t.device_mesh) if is_sharded(t) else "not sharded"  # type: ignore[attr-defined]


def _list(op: str, name: str, tensors: Sequence[Tensor]) -> list[Tensor]:
    if isinstance(tensors, Tensor) or not isinstance(tensors, Sequence):
        _checks.fail(op, name, "a list of tensors", tensors, TypeError)
    return list(tensors)


def _same_device(op: str, name: str, t: Tensor, first_name: str, first: Tensor) -> None:
    if t.device != first.device:
        _checks.fail(op, name, f"on {first.device}, as {first_name} is", t)


def _call(op: str, explain: Callable[[], None], tensors: list, *args):
    """Run an operator. The kernels check everything themselves; only what they refuse is explained in Python."""
    try:
        checked = all([t.is_cpu for t in tensors]) or (  # a list: half the time of a generator
            not has_fallback(op, "CUDA") and all([t.is_cuda for t in tensors])
        )
    except AttributeError:
        checked = False
    if not checked or torch.compiler.is_compiling():
        explain()
    try:
        return getattr(torch.ops.atst_fast, op).default(*args)
    except (RuntimeError, TypeError):
        explain()
        raise


def _mark_changed(tensors: Sequence[Tensor]) -> None:
    """Let autograd notice that the tensors changed, as it does for the operators of torch."""
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(tensors)


for _op in ("ema_update_", "adamw_ema_"):
    torch.library.register_fake(f"atst_fast::{_op}")(lambda *args: None)
torch.library.register_fake("atst_fast::grad_norm")(lambda grads: grads[0].new_empty((), dtype=torch.float64))

register("ema_update_", CUDA=reference.ema_update_)
register("adamw_ema_", CUDA=reference.adamw_ema_)
register("grad_norm", CUDA=reference.grad_norm)
