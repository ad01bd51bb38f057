import pickle
from functools import partial

import pytest
import torch
from torch import nn

from atst_fast.nn import Block, FrameAttention, Mlp, Selection
from benchmarks import official
from tests.golden import assert_golden, load
from tests.tolerances import NETWORK_RTOL, OTHER_ORDER


def golden_block(name, **kwargs):
    meta = load(name)[1]
    tensors = load(meta["attn_from"])[0] | load(name)[0]
    norm = partial(nn.LayerNorm, eps=meta["ln_eps"])
    block = Block(meta["dim"], meta["heads"], meta["mlp_ratio"], meta["qkv_bias"], norm_layer=norm, **kwargs)
    weights = {k.removeprefix("in/w/"): v for k, v in tensors.items() if k.startswith("in/w/")}
    weights |= {f"attn.{k}": weights.pop(k) for k in list(weights) if k.startswith(("qkv", "proj"))}
    block.load_state_dict(weights)
    return block, tensors


CASES = [
    (name, case["id"])
    for name in ("block_d48_h3_t37", "block_d128_h2_t250", "block_d192_h3_t64")
    for case in load(name)[1]["cases"]
]


@pytest.mark.parametrize("name, case_id", CASES)
def test_golden(name, case_id):
    case = next(c for c in load(name)[1]["cases"] if c["id"] == case_id)
    block, t = golden_block(name, drop_path=case.get("drop_path", 0.0))
    x = t["in/x"].clone().requires_grad_()
    length = None if case["len"] is None else t[f"in/{case['len']}"]
    y = block(x, length, draws=t["in/u"] if "u" in case else None)
    y.backward(t["in/dy"])
    if case_id == "len0":
        # Without a valid key, attention is zero here and the mean over everything there: that clip is nobody's input.
        some = length > 0
        torch.testing.assert_close(y[some], t["out/len0/y"][some], rtol=OTHER_ORDER, atol=OTHER_ORDER)
        torch.testing.assert_close(x.grad[some], t["grad/len0/x"][some], rtol=OTHER_ORDER, atol=OTHER_ORDER)
        return
    assert_golden(name, f"out/{case_id}/y", y)
    assert_golden(name, f"grad/{case_id}/x", x.grad)
    for key in (k for k in load(name)[0] if k.startswith(f"grad/{case_id}/w/")):
        assert_golden(name, key, block.get_parameter(key.removeprefix(f"grad/{case_id}/w/")).grad)


def pair(dim, heads, drop_path):
    """Our block and the plain one, with the same weights."""
    ours = Block(dim, heads, 2.0, drop_path=drop_path, norm_layer=partial(nn.LayerNorm, eps=1e-6))
    plain = official.Block(dim, heads, 2.0, drop_path)
    plain.load_state_dict(ours.state_dict())
    return ours, plain


def assert_same(ours, plain):
    torch.testing.assert_close(ours, plain, rtol=0, atol=NETWORK_RTOL * max(plain.abs().max().item(), 1e-3))


@pytest.mark.parametrize("clips, tokens, ragged", [(1, 1, False), (3, 7, True), (5, 33, False), (4, 50, True)])
@pytest.mark.parametrize("drop_path", [0.0, 0.5, 0.95])
def test_selected_rows_are_the_rows_of_the_whole(clips, tokens, ragged, drop_path):
    ours, plain = pair(24, 3, drop_path)
    x = torch.randn(clips, tokens, 24)
    length = torch.randint(1, tokens + 1, (clips,)) if ragged else None
    mask = torch.rand(clips, tokens) < 0.6
    mask[0, 0] = True
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.manual_seed(3)
    got = ours(x1, select=Selection.build(mask, length))
    torch.manual_seed(3)
    valid = torch.ones_like(mask) if length is None else torch.arange(tokens) < length[:, None]
    want = plain(x2, length)[mask & valid]
    assert_same(got, want)
    dy = torch.randn_like(want)
    got.backward(dy)
    want.backward(dy)
    assert_same(x1.grad, x2.grad)
    for name, p in plain.named_parameters():
        assert_same(ours.get_parameter(name).grad, p.grad)


@pytest.mark.parametrize("selected", [False, True])
def test_parameters_of_a_branch_that_everyone_dropped_get_gradients_of_zero(selected):
    block = Block(24, 3, drop_path=0.5)
    x = torch.randn(2, 5, 24)
    select = Selection.build(torch.ones(2, 5, dtype=torch.bool)) if selected else None
    y = block(x, select=select, draws=torch.zeros(2, 2))
    assert torch.equal(y.view(2, 5, 24), x)
    y.sum().backward() if y.requires_grad else None
    assert all(p.grad is not None and not p.grad.any() for p in block.parameters())


