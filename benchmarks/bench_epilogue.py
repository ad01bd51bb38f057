"""What follows the matrix products of a block or a head, beside the same in calls of torch.

The rows of 8 clips of 10 s, in a head half of them.
"""

import pytest
import torch
import torch.nn.functional as F

from atst_fast import ops

SIZES = {"tiny": (50, 48), "small": (2000, 384), "base": (1000, 768)}  # rows, width
GELUS = {"atst_fast": ops.bias_gelu, "torch": lambda h, bias: F.gelu(h + bias)}
BRANCHES = {
    "atst_fast": lambda x, y, bias: ops.add_branch(x, y, bias, alpha=1.05),
    "torch": lambda x, y, bias: torch.add(x, y + bias, alpha=1.05),
}
NORMS = {
    "atst_fast": ops.batch_norm_relu,
    "torch": lambda x, weight, bias: F.relu(F.batch_norm(x, None, None, weight, bias, True), inplace=True),
}


def measure(benchmark, way, call, inputs):
    if way == "forward":
        with torch.no_grad():
            benchmark(call, *inputs)
    else:
        out = call(*inputs)
        grad = torch.randn_like(out)
        benchmark(lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True))


@pytest.mark.benchmark(group="bias_gelu")
@pytest.mark.parametrize("way", ["forward", "backward"])
@pytest.mark.parametrize("provider", GELUS)
@pytest.mark.parametrize("size", SIZES)
def test_bias_gelu(benchmark, provider, size, way):
    rows, width = SIZES[size]
    inputs = [torch.randn(rows, 4 * width, requires_grad=True), torch.randn(4 * width, requires_grad=True)]
    benchmark.extra_info.update(bytes=inputs[0].numel() * (8 if way == "forward" else 12))
    measure(benchmark, way, GELUS[provider], inputs)


@pytest.mark.benchmark(group="add_branch")
@pytest.mark.parametrize("way", ["forward", "backward"])
@pytest.mark.parametrize("provider", BRANCHES)
@pytest.mark.parametrize("size", SIZES)
def test_add_branch(benchmark, provider, size, way):
    rows, width = SIZES[size]
    inputs = [torch.randn(*s, requires_grad=True) for s in ((rows, width), (rows, width), (width,))]
    benchmark.extra_info.update(bytes=inputs[0].numel() * (12 if way == "forward" else 8))
    measure(benchmark, way, BRANCHES[provider], inputs)


@pytest.mark.benchmark(group="batch_norm_relu")
@pytest.mark.parametrize("way", ["forward", "backward"])
@pytest.mark.parametrize("provider", NORMS)
@pytest.mark.parametrize("rows, width", [(25, 64), (960, 4096)], ids=["tiny", "small"])
def test_batch_norm_relu(benchmark, provider, rows, width, way):
    inputs = [torch.randn(*s, requires_grad=True) for s in ((rows, width), (width,), (width,))]
    benchmark.extra_info.update(bytes=inputs[0].numel() * (12 if way == "forward" else 20))
    measure(benchmark, way, NORMS[provider], inputs)
