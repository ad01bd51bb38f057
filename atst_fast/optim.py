"""AdamW and the teacher update in one pass over memory."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from atst_fast.ops import _checks
from atst_fast.ops import ema as _ops

_OP = "AdamWEMA"
_NAMES = ("lr", "weight_decay", "beta1", "beta2", "eps")
_TOO_EARLY = f"{_OP}: a step must be taken before one is captured in a CUDA graph: groups or gradients are new"
_Row = list[float | Tensor]
_FORM = (("correct_bias", True), ("amsgrad", False), ("maximize", False), ("decoupled_weight_decay", True))
_UNREAD: _Row = [0.0] * len(_NAMES)  # of tensors that are only averaged
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
        lr, betas, eps, weight_decay: per group; may be changed between steps; tensors of one value will do, also on the
            parameters' device.
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
            its shape, which each step overwrites with the new value. A parameter without ``.grad`` takes that of its
            shadow, so that the copy can be what is trained in bfloat16; ``zero_grad`` clears both.

    A parameter without gradient gets no AdamW step and keeps its state, but its teacher still moves, as in the
    official loop. Sharded parameters (FSDP2: make the optimizer after ``fully_shard``) are trained where they lie, with
    teachers and shadows that are sharded alike. The state has the keys of torch.optim.AdamW (``step``, ``exp_avg``,
    ``exp_avg_sq``), whose state dicts can be loaded, and loading continues bit for bit. Sparse gradients and complex
    numbers are refused.

    One step is within ``4 * 2^-23`` (relative, ``exp_avg`` and ``exp_avg_sq``; for ``p`` relative to the size of the
    terms it is the sum of) of the same step in float64. Bits do not depend on the number of threads.

    On a GPU a step is one kernel (with clipping, two and what computes the factor), and nothing in it waits for the
    GPU; ``grad_norm``, the steps in the state and the table that the kernel reads lr, betas, eps, weight_decay and
    momentum from stay there. What is given there as a tensor cannot be checked: out of range, it makes what it would
    change NaN. A step can be captured in a CUDA graph after one has been taken; a replay uses what ``refresh`` wrote
    last, and lr and the like that are tensors on the GPU as they are at its time. A ``grad_scale`` that is a number is
    the graph's for good; so is everything else once ``add_param_group`` or ``load_state_dict`` has been called: capture
    anew after them.

    Raises ValueError or TypeError with the argument's name, what was expected and what came; RuntimeError where a CUDA
    graph would capture what has to happen before.
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
        self._numbers = _Numbers()
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

    @classmethod
    def from_optimizer(cls, optimizer: torch.optim.Optimizer, **options: Any) -> "AdamWEMA":
        """Go on where an AdamW is: its parameters, groups with all their keys, moments and step counts.

        ``optimizer`` is torch.optim.AdamW or transformers' AdamW (without ``amsgrad`` and ``maximize``, and with
        ``correct_bias``), which keeps its own state; the form follows from which of the two it is. ``options``:
        ``teacher``, ``momentum``, ``max_grad_norm``, ``shadows`` as for the class, and ``form``. With ``teacher`` the
        step moves the teacher: do not call ``update_teacher`` as well. Make a scheduler for this optimizer: that of the
        other one moves the other one's rates.

        Raises TypeError for another kind of optimizer, ValueError for a setting that this one has not.
        """
        first = optimizer.param_groups[0] if getattr(optimizer, "param_groups", None) else {}
        kinds = {"hf": "correct_bias" in first, "torch": "decoupled_weight_decay" in first or "amsgrad" in first}
        named = type(optimizer).__name__ == "AdamW" and any(kinds.values())
        if not (named or isinstance(optimizer, torch.optim.AdamW)):
            _checks.fail(f"{_OP}.from_optimizer", "optimizer", "torch's or transformers' AdamW", optimizer, TypeError)
        for i, group in enumerate(optimizer.param_groups):
            for name, wanted in _FORM:
                if group.get(name, wanted) != wanted:
                    _checks.fail(f"{_OP}.from_optimizer", f"{name} of group {i}", str(wanted), group[name])
        options.setdefault("form", "hf" if kinds["hf"] else "torch")
        made = cls([dict(group) for group in optimizer.param_groups], **options)
        made.load_state_dict(optimizer.state_dict())
        return made

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
        self._sharded = any(_ops.is_sharded(p) for group in self.param_groups for p in group["params"])

    def __getstate__(self) -> dict[str, Any]:
        names = ("form", "momentum", "max_grad_norm", "grad_norm", "_teacher", "_shadows")
        return super().__getstate__() | {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if not hasattr(self, "_numbers"):  # load_state_dict comes here too, and a CUDA graph may read the table
            self._numbers = _Numbers()
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
            for name, wanted in _FORM:
                if group.get(name, wanted) != wanted:
                    _checks.fail(_OP, f"state_dict's {name} of group {i}", str(wanted), group[name])
            _hyper(group, i)
        for i, state in state_dict["state"].items():
            if state and not {"step", "exp_avg", "exp_avg_sq"} <= set(state):
                expected = "must have 'step', 'exp_avg' and 'exp_avg_sq'"
                raise ValueError(f"{_OP}: state_dict's state of parameter {i} {expected}, got {[*state]}")
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "momentum"})
        if "momentum" in state_dict:
            self.momentum = state_dict["momentum"]
        for p, state in self.state.items():
            if not state:
                continue
            state["step"] = torch.tensor(float(state["step"]), dtype=torch.float32, device=p.device)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = state[name].to(p.dtype, copy=True, memory_format=torch.contiguous_format)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the parameters and of their bfloat16 copies; see torch.optim.Optimizer.zero_grad."""
        super().zero_grad(set_to_none)
        for shadow in self._student_shadows.values():
            if shadow.grad is not None:
                shadow.grad = None if set_to_none else shadow.grad.detach().zero_()

    @torch.no_grad()
    def refresh(self) -> None:
        """Write lr, weight_decay, betas, eps and momentum as they are now to where a step on a GPU reads them.

        ``step`` does so itself, except in a CUDA graph: call this before a replay when one of them has changed, on the
        stream of the replay. Nobody waits for the GPU. Does nothing for parameters on the CPU.
        """
        first = next((p for group in self.param_groups for p in group["params"]), None)
        if first is not None and _on_gpu(first.device):
            rows = [_hyper(group, i) for i, group in enumerate(self.param_groups)]
            self._device_numbers(first.device, rows, _ops.momentum_tensor(_OP, self.momentum))

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
        their norm is compared with ``max_grad_norm``). Both may be tensors of one value on the parameters' device.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        m = _ops.momentum_tensor(_OP, self.momentum if momentum is None else momentum)
        rows = [_hyper(group, i) for i, group in enumerate(self.param_groups)]
        lists, grads = self._lists()
        sizes = [len(group["params"]) for group in self.param_groups]
        sizes.append(len(lists[0]) - sum(sizes))  # what is only averaged: a group whose hyper-parameters nobody reads
        scale = self._scale(grads, grad_scale)
        if not lists[0]:
            return loss
        device = lists[0][0].device
        if not _on_gpu(device):
            table = torch.tensor([[float(x) for x in row] for row in [*rows, _UNREAD]], dtype=torch.float64)
        elif momentum is not None and m.device.type == "cpu" and _capturing():
            _checks.fail(_OP, "momentum", "a tensor on the GPU, or optimizer.momentum, in a CUDA graph", momentum)
        else:
            table, m = self._device_numbers(device, rows, m)
        _ops.adamw_ema_(*lists, table, sizes, m, scale, self.form == "hf")
        return loss

    def _device_numbers(self, device: torch.device, rows: list[_Row], m: Tensor) -> tuple[Tensor, Tensor]:
        """The table of hyper-parameters and the momentum, on the device."""
        momentum = float(m) if m.device.type == "cpu" else m
        written = self._numbers.write(device, [*(x for row in [*rows, _UNREAD] for x in row), momentum])
        return written[:-1].view(-1, len(_UNREAD)), written[-1]

    def _scale(self, grads: list[Tensor], grad_scale: float | Tensor | None) -> Tensor | None:
        """The factor of all gradients: the caller's, times what brings their norm down to max_grad_norm."""
        scale = None
        if isinstance(grad_scale, Tensor) and _on_gpu(grad_scale.device):
            scale = grad_scale
        elif grad_scale is not None:
            if not math.isfinite(factor := float(grad_scale)):
                _checks.fail(_OP, "grad_scale", "a finite number", grad_scale)
            scale = torch.tensor(factor, dtype=torch.float64)
        if self.max_grad_norm is None:
            return scale
        norm = _ops.grad_norm(grads)
        self.grad_norm = norm if scale is None else norm * scale.abs()
        clip = (self.max_grad_norm / (self.grad_norm + 1e-6)).clamp(max=1.0)
        return clip if scale is None else clip * scale

    def _lists(self) -> tuple[_Lists, list[Tensor]]:
        """The operator's lists along all parameters and, after them, what is only averaged; and the gradients."""
        params = [p for group in self.param_groups for p in group["params"]]
        trained = {id(p) for p in params}
        none = torch.empty(0) if not params else _ops.here(params[0]).new_empty(0)
        absent = dict(exp_avg=none, exp_avg_sq=none, step=none)
        grads, exp_avgs, exp_avg_sqs, steps = [], [], [], []
        for p in params:
            g = p.grad
            if g is None and id(p) in self._student_shadows:
                g = self._student_shadows[id(p)].grad
            if g is None:
                state = absent
            else:
                state = self.state.get(p) or self._first_state(p)
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
        whole = [g for g in grads if g is not none]
        teachers = [t for t, _ in partners]
        if self._sharded:
            for tensors in (params, grads, exp_avgs, exp_avg_sqs, teachers, shadows, teacher_shadows):
                tensors[:] = [_ops.here(t) for t in tensors]
        return (params, grads, exp_avgs, exp_avg_sqs, steps, teachers, shadows, teacher_shadows), whole

    def _first_state(self, p: Tensor) -> dict[str, Tensor]:
        if _on_gpu(p.device) and _capturing():  # every replay would begin with moments of 0 again
            raise RuntimeError(_TOO_EARLY)
        step = torch.zeros((), dtype=torch.float32, device=p.device)
        self.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        return self.state[p]


