import math

import pytest
import torch

from atst_fast.models import ARCHS, FrameEncoder
from atst_fast.nn import Block, LogMelSpectrogram
from benchmarks import official
from tests.golden import assert_golden, load
from tests.models.checks import assert_same, copies
from tests.tolerances import BF16_RTOL, OTHER_ORDER

TINY = {"dim": 24, "depth": 2, "num_heads": 3}
TOKENS = [c for c in load("prepare_tokens")[1]["cases"] if c["model"] == "FrameAST"]


def tiny(**kwargs):
    return FrameEncoder(TINY, **({"max_frames": 41, "mlp_ratio": 2.0} | kwargs))


def batch(clips=3, frames=41, **kwargs):
    mel = torch.randn(clips, 1, 64, frames)
    mask = torch.rand(clips, frames // 4) < 0.5
    mask[:, 0] = True
    return mel, torch.randint(4, frames + 1, (clips,)), mask


def plain_pair(**kwargs):
    ours = tiny(**kwargs)
    plain = official.Encoder(**TINY, mlp_ratio=2.0, positions=10)
    plain.load_state_dict(ours.state_dict())
    return ours.eval(), plain.eval()


# those of one chunk, which an encoder can take
EMBEDDINGS = [c for c in load("embedding")[1]["cases"] if c.get("n", math.inf) <= 160_000]


@pytest.mark.parametrize("case", EMBEDDINGS, ids=lambda c: c["id"])
def test_golden_embeddings(case):
    """From the waveform: tokens of all blocks, and their mean over time, as get_timestamp_embedding and
    get_scene_embedding of the official code."""
    t, meta = load("embedding")
    cfg, n = meta["cfg"], case["n"]
    encoder = FrameEncoder({"dim": cfg["dim"], "depth": cfg["depth"], "num_heads": cfg["heads"]}).eval()
    encoder.load_state_dict({k.removeprefix("in/w/"): v for k, v in t.items() if k.startswith("in/w/")})
    x = load("mel_waveforms")[0]["in/speech_160000"].float() / 32768
    wave = torch.stack([x[:n], 0.01 * x[n : 2 * n]]) if case["build"] == "batch" else x[None, :n]
    with torch.no_grad():
        tokens = encoder.intermediate(LogMelSpectrogram()(wave[:, None]), n_blocks=cfg["depth"])
    assert list(tokens.shape) == meta["timestamp_shapes"][case["id"]]
    assert_golden("embedding", f"out/{case['id']}/timestamp", tokens[:, case.get("rows", slice(None))])
    assert_golden("embedding", f"out/{case['id']}/scene", tokens.mean(1))


@pytest.mark.parametrize("case", TOKENS, ids=lambda c: c["id"])
def test_golden_prepare_tokens(case):
    t = load("prepare_tokens")[0]
    size = {"dim": case["dim"], "depth": 1, "num_heads": case["heads"]}
    patch = (case["ph"], case["pw"])
    encoder = FrameEncoder(size, patch=patch, max_frames=case["spec_w"], pos_type=case["pos"])
    weights = {k.removeprefix(f"in/w_{case['w']}/"): v for k, v in t.items() if k.startswith(f"in/w_{case['w']}/")}
    assert not encoder.load_state_dict(weights, strict=False).unexpected_keys
    mel = t["in/x"][..., : case["T"]]
    want = t[f"out/{case['id']}/x"]
    mask = t[case["mask"]][:, : want.shape[1]] if case["mask"] and case["use_mask"] else None
    assert_golden("prepare_tokens", f"out/{case['id']}/x", encoder.prepare_tokens(mel, mask))
    lengths = encoder.tokens(t["in/len"].clamp(max=case["T"]))
    assert torch.equal(lengths, t[f"out/{case['id']}/patch_length"].clamp(max=encoder.tokens(case["T"])))


def test_interpolated_positions_can_be_longer_than_trained():
    encoder = tiny(pos_type="interpolate")
    y = encoder(torch.randn(1, 1, 64, 100))
    assert y.shape == (1, 25, 24)
    y.square().sum().backward()
    assert encoder.pos_embed.grad[:, 1:].abs().max() > 0
    assert not encoder.pos_embed.grad[:, 0].any()


def test_less_than_a_token_has_no_positions():
    assert tiny(pos_type="interpolate")(torch.randn(2, 1, 64, 3)).shape == (2, 0, 24)


@pytest.mark.parametrize("ragged", [False, True])
def test_forward_equals_the_plain_structure(ragged):
    ours, plain = plain_pair()
    mel, lengths, mask = batch()
    lengths = lengths if ragged else torch.full_like(lengths, 41)
    want, _ = plain.tokens(mel, lengths)
    assert_same(ours(mel, lengths), want)  # padded rows too
    want, _ = plain.tokens(mel, lengths, mask)
    assert_same(ours(mel, lengths, mask), want)
    for replace in (True, False):
        assert_same(ours.masked_tokens(mel, lengths, mask, replace=replace), plain(mel, lengths, mask, replace))


def test_lengths_none_is_all_valid():
    encoder = tiny().eval()
    mel, _, mask = batch()
    full = torch.full((3,), 41)
    assert torch.equal(encoder(mel), encoder(mel, full))
    # the last frame belongs to no token
    assert torch.equal(encoder(mel), encoder(mel, full - 1))
    rows = encoder.masked_tokens(mel, None, mask, replace=True)
    assert torch.equal(rows, encoder.masked_tokens(mel, full, mask, replace=True))


def test_what_lies_past_the_length_is_not_read():
    encoder = tiny().eval()
    mel, _, mask = batch(2)
    lengths = torch.tensor([20, 41])
    other = mel.clone()
    other[0, :, :, 20:] = 1e4
    assert torch.equal(
        encoder.masked_tokens(mel, lengths, mask, replace=False),
        encoder.masked_tokens(other, lengths, mask, replace=False),
    )
    alone = encoder(mel[:1, :, :, :20])
    torch.testing.assert_close(encoder(mel, lengths)[:1, :5], alone, rtol=0, atol=OTHER_ORDER)


class Doubled(Block):
    """Somebody's own block."""

    def forward(self, x, length=None, **options):
        return 2 * super().forward(x, length, **options)


@pytest.mark.parametrize("which", range(3))
def test_a_block_of_another_class_is_called_as_it_is(which):
    encoder = FrameEncoder({**TINY, "depth": 3}, max_frames=41).eval()
    encoder.blocks[which].__class__ = Doubled
    mel, lengths, mask = batch()
    want = encoder(mel, lengths), encoder.masked_tokens(mel, lengths, mask, replace=True)
    encoder.fixed_shapes = True
    got = encoder(mel, lengths), encoder.masked_tokens(mel, lengths, mask, replace=True)[: len(want[1])]
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=0, atol=OTHER_ORDER)


