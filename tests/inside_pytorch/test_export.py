"""torch.export of the encoders with their front end: any batch, any length, written and read again."""

import io

import pytest
import torch
from torch import nn
from torch.export import Dim

from atst_fast.models import ClipEncoder, FineTuned, FrameEncoder
from tests.inside_pytorch.cases import SINGLE, TINY, WaveformEncoder, first, inputs, make
from tests.tolerances import COMPILED_RTOL


def export(module, args, dims):
    return torch.export.export(module, args, dynamic_shapes=dims)


def assert_same(program, module, args):
    want = first(module(*args))
    torch.testing.assert_close(first(program(*args)), want, rtol=0, atol=COMPILED_RTOL * want.abs().max().item())


@pytest.mark.parametrize("name", SINGLE)
def test_any_batch(name):
    module, args = make(name).eval(), inputs(name, 3)
    exported = export(module, args, tuple({0: Dim("clips", min=1, max=64)} for _ in args))
    assert_same(exported.module(), module, inputs(name, 5))


@pytest.mark.parametrize(
    "kind, level", [(ClipEncoder, "clip"), pytest.param(FrameEncoder, "frame", marks=pytest.mark.long)]
)
def test_fine_tuned_for_any_batch(kind, level):
    """Also where clips go through the encoder in two pieces."""
    torch.manual_seed(0)
    module = FineTuned(kind(TINY, mlp_ratio=2.0, max_frames=41), 3, level=level).eval()
    mel, lengths = torch.randn(5, 1, 64, 78), torch.tensor([78, 50, 30, 3, 0])
    clips = {0: Dim.DYNAMIC}
    exported = export(module, (mel[:3], lengths[:3]), (clips, clips))
    assert_same(exported.module(), module, (mel, lengths))


@pytest.mark.parametrize("encoder", [None, ClipEncoder], ids=["FrameEncoder", "ClipEncoder"])
def test_encoder_and_front_end(encoder):
    """From waveform to representation: clips and samples are free, as far as the positions go."""
    torch.manual_seed(0)
    module = WaveformEncoder(encoder and encoder(TINY, mlp_ratio=2.0, max_frames=41)).eval()
    args = inputs("WaveformEncoder", 3)
    exported = export(module, args, ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC}, {0: Dim.DYNAMIC}))
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    program = torch.export.load(file).module()
    for clips, samples in ((3, 6400), (5, 6000), (2, 1700)):
        wave, lengths = torch.randn(clips, samples), torch.full((clips,), samples)
        lengths[0] = 900
        assert_same(program, module, (wave, lengths))


class AsTuple(nn.Module):
    """What ``models.FrameLoss`` says of systems that are to be written."""

    def __init__(self, system):
        super().__init__()
        self.system = system

    def forward(self, *args):
        return tuple(self.system(*args))


@pytest.mark.long
@pytest.mark.parametrize("name", ["ATSTClip", "ATSTFrame"])
def test_systems_are_written_and_read(name):
    module, args, file = AsTuple(make(name).eval()), inputs(name, 3), io.BytesIO()
    torch.export.save(export(module, args, None), file)
    file.seek(0)
    want, got = module(*args), torch.export.load(file).module()(*args)
    assert len(got) == 3
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=COMPILED_RTOL, atol=0)


def test_operators_of_the_graph():
    """The graph holds the operators by name: what runs it runs the kernels."""
    exported = export(WaveformEncoder().eval(), inputs("WaveformEncoder", 2), None)
    graphs = [m.graph for m in exported.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    names = {str(node.target) for graph in graphs for node in graph.nodes}
    assert {f"atst_fast.{op}.default" for op in ("log_mel", "patch_embed", "frame_attention", "add_norm")} <= names
