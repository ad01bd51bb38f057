"""What lies between the heads' matrix products and behind them: batch norm and ReLU, and the loss with its diagnostics.

In bfloat16 at the rows of a training step: the masked tokens of both views of 144 and 288 clips. Beside it the same in
calls of torch, and these compiled; all of them get rows without padding.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from atst_fast import ops
from atst_fast.reference import frame_loss as reference
from benchmarks.gpu import timing

NORM_SIZES = {"tiny": (64, 96), "step": (36_000, 4096), "double": (73_000, 4096)}  # rows, width
LOSS_SIZES = {"tiny": (64, 32), "step": (36_000, 256), "double": (73_000, 256)}


def torch_norm(x, weight, bias):
    return F.relu(F.batch_norm(x, None, None, weight, bias, True), inplace=True)


def torch_loss(student, teacher):
    return reference.frame_loss(student, teacher, None, True)


NORMS = {"atst_fast": ops.batch_norm_relu, "torch": torch_norm, "torch_compiled": torch_norm}
LOSSES = {"atst_fast": ops.frame_loss, "torch": torch_loss, "torch_compiled": torch_loss}


def norm_inputs(size, device, dtype=torch.bfloat16):
    rows, width = NORM_SIZES[size]
    shapes = (rows, width), (width,), (width,)
    return [torch.randn(s, device=device).to(dtype).requires_grad_() for s in shapes]


def loss_inputs(size, device, dtype=torch.bfloat16):
    student, teacher = (torch.randn(LOSS_SIZES[size], device=device).to(dtype) for _ in range(2))
    return student.requires_grad_(), teacher


def make(f, provider, way, inputs):
    """The forward pass alone, or the backward pass of one that was made before."""
    if provider == "torch_compiled":
        f = timing.compiled(f)
    if way == "forward":
        return partial(f, *inputs)
    out = f(*inputs)
    out = out[0] if isinstance(out, tuple) else out
    leaves, grad = [x for x in inputs if x.requires_grad], torch.randn_like(out)
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)


@pytest.mark.benchmark(group="batch_norm_relu")
@pytest.mark.parametrize("way", ["forward", "backward"])
@pytest.mark.parametrize("provider", NORMS)
@pytest.mark.parametrize("size", NORM_SIZES)
def test_batch_norm_relu(measure, size, provider, way):
    inputs = norm_inputs(size, "cuda")
    # x twice and the result; x and the gradient twice and the result
    moved = (3 if way == "forward" else 5) * inputs[0].numel() * inputs[0].element_size()
    measure(make(NORMS[provider], provider, way, inputs), bytes=moved)


@pytest.mark.benchmark(group="frame_loss")
@pytest.mark.parametrize("way", ["forward", "backward"])
@pytest.mark.parametrize("provider", LOSSES)
@pytest.mark.parametrize("size", LOSS_SIZES)
def test_frame_loss(measure, size, provider, way):
    inputs = loss_inputs(size, "cuda")
    # both networks; and the gradient of one
    moved = (2 if way == "forward" else 3) * inputs[0].numel() * inputs[0].element_size()
    measure(make(LOSSES[provider], provider, way, inputs), bytes=moved)


@pytest.mark.benchmark(group="frame_loss")
@pytest.mark.parametrize("provider", ["atst_fast", "torch"])
def test_frame_loss_in_a_graph(measure, provider):
    """Some launches of a few microseconds, as a captured step makes them."""
    with torch.no_grad():
        measure(make(LOSSES[provider], provider, "forward", loss_inputs("step", "cuda")), way="replayed")
