import pytest
import torch

from atst_fast.models import ClipEncoder
from tests.golden import assert_golden, load
from tests.models import plain_clip
from tests.models.checks import assert_same, copies
from tests.tolerances import BF16_RTOL, OTHER_ORDER

TINY = {"dim": 24, "depth": 2, "num_heads": 3}
TOKENS = [c for c in load("prepare_tokens")[1]["cases"] if c["model"] == "AST"]


def tiny(**kwargs):
    encoder = ClipEncoder(TINY, **({"max_frames": 41, "mlp_ratio": 2.0} | kwargs))
    with torch.no_grad():
        for p in encoder.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return encoder


def batch(clips=3, frames=41):
    return torch.randn(clips, 1, 64, frames), torch.randint(4, frames + 1, (clips,))


def plain_of(encoder):
    plain = plain_clip.Encoder(**TINY, mlp_ratio=2.0, positions=10)
    plain.load_state_dict(encoder.state_dict())
    return plain.eval()


@pytest.mark.parametrize("case", TOKENS, ids=lambda c: c["id"])
def test_golden_prepare_tokens(case):
    t = load("prepare_tokens")[0]
    size = {"dim": case["dim"], "depth": 1, "num_heads": case["heads"]}
    encoder = ClipEncoder(size, max_frames=case["spec_w"], pos_type=case["pos"])
    weights = {k.removeprefix("in/w_c/"): v for k, v in t.items() if k.startswith("in/w_c/")}
    assert not encoder.load_state_dict(weights, strict=False).unexpected_keys
    got = encoder.prepare_tokens(t["in/x"][..., : case["T"]])
    assert_golden("prepare_tokens", f"out/{case['id']}/x", got)


def test_positions_are_resized_to_any_other_number_of_frames():
    """Also to one of as many tokens, as the official code does; but not to the frames that they are made for."""
    encoder, (mel, _) = tiny(pos_type="interpolate"), batch()
    cut = tiny()
    cut.load_state_dict(encoder.state_dict())
    assert torch.equal(encoder.prepare_tokens(mel), cut.prepare_tokens(mel))
    assert not torch.allclose(encoder.prepare_tokens(mel[..., :40]), cut.prepare_tokens(mel[..., :40]))
    assert encoder.prepare_tokens(mel[..., :3]).shape == (3, 1, 24)


def test_masked_patches_enter_as_the_mask_token():
    encoder = tiny()
    mel, _ = batch()
    mask = torch.rand(3, 10) < 0.5
    got, plain = encoder.prepare_tokens(mel, mask), encoder.prepare_tokens(mel)
    want = encoder.mask_embed + encoder.pos_embed[:, 1:]
    torch.testing.assert_close(got[:, 1:], torch.where(mask[:, :, None], want, plain[:, 1:]))
    assert torch.equal(got[:, 0], plain[:, 0])


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
def test_rows_equal_the_plain_structure(fixed, ragged):
    encoder = tiny().eval()
    encoder.fixed_shapes = fixed
    mel, lengths = batch()
    lengths = lengths if ragged else torch.full_like(lengths, 41)
    want = plain_of(encoder).tokens(mel, lengths)
    assert_same(encoder(mel, lengths), want[:, 0])
    cls, tokens = encoder.intermediate(mel, lengths)
    assert_same(cls, want[:, 0])
    assert_same(tokens, want[:, 1:])  # padded ones too
    select = encoder.select(mel, lengths)
    assert (select is None) == (not fixed)
    assert torch.equal(encoder(mel, lengths, select=select), encoder(mel, lengths))


def test_lengths_none_is_all_valid():
    encoder = tiny().eval()
    mel, _ = batch()
    full = torch.full((3,), 41)
    assert torch.equal(encoder(mel), encoder(mel, full))
    assert torch.equal(encoder(mel), encoder(mel, full - 1))  # the last frame belongs to no token