def test_fixed_shapes_drop_each_branch_of_a_clip_by_itself():
    """Of equal clips four kinds come out of a block that drops half of the branches, and two of them only while it
    trains: nothing is dropped by one in eval mode."""
    torch.manual_seed(0)
    encoder = tiny(drop_path_rate=0.5)
    encoder.fixed_shapes = True
    with torch.no_grad():
        out = encoder(torch.randn(1, 1, 64, 8).repeat(64, 1, 1, 1)).flatten(1)
        encoder.blocks.eval()
        whole = encoder(torch.randn(1, 1, 64, 8).repeat(64, 1, 1, 1)).flatten(1)
    assert len((out / (64 * OTHER_ORDER)).round().unique(dim=0)) == 4
    assert (whole - whole[0]).abs().max() < OTHER_ORDER


def test_a_clip_without_valid_token_is_nobodys_problem():
    encoder = tiny().eval()
    mel, _, mask = batch(2)
    rows = encoder.masked_tokens(mel, torch.tensor([3, 41]), mask, replace=True)
    torch.testing.assert_close(
        rows, encoder.masked_tokens(mel[1:], None, mask[1:], replace=True), rtol=0, atol=OTHER_ORDER
    )
    assert encoder(mel, torch.tensor([0, 41])).isfinite().all()


def test_intermediate():
    ours, plain = plain_pair()
    mel, lengths, _ = batch()
    both = ours.intermediate(mel, lengths, n_blocks=2)
    assert both.shape == (3, 10, 48)
    assert torch.equal(both[..., 24:], ours(mel, lengths))
    assert torch.equal(both[..., 24:], ours.intermediate(mel, lengths))
    del plain.blocks[1]
    assert_same(both[..., :24], plain.tokens(mel, lengths)[0])


def test_no_clips():
    encoder = tiny()
    assert encoder(torch.randn(0, 1, 64, 41)).shape == (0, 10, 24)
    assert encoder(torch.randn(0, 1, 64, 41), torch.zeros(0, dtype=torch.int64)).shape == (0, 10, 24)


