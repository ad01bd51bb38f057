"""What accelerate does to a model besides making it fast: nothing."""

import contextlib
import copy
import io
import pickle

import pytest
import torch
from torch import nn

import atst_fast
from atst_fast import accelerate, accelerated, restore
from atst_fast.integrations.accelerate_swap import is_fused
from tests.integrations.standins.audiossl_blocks import Block
from tests.integrations.standins.audiossl_systems import ATST, FrameATST, LightningShaped
from tests.tolerances import ACCELERATED_CURVE_RTOL, FLOAT64_RTOL, NETWORK_RTOL

KINDS = {"frame": FrameATST, "clip": ATST}
SIZES = {"embed_dim": 24, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0, "spec_w": 41, "hidden": 32, "out": 16}


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)


def make(kind, seed=0, **options):
    torch.manual_seed(seed)
    return KINDS[kind](**SIZES | {"drop_path_rate": 0.3} | options)


def batch(kind, generator=None, clips=4):
    g = generator or torch.Generator().manual_seed(1)
    views = [torch.randn(clips, 1, 64, 40, generator=g) for _ in range(2)]
    lengths = torch.randint(4, 41, (clips,), generator=g)
    if kind == "clip":
        return views, [lengths, lengths.flip(0)]
    mask = torch.rand(clips, 10, generator=g) < 0.5
    mask[:, 0] = True
    return views, [lengths, lengths], [mask, mask]


def run(model, data, seed=2):
    """Losses and gradients of one batch, by the same draws."""
    model.zero_grad()
    torch.manual_seed(seed)
    out = model(*data)
    out[0].backward()
    grads = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    return [x.detach() for x in out], grads


def assert_same(a, b, rtol=NETWORK_RTOL):
    torch.testing.assert_close(a[0], b[0], rtol=rtol, atol=0)
    largest = max(float(g.abs().max()) for g in b[1].values() if g is not None)
    for name, grad in b[1].items():
        assert (a[1][name] is None) == (grad is None), name
        if grad is not None:
            torch.testing.assert_close(a[1][name], grad, rtol=rtol, atol=rtol * largest, msg=name)


def fused(model):
    return [name for name, module in model.named_modules() if is_fused(module)]


def snapshot(model):
    """Everything of every module but the tensors' values."""

    def ids(things):
        return {k: id(v) for k, v in things.items()}

    return {n: (type(m), ids(vars(m)), ids(m._parameters | m._buffers)) for n, m in model.named_modules()}


