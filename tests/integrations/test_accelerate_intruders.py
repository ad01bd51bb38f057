"""What other code does to a model, before and after it is accelerated, takes effect as it would have."""

import copy
import types

import pytest
import torch
from torch import nn

from atst_fast import accelerate, restore
from tests.integrations.standins import audiossl_blocks as audiossl
from tests.integrations.standins import vit_blocks as vit
from tests.integrations.standins.audiossl_encoders import FrameAST
from tests.integrations.test_accelerate import make
from tests.tolerances import NETWORK_RTOL

D, H = 24, 3


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)


def block_and_tokens(**kwargs):
    torch.manual_seed(0)
    return vit.TimmBlock(D, H, **kwargs), torch.randn(4, 6, D)


def same(block, x):
    """Whether the model gives, with the same draws, what it gives when restored."""
    plain = copy.deepcopy(block)
    restore(plain)
    results = []
    for b in (plain, block):
        torch.manual_seed(1)
        results.append(b(x))
    return torch.allclose(*results, rtol=NETWORK_RTOL, atol=NETWORK_RTOL * float(results[0].abs().max()))


PARTS = ("norm1", "attn", "attn.qkv", "attn.q_norm", "attn.attn_drop", "attn.norm", "attn.proj", "ls1", "drop_path1",
         "norm2", "mlp", "mlp.fc1", "mlp.act", "mlp.drop1", "mlp.norm", "mlp.fc2", "ls2", "drop_path2")  # fmt: skip


def patch(layer):
    """As HuggingFace's accelerate and many LoRAs do."""
    original = type(layer).forward
    layer.forward = types.MethodType(lambda self, *args, **kwargs: 2 * original(self, *args, **kwargs) + 0.1, layer)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("path", PARTS)
def test_a_forward_replaced_on_an_instance_is_called(path, when):
    block, x = block_and_tokens(drop_path=0.3)
    unpatched = block(x)
    if when == "before":
        patch(block.get_submodule(path))
    accelerate(block)
    if when == "after":
        patch(block.get_submodule(path))
    assert same(block, x)
    assert not torch.allclose(block.eval()(x), unpatched, atol=1e-2)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("path", ["attn.q_norm", "attn.norm", "ls1", "drop_path1", "mlp.norm", "drop_path2"])
def test_hooks_on_what_does_nothing_by_itself(path, when):
    block, x = block_and_tokens(drop_path=0.3)
    shapes = []

    def register(b):
        b.get_submodule(path).register_forward_hook(lambda module, args, y: shapes.append(y.shape) or 2 * y)

    if when == "before":
        register(block)
        (entry, *_) = accelerate(block)
        assert entry.note == f"{path} has a hook, or a forward of its own"
    else:
        accelerate(block)
        register(block)
    assert same(block, x)
    assert len(shapes) == 2
    assert shapes[0] == shapes[1]
    assert shapes[0].numel() >= x.numel()