def test_what_lies_past_the_length_is_not_read():
    encoder = tiny().eval()
    mel, _ = batch(2)
    lengths = torch.tensor([20, 41])
    other = mel.clone()
    other[0, :, :, 20:] = 1e4
    assert torch.equal(encoder(mel, lengths), encoder(other, lengths))
    alone = encoder(mel[:1, :, :, :20])
    torch.testing.assert_close(encoder(mel, lengths)[:1], alone, rtol=0, atol=OTHER_ORDER)


@pytest.mark.parametrize("fixed", [False, True])
def test_a_clip_without_valid_token_is_its_class_token(fixed):
    encoder = tiny().eval()
    encoder.fixed_shapes = fixed
    mel, _ = batch(2)
    alone = encoder(mel[:1, :, :, :0])
    torch.testing.assert_close(encoder(mel, torch.tensor([3, 41]))[:1], alone, rtol=0, atol=OTHER_ORDER)


@pytest.mark.parametrize("length", [-1, -5, 46])
def test_a_length_out_of_range_is_told_by_the_count(length, monkeypatch):
    encoder = tiny()
    encoder.fixed_shapes = True
    mel, lengths = batch()
    assert encoder.select(mel, lengths).count == 3
    lengths[1] = length
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # there the values are not looked at
    assert encoder.select(mel, lengths).count == -1
    # a GPU's kernels go on with it
    monkeypatch.setattr(ClipEncoder, "_selected_rows", lambda self, x, length, select: x[:, 0])
    monkeypatch.setattr(ClipEncoder, "_all_rows", lambda self, x, length: x)
    assert encoder(mel, lengths).isnan().all()
    assert encoder(mel, torch.tensor([41, 0, 3])).isfinite().all()
    if length < 0:
        mean = tiny(use_cls=False)(mel, torch.tensor([41, length, 20]))
        assert mean.isnan().all(1).tolist() == [False, True, False]


