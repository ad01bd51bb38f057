"""AdamW and the teacher update in one pass over memory."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from atst_fast.ops import _checks
from atst_fast.ops import ema as _ops

_OP = "AdamWEMA"
_List = list[Tensor]
_Lists = tuple[_List, _List, _List, _List, _List, _List, _List, _List]  # as ops.ema.adamw_ema_ takes them


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The two parameter groups of the official code: decayed, and not decayed.

    Not decayed are biases (names ending in ``.bias``) and everything with at most one axis; parameters that need no
    gradient are left out. Upstream: audiossl/utils/common.py (get_params_groups).
    """
    decayed: list[Tensor] = []
    plain: list[Tensor] = []
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
        if isinstance(teacher, Mapping):
            self._pair(list(teacher), list(teacher.values()))
        elif teacher is not None:
            self._pair([p for group in self.param_groups for p in group["params"]], teacher)
        self._add_shadows(shadows or {})
        self._index()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its key ``"teacher"`` (a list along its parameters, None where there is none) is optional."""
        teacher = param_group.pop("teacher", None)
        super().add_param_group(param_group)
        number, group = len(self.param_groups) - 1, self.param_groups[-1]
        try:
            _hyper(group, number)
            for i, p in enumerate(group["params"]):
                _ops.check_entry(_OP, f"params[{i}] of group {number}", p)
            if teacher is not None:
                self._pair(group["params"], teacher)
        except (ValueError, TypeError):
            self.param_groups.pop()
            raise
        self._index()

    def _pair(self, params: Sequence[Tensor], teachers: Sequence[Tensor | None]) -> None:
        if len(params) != len(teachers):
            raise ValueError(f"{_OP}: teacher must have one entry per parameter ({len(params)}), got {len(teachers)}")
        pairs = {p: t for p, t in zip(params, teachers) if t is not None}
        for i, (p, t) in enumerate(pairs.items()):
            _ops.check_entry(_OP, f"the parameter of teacher[{i}]", p)
            _ops.check_entry(_OP, f"teacher[{i}]", t, like=p)
        self._teacher.update(pairs)

    def _add_shadows(self, shadows: Mapping[Tensor, Tensor]) -> None:
        known = {*self._teacher, *self._teacher.values(), *(p for g in self.param_groups for p in g["params"])}
        for source, shadow in shadows.items():
            if source not in known:
                _checks.fail(_OP, "shadows", "a mapping whose keys are parameters or teacher tensors", source)
            _ops.check_entry(_OP, "shadows", shadow, like=source, dtypes=(torch.bfloat16,))
        self._shadows.update(shadows)

    def _index(self) -> None:
        """Teacher and shadows by the parameter's id, which a step finds faster than by the tensor."""
        self._partners = {id(p): (t, self._shadows.get(t)) for p, t in self._teacher.items()}
        self._student_shadows = {id(p): shadow for p, shadow in self._shadows.items()}

    def __getstate__(self) -> dict[str, Any]:
        names = ("form", "momentum", "max_grad_norm", "grad_norm", "_teacher", "_shadows")
        return super().__getstate__() | {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._index()

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim.AdamW's, and ``momentum``. The teacher is the model's to save."""
        return super().state_dict() | {"momentum": float(self.momentum)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state dict of this class or of torch.optim.AdamW (without ``amsgrad`` or ``maximize``).

        Hyper-parameters come from the state dict as well, as in torch; the tensors are copied.
        """
        for i, group in enumerate(state_dict["param_groups"]):
            for name in ("lr", "betas", "eps", "weight_decay"):
                if name not in group:
                    raise ValueError(f"{_OP}: state_dict's group {i} must have {name!r}, as AdamW's do, got {[*group]}")
            for name in ("amsgrad", "maximize"):
                if group.get(name):
                    _checks.fail(_OP, f"state_dict's {name} of group {i}", "False", True)
            _hyper(group, i)
        for i, state in state_dict["state"].items():
            if state and not {"step", "exp_avg", "exp_avg_sq"} <= set(state):
                expected = "must have 'step', 'exp_avg' and 'exp_avg_sq'"
                raise ValueError(f"{_OP}: state_dict's state of parameter {i} {expected}, got {[*state]}")
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "momentum"})
        if "momentum" in state_dict:
            self.momentum = state_dict["momentum"]
        for p, state in self.state.items():
            state["step"] = torch.tensor(float(state["step"]), dtype=torch.float32)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = state[name].to(p.dtype, copy=True, memory_format=torch.contiguous_format)

    @torch.no_grad()
    def step(
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
        hyper = [_hyper(group, i) for i, group in enumerate(self.param_groups)]
        lists, grads = self._lists()
        sizes = [len(group["params"]) for group in self.param_groups]
        if len(lists[0]) > sum(sizes):  # what is only averaged: a group whose hyper-parameters nobody reads
            sizes.append(len(lists[0]) - sum(sizes))
            hyper.append([0.0] * 5)
        scale = self._scale(grads, grad_scale)
        if lists[0]:
            table = torch.tensor(hyper, dtype=torch.float64)
            _ops.adamw_ema_(*lists, table, sizes, m, scale, self.form == "hf")
        return loss

    def _scale(self, grads: list[Tensor], grad_scale: float | Tensor | None) -> Tensor | None:
        """The factor of all gradients: the caller's, times what brings their norm down to max_grad_norm."""
        factor = 1.0 if grad_scale is None else float(grad_scale)
        if not math.isfinite(factor):
            _checks.fail(_OP, "grad_scale", "a finite number", grad_scale)
        scale = None if grad_scale is None else torch.tensor(factor, dtype=torch.float64)
        if self.max_grad_norm is None:
            return scale
        self.grad_norm = _ops.grad_norm(grads) * abs(factor)
        return (self.max_grad_norm / (self.grad_norm + 1e-6)).clamp(max=1.0) * factor

    def _lists(self) -> tuple[_Lists, list[Tensor]]:
        """The operator's lists along all parameters and, after them, what is only averaged; and the gradients."""
        params = [p for group in self.param_groups for p in group["params"]]
        trained = {id(p) for p in params}
        none = torch.empty(0) if not params else params[0].new_empty(0)
        absent = dict(exp_avg=none, exp_avg_sq=none, step=none)
        grads, exp_avgs, exp_avg_sqs, steps = [], [], [], []
        for p in params:
            if (g := p.grad) is None:
                state = absent
            else:
                state = self.state[p] or self._first_state(p)
            grads.append(none if g is None else _dense(g))
            exp_avgs.append(state["exp_avg"])
            exp_avg_sqs.append(state["exp_avg_sq"])
            steps.append(state["step"])
        extra = [p for p in self._teacher if id(p) not in trained]
        params += extra
        for partial in (grads, exp_avgs, exp_avg_sqs, steps):
            partial += [none] * len(extra)
        partners = [self._partners.get(id(p), (none, None)) for p in params]
        shadows = [self._student_shadows.get(id(p), none) for p in params] if self._shadows else []
        teacher_shadows = [none if s is None else s for _, s in partners] if self._shadows else []
        lists = (params, grads, exp_avgs, exp_avg_sqs, steps, [t for t, _ in partners], shadows, teacher_shadows)
        return lists, [g for g in grads if g is not none]

    def _first_state(self, p: Tensor) -> dict[str, Tensor]:
        state = self.state[p]
        state["step"] = torch.zeros((), dtype=torch.float32)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        return state


def _dense(g: Tensor) -> Tensor:
    if g.layout != torch.strided:
        _checks.fail(_OP, "the gradient of a parameter", f"dense, not {g.layout}", g)
    return g.contiguous()


def _hyper(group: dict[str, Any], i: int) -> list[float]:
    """lr, weight_decay, beta1, beta2, eps of a group as numbers."""
    if len(group["betas"]) != 2:
        _checks.fail(_OP, f"betas of group {i}", "two numbers", group["betas"])
    row = [float(x) for x in (group["lr"], group["weight_decay"], *group["betas"], group["eps"])]
    for name, value in zip(("lr", "weight_decay", "beta1", "beta2", "eps"), row):
        if not (0 <= value < math.inf) or (name.startswith("beta") and value >= 1):
            expected = "0 or more and less than 1" if name.startswith("beta") else "finite and 0 or more"
            _checks.fail(_OP, f"{name} of group {i}", expected, value)
    return row