@pytest.mark.parametrize(
    "path, new",
    [
        ("ls1", lambda: vit.LayerScale(D, 0.5)),
        ("attn.q_norm", lambda: nn.LayerNorm(D // H)),
        ("drop_path2", lambda: vit.TimmDropPath(0.5)),
        ("mlp.act", nn.ReLU),
        ("mlp.drop1", nn.Identity),
        ("norm1", nn.Identity),
    ],
)
def test_a_part_replaced_after_it(path, new):
    block, x = block_and_tokens()
    accelerate(block)
    parent, _, name = path.rpartition(".")
    setattr(block.get_submodule(parent), name, new())
    assert same(block, x)


def test_attention_replaced_after_it():
    block, x = block_and_tokens()
    accelerate(block)
    block.attn = vit.OldAttention(D, H, returns_matrix=False)
    block.attn.forward = lambda x, attn_mask=None: vit.OldAttention.forward(block.attn, x)
    assert same(block, x)


class Neighbours(vit.TimmAttention):
    """Attends to 100 tokens on either side."""

    def forward(self, x, attn_mask=None):
        at = torch.arange(x.shape[1])
        return super().forward(x, (at[:, None] - at).abs() <= 100)


class Keeps(vit.TimmAttention):
    """Keeps something for a visualisation."""

    def forward(self, x, attn_mask=None):
        self.last = self.qkv(x).detach()
        return super().forward(x, attn_mask)


class Counts(vit.TimmAttention):
    calls = 0

    def forward(self, x, attn_mask=None):
        self.calls += 1
        return super().forward(x, attn_mask)


class Asserts(vit.TimmBlock):
    def forward(self, x, attn_mask=None):
        if len(x) % 3:
            raise AssertionError  # without a word, as an assertion of somebody else's
        return super().forward(x, attn_mask)


def with_attention(kind):
    block = vit.TimmBlock(D, H, init_values=0.5)
    block.attn = kind(D, H)
    block.ls1 = block.ls2 = nn.Identity()
    return block


@pytest.mark.parametrize(
    "make, why",
    [
        (lambda: with_attention(Neighbours), "what it computes differs"),
        (lambda: with_attention(Neighbours).attn, "what it computes differs"),
        (lambda: with_attention(Keeps), "its forward sets attn.last"),
        (lambda: with_attention(Keeps).attn, "its forward sets last"),
        (lambda: with_attention(Counts), "its forward sets attn.calls"),
        (lambda: Asserts(D, H), "it does not run as expected: AssertionError"),
    ],
)
def test_what_a_few_tokens_or_the_result_do_not_show(make, why):
    (entry, *_) = accelerate(make())
    assert (entry.replaced, entry.note) == (False, why)


def test_an_attention_with_a_hook_within_is_left():
    attention = vit.TimmAttention(D, H)
    attention.k_norm.register_forward_hook(lambda *_: None)
    assert accelerate(attention)[0].note == "k_norm has a hook, or a forward of its own"
    other = vit.TimmAttention(D, H)
    assert accelerate(other).replaced
    patch(other.k_norm)
    assert same(other, torch.randn(2, 5, D))


def test_layers_without_a_shape_yet():
    block, x = block_and_tokens()
    block.mlp.fc1 = nn.LazyLinear(4 * D)
    assert not accelerate(block)[0].replaced
    block(x)
    assert accelerate(block)[0].replaced
    encoder = FrameAST(embed_dim=D, depth=1, num_heads=H)
    encoder.head = nn.LazyLinear(2)
    entries = {entry.part: entry for entry in accelerate(encoder)}
    assert entries["block"].replaced
    assert entries["encoder"].note == "LazyLinear has no shape before the model has run once"


@pytest.mark.parametrize("fixed", [False, True])
def test_one_block_in_all_places(fixed):
    """As in ALBERT: it is not the last one where it is met first."""
    torch.manual_seed(0)
    encoder = FrameAST(embed_dim=D, depth=1, num_heads=H, spec_w=40, drop_path_rate=0.0)
    encoder.blocks.extend([encoder.blocks[0]] * 2)
    mel, mask = torch.randn(3, 1, 64, 40), torch.rand(3, 10) < 0.5
    want = encoder(mel, mask, length=torch.tensor([40, 20, 31]))
    accelerate(encoder)
    encoder.fixed_shapes = fixed
    got = encoder(mel, mask, length=torch.tensor([40, 20, 31]))
    torch.testing.assert_close(got, want, rtol=NETWORK_RTOL, atol=NETWORK_RTOL * float(want.abs().max()))


def test_audiossl_blocks_follow_a_patched_norm():
    torch.manual_seed(0)
    block, x = audiossl.Block(D, H), torch.randn(3, 5, D)
    accelerate(block)
    block.fixed_shapes = True
    patch(block.norm2)
    assert same(block, x)


def test_a_head_and_a_loss_that_take_more():
    class Head(nn.Sequential):
        def forward(self, x, factor=1.0):
            return factor * super().forward(x)

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.symmetric = True

        def forward(self, q, z, weight=1.0):
            return q.sum() * weight, z.sum(), z.mean()

    head = Head(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    (entry,) = accelerate(head)
    assert (entry.replaced, entry.note) == (False, "it has a forward of its own")
    assert head(torch.randn(5, 4), 2.0).shape == (5, 2)
    loss, x = Loss(), torch.randn(4, 3)
    accelerate(loss)
    assert loss(x, x, 3.0)[0] == 3 * x.sum()
    assert loss(q=x, z=x)[0] == x.sum()


class OtherOrder(FrameAST):
    def forward(self, x, mask_index=None, length=None, mask_input=True):
        return super().forward(x, mask_index, mask_input, length)


def test_an_encoder_with_other_arguments():
    torch.manual_seed(0)
    encoder = OtherOrder(embed_dim=D, depth=1, num_heads=H, spec_w=40).eval()
    mel, mask, length = torch.randn(2, 1, 64, 40), torch.rand(2, 10) < 0.5, torch.tensor([40, 20])
    want = encoder(mel, mask, length)
    entry = next(entry for entry in accelerate(encoder) if entry.part == "encoder")
    assert entry.note == "its forward takes x, mask_index, length, mask_input, not x, mask_index, mask_input, length"
    torch.testing.assert_close(encoder(mel, mask, length), want, rtol=NETWORK_RTOL, atol=NETWORK_RTOL)


class Registered(audiossl.Block):
    """Cannot be derived from without a word that nobody here knows."""

    def __init_subclass__(cls, tag, **kwargs):
        super().__init_subclass__(**kwargs)


def test_what_raises_where_it_is_looked_at_is_left():
    model = nn.Sequential(Registered(D, H), audiossl.Block(D, H))
    entries = {entry.name: entry for entry in accelerate(model)}
    assert entries["1"].replaced
    assert entries["0"].note.startswith("it cannot be tried out: TypeError")
    assert "'tag'" in entries["0"].note


def test_nothing_is_changed_by_what_ends_early(monkeypatch):
    from atst_fast.integrations import accelerate as module

    def interrupted(_):
        raise KeyboardInterrupt

    model = make("frame")
    monkeypatch.setattr(module, "is_system", interrupted)
    with pytest.raises(KeyboardInterrupt):
        accelerate(model)
    assert restore(model) == 0


@pytest.mark.skipif(
    {*torch.backends.quantized.supported_engines} <= {"none"}, reason="torch has no quantised layers here"
)
@pytest.mark.filterwarnings("ignore")
def test_quantised_layers_are_left():
    model = make("frame").eval()
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    report = accelerate(quantised)
    assert {entry.part for entry in report.replaced} == {"loss", "teacher"}
    assert any("it does not run as expected" in entry.note for entry in report.left)


def test_a_default_device_does_not_matter():
    model = make("clip")
    with torch.device("meta"):
        report = accelerate(model)
    assert not report.left


def test_shapes_without_values():
    """As memory and operations are counted: on the meta device, and in fake tensors."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    block, encoder, head = (
        audiossl.Block(D, H, drop_path=0.3),
        make("clip").student.encoder,
        make("clip").student.projector,
    )
    for module in (block, encoder, head):
        accelerate(module)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert block(torch.zeros(4, 5, D)).shape == (4, 5, D)
    mel, length = torch.zeros(3, 1, 64, 40, device="meta"), torch.zeros(3, dtype=torch.int64, device="meta")
    assert encoder.to("meta")(mel, length=length).shape == (3, D)
    assert block.to("meta")(torch.zeros(4, 5, D, device="meta")).shape == (4, 5, D)
    assert head.to("meta")(torch.zeros(3, D, device="meta")).shape == (3, 16)
