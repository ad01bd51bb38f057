"""Blocks of other vision transformers, what is left as it is, and what happens to a fused block later."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from atst_fast import accelerate, restore
from atst_fast.integrations.accelerate_swap import is_fused
from tests.integrations.standins import audiossl_blocks as audiossl
from tests.integrations.standins import vit_blocks as vit
from tests.integrations.standins.audiossl_encoders import FrameAST
from tests.tolerances import NETWORK_RTOL

D, H = 24, 3


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)


def outcome(block, x, *args, seed=3, **kwargs):
    """Result and gradients by the same draws."""
    block.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(seed)
    y = block(x, *args, **kwargs)
    first = y[0] if isinstance(y, tuple) else y
    first.square().sum().backward()
    return y, x.grad, [None if p.grad is None else p.grad.clone() for p in block.parameters()]


def assert_close(got, want):
    scale = max(1.0, float(want[1].abs().max()))
    torch.testing.assert_close(got, want, rtol=NETWORK_RTOL, atol=NETWORK_RTOL * scale)


BLOCKS = {
    "timm": lambda: vit.TimmBlock(D, H, drop_path=0.4),
    "timm, not scaled": lambda: vit.TimmBlock(D, H, drop_path=0.4, scaled=False),
    "SSAST": lambda: vit.SSASTBlock(D, H, drop_path=0.4),
    "ASiT": lambda: vit.DinoBlock(D, H, drop_path=0.4),
    "HuggingFace": lambda: vit.HFLayer(D, H),
    "HuggingFace, renamed": lambda: vit.NewHFLayer(D, H),
    "audiossl": lambda: audiossl.Block(D, H, drop_path=0.4),
    "tanh": lambda: vit.TimmBlock(D, H, act_layer=lambda: nn.GELU("tanh")),
    "ReLU": lambda: audiossl.Block(D, H, act_layer=nn.ReLU, drop_path=0.4),
    "qk_scale": lambda: audiossl.Block(D, H, qk_scale=0.7, qkv_bias=True),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name, training):
    torch.manual_seed(0)
    block, x = BLOCKS[name]().train(training), torch.randn(6, 9, D)
    for p in block.parameters():
        nn.init.normal_(p, std=0.3)
    want = outcome(block, x)
    for flags in ({}, {"attention": False}, {"block": False}):
        report = accelerate(block, **flags)
        assert [e.name for e in report.replaced] == [""], report
        got = outcome(block, x)
        assert type(got[0]) is type(want[0])
        assert_close(got, want)
        block.fixed_shapes = True
        assert_close(outcome(block, x), want)
        del block.fixed_shapes
        restore(block)
    assert_close(outcome(block, x), want)


@pytest.mark.parametrize("name", ["tanh", "ReLU"])
def test_another_activation_is_called(name):
    block = BLOCKS[name]()
    (entry,) = accelerate(block)
    assert "called as they are: mlp.act" in entry.note
    calls = []
    block.mlp.act.register_forward_hook(lambda *_: calls.append(1))
    block(torch.randn(2, 4, D))
    assert calls


class Lora(nn.Linear):
    """A layer of low rank beside the linear one, with a dropout of its own."""

    def __init__(self, of, rank=2):
        super().__init__(of.in_features, of.out_features, bias=of.bias is not None)
        self.down, self.up = nn.Linear(of.in_features, rank, bias=False), nn.Linear(rank, of.out_features, bias=False)
        self.dropout = nn.Dropout(0.3)

    def forward(self, x):
        return super().forward(x) + self.up(self.down(self.dropout(x)))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("path", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"])
def test_layers_that_are_more_than_linear_are_called(path, when):
    torch.manual_seed(0)
    block, x = audiossl.Block(D, H, drop_path=0.4), torch.randn(5, 6, D)
    parent, name = block.get_submodule(path.split(".")[0]), path.split(".")[1]
    layer = Lora(getattr(parent, name))
    if when == "after":
        accelerate(block)
    setattr(parent, name, layer)
    want = outcome(_plain(block), x, torch.tensor([6, 2, 1, 4, 6]))
    if when == "before":
        (entry,) = accelerate(block)
        assert f"called as they are: {path} (Lora)" in entry.note
    assert_close(outcome(block, x, torch.tensor([6, 2, 1, 4, 6])), want)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("path", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"])
def test_such_layers_in_an_encoder(path, when, training):
    """What is dropped, and whose branch, is drawn as the original draws it, also where only some rows are read."""
    torch.manual_seed(0)
    encoder = FrameAST(embed_dim=D, depth=2, num_heads=H, spec_w=40, drop_path_rate=0.6)
    mel, mask, length = torch.randn(4, 1, 64, 40), torch.rand(4, 10) < 0.5, torch.tensor([40, 20, 31, 8])
    if when == "after":
        accelerate(encoder)
    for block in encoder.blocks:
        parent, name = block.get_submodule(path.split(".")[0]), path.split(".")[1]
        setattr(parent, name, Lora(getattr(parent, name)))
        block.train(training).drop_path.train()  # stochastic depth in either case
    if when == "before":
        assert {e.part for e in accelerate(encoder).replaced} == {"encoder", "block"}
    results = []
    for one in (_plain(encoder), encoder):
        torch.manual_seed(1)
        results.append(one(mel, mask, length=length))
    torch.testing.assert_close(*results, rtol=NETWORK_RTOL, atol=NETWORK_RTOL * float(results[0].abs().max()))


def _plain(block):
    other = copy.deepcopy(block)
    restore(other)
    return other


def test_hooks_run_whenever_they_are_added():
    block, x = audiossl.Block(D, H), torch.randn(2, 4, D)
    want = block(x)
    accelerate(block)
    for path in ("", "norm1", "attn", "attn.qkv", "attn.proj", "norm2", "mlp", "mlp.fc1", "mlp.act", "mlp.fc2"):
        for register in ("register_forward_hook", "register_forward_pre_hook"):
            calls = []
            handle = getattr(block.get_submodule(path), register)(lambda *_, seen=calls: seen.append(1))
            torch.testing.assert_close(block(x), want, rtol=NETWORK_RTOL, atol=NETWORK_RTOL)
            assert calls == [1], path
            handle.remove()
    block.mlp.forward = lambda x: torch.zeros_like(x)
    assert not torch.allclose(block(x), want, atol=1e-2)


LEFT = {
    "attn.attn_drop drops out 0.1": lambda: audiossl.Block(D, H, attn_drop=0.1),
    "drops out 0.2": lambda: audiossl.Block(D, H, drop=0.2),
    "ls1 is LayerScale with gamma of its own": lambda: vit.TimmBlock(D, H, init_values=1e-5),
    "it has norms within attention or MLP": lambda: vit.TimmBlock(D, H, qk_norm=nn.LayerNorm),
    "what it computes differs": lambda: vit.HFLayer(D, H, dropout_prob=0.3),
}


@pytest.mark.parametrize("why", LEFT)
def test_what_is_left_and_why(why):
    torch.manual_seed(0)
    block, x = LEFT[why](), torch.randn(3, 5, D)
    want = outcome(block, x)
    report = accelerate(block)
    entries = {e.name: e for e in report}
    assert why in entries[""].note
    assert not entries[""].replaced
    assert "LEFT" in str(report)
    assert_close(outcome(block, x), want)


class PostNorm(audiossl.Block):
    """The same layers in another order."""

    def forward(self, x, length=None):
        x = self.norm1(x + self.attn(x, None)[0])
        return self.norm2(x + self.mlp(x))


class Clamped(audiossl.Block):
    def forward(self, x, length=None):
        return super().forward(x, length).clamp(-1, 1)


class Windowed(audiossl.Block):
    """Reads the lengths in another way."""

    def forward(self, x, length=None):
        return super().forward(x, None if length is None else length - 1)


class NeedsMore(audiossl.Block):
    def forward(self, x, positions):
        return super().forward(x + positions)


class Scaling(audiossl.Block):
    def forward(self, x, length=None, factor=2.0):
        return factor * super().forward(x, length)


class Packs(audiossl.Block):
    def forward(self, x, length=None):
        return {"x": super().forward(x, length)}


class FourHundred(audiossl.Block):
    """What a table of zeros hides: the weights of the model alone do not tell."""

    def __init__(self, dim, heads):
        super().__init__(dim, heads)
        self.attn.table = nn.Parameter(torch.zeros(heads))


@pytest.mark.parametrize(
    "kind, why",
    [
        (PostNorm, "what it computes differs"),
        (Clamped, "what it computes differs"),
        (Windowed, "what it computes differs"),
        (NeedsMore, "its forward needs positions"),
        (Scaling, "its forward takes factor=2.0"),
        (Packs, "it returns dict"),
        (FourHundred, "attn is Attention with table of its own"),
    ],
)
def test_the_same_layers_used_otherwise_are_left(kind, why):
    block = kind(D, H)
    for p in block.parameters():
        nn.init.zeros_(p)  # so that nothing differs in the model itself
    report = accelerate(block)
    assert not report.replaced
    assert why in report[0].note


def test_modules_that_cannot_be_replaced_are_left():
    patched = audiossl.Block(D, H)
    patched.forward = lambda x: x
    assert "its forward has been replaced on the instance" in accelerate(patched)[0].note
    scripted = torch.jit.trace(vit.SSASTBlock(D, H).eval(), torch.zeros(1, 2, D))
    (entry,) = accelerate(nn.Sequential(scripted))
    assert (entry.name, entry.note) == ("0", "it is TorchScript")
    hooked = audiossl.Block(D, H)
    hooked.attn.register_forward_hook(lambda *_: None)
    assert "attn has a hook, or a forward of its own" in accelerate(hooked)[0].note

    class NoCopy(audiossl.Block):
        def __deepcopy__(self, memo):
            raise NotImplementedError("no copies")

    assert "it cannot be copied to be compared: no copies" in accelerate(NoCopy(D, H))[0].note


def test_a_class_replaced_since_is_not_restored():
    block = audiossl.Block(D, H)
    accelerate(block)
    block.__class__ = type("Wrapped", (type(block),), {})
    with pytest.raises(RuntimeError, match="restore: the class of a fused module was replaced again, by Wrapped"):
        restore(nn.Sequential(audiossl.Block(D, H), block))
    with pytest.raises(RuntimeError, match="replaced again"):
        accelerate(block)


def test_attention_of_its_own():
    """Where the block around it is none that is known."""
    torch.manual_seed(0)
    block, x = vit.TimmBlock(D, H, init_values=0.5), torch.randn(3, 6, D)
    want = outcome(block, x)
    mask = torch.zeros(6, 6).masked_fill(torch.ones(6, 6, dtype=torch.bool).triu(1), -1e4)
    masked = outcome(block, x, mask)
    report = accelerate(block)
    assert [(e.name, e.part) for e in report.replaced] == [("attn", "attention")]
    assert is_fused(block.attn)
    assert_close(outcome(block, x), want)
    assert_close(outcome(block, x, mask), masked)
    (entry,) = accelerate(audiossl.Attention(D, H))
    assert "needs" in entry.note or "does not run" in entry.note
    (entry,) = accelerate(vit.OldAttention(D, H, returns_matrix=True))
    assert entry.note == "it returns its attention matrix, which the operator never forms"


def test_extra_output_on_request():
    torch.manual_seed(0)
    block, x = vit.HFLayer(D, H).eval(), torch.randn(2, 5, D)
    want = block(x, output_attentions=True)
    accelerate(block)
    torch.testing.assert_close(block(x, output_attentions=True), want, rtol=0, atol=0)
    torch.testing.assert_close(block(hidden_states=x), block(x), rtol=0, atol=0)
    assert len(block(x, None, False)) == 1


@pytest.mark.parametrize("without", [["k_proj"], ["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj"]])
def test_some_layers_of_attention_without_a_bias(without):
    block, x = vit.NewHFLayer(D, H), torch.randn(2, 5, D)
    attention = next(m for m in block.modules() if hasattr(m, "k_proj"))
    for name in without:
        getattr(attention, name).bias = None
    assert accelerate(block)[0].replaced
    assert_close(outcome(block, x), outcome(_plain(block), x))


@pytest.mark.parametrize("fixed", [False, True])
def test_biases_taken_away_later(fixed):
    torch.manual_seed(0)
    block, x = audiossl.Block(D, H, qkv_bias=True), torch.randn(2, 5, D)
    accelerate(block)
    block.fixed_shapes = fixed
    for path in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"):
        block.get_submodule(path).bias = None
        assert_close(outcome(block, x), outcome(_plain(block), x))


class Halved(torch.Tensor):
    """A weight that knows how to be multiplied with and nothing else, as those that are quantised."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.cat:
            raise NotImplementedError("cat")
        if func is F.linear:
            return F.linear(args[0], 0.5 * args[1].as_subclass(torch.Tensor), *args[2:])
        return super().__torch_function__(func, types, args, kwargs)


