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
            scale = 0.1 * max(g.abs().max().item() for g in eager if g is not None)
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


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.long)])
@pytest.mark.parametrize("op", [ops.log_mel, ops.kaldi_fbank])
def test_functions(op, backend):
    """dynamic=True makes symbols of the settings too; window and triangles are one node of the graph."""
    names = []

    def keep(graph, example):
        names.extend(str(node.target).removeprefix("atst_fast.") for node in graph.graph.nodes)
        return torch._dynamo.lookup_backend(backend)(graph, example)

    call = compiled(op, keep)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for shape in ((2, 4000), (3, 3000)):
            wave = torch.randn(shape)
            assert torch.equal(call(wave), op(wave))
    assert f"{op.__name__}_tables" in names
    assert not any("linspace" in name or "arange" in name for name in names)
    wave = torch.randn(2, 4000, requires_grad=True)
    (eager,), (traced,) = (torch.autograd.grad(f(wave).sum(), wave) for f in (op, compiled(op, backend)))
    assert_close(traced, eager, "gradient of the waveform")


@pytest.mark.parametrize(
    "op, options",
    [(ops.log_mel, {"n_mels": 80, "win_length": 640}), (ops.kaldi_fbank, {"sample_frequency": 32000, "low_freq": 50})],
)
def test_settings_of_functions(op, options):
    wave = torch.randn(2, 4000)
    assert torch.equal(compiled(lambda x: op(x, **options) * 2)(wave), op(wave, **options) * 2)
