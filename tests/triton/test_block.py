"""Blocks and encoder with fixed shapes: the same numbers as where the CPU counts, by the Triton kernels and without.

``where`` runs each test with the operators of the CPU and with the Triton kernels in their place.
"""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from atst_fast.models import FrameEncoder
from atst_fast.nn import Block, FixedRows, Selection
from atst_fast.nn.stream import attended, drop_path_factors
from benchmarks import official
from tests.tolerances import BF16_RTOL, NETWORK_RTOL

DIM, HEADS = 32, 2


class Cpu:
    device = "cpu"


@pytest.fixture(params=["plain", "triton"])
def where(request):
    return Cpu() if request.param == "plain" else request.getfixturevalue("triton_ops")


def make_block(drop_path=0.0, **kwargs):
    return Block(DIM, HEADS, 2.0, drop_path=drop_path, norm_layer=partial(nn.LayerNorm, eps=1e-6), **kwargs)


def assert_same(ours, plain, factor=1):
    scale = max(plain.abs().max().item(), 1e-3)
    torch.testing.assert_close(ours.cpu(), plain, rtol=0, atol=factor * NETWORK_RTOL * scale)


def compare(ours, plain, x, dy, run_ours, run_plain):
    """Outputs and all gradients."""
    device = next(ours.parameters()).device
    x1, x2 = x.to(device, copy=True).requires_grad_(), x.clone().requires_grad_()
    got, want = run_ours(x1), run_plain(x2)
    assert_same(got, want)
    got.backward(dy.to(device))
    want.backward(dy)
    assert_same(x1.grad, x2.grad)
    for name, p in plain.named_parameters():
        assert_same(ours.get_parameter(name).grad, p.grad, factor=4)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_block_is_the_plain_formula(where, drop_path, ragged):
    ours = make_block(drop_path).to(where.device)
    plain = official.Block(DIM, HEADS, 2.0, drop_path)
    plain.load_state_dict(ours.state_dict())
    x, dy = torch.randn(2, 4, 7, DIM).unbind()
    length = torch.tensor([7, 3, 1, 5]) if ragged else None
    torch.manual_seed(1)  # of the four samples one keeps both branches, one neither, and one each of them
    draws = torch.rand(2, 4)
    torch.manual_seed(1)  # what the plain one draws

    def run(x):
        there = None if length is None else length.to(where.device)
        return ours(x, there, draws=draws, fixed_shapes=True)

    compare(ours, plain, x, dy, run, lambda x: plain(x, length))


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_selected_rows(where, drop_path, ragged):
    """Those of the lists that the CPU counts, then padding."""
    ours, plain = make_block(drop_path).to(where.device), make_block(drop_path)
    plain.load_state_dict(ours.state_dict())
    x, mask = torch.randn(4, 7, DIM), torch.rand(4, 7) < 0.5
    mask[:, 0] = True
    length = torch.tensor([7, 3, 1, 5]) if ragged else None
    draws = torch.tensor([[0.9, 0.1, 0.9, 0.2], [0.1, 0.1, 0.9, 0.9]])
    there = None if length is None else length.to(where.device)
    select, fixed = Selection.build(mask, length), FixedRows.build(mask.to(where.device), there, 25)
    count = len(select.queries)
    assert fixed.count.item() == count < 25

    def run(x):
        rows = ours(x, select=fixed, draws=draws)
        assert rows.shape == (25, DIM)
        assert rows.isfinite().all()
        return rows[:count]

    compare(ours, plain, x, torch.randn(count, DIM), run, lambda x: plain(x, select=select, draws=draws))


def test_what_a_dropped_sample_computes_is_not_read(where, monkeypatch):
    """The rows of its MLP are NaN, and nothing sees them."""
    block = make_block(0.5).to(where.device)
    hidden = block.mlp.hidden

    def broken(x):
        h = hidden(x)
        return torch.where(torch.tensor([False, True, False], device=h.device)[:, None, None], torch.nan, h)

    monkeypatch.setattr(block.mlp, "hidden", broken)
    draws = torch.tensor([[0.9, 0.9, 0.9], [0.9, 0.1, 0.9]])
    y = block(torch.randn(3, 4, DIM, device=where.device), draws=draws, fixed_shapes=True)
    assert y.isfinite().all()