def test_weights_that_are_more_than_tensors():
    block, x = vit.NewHFLayer(D, H).eval(), torch.randn(2, 5, D)
    accelerate(block)
    for linear in [m for m in block.modules() if isinstance(m, nn.Linear)]:
        linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Halved), requires_grad=False)
    with torch.no_grad():
        y = block(x)
        restore(block)
        torch.testing.assert_close(y, block(x), rtol=NETWORK_RTOL, atol=1e-5)


def test_settings_changed_later_are_followed():
    torch.manual_seed(0)
    block, x = audiossl.Block(D, H, drop_path=0.5), torch.randn(6, 5, D)
    accelerate(block)
    block.attn.scale, block.drop_path.drop_prob, block.attn.proj_drop.p = 0.9, 0.2, 0.5
    assert_close(outcome(block, x), outcome(_plain(block), x))


def test_half_precision_and_autocast():
    torch.manual_seed(0)
    block, x = audiossl.Block(D, H, drop_path=0.4), torch.randn(6, 5, D)
    plain = copy.deepcopy(block)
    accelerate(block)
    results = []
    for b in (plain, block):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16):
            results.append(b(x, torch.tensor([5, 5, 3, 1, 2, 5])))
    assert results[0].dtype == results[1].dtype
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0.05)
    torch.testing.assert_close(
        block.bfloat16().eval()(x.bfloat16()), plain.bfloat16().eval()(x.bfloat16()), rtol=0, atol=0.06
    )


def test_meta_parameters():
    with torch.device("meta"):
        block = audiossl.Block(D, H)
    (entry,) = accelerate(block)
    assert entry.replaced
    block.to_empty(device="cpu")
    for p in block.parameters():
        nn.init.normal_(p, std=0.2)
    x = torch.randn(2, 4, D)
    assert_close(outcome(block, x), outcome(_plain(block), x))
