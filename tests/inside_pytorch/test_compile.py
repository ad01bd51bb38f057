"""torch.compile in one graph for any batch: same numbers, same gradients, and what is random stays random."""

import pytest
import torch

from atst_fast import ops
from tests.inside_pytorch.cases import NAMES, SINGLE, first, inputs, loss, make
from tests.tolerances import COMPILED_RTOL

SYSTEMS = ["ATSTFrame", pytest.param("ATSTClip", marks=pytest.mark.long)]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(module, backend="eager"):
    return torch.compile(module, fullgraph=True, dynamic=True, backend=backend)


def assert_close(got, want, what, scale=0.0):
    atol = COMPILED_RTOL * max(want.abs().max().item(), scale)
    torch.testing.assert_close(got, want, rtol=0, atol=atol, msg=lambda m: f"{what}: {m}")


def check(name, backend, batches=(3, 5)):
    module = make(name).train()
    parameters = [p for p in module.parameters() if p.requires_grad]
    call = compiled(module, backend)
    for clips in batches:
        x = inputs(name, clips)
        outs = [f(*x) for f in (module, call)]
        assert_close(first(outs[1]), first(outs[0]), name)
        if parameters:
            eager, traced = (torch.autograd.grad(loss(out), parameters, allow_unused=True) for out in outs)
            scale = 1e-2 * max(g.abs().max().item() for g in eager if g is not None)
            for a, b in zip(eager, traced):
                if a is not None:
                    assert_close(b, a, f"{name}, gradient of {list(a.shape)}", scale)


@pytest.mark.parametrize("name", SINGLE)
def test_one_graph_for_any_batch(name):
    """dynamic=True, and a second batch of another size does not compile again."""
    with torch._dynamo.config.patch(error_on_recompile=True):
        check(name, "eager")


@pytest.mark.parametrize("name", SYSTEMS)
def test_systems_in_one_graph(name):
    check(name, "eager", (3,))


@pytest.mark.long
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", NAMES)
def test_every_backend(name, backend):
    check(name, backend)


def test_inductor():
    check("FrameAttention", "inductor", (3,))


@pytest.mark.parametrize("name", ["FrameEncoder"])
def test_stochastic_depth_is_drawn_anew_in_each_call(name):
    """Training on a CPU draws on the host otherwise, which a graph cannot hold."""
    module = make(name, drop_path=0.5).train()
    call, x = compiled(module), inputs(name)
    assert len({first(call(*x)).sum().item() for _ in range(8)}) > 1
    assert torch.equal(first(module.eval()(*x)), first(module(*x)))


def test_functions():
    """The tables of the front end are constants of the graph."""
    wave = torch.randn(2, 4000)
    assert torch.equal(compiled(lambda x: ops.log_mel(x) * 2)(wave), ops.log_mel(wave) * 2)