def test_samples_that_drop_attention_have_no_keys():
    """By the first branch of each block; what they drop of the second changes nothing."""
    factors = torch.tensor([[[2.0, 0, 2, 0], [0, 0, 2, 2]], [[0, 0, 0, 2], [2, 2, 2, 0]]])
    assert attended(None, factors, 7).tolist() == [[7, 0, 7, 0], [0, 0, 0, 7]]
    assert attended(torch.tensor([5, 4, 3, 2]), factors, 7).tolist() == [[5, 0, 3, 0], [0, 0, 0, 2]]
    assert attended(None, factors, 7).dtype == torch.int64


@pytest.mark.parametrize("what", ["hook", "subclass"])
def test_layers_that_are_more_than_that_are_called(where, what):
    """Twice what a layer gives is what a layer of twice its parameters gives: norms and linear layers."""
    torch.manual_seed(1)
    x = torch.randn(2, 5, DIM, device=where.device)
    for name in ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
        block = make_block().to(where.device)
        want = copy.deepcopy(block)
        layer, plain = block.get_submodule(name), want.get_submodule(name)
        if what == "hook":
            layer.register_forward_hook(lambda module, inputs, output: 2 * output)
        else:
            kind = type(layer)
            layer.__class__ = type("Twice", (kind,), {"forward": lambda self, x, kind=kind: 2 * kind.forward(self, x)})
        with torch.no_grad():
            for p in plain.parameters():
                p.mul_(2)
        got = block(x, fixed_shapes=True)
        torch.testing.assert_close(got, want(x, fixed_shapes=True), rtol=0, atol=NETWORK_RTOL * 8, msg=name)


def test_norms_without_parameters_and_layers_without_bias(where):
    block = Block(DIM, HEADS, 2.0, norm_layer=partial(nn.LayerNorm, elementwise_affine=False)).to(where.device)
    for layer in (block.attn.proj, block.mlp.fc2):
        layer.bias = None
    plain = copy.deepcopy(block).cpu()
    x = torch.randn(2, 5, DIM)
    compare(
        block, plain, x, torch.randn(2, 5, DIM), partial(block, fixed_shapes=True), partial(plain, fixed_shapes=False)
    )


def make_encoder(where, **kwargs):
    size = {"dim": DIM, "depth": 2, "num_heads": HEADS}
    plain = FrameEncoder(size, max_frames=41, mlp_ratio=2.0, **kwargs)
    ours = copy.deepcopy(plain).to(where.device)
    ours.fixed_shapes = True
    return ours, plain


def batch():
    mask = torch.rand(3, 6) < 0.5
    mask[:, 0] = True
    return torch.randn(3, 1, 64, 25), torch.tensor([25, 9, 18]), mask


@pytest.mark.parametrize("ragged, host", [(False, True), (True, False)])
def test_encoder(where, ragged, host):
    """lengths and mask on the host or on the device."""
    ours, plain = (encoder.eval() for encoder in make_encoder(where))
    mel, lengths, mask = batch()
    lengths = lengths if ragged else None
    there = [t if host or t is None else t.to(where.device) for t in (lengths, mask)]
    mel_there = mel.to(where.device)
    with torch.no_grad():
        assert_same(ours(mel_there, *there), plain(mel, lengths, mask))
        if ragged:
            assert_same(ours.intermediate(mel_there, there[0], 2), plain.intermediate(mel, lengths, 2))
        select = ours.select(mel_there, *there, capacity=16)
        for replace in (False, True):
            want = plain.masked_tokens(mel, lengths, mask, replace=replace)
            got = ours.masked_tokens(mel_there, *there, replace=replace, select=select)
            assert got.shape == (16, DIM)
            assert select.count.item() == len(want)
            assert_same(got[: len(want)], want)
        everything = ours.masked_tokens(mel_there, *there, replace=True)
        assert everything.shape == (18, DIM)
        assert_same(everything[: len(want)], want)


@pytest.mark.parametrize("what", ["hook", "subclass"])
def test_blocks_that_are_more_than_that_are_called(what):
    """Where shapes are fixed as on a CPU."""
    ours, plain = (encoder.eval() for encoder in make_encoder(Cpu()))
    mel, lengths, mask = batch()
    for block in (*ours.blocks, *plain.blocks):
        if what == "hook":
            block.register_forward_hook(lambda module, inputs, output: 2 * output)
        else:
            block.__class__ = type(
                "Twice", (Block,), {"forward": lambda self, *a, **k: 2 * Block.forward(self, *a, **k)}
            )
    select = ours.select(mel, lengths, mask, capacity=16)
    with torch.no_grad():
        assert_same(ours(mel, lengths), plain(mel, lengths))
        assert_same(ours.intermediate(mel, lengths, 2), plain.intermediate(mel, lengths, 2))
        want = plain.masked_tokens(mel, lengths, mask, replace=True)
        assert_same(ours.masked_tokens(mel, lengths, mask, replace=True, select=select)[: len(want)], want)


