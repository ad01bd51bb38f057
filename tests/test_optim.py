"""AdamWEMA against the official code, torch.optim.AdamW and plain re-implementations."""

import torch

from atst_fast.optim import AdamWEMA, param_groups
from tests import golden, tolerances


def _golden_student():
    """The student of the golden step as a module with the official names, its gradients, and the teacher's tensors."""
    tensors, meta = golden.load("frame_step")
    names = [k.removeprefix("grad/") for k in tensors if k.startswith("grad/") and not k.startswith("grad/asym/")]
    params = {n: torch.nn.Parameter(tensors[f"in/state/student.{n}"].clone()) for n in names}
    for n, p in params.items():
        p.grad = tensors[f"grad/{n}"].clone()
    teacher = {n: tensors[f"in/state/teacher.{n}"].clone() for n in names if not n.startswith("predictor")}
    return params, teacher, tensors, meta


class _Named(torch.nn.Module):
    def __init__(self, params):
        super().__init__()
        self.params = params

    def named_parameters(self, *args, **kwargs):
        return iter(self.params.items())


def test_golden_step(isa):
    params, teacher, tensors, meta = _golden_student()
    assert len(params) == 36
    optimizer = AdamWEMA(
        param_groups(_Named(params), meta["wd"]),
        lr=meta["lr"],
        eps=meta["eps"],
        teacher={params[n]: t for n, t in teacher.items()},
        momentum=meta["ema_used"],
    )
    optimizer.step()
    tolerance = dict(rtol=tolerances.ADAMW_RTOL, atol=tolerances.ADAMW_ATOL)
    for n, p in params.items():
        torch.testing.assert_close(p.data, tensors[f"out/after_opt/student.{n}"], **tolerance)
    for n, t in teacher.items():
        torch.testing.assert_close(t, tensors[f"out/after_ema/teacher.{n}"], **tolerance)


def test_param_groups_split():
    params, *_ = _golden_student()
    decayed, plain = param_groups(_Named(params), 0.04)
    by_id = {id(p): n for n, p in params.items()}
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.04, 0.0)
    assert {"encoder.pos_embed", "encoder.mask_embed"} <= {by_id[id(p)] for p in decayed["params"]}
    assert all(p.ndim > 1 for p in decayed["params"])
    assert all(p.ndim <= 1 for p in plain["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(params)