def errors():
    mel, lengths, mask = batch()
    n, p = "FrameEncoder: ", torch.Tensor
    yield lambda e: e(mel[:, 0]), n + r"mel must be \[B, 1, 64, T\]"
    yield lambda e: e(mel[:, :, :32]), n + r"mel must be \[B, 1, 64, T\]"
    yield lambda e: e(mel.repeat(1, 2, 1, 1)), n + r"mel must be \[B, 1, 64, T\]"
    yield lambda e: e(None), n + "mel must be a tensor"
    yield lambda e: e(torch.randn(1, 1, 64, 45)), n + "mel must be at most 41 frames long"
    yield lambda e: e(mel, lengths.int()), n + r"lengths must be .* of dtype int64"
    yield lambda e: e(mel, lengths[:2]), n + r"lengths must be \[3\]"
    yield lambda e: e(mel, lengths + 41), n + r"lengths must be \[3\] \(valid frames of each clip, 0 to 41\)"
    yield lambda e: e(mel, p([41, -1, 41]).long()), n + r"lengths must be .*, got list \[41, -1, 41\]"
    yield lambda e: e(mel, p([41, 42, 41]).long()), n + r"lengths must be .*, got list \[41, 42, 41\]"
    yield lambda e: e(mel, None, p.float(mask)), n + r"mask must be .* of dtype bool"
    yield lambda e: e(mel, None, mask[:, 1:]), n + r"mask must be \[3, 10\] \(clips, tokens\)"
    yield lambda e: e.masked_tokens(mel, None, mask[:2], replace=True), n + r"mask must be \[3, 10\]"
    yield lambda e: e.masked_tokens(mel, None, mask & False, replace=True), n + "mask must select at least one"
    yield lambda e: e.masked_tokens(mel, lengths * 0, mask, replace=True), n + "mask must select at least one"
    yield lambda e: e.intermediate(mel, n_blocks=3), n + "n_blocks must be from 1 to 2"
    yield lambda e: tiny(pos_type="learned"), n + "pos_type must be"
    yield lambda e: tiny(patch=(65, 4)), n + "patch must be at most"
    yield lambda e: tiny(patch=(64, 0)), n + "patch must be two positive numbers"
    yield lambda e: tiny(patch=(64,)), n + "patch must be two positive numbers"
    yield lambda e: FrameEncoder("huge"), n + "arch must be one of tiny, small, base, large"
    yield lambda e: FrameEncoder({"dim": 24}), n + "arch must be"
    yield lambda e: FrameEncoder({**TINY, "depth": 0}), n + "arch must be .*, each at least 1, got"
    yield lambda e: FrameEncoder({**TINY, "num_heads": 0}), n + "arch must be .*, each at least 1, got"
    yield lambda e: FrameEncoder(2), n + "arch must be a name or a mapping .*, got int 2"


@pytest.mark.parametrize("index", range(len(list(errors()))))
def test_errors(index):
    call, message = list(errors())[index]
    with pytest.raises((ValueError, TypeError), match=message):
        call(tiny())


def test_archs_have_the_published_sizes():
    counts = {}
    for arch in ("small", "base"):
        with torch.device("meta"):
            counts[arch] = sum(p.numel() for p in FrameEncoder(arch).parameters())
    assert counts == {"small": 21_475_968, "base": 85_419_264}
    assert all(size["dim"] % size["num_heads"] == 0 for size in ARCHS.values())


def test_initialisation():
    encoder = FrameEncoder("tiny")
    for name, p in encoder.named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        elif "norm" in name:
            assert (p == 1).all(), name
        else:
            assert p.std().item() == pytest.approx(0.02, rel=0.25 if p.numel() < 1000 else 0.03), name
    assert [round(b.drop_path, 6) for b in encoder.blocks] == [0.0, 0.033333, 0.066667, 0.1]


def test_copies_and_config():
    encoder = tiny(patch_embed="CNN", qkv_bias=True, pos_type="interpolate").eval()
    mel, lengths, _ = batch()
    for other in copies(encoder):
        assert torch.equal(other(mel, lengths), encoder(mel, lengths))
    state = encoder.state_dict()
    with pytest.raises(RuntimeError, match=r"norm_frame\.weight"):
        encoder.load_state_dict({k: v for k, v in state.items() if k != "norm_frame.weight"})


def test_made_on_meta_and_filled_later():
    with torch.device("meta"):
        encoder = tiny()
    encoder = encoder.to_empty(device="cpu")
    encoder.reset_parameters()
    assert encoder(torch.randn(1, 1, 64, 41)).isfinite().all()


def test_autocast():
    encoder = tiny().eval()
    mel, lengths, mask = batch()
    with torch.autocast("cpu", torch.bfloat16):
        rows = encoder.masked_tokens(mel, lengths, mask, replace=True)
    want = encoder.masked_tokens(mel, lengths, mask, replace=True)
    torch.testing.assert_close(rows.float(), want, rtol=0, atol=BF16_RTOL * want.abs().max().item())


def test_compile():
    encoder = tiny().eval()
    mel, lengths, mask = batch()
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(mel), encoder(mel), rtol=0, atol=OTHER_ORDER)
    torch.testing.assert_close(compiled(mel, lengths, mask), encoder(mel, lengths, mask), rtol=0, atol=OTHER_ORDER)