def test_gradients_of_an_encoder(where):
    ours, plain = make_encoder(where, drop_path_rate=0.0)
    mel, lengths, mask = batch()
    select = ours.select(mel.to(where.device), lengths, mask, capacity=17)
    want = plain.masked_tokens(mel, lengths, mask, replace=True)
    got = ours.masked_tokens(mel.to(where.device), lengths, mask, replace=True, select=select)
    dy = torch.randn(want.shape)
    want.backward(dy)
    got[: len(want)].backward(dy.to(where.device))
    for name, p in plain.named_parameters():
        assert_same(ours.get_parameter(name).grad, p.grad, factor=4)


def test_too_many_masked_tokens_are_not_left_out_silently(where):
    ours, _ = make_encoder(where)
    mel, lengths, mask = batch()
    select = ours.select(mel.to(where.device), lengths, mask | True, capacity=8)
    assert select.count.item() == -1


def test_shapes_are_fixed_where_they_must_be():
    encoder = FrameEncoder({"dim": DIM, "depth": 1, "num_heads": HEADS}, max_frames=41)
    mel, lengths, mask = batch()
    assert encoder.select(mel, lengths, mask) is None
    assert encoder.select(mel, lengths, mask, capacity=16).queries.rows.shape == (16,)
    encoder.fixed_shapes = True
    assert encoder.select(mel, lengths, mask).queries.rows.shape == (18,)


def test_draws_are_those_of_every_block(where):
    """In training some samples drop branches: blocks with the same draws one by one give the same."""
    ours, plain = make_encoder(where, drop_path_rate=0.6)
    mel, lengths, _ = batch()
    torch.manual_seed(5)
    draws = torch.rand(2, 2, 3, device=where.device)
    torch.manual_seed(5)
    with torch.no_grad():
        got = ours(mel.to(where.device), lengths)
        x = plain.prepare_tokens(mel)
        for block, u in zip(plain.blocks, draws.cpu()):
            x = block(x, plain.tokens(lengths), draws=u)
        assert_same(got, plain.norm_frame(x))
    assert not ours.eval().training
    state = torch.get_rng_state()
    ours(mel.to(where.device), lengths)
    assert torch.equal(state, torch.get_rng_state())


def test_factors_keep_the_mean():
    draws = torch.rand(2, 2, 20000)
    factors = drop_path_factors([0.0, 0.3], draws)
    assert torch.equal(factors[0], torch.ones(2, 20000))
    assert set(factors[1].unique().tolist()) == {0.0, (1 / torch.tensor(0.7)).item()}
    assert torch.equal(factors[1] == 0, draws[1] + 0.7 < 1)
    assert factors[1].mean().item() == pytest.approx(1, abs=0.02)
    length = torch.randint(0, 9, (20000,))
    assert torch.equal(attended(length, factors, 9)[1], torch.where(factors[1, 0] > 0, length, 0))
    assert torch.equal(attended(None, factors, 9)[1], torch.where(factors[1, 0] > 0, 9, 0))


@pytest.mark.parametrize("way", ["bfloat16", "autocast"])
def test_bfloat16(where, way):
    ours, plain = (encoder.eval() for encoder in make_encoder(where))
    mel, lengths, mask = batch()
    want = plain.masked_tokens(mel, lengths, mask, replace=True)
    select = ours.select(mel.to(where.device), lengths, mask, capacity=16)
    if way == "bfloat16":
        ours.bfloat16()
        got = ours.masked_tokens(mel.to(where.device), lengths, mask, replace=True, select=select)
        assert got.dtype == torch.bfloat16
    else:
        with torch.autocast(where.device, torch.bfloat16):
            got = ours.masked_tokens(mel.to(where.device), lengths, mask, replace=True, select=select)
    got = got[: len(want)].float().cpu()
    torch.testing.assert_close(got, want, rtol=0, atol=BF16_RTOL * want.abs().max().item())


def test_compile(where):
    ours, _ = make_encoder(where, drop_path_rate=0.5)
    mel, lengths, mask = (t.to(where.device) for t in batch())
    compiled = torch.compile(lambda *a: ours.masked_tokens(*a, replace=True), fullgraph=True, backend="aot_eager")
    ours.eval()
    torch.testing.assert_close(compiled(mel, lengths, mask), ours.masked_tokens(mel, lengths, mask, replace=True))
    ours.train()
    assert compiled(mel, lengths, mask).isfinite().all()