class _Numbers:
    """Numbers in device memory, uploaded when they have changed, but never into a CUDA graph."""

    def __init__(self) -> None:
        self._table: Tensor | None = None
        self._former: list[Tensor] = []  # of other sizes: graphs that were captured with them may be replayed
        self._written: list[float | None] = []

    def write(self, device: torch.device, numbers: Sequence[float | Tensor]) -> Tensor:
        """A float64 tensor of these numbers; a tensor among them is copied on the device each time."""
        values = [None if isinstance(x, Tensor) else x for x in numbers]
        table = self._table
        if table is None or table.device != device or len(values) != len(self._written):
            if _capturing():
                raise RuntimeError(_TOO_EARLY)
            self._former += [] if table is None else [table]
            table = self._table = torch.empty(len(values), dtype=torch.float64, device=device)
            self._written = []
        if values != self._written and not _capturing():
            self._upload(table, [math.nan if x is None else x for x in values])
            self._written = values
        for place, x in enumerate(numbers):
            if isinstance(x, Tensor):
                table[place].copy_(x.detach().reshape(()))
        return table

    @staticmethod
    def _upload(table: Tensor, values: list[float]) -> None:
        # from pinned memory of its own, which is not used again before the copy is done: nobody waits
        pinned = torch.tensor(values, dtype=torch.float64, pin_memory=table.is_cuda)
        table.copy_(pinned, non_blocking=True)


def _on_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def _capturing() -> bool:
    return torch.cuda.is_current_stream_capturing()


def _dense(g: Tensor) -> Tensor:
    if g.layout != torch.strided:
        _checks.fail(_OP, "the gradient of a parameter", f"dense, not {g.layout}", g)
    return g.contiguous()


def _hyper(group: dict[str, Any], i: int) -> _Row:
    """lr, weight_decay, beta1, beta2, eps of a group as numbers, or as the tensors on a GPU that they are."""
    if len(group["betas"]) != 2:
        _checks.fail(_OP, f"betas of group {i}", "two numbers", group["betas"])
    row: _Row = []
    for name, x in zip(_NAMES, (group["lr"], group["weight_decay"], *group["betas"], group["eps"])):
        if isinstance(x, Tensor) and _on_gpu(x.device):
            if x.numel() != 1:
                _checks.fail(_OP, f"{name} of group {i}", "a number or a tensor of one value", x)
            row.append(x)
            continue
        value = float(x)
        if not (0 <= value < math.inf) or (name.startswith("beta") and value >= 1):
            expected = "0 or more and less than 1" if name.startswith("beta") else "finite and 0 or more"
            _checks.fail(_OP, f"{name} of group {i}", expected, value)
        row.append(value)
    return row
