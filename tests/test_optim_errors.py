"""What AdamWEMA refuses, in which words."""

import math
import re

import pytest
import torch

from atst_fast.optim import AdamWEMA

P = torch.nn.Parameter


def one(**options):
    return lambda: AdamWEMA([P(torch.zeros(2, 3))], **options)


def stepped(change):
    """A step after ``change(optimizer, parameter)``."""

    def call():
        p = P(torch.zeros(2, 3))
        p.grad = torch.ones(2, 3)
        optimizer = AdamWEMA([p])
        change(optimizer, p)
        optimizer.step()

    return call


def with_mapping(name):
    """A mapping whose key, or whose value, does not fit."""
    p = P(torch.zeros(3))
    given = {
        "stranger": dict(shadows={torch.zeros(3): torch.zeros(3).bfloat16()}),
        "float_shadow": dict(shadows={p: torch.zeros(3)}),
        "teacher": dict(teacher={p: torch.zeros(4)}),
        "student": dict(teacher={torch.zeros(3).double(): torch.zeros(3)}),
    }[name]
    return lambda: AdamWEMA([p], **given)


def load(**group):
    def call():
        optimizer = AdamWEMA([P(torch.zeros(3))])
        state = optimizer.state_dict()
        state["param_groups"][0].update(group)
        optimizer.load_state_dict(state)

    return call


def sparse_gradient(optimizer, p):
    p.grad = torch.ones(2, 3).to_sparse()


def teacher_of_two():
    AdamWEMA([P(torch.zeros(3)), P(torch.zeros(3))], teacher=[torch.zeros(3)])


CASES = {
    "form": (one(form="adam"), ValueError, "form must be 'hf' or 'torch', got str 'adam'"),
    "norm": (one(max_grad_norm=0.0), ValueError, "max_grad_norm must be positive or None, got float 0.0"),
    "nan norm": (one(max_grad_norm=math.nan), ValueError, "max_grad_norm must be positive or None, got float nan"),
    "momentum": (one(momentum=1.1), ValueError, "momentum must be between 0 and 1, got float 1.1"),
    "lr": (one(lr=math.nan), ValueError, "lr of group 0 must be finite and 0 or more, got float nan"),
    "negative lr": (one(lr=-1.0), ValueError, "lr of group 0 must be finite and 0 or more, got float -1.0"),
    "decay": (
        one(weight_decay=math.inf),
        ValueError,
        "weight_decay of group 0 must be finite and 0 or more, got float inf",
    ),
    "beta": (one(betas=(0.9, 1.0)), ValueError, "beta2 of group 0 must be 0 or more and less than 1, got float 1.0"),
    "eps": (one(eps=-1e-6), ValueError, "eps of group 0 must be finite and 0 or more, got float -1e-06"),
    "dtype": (
        lambda: AdamWEMA([P(torch.zeros(3).bfloat16())]),
        TypeError,
        "params[0] of group 0 must be float32, got bfloat16 [3] on cpu",
    ),
    "layout": (
        lambda: AdamWEMA([P(torch.zeros(2, 3).T)]),
        ValueError,
        "params[0] of group 0 must be contiguous, got float32 [3, 2] on cpu with strides (1, 3)",
    ),
    "teacher count": (teacher_of_two, ValueError, "teacher must have one entry per parameter (2), got 1"),
    "teacher dtype": (
        one(teacher=[torch.zeros(2, 3).half()]),
        TypeError,
        "teacher[0] must be float32, got float16 [2, 3] on",
    ),
    "teacher shape": (
        with_mapping("teacher"),
        ValueError,
        "teacher[0] must be of shape [3] on cpu, as its counterpart is, got float32 [4] on cpu",
    ),
    "teacher device": (
        one(teacher=[torch.zeros(2, 3, device="meta")]),
        ValueError,
        "teacher[0] must be of shape [2, 3] on cpu, as its counterpart is, got float32 [2, 3] on meta",
    ),
    "stranger": (
        with_mapping("stranger"),
        ValueError,
        "shadows must be a mapping whose keys are parameters or teacher tensors, got float32 [3] on cpu",
    ),
    "shadow dtype": (with_mapping("float_shadow"), TypeError, "shadows must be bfloat16, got float32 [3] on cpu"),
    "later lr": (
        stepped(lambda o, p: o.param_groups[0].update(lr=math.nan)),
        ValueError,
        "lr of group 0 must be finite and 0 or more, got float nan",
    ),
    "later momentum": (
        stepped(lambda o, p: setattr(o, "momentum", math.nan)),
        ValueError,
        "momentum must be between 0 and 1, got float nan",
    ),
    "grad scale": (
        stepped(lambda o, p: o.step(grad_scale=math.inf)),
        ValueError,
        "grad_scale must be a finite number, got float inf",
    ),
    "sparse": (
        stepped(sparse_gradient),
        ValueError,
        "the gradient of a parameter must be dense, not torch.sparse_coo, got float32 [2, 3] on cpu",
    ),
    "amsgrad": (load(amsgrad=True), ValueError, "state_dict's amsgrad of group 0 must be False, got bool True"),
    "maximize": (load(maximize=True), ValueError, "state_dict's maximize of group 0 must be False, got bool True"),
    "Adam": (
        load(decoupled_weight_decay=False),
        ValueError,
        "state_dict's decoupled_weight_decay of group 0 must be True",
    ),
    "student": (
        with_mapping("student"),
        TypeError,
        "the parameter of teacher[0] must be float32, got float64 [3] on cpu",
    ),
    "loaded lr": (load(lr=math.nan), ValueError, "lr of group 0 must be finite and 0 or more, got float nan"),
}


@pytest.mark.parametrize("name", CASES)
def test_message(name):
    call, error, message = CASES[name]
    with pytest.raises(error, match=re.escape(f"AdamWEMA: {message}")):
        call()


def test_a_refused_group_leaves_the_optimizer_as_it_was():
    optimizer = AdamWEMA([P(torch.zeros(3))])
    with pytest.raises(ValueError, match="lr of group 1"):
        optimizer.add_param_group({"params": [P(torch.zeros(3))], "lr": -1.0})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("betas", [(0.9,), (0.9, 0.99, 0.999)])
def test_betas_are_two(betas):
    with pytest.raises(ValueError, match="AdamWEMA: betas of group 0 must be two numbers, got tuple"):
        one(betas=betas)()


@pytest.mark.parametrize("change, message", [
    (lambda s: s["param_groups"][0].pop("eps"), "state_dict's group 0 must have 'eps', as AdamW's do, got"),
    (lambda s: s["state"][0].pop("exp_avg_sq"), "state_dict's state of parameter 0 must have 'step', 'exp_avg' and"),
])  # fmt: skip
def test_a_state_of_another_optimizer_changes_nothing(change, message):
    p = P(torch.zeros(2, 3))
    p.grad = torch.ones(2, 3)
    optimizer = AdamWEMA([p])
    optimizer.step()
    state, before = optimizer.state_dict(), optimizer.state_dict()
    state = {"state": {k: dict(v) for k, v in state["state"].items()}, "param_groups": [dict(state["param_groups"][0])]}
    change(state)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert str(optimizer.state_dict()) == str(before)
