"""Features of long audio: golden tensors of the official chunks, chunk by chunk by hand, and errors."""

import copy

import pytest
import torch

from atst_fast.models import ClipEncoder, FrameEncoder, clip_features, frame_features, token_features
from atst_fast.nn import LogMelSpectrogram
from tests.golden import assert_golden, load
from tests.tolerances import OTHER_ORDER

SIZE = {"dim": 24, "depth": 2, "num_heads": 3}


@pytest.fixture(scope="module")
def frame_encoder():
    torch.manual_seed(0)
    return FrameEncoder(SIZE, max_frames=101).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def clip_encoder():
    torch.manual_seed(0)
    return ClipEncoder(SIZE, max_frames=101).eval().requires_grad_(False)


def golden_clip_chunks():
    """Encoder, mel and lengths of ``clip_chunks``."""
    t, meta = load("embedding")
    c = meta["clip_cfg"]
    size = {"dim": c["dim"], "depth": c["depth"], "num_heads": c["heads"]}
    encoder = ClipEncoder(size, max_frames=c["spec_w"])
    encoder.load_state_dict({k.removeprefix("in/wc/"): v for k, v in t.items() if k.startswith("in/wc/")})
    waveform = load("mel_waveforms")[0]["in/speech_160000"].float() / 32768
    lengths = torch.tensor(meta["clip_len"])
    mel = LogMelSpectrogram()(waveform[None, None]).repeat(4, 1, 1, 1)
    mel = mel * (torch.arange(mel.shape[3]) < lengths[:, None, None, None])
    return encoder.eval(), mel, lengths, meta["clip_chunk_len"]


@torch.inference_mode()
def test_golden_clip_chunks():
    encoder, mel, lengths, chunk = golden_clip_chunks()
    for n in (1, 2):
        assert_golden("embedding", f"out/clip_chunks/n{n}", clip_features(encoder, mel, lengths, n, chunk))
    short = clip_features(encoder, mel[1:3, ..., :600], lengths[1:3].clamp(max=600), 1, chunk)
    assert_golden("embedding", "out/clip_chunks/n1_short", short)


@torch.inference_mode()
def test_the_scale_bug_is_in_the_means_alone():
    encoder, mel, lengths, chunk = golden_clip_chunks()
    official = clip_features(encoder, mel, lengths, 1, chunk)
    ours = clip_features(encoder, mel, lengths, 1, chunk, scale_bug=False)
    cls, mean = official[0].chunk(2)
    assert torch.equal(ours[0, : len(cls)], cls)
    # of 1001 frames the first chunk of 150 tokens is divided by 250; the second one, of 100 tokens, by 100
    first, second = (encoder.intermediate(mel[:1, ..., a:b])[1].mean(1)[0] for a, b in ((0, 601), (601, 1001)))
    torch.testing.assert_close(mean, (0.6 * first + second) / 2, rtol=0, atol=OTHER_ORDER)
    torch.testing.assert_close(ours[0, len(cls) :], (first + second) / 2, rtol=0, atol=OTHER_ORDER)
    assert torch.equal(clip_features(encoder, mel, lengths, 1, chunk, avgpool=False), official[:, : len(cls)])


@pytest.mark.parametrize("frames", [101, 202, 260, 240])
@torch.inference_mode()
def test_frame_features_chunk_by_chunk(frame_encoder, frames):
    lengths = torch.tensor([frames, frames - 60, 140, 3, 0])
    mel = torch.randn(5, 1, 64, frames)
    got = frame_features(frame_encoder, mel, lengths.clamp(max=frames), 2, 101)
    for row, n in enumerate(lengths.clamp(max=frames).tolist()):
        means = []
        for start in range(0, n, 101):
            tokens = min(n - start, 101) // 4
            if tokens and (start == 0 or n - start > 50):
                out = frame_encoder.intermediate(mel[row : row + 1, ..., start : start + 4 * tokens], None, 2)
                means.append(out[0].mean(0))
        want = torch.stack(means).mean(0) if means else torch.zeros(48)
        torch.testing.assert_close(got[row], want, rtol=0, atol=OTHER_ORDER)


@pytest.mark.parametrize(
    "frames, chunk, counted",
    [
        (50, 30, [(0, 30)]),  # 20 frames are left out
        (51, 30, [(0, 30), (30, 51)]),
        (12, 30, [(0, 12)]),  # unless they are all there is
        (100, 20, [(start, start + 20) for start in range(0, 100, 20)]),
        (151, 101, [(0, 101)]),  # half of a chunk is not more than half of it
        (152, 101, [(0, 101), (101, 152)]),
    ],
)
@torch.inference_mode()
def test_which_chunks_count(frame_encoder, frames, chunk, counted):
    """Alone, and beside a longer clip."""
    mel = torch.randn(2, 1, 64, frames + 2 * chunk)
    means = [frame_encoder.intermediate(mel[:1, ..., a:b])[0].mean(0) for a, b in counted]
    want = torch.stack(means).mean(0)
    alone = frame_features(frame_encoder, mel[:1, ..., :frames], None, 1, chunk)
    torch.testing.assert_close(alone[0], want, rtol=0, atol=OTHER_ORDER)
    if chunk > 40:
        lengths = torch.tensor([frames, frames + 2 * chunk])
        both = frame_features(frame_encoder, mel, lengths, 1, chunk)
        torch.testing.assert_close(both[0], want, rtol=0, atol=OTHER_ORDER)