def test_dropped_samples_cost_nothing(monkeypatch):
    block = Block(24, 3, drop_path=0.5)
    seen = []
    monkeypatch.setattr(block.mlp, "hidden", lambda h: seen.append(len(h)) or h.repeat(1, 1, 4))
    block(torch.randn(4, 5, 24), draws=torch.tensor([[0.9] * 4, [0.9, 0.1, 0.2, 0.9]]))
    assert seen == [2]


def test_draws_come_from_the_generator_and_only_in_training():
    x, block = torch.randn(3, 4, 24), Block(24, 3, drop_path=0.5)
    state = torch.get_rng_state()
    first = block(x)
    assert not torch.equal(state, torch.get_rng_state())
    torch.set_rng_state(state)
    assert torch.equal(first, block(x))
    state = torch.get_rng_state()
    block.eval()(x)
    assert torch.equal(state, torch.get_rng_state())


def test_attention_with_bias_of_qkv():
    name = "attention_d48_h3_t37_bias"
    t, meta = load(name)
    attention = FrameAttention(meta["dim"], meta["heads"], qkv_bias=True)
    attention.load_state_dict({k.removeprefix("in/w/"): v for k, v in t.items() if k.startswith("in/w/")})
    case = meta["cases"][0]
    length = None if case["len"] is None else t[f"in/{case['len']}"]
    y = attention(t["in/x"], length)
    assert_golden(name, f"out/{case['id']}/y", y)
    mask = torch.rand(t["in/x"].shape[:2]) < 0.5
    select = Selection.build(mask, length)
    rows = attention(t["in/x"], select=select)
    torch.testing.assert_close(rows, y.flatten(0, 1)[select.queries], rtol=0, atol=OTHER_ORDER)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: FrameAttention(48, 5), "FrameAttention: num_heads must divide dim"),
        (lambda: FrameAttention(48, 3, attn_drop=0.1), "FrameAttention: attn_drop must be 0"),
        (lambda: Block(48, 3, drop_path=1.0), "Block: drop_path must be in"),
        (lambda: Block(48, 3, attn_drop=0.5), "FrameAttention: attn_drop must be 0"),
    ],
)
def test_errors(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_keys_and_pickle():
    block = Block(48, 3, drop=0.1, qk_scale=0.2)
    assert set(block.state_dict()) == {
        f"{part}.{kind}"
        for part in ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
        for kind in ("weight", "bias")
    } - {"attn.qkv.bias"}
    again = pickle.loads(pickle.dumps(block)).eval()
    x = torch.randn(2, 3, 48)
    assert torch.equal(again(x), block.eval()(x))


def test_dropout():
    torch.manual_seed(1)
    block, x = Block(48, 3, drop=0.5), torch.randn(2, 3, 48)
    assert torch.equal(block.eval()(x), block(x))
    block.train()
    y = block(x)
    assert not torch.equal(y, block(x))
    y.sum().backward()
    assert all(p.grad is not None for p in block.parameters())


def test_mlp_takes_the_arguments_of_its_model():
    mlp = Mlp(8, 16, 4, act_layer=nn.ReLU, drop=0.5).eval()
    x = torch.randn(2, 8)
    want = torch.relu(x @ mlp.fc1.weight.T + mlp.fc1.bias) @ mlp.fc2.weight.T + mlp.fc2.bias
    torch.testing.assert_close(mlp(x), want)


class _Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("name", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"])
@pytest.mark.parametrize("way", ["subclass", "hook", "parametrized"])
@pytest.mark.parametrize("selected", [False, True])
def test_a_linear_layer_that_is_more_than_that_is_called(name, way, selected):
    """Twice what a layer gives is what a layer of twice its weight and bias gives."""
    block, want = Block(16, 2), Block(16, 2)
    want.load_state_dict(block.state_dict())
    layer, plain = block.get_submodule(name), want.get_submodule(name)
    if way == "subclass":
        layer.__class__ = _Doubled
    elif way == "hook":
        layer.register_forward_hook(lambda module, inputs, output: 2 * output)
    else:
        twice = type("Twice", (nn.Module,), {"forward": lambda self, x: 2 * x})
        for key, _ in list(layer.named_parameters()):
            torch.nn.utils.parametrize.register_parametrization(layer, key, twice())
    with torch.no_grad():
        for p in plain.parameters():
            p.mul_(2)
    x = torch.randn(2, 5, 16)
    select = Selection.build(torch.rand(2, 5) < 0.5) if selected else None
    torch.testing.assert_close(block(x, select=select), want(x, select=select))


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_mlp_drops_behind_both_layers(p):
    mlp = Mlp(8, drop=p)
    zeros = (mlp.hidden(torch.ones(100, 8)) == 0).float().mean(), (mlp(torch.ones(100, 8)) == 0).float().mean()
    assert all(abs(float(z) - p) < 0.08 for z in zeros)
