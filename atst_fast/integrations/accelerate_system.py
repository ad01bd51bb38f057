"""The fused parts around the encoders: heads, loss, teacher update."""

import copy
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from atst_fast import ops
from atst_fast.integrations import accelerate_probe as probe
from atst_fast.integrations.accelerate_match import Unknown
from atst_fast.integrations.accelerate_probe import hooked
from atst_fast.integrations.accelerate_swap import Fused
from atst_fast.models.heads import batch_norm_relu
from atst_fast.models.loss import frame_loss

_NORMS = (nn.BatchNorm1d, nn.SyncBatchNorm)
# of the loss of the first batch, ours and the original's: float32 means of cosines; half precision rounds each of them
_SAME = {torch.float32: 1e-4, torch.float64: 1e-9}
_SAME_HALF = 2e-2


class FusedHead(Fused):
    """``Linear -> BatchNorm1d -> ReLU -> Linear`` with batch norm and ReLU in one operator, forward and backward; also
    where the norm was converted to SyncBatchNorm since. In evaluation, and with a hook within, the original forward."""

    def forward(self, x):
        first, norm, relu, last = self
        usual = type(norm) in _NORMS and norm.training and norm.affine and norm.momentum is not None
        if not usual or hooked(norm) or hooked(relu) or not isinstance(x, Tensor) or x.dim() != 2:
            return super().forward(x)
        if type(relu) is not nn.ReLU or len(x) < 2 or type(norm.weight) not in (nn.Parameter, Tensor):
            return super().forward(x)
        return last(batch_norm_relu(norm, first(x)))


def is_head(module: nn.Module) -> bool:
    kinds = [type(layer) for layer in module.children()]
    return isinstance(module, nn.Sequential) and len(kinds) == 4 and kinds[1] in _NORMS and kinds[2] is nn.ReLU


def check_head(module: Any) -> None:
    """Raise `Unknown` where the fused forward is not what this head does."""
    for i in (0, 3):
        if not hasattr(module[i], "in_features"):
            raise Unknown(f"its layer {i} is {type(module[i]).__name__}")
    if type(module).forward is not nn.Sequential.forward:
        raise Unknown("it has a forward of its own")
    if hooked(module[1]) or hooked(module[2]):
        raise Unknown("its norm or ReLU has a hook")
    if not module[1].affine or module[1].momentum is None:
        raise Unknown("its norm has no weight, or averages over all batches")


class LossPlan(NamedTuple):
    """``views``: whether rows of one view are compared with those of the other (``symmetric``, ``ncrops=2``);
    ``settings``: all attributes, for what has others may agree or not on its own."""

    views: bool
    settings: tuple = ()


class FusedLoss(Fused):
    """The loss and both deviations in one operator, and one exchange between processes in the place of six.

    What the original computes cannot be tried out everywhere (it needs a GPU and a process group), so the first batch
    is given to both. If they agree, or if the original cannot run at all, the operator computes from then on; if they
    do not, the original does. Under ``torch.compile`` the original runs until that has been decided.
    """

    plan: LossPlan
    agreed: bool | None = None  # of the class made for this module

    def forward(self, *args, **kwargs):
        cls = type(self)
        if cls.agreed is False or kwargs or len(args) != 2 or not self._takes(*args):
            return super().forward(*args, **kwargs)
        student, teacher = args
        if cls.agreed is None:
            if torch.compiler.is_compiling():
                return super().forward(student, teacher)
            with torch.no_grad():
                cls.agreed = self._agrees(student, teacher)
            return self.forward(student, teacher)
        loss, std_student, std_teacher = frame_loss(student, teacher, symmetric=self.plan.views)
        if student.requires_grad and torch.is_grad_enabled():
            std_student = _Spread.apply(student, std_student)
        return loss, std_student, std_teacher

    def _takes(self, student, teacher) -> bool:
        both = isinstance(student, Tensor) and isinstance(teacher, Tensor) and student.shape == teacher.shape
        if not both or student.dim() != 2 or len(student) < 2 or teacher.requires_grad:
            return False
        return not (self.plan.views and len(student) % 2) and student.is_floating_point()

    def _agrees(self, student: Tensor, teacher: Tensor) -> bool:
        ours = torch.stack([x.double() for x in frame_loss(student, teacher, symmetric=self.plan.views)])
        try:
            theirs = torch.stack([x.double() for x in super().forward(student, teacher)])
        except Exception:
            agreed = True
        else:
            rtol = _SAME.get(student.dtype, _SAME_HALF)
            agreed = bool(torch.allclose(ours, theirs.to(ours.device), rtol=rtol, atol=rtol, equal_nan=True))
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            # all or none: they exchange their sums in another number of steps
            votes = torch.tensor(int(agreed), device=student.device)
            dist.all_reduce(votes, op=dist.ReduceOp.MIN)
            agreed = bool(votes)
        return agreed