@torch.inference_mode()
def test_a_clip_of_nothing_gives_zeros(clip_encoder):
    """It does not count: not even its class token does."""
    got = clip_features(clip_encoder, torch.randn(2, 1, 64, 120), torch.tensor([0, 120]), 1, 101)
    assert not got[0].any()
    assert got[1].all()


@torch.inference_mode()
def test_means_of_halves_are_float32(frame_encoder, clip_encoder):
    mel = torch.randn(1, 1, 64, 101, dtype=torch.bfloat16)
    for encoder, features in ((frame_encoder, frame_features), (clip_encoder, clip_features)):
        assert features(copy.deepcopy(encoder).bfloat16(), mel).dtype == torch.float32


@torch.inference_mode()
def test_lengths_on_fixed_shapes_give_the_same(frame_encoder, clip_encoder):
    mel, lengths = torch.randn(3, 1, 64, 230), torch.tensor([230, 110, 160])
    for encoder, features in ((frame_encoder, frame_features), (clip_encoder, clip_features)):
        counted = features(encoder, mel, lengths, 1, 101)
        encoder.fixed_shapes = True
        fixed = features(encoder, mel, lengths, 1, 101)
        encoder.fixed_shapes = None
        torch.testing.assert_close(fixed, counted, rtol=0, atol=OTHER_ORDER)


@torch.inference_mode()
def test_tokens_do_not_drift(frame_encoder, clip_encoder):
    """Chunks of 100 frames for 101: token k begins at frame 4 k, also in later chunks."""
    mel, lengths = torch.randn(2, 1, 64, 246), torch.tensor([246, 130])
    for encoder in (frame_encoder, clip_encoder):
        got = token_features(encoder, mel, lengths, 1, 101)
        assert got.shape == (2, 61, 24)
        parts = [encoder.intermediate(mel[:1, ..., a : a + 100]) for a in (0, 100, 200)]
        want = torch.cat([p[1] if isinstance(p, tuple) else p for p in parts], dim=1)
        torch.testing.assert_close(got[:1], want, rtol=0, atol=OTHER_ORDER)
        assert not got[1, 32:].any()
        assert got[1, :32].all()
        assert token_features(encoder, mel[..., :104], None, 1, 101).shape == (2, 26, 24)  # the last chunk is a token


@pytest.mark.parametrize("frames", [3, 101, 250])
def test_no_clips(frame_encoder, clip_encoder, frames):
    mel, none = torch.zeros(0, 1, 64, frames), torch.zeros(0, dtype=torch.int64)
    assert frame_features(frame_encoder, mel, none, 1, 101).shape == (0, 24)
    assert clip_features(clip_encoder, mel, none, 1, 101).shape == (0, 48)
    assert token_features(frame_encoder, mel, none, 1, 100).shape == (0, frames // 4, 24)


def test_gradients_pass_through_chunks(frame_encoder):
    mel = torch.randn(1, 1, 64, 202, requires_grad=True)
    frame_features(frame_encoder, mel, None, 1, 101).sum().backward()
    assert mel.grad[..., :100].any()
    assert mel.grad[..., 101:201].any()
    assert not mel.grad[..., 100].any()  # the frame after the last patch


@pytest.mark.parametrize("features", [frame_features, token_features])
def test_errors(frame_encoder, features):
    mel = torch.randn(2, 1, 64, 101)
    name = features.__name__
    with pytest.raises(ValueError, match=rf"{name}: mel must be \[B, 1, 64, T\]"):
        features(frame_encoder, mel[0])
    with pytest.raises(ValueError, match=f"{name}: chunk_frames must be at least 4 frames"):
        features(frame_encoder, mel, chunk_frames=3)
    with pytest.raises(ValueError, match=rf"{name}: lengths must be \[2\]"):
        features(frame_encoder, mel, torch.tensor([101]))
    with pytest.raises(ValueError, match=rf"{name}: lengths must be .*got list \[102, 1\]"):
        features(frame_encoder, mel, torch.tensor([102, 1]))
    with pytest.raises(ValueError, match=rf"{name}: lengths must be .*got list \[-1, 1\]"):
        features(frame_encoder, mel, torch.tensor([-1, 1]))
    assert features(frame_encoder, mel, chunk_frames=4).isfinite().all()
    with pytest.raises(TypeError, match=f"{name}: lengths must be"):
        features(frame_encoder, mel, torch.tensor([101.0, 1.0]))


def test_tokens_that_share_their_time_are_refused():
    encoder = FrameEncoder(SIZE, patch=(16, 16), max_frames=96)
    assert frame_features(encoder, torch.randn(1, 1, 64, 96)).shape == (1, 24)
    with pytest.raises(ValueError, match="token_features: encoder must have one token at a time, got 4 of them"):
        token_features(encoder, torch.randn(1, 1, 64, 96))
