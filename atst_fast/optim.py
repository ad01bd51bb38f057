"""AdamW and the teacher update in one pass over memory."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from atst_fast.ops import _checks
from atst_fast.ops import ema as _ops

_OP = "AdamWEMA"


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The two parameter groups of the official code: decayed, and not decayed.

    Not decayed are biases (names ending in ``.bias``) and everything with at most one axis; parameters that need no
    gradient are left out. Upstream: audiossl/utils/common.py (get_params_groups).
    """
    decayed, plain = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (plain if name.endswith(".bias") or p.ndim <= 1 else decayed).append(p)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


class AdamWEMA(torch.optim.Optimizer):
    """AdamW whose step also updates the teacher: one pass over parameters, gradients, moments and teacher.

    Args:
        params: parameters or parameter groups, as for any torch optimizer: float32, contiguous.
        lr, betas, eps, weight_decay: per group; may be changed between steps; tensors of one value will do.
        form: where epsilon and the decay enter.
            ``"torch"`` is torch.optim.AdamW: ``p -= lr * wd * p`` first, then
            ``p -= lr / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + eps)``.
            ``"hf"`` is transformers' AdamW, with which audiossl trains:
            ``p -= lr * sqrt(1 - b2^t) / (1 - b1^t) * m / (sqrt(v) + eps)``, then ``p -= lr * wd * p``.
        teacher: the teacher's tensor of each parameter: a list along all parameters of all groups (None where there is
            none), or a mapping from parameter to teacher. What a mapping holds beyond the optimizer's parameters is
            averaged too. float32, contiguous, of the parameter's shape and device.
        momentum: of the teacher update that ends each step, ``teacher = momentum * teacher + (1 - momentum) * p``;
            change ``optimizer.momentum`` or give ``step(momentum=...)``.
        max_grad_norm: scale the gradients so that the norm of all of them together is at most this (one more reading
            pass; ``p.grad`` itself is left as it is). The last norm is ``optimizer.grad_norm``.
        shadows: bfloat16 copies to keep: a mapping from parameter or teacher tensor to a contiguous bfloat16 tensor of
            its shape, which each step overwrites with the new value.

    A parameter without gradient gets no AdamW step and keeps its state, but its teacher still moves, as in the
    official loop. The state has the keys of torch.optim.AdamW (``step``, ``exp_avg``, ``exp_avg_sq``), whose state
    dicts can be loaded, and loading continues bit for bit. Sparse gradients and complex numbers are refused.

    One step is within ``4 * 2^-23`` (relative, ``exp_avg`` and ``exp_avg_sq``; for ``p`` relative to the size of the
    terms it is the sum of) of the same step in float64. Bits do not depend on the number of threads.

    Raises ValueError or TypeError with the argument's name, what was expected and what came.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.04,
        *,
        form: str = "hf",
        teacher: Sequence[Tensor | None] | Mapping[Tensor, Tensor] | None = None,
        momentum: float | Tensor = 0.996,
        max_grad_norm: float | None = None,
        shadows: Mapping[Tensor, Tensor] | None = None,
    ) -> None:
        if form not in ("hf", "torch"):
            _checks.fail(_OP, "form", "'hf' or 'torch'", form)
        if max_grad_norm is not None and not max_grad_norm > 0:
            _checks.fail(_OP, "max_grad_norm", "positive or None", max_grad_norm)
        _ops.momentum_tensor(_OP, momentum)
        self.form, self.momentum, self.max_grad_norm = form, momentum, max_grad_norm
        self.grad_norm: Tensor | None = None
        self._teacher: dict[Tensor, Tensor] = {}
        self._shadows: dict[Tensor, Tensor] = {}
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        self._set_teacher(teacher)
        self._set_shadows(shadows or {})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its key ``"teacher"`` (a list along its parameters, None where there is none) is optional."""
        teacher = param_group.pop("teacher", None)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_hyper(group, len(self.param_groups) - 1)
            for i, p in enumerate(group["params"]):
                _ops.check_entry(_OP, f"params[{i}] of group {len(self.param_groups) - 1}", p)
            if teacher is not None:
                self._pair(group["params"], teacher)
        except (ValueError, TypeError):
            self.param_groups.pop()
            raise

    def _set_teacher(self, teacher: Sequence[Tensor | None] | Mapping[Tensor, Tensor] | None) -> None:
        if isinstance(teacher, Mapping):
            self._pair(list(teacher), list(teacher.values()))
        elif teacher is not None:
            self._pair([p for group in self.param_groups for p in group["params"]], list(teacher))

    def _pair(self, params: Sequence[Tensor], teachers: Sequence[Tensor | None]) -> None:
        if len(params) != len(teachers):
            raise ValueError(f"{_OP}: teacher must have one entry per parameter ({len(params)}), got {len(teachers)}")
        for i, (p, t) in enumerate(zip(params, teachers)):
            if t is not None:
                _ops.check_entry(_OP, f"teacher[{i}]", t, like=p)
                self._teacher[p] = t

    def _set_shadows(self, shadows: Mapping[Tensor, Tensor]) -> None:
        known = {*self._teacher, *self._teacher.values(), *(p for g in self.param_groups for p in g["params"])}
        for source, shadow in shadows.items():
            if source not in known:
                _checks.fail(_OP, "shadows", "a mapping whose keys are parameters or teacher tensors", source)
            _ops.check_entry(_OP, "shadows", shadow, like=source, dtypes=(torch.bfloat16,))
            self._shadows[source] = shadow

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], Any] | None = None,
        *,
        momentum: float | Tensor | None = None,
        grad_scale: float | Tensor | None = None,
    ) -> Any:
        """One optimizer step and one teacher update.

        ``closure`` evaluates the loss again and returns it, as in torch; ``momentum`` is used in place of
        ``self.momentum`` this once; the gradients are multiplied by ``grad_scale`` before anything else (and before
        their norm is compared with ``max_grad_norm``).
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        m = _ops.momentum_tensor(_OP, self.momentum if momentum is None else momentum)
        lists = self._lists()
        if lists[0]:
            hyper = torch.tensor([_check_hyper(g, i) for i, g in enumerate(self.param_groups)], dtype=torch.float64)
            hyper = torch.cat([hyper, hyper.new_zeros(1, 5)])  # the row of what is only averaged
            sizes = [len(g["params"]) for g in self.param_groups]
            scale = self._scale([g for g in lists[1] if g.numel()], grad_scale)
            _ops.adamw_ema_(*lists, hyper, [*sizes, len(lists[0]) - sum(sizes)], m, scale, self.form == "hf")
        return loss

    def _scale(self, grads: list[Tensor], grad_scale: float | Tensor | None) -> Tensor | None:
        """The factor of all gradients: the caller's, times what brings their norm down to max_grad_norm."""
        scale = None if grad_scale is None else torch.as_tensor(grad_scale, dtype=torch.float64)
        if scale is not None and (scale.dim() or not math.isfinite(scale)):
            _checks.fail(_OP, "grad_scale", "a finite number", grad_scale)
        if self.max_grad_norm is None:
            return scale
        self.grad_norm = _ops.grad_norm(grads) * (1.0 if scale is None else scale.abs())
        clip = (self.max_grad_norm / (self.grad_norm + 1e-6)).clamp(max=1.0)
        return clip if scale is None else clip * scale

    def _lists(self) -> tuple[list[Tensor], ...]:
        """The operator's lists along all parameters and, after them, the pairs that are only averaged."""
        params = [p for group in self.param_groups for p in group["params"]]
        self._init_state([p for p in params if p.grad is not None])
        own = set(params)
        params += [p for p in self._teacher if p not in own]
        if not params:
            return ([],)
        none = params[0].new_empty(0)
        grads, exp_avgs, exp_avg_sqs, steps = [], [], [], []
        for p in params:
            state = self.state[p] if p in own and p.grad is not None else None
            grads.append(none if state is None else _gradient(p))
            exp_avgs.append(none if state is None else state["exp_avg"])
            exp_avg_sqs.append(none if state is None else state["exp_avg_sq"])
            steps.append(none if state is None else state["step"])
        teachers = [self._teacher.get(p, none) for p in params]
        student_shadows = [self._shadows.get(p, none) for p in params]
        teacher_shadows = [self._shadows.get(t, none) for t in teachers]
        return params, grads, exp_avgs, exp_avg_sqs, steps, teachers, student_shadows, teacher_shadows

    def _init_state(self, params: list[Tensor]) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p] = {
                    "step": torch.zeros((), dtype=torch.float32),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }


def _gradient(p: Tensor) -> Tensor:
    g = p.grad
    assert g is not None
    if g.layout != torch.strided:
        _checks.fail(_OP, "the gradient of a parameter", f"dense, not {g.layout}", g)
    return g.contiguous()


def _check_hyper(group: dict[str, Any], i: int) -> list[float]:
    """lr, weight_decay, beta1, beta2, eps of a group as numbers."""
    row = [float(x) for x in (group["lr"], group["weight_decay"], *group["betas"], group["eps"])]
    for name, value in zip(("lr", "weight_decay", "beta1", "beta2", "eps"), row):
        if not (0 <= value < math.inf) or (name.startswith("beta") and value >= 1):
            expected = "0 or more and less than 1" if name.startswith("beta") else "finite and 0 or more"
            _checks.fail(_OP, f"{name} of group {i}", expected, value)
    return row