def curve(kind, fast, steps, dtype=torch.float32):
    """The outputs of each step of training with padding, masks and stochastic depth."""
    module = LightningShaped(make(kind, seed=1).to(dtype), 3e-4, 20, steps)
    if fast:
        accelerate(module)
    g = torch.Generator().manual_seed(1)
    torch.manual_seed(5)
    outputs = []
    for _ in range(steps):
        views, *rest = batch(kind, g, clips=6)
        outputs.append(module.fit_batch([[v.to(dtype) for v in views], *rest]))
    return torch.tensor(outputs, dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_two_hundred_steps_have_equal_losses(kind):
    plain, fast = (curve(kind, on, 200) for on in (False, True))
    torch.testing.assert_close(fast, plain, rtol=ACCELERATED_CURVE_RTOL, atol=0)
    assert plain[-20:, 0].mean() < plain[:20, 0].mean()


@pytest.mark.parametrize("kind", KINDS)
def test_steps_in_float64_are_the_same(kind):
    """Where rounding does not matter, nothing is left that differs."""
    plain, fast = (curve(kind, on, 20, torch.float64) for on in (False, True))
    torch.testing.assert_close(fast, plain, rtol=FLOAT64_RTOL, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_else_changes(kind):
    model = make(kind)
    before, keys = snapshot(model), list(model.state_dict())
    optimizer = torch.optim.AdamW(model.student.parameters())
    state, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    report = accelerate(model)
    assert len(report.replaced) == len(fused(model)) == 11
    assert not report.left
    assert torch.equal(rng, torch.get_rng_state())
    after = snapshot(model)
    assert {k: v[1:] for k, v in after.items()} == {k: v[1:] for k, v in before.items()}
    assert list(model.state_dict()) == keys
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in model.student.parameters()}
    assert all(isinstance(model.get_submodule(name), kind_of[0]) for name, kind_of in before.items())
    assert restore(model) == 11
    assert snapshot(model) == before
    assert restore(model) == 0


def test_again_and_with_other_arguments():
    model = make("frame")
    first = accelerate(model)
    classes = {n: type(m) for n, m in model.named_modules()}
    assert accelerate(model) == first
    assert {n: type(m) for n, m in model.named_modules()} == classes
    report = accelerate(model, heads=False, loss=False, teacher=False, patch_embed=False)
    assert {e.part for e in report.replaced} == {"block", "encoder"}
    assert {e.note for e in report.left} == {"heads=False", "loss=False", "teacher=False"}
    accelerate(model, attention=False, block=False, patch_embed=False, heads=False, loss=False, teacher=False)
    assert not fused(model)


FLAGS = ("attention", "patch_embed", "block", "heads", "loss", "teacher")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("alone", [True, False])
def test_each_part_alone_and_left_out(kind, flag, alone):
    model, data = make(kind), batch(kind)
    want = run(model, data)
    report = accelerate(model, **{name: (name == flag) == alone for name in FLAGS})
    assert report.replaced
    assert_same(run(model, data), want)


def test_context():
    model = make("frame")
    with accelerated(model, loss=False) as report:
        assert len(report.replaced) == len(fused(model)) == 10
    assert not fused(model)
    with contextlib.suppress(KeyError), accelerated(model):
        raise KeyError
    assert not fused(model)


def test_table():
    text = str(accelerate(make("frame"), teacher=False))
    assert "block    student.encoder.blocks.0-1  attention and MLP, residuals, norms" in text
    assert "LEFT: teacher=False" in text
    assert text.endswith("10 of 11 parts replaced")
    assert "nothing in this model is known" in str(accelerate(nn.Linear(2, 2)))


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_accelerated_and_independent(copied):
    model, data = make("frame"), batch("frame")
    want = run(model, data)
    accelerate(model)
    other = copied(model)
    assert fused(other) == fused(model)
    assert_same(run(other, data), want)
    if copied is not copy.copy:  # which shares its children
        assert restore(other) == 11
        assert len(fused(model)) == 11


def test_torch_save_of_a_whole_model():
    model, data = make("clip"), batch("clip")
    accelerate(model)
    want = run(model, data)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    other = torch.load(file, weights_only=False)
    assert_same(run(other, data), want)
    restore(other)
    assert type(other) is ATST


def test_replicas_use_their_own_parameters():
    """As DataParallel makes them: a new object whose parameters are replaced."""
    model = make("frame").student.projector
    accelerate(model)
    replica = model._replicate_for_data_parallel()
    assert type(replica) is type(model)
    assert replica is not model
    replica._modules = {k: copy.deepcopy(v) for k, v in model._modules.items()}
    with torch.no_grad():
        replica[3].weight.zero_()
    assert not replica(torch.randn(4, 24)).any()


@pytest.mark.parametrize("kind", KINDS)
def test_state_dicts_go_both_ways(kind):
    plain, fast, data = make(kind), make(kind, seed=7), batch(kind)
    accelerate(fast)
    fast.load_state_dict(plain.state_dict())
    want = run(plain, data)
    assert_same(run(fast, data), want)
    fast.load_state_dict(make(kind, seed=8).state_dict(), assign=True)
    plain.load_state_dict(fast.state_dict())
    assert_same(run(fast, data), run(plain, data))


def test_modules_that_occur_twice():
    block = Block(24, 2)
    model = nn.ModuleDict({"a": block, "b": nn.Sequential(block, Block(24, 2))})
    model["b"][1].mlp = block.mlp
    x = torch.randn(3, 5, 24)
    want = model["b"](x)
    report = accelerate(model)
    assert [e.name for e in report.replaced] == ["a", "b.1"]
    torch.testing.assert_close(model["b"](x), want, rtol=0, atol=1e-5)
    assert restore(model) == 2
    assert type(model["b"][0]) is Block


def test_no_class_is_patched():
    other, model = make("frame"), make("frame")
    accelerate(model)
    assert not fused(other)
    assert not fused(make("frame"))


def test_unusual_calls_run_the_original():
    model, data = make("frame").eval(), batch("frame")
    encoder = model.student.encoder
    mel, length = data[0][0], data[1][0]
    zero = length.clone()
    zero[1] = 0
    calls = [
        lambda: encoder.get_last_selfattention(mel),
        lambda: encoder.get_intermediate_layers(mel, length, n=2, scene=True),
        lambda: encoder.get_intermediate_layers(mel, length, n=1, scene=False),
        lambda: encoder.blocks[1](torch.ones(2, 5, 24), return_attention=True),
        lambda: encoder.blocks[1](torch.ones(2, 5, 24).cumsum(1), length=torch.tensor([9, 2])),
        lambda: encoder.blocks[1](torch.ones(2, 5, 24).cumsum(1), torch.tensor([1.5, 2.0])),
        lambda: encoder(mel, data[2][0], True, zero),
        lambda: encoder(mel, torch.zeros_like(data[2][0]), True, length),
        lambda: encoder.prepare_tokens(mel, data[2][0], length, True)[2],
        lambda: encoder.prepare_tokens(mel[..., :37], None, None, False),
    ]
    with torch.no_grad():
        want = [call() for call in calls]
        accelerate(model)
        got = [call() for call in calls]
    torch.testing.assert_close(got, want, rtol=NETWORK_RTOL, atol=NETWORK_RTOL)
    with pytest.raises(AttributeError, match="unsqueeze"):  # and fail as it does
        encoder(mel, None, True, None)
    with pytest.raises(RuntimeError, match="size of tensor"):
        encoder(torch.zeros(1, 1, 64, 80), torch.ones(1, 20, dtype=torch.bool), True, torch.tensor([80]))


@pytest.mark.parametrize(
    "options", [{"pos_type": "interpolate"}, {"patch_embed": "CNN"}, {"nprompt": 2}, {"avg_blocks": 1}]
)
def test_other_frame_encoders(options):  # fmt: skip
    from tests.integrations.standins.audiossl_encoders import FrameAST

    torch.manual_seed(0)
    sizes = {k: v for k, v in SIZES.items() if k not in ("hidden", "out")}
    encoder, data = FrameAST(**sizes, **options), batch("frame")
    args = data[0][0], data[2][0], True, data[1][0]

    def once():
        torch.manual_seed(1)
        return encoder(*args)

    want = once()
    assert accelerate(encoder).replaced
    torch.testing.assert_close(once(), want, rtol=NETWORK_RTOL, atol=NETWORK_RTOL)


@pytest.mark.parametrize("options", [{"use_cls": False}, {"pos_type": "interpolate"}, {"patch_embed": "CNN"}])
def test_other_clip_encoders(options):
    from tests.integrations.standins.audiossl_encoders import AST

    torch.manual_seed(0)
    sizes = {k: v for k, v in SIZES.items() if k not in ("hidden", "out")}
    encoder, data = AST(**sizes, **options).eval(), batch("clip")
    calls = [lambda: encoder(data[0][0], length=data[1][0]), lambda: encoder(data[0][0], length=data[1][0], avg=True)]
    want = [call() for call in calls]
    assert accelerate(encoder).replaced
    torch.testing.assert_close([call() for call in calls], want, rtol=NETWORK_RTOL, atol=NETWORK_RTOL)


@pytest.mark.parametrize(
    "call", [lambda: accelerate("model"), lambda: restore(None), lambda: accelerate({}, loss=False)]
)
def test_what_is_no_module_is_refused(call):  # fmt: skip
    with pytest.raises(TypeError, match=r"(accelerate|restore): model must be a torch.nn.Module, got"):
        call()


def test_arguments_are_bools():
    with pytest.raises(TypeError, match="accelerate: heads must be True or False, got 'no'"):
        atst_fast.accelerate(nn.Linear(1, 1), heads="no")