def loss_views(module: nn.Module) -> bool | None:
    """Of a loss of two outputs: whether it compares across views; None if this is no such module."""
    if any(True for things in (module.children(), module.parameters(), module.buffers()) for _ in things):
        return None
    settings = {k: v for k, v in vars(module).items() if not k.startswith("_") and k != "training"}
    if set(settings) == {"symmetric"}:
        return bool(settings["symmetric"])
    if set(settings) == {"ncrops"}:
        if settings["ncrops"] != 2:
            raise Unknown(f"it compares {settings['ncrops']} crops, and two are expected")
        return True
    return None


class _Spread(torch.autograd.Function):
    """The student's deviation with the gradient that the official one has, computed only if somebody asks for it."""

    @staticmethod
    def forward(ctx, student, std):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(student)
        return std.clone()

    @staticmethod
    def backward(ctx, grad):
        if grad is None:
            return None, None
        (student,) = ctx.saved_tensors
        with torch.enable_grad():
            leaf = student.detach().requires_grad_()
            y = F.normalize(leaf.float() if leaf.dtype != torch.float64 else leaf, dim=-1)
            sums = torch.stack([y.sum(0), y.square().sum(0)])
            everywhere = torch.cat([sums.detach().flatten(), sums.new_tensor([float(len(y))])])
            if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
                dist.all_reduce(everywhere)
            n = everywhere[-1]
            # the values of all processes, the gradient of this one's: an all_reduce has none
            sums = sums + (everywhere[:-1].view_as(sums) - sums.detach())
            variance = sums[1] / (n - 1) - sums[0].square() / (n * (n - 1))
            std = (variance + 1e-6).sqrt().mean()
            (result,) = torch.autograd.grad(std, leaf, grad.to(std.dtype))
        return result, None


class FusedTeacher(Fused):
    """``update_teacher(m)`` over all parameters of encoder and projector in one call."""

    plan: tuple = ()

    def update_teacher(self, m):
        student, teacher = teacher_lists(self)
        tensors = [*student, *teacher]
        usual = len({t.device for t in tensors}) == 1 and all(
            type(t) in (nn.Parameter, Tensor) and t.dtype == torch.float32 and t.is_contiguous() for t in tensors
        )
        momentum = m if isinstance(m, Tensor) else float(m)
        if not usual or len(student) != len(teacher) or not isinstance(momentum, float) or not 0 <= momentum <= 1:
            return super().update_teacher(m)
        ops.ema_update_([t.detach() for t in teacher], [s.detach() for s in student], momentum)
        return None


def teacher_lists(system: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters of encoder and projector, of the student and of the teacher."""
    student, teacher = (
        [p for part in ("encoder", "projector") for p in getattr(network, part).parameters()]
        for network in (system.student, system.teacher)
    )
    return student, teacher


def is_system(module: nn.Module) -> bool:
    """Whether it has a student and a teacher, an encoder and a projector in each, and a method that moves one."""
    networks = [module._modules.get(name) for name in ("student", "teacher")]
    has = all(n is not None and {"encoder", "projector"} <= {k for k, _ in n.named_children()} for n in networks)
    return has and callable(getattr(module, "update_teacher", None))


def check_teacher(module: nn.Module) -> None:
    """Raise unless ``update_teacher`` averages the parameters of encoder and projector, and those alone: tried out on a
    copy whose tensors have a few values each."""
    if "update_teacher" in vars(module):
        raise Unknown("its update_teacher has been replaced on the instance")
    generator = torch.Generator("cpu").manual_seed(0)
    small: dict[int, Tensor] = {}
    for p in module.parameters():
        small[id(p)] = nn.Parameter(torch.randn(3, generator=generator), requires_grad=p.requires_grad)
    for b in module.buffers():
        small[id(b)] = torch.ones(3)
    skeleton = probe.replica(module, small, torch.float32)
    want = copy.deepcopy(skeleton)
    for s, t in zip(*teacher_lists(want)):
        t.data.lerp_(s.data, 0.25)
    probe.run(skeleton.update_teacher, 0.75)
    got = _tensors(skeleton)
    student, teacher = teacher_lists(module)
    if [p.shape for p in student] != [p.shape for p in teacher]:
        raise Unknown("student and teacher have other parameters")
    if any(not torch.allclose(v, got[k], rtol=0, atol=1e-6) for k, v in _tensors(want).items()):
        raise Unknown("its update_teacher is not the average of encoder and projector")


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Not the state dict, in which modules may keep other things (quantised ones their dtype)."""
    return dict(module.named_parameters()) | dict(module.named_buffers())