@pytest.mark.parametrize("fixed", [False, True])
def test_without_class_token_a_clip_is_the_mean_of_its_valid_tokens(fixed):
    encoder = tiny(use_cls=False).eval()
    encoder.fixed_shapes = fixed
    assert "cls_token" not in encoder.state_dict()
    mel, lengths = batch()
    cls, tokens = encoder.intermediate(mel, lengths)
    assert cls.shape == (3, 24)
    assert not cls.any()
    got = encoder(mel, lengths)
    for clip, n in enumerate((lengths // 4).tolist()):
        torch.testing.assert_close(got[clip], tokens[clip, :n].mean(0), rtol=0, atol=OTHER_ORDER)
    torch.testing.assert_close(encoder(mel), encoder.intermediate(mel)[1].mean(1), rtol=0, atol=OTHER_ORDER)
    assert torch.equal(encoder.prepare_tokens(mel), encoder.patch_embed(mel) + encoder.pos_embed[:, :10])
    assert encoder(mel, lengths * 0).isnan().all()
    longest = encoder(torch.randn(1, 1, 64, 44))  # eleven tokens: positions begin at row 0
    assert longest.isfinite().all()


def test_intermediate():
    encoder = tiny().eval()
    mel, lengths = batch()
    cls, tokens = encoder.intermediate(mel, lengths, n_blocks=2)
    assert (cls.shape, tokens.shape) == ((3, 48), (3, 10, 48))
    torch.testing.assert_close(cls[:, 24:], encoder(mel, lengths), rtol=0, atol=OTHER_ORDER)
    plain = plain_of(encoder)
    del plain.blocks[1]
    want = plain.tokens(mel, lengths)
    assert_same(cls[:, :24], want[:, 0])
    assert_same(tokens[..., :24], want[:, 1:])


def test_gradients_reach_all_but_the_mask_token():
    encoder = tiny(drop_path_rate=0.0)
    mel, lengths = batch()
    encoder(mel, lengths).square().sum().backward()
    assert [n for n, p in encoder.named_parameters() if p.grad is None] == ["mask_embed"]
    assert all(p.grad.any() for n, p in encoder.named_parameters() if n != "mask_embed")


def leaves(node):
    """Parameters that a graph leads to."""
    if hasattr(node, "variable"):
        return {node.variable}
    return set().union(*(leaves(n) for n, _ in node.next_functions if n is not None)) if node else set()


def test_the_mask_token_is_in_a_graph_only_with_a_mask():
    """DistributedDataParallel makes a gradient of zeros for what is in it, and an optimizer decays that."""
    encoder, (mel, _) = tiny(), batch(2)
    assert encoder.mask_embed not in leaves(encoder.prepare_tokens(mel).grad_fn)
    assert encoder.mask_embed in leaves(encoder.prepare_tokens(mel, torch.ones(2, 10, dtype=torch.bool)).grad_fn)


def test_no_clips():
    for fixed in (False, True):
        encoder = tiny()
        encoder.fixed_shapes = fixed
        assert encoder(torch.randn(0, 1, 64, 41)).shape == (0, 24)


def errors():
    mel, lengths = batch()
    n = "ClipEncoder: "
    yield lambda e: e(mel[:, 0]), n + r"mel must be \[B, 1, 64, T\]"
    yield lambda e: e(torch.randn(1, 1, 64, 45)), n + "mel must be at most 41 frames long"
    yield lambda e: e(mel, lengths.int()), n + r"lengths must be .* of dtype int64"
    yield lambda e: e(mel, lengths + 41), n + r"lengths must be \[3\] \(valid frames of each clip, 0 to 41\)"
    yield lambda e: e.prepare_tokens(mel, torch.ones(3, 11, dtype=torch.bool)), n + r"mask must be \[3, 10\]"
    yield lambda e: e.intermediate(mel, n_blocks=0), n + "n_blocks must be from 1 to 2"
    yield lambda e: tiny(pos_type="interpolate", use_cls=False), n + "pos_type must be 'cut' without a class token"
    yield lambda e: ClipEncoder("huge"), n + "arch must be one of tiny, small, base, large"


@pytest.mark.parametrize("index", range(len(list(errors()))))
def test_errors(index):
    call, message = list(errors())[index]
    with pytest.raises((ValueError, TypeError), match=message):
        call(tiny())


def test_archs_have_the_published_sizes():
    counts = {}
    for arch in ("small", "base"):
        with torch.device("meta"):
            counts[arch] = sum(p.numel() for p in ClipEncoder(arch).parameters())
    assert counts == {"small": 21_476_352, "base": 85_420_032}


def test_initialisation():
    encoder = ClipEncoder("tiny")
    for name in ("cls_token", "mask_embed", "pos_embed"):
        assert encoder.get_parameter(name).std().item() == pytest.approx(0.02, rel=0.25), name
    assert not torch.equal(encoder.cls_token, encoder.mask_embed)


@pytest.mark.parametrize("use_cls", [True, False])
def test_copies_and_config(use_cls):
    encoder = tiny(patch_embed="CNN", qkv_bias=True, use_cls=use_cls).eval()
    mel, lengths = batch()
    for other in copies(encoder):
        assert torch.equal(other(mel, lengths), encoder(mel, lengths))


def test_autocast():
    encoder = tiny().eval()
    mel, lengths = batch()
    with torch.autocast("cpu", torch.bfloat16):
        rows = encoder(mel, lengths)
    want = encoder(mel, lengths)
    torch.testing.assert_close(rows.float(), want, rtol=0, atol=BF16_RTOL * want.abs().max().item())


def test_compile():
    encoder = tiny().eval()
    mel, lengths = batch()
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(mel), encoder(mel), rtol=0, atol=OTHER_ORDER)
    torch.testing.assert_close(compiled(mel, lengths), encoder(mel, lengths), rtol=0, atol=OTHER_ORDER)
