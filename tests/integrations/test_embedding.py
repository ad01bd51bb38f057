import copy
import pickle

import pytest
import torch

from atst_fast.integrations import load_checkpoint
from atst_fast.integrations.embedding import Embedder
from atst_fast.integrations.spans import official_clip
from atst_fast.models import ClipEncoder, FrameEncoder
from atst_fast.nn import LogMelSpectrogram
from tests.golden import assert_golden, load
from tests.tolerances import CHUNKED_FEATURES, POOLED

META = load("embedding")[1]
SIZE = {"dim": 32, "depth": 2, "num_heads": 2}
SECOND = 16000


def encoder(max_frames=1001, **options):
    torch.manual_seed(1)
    return FrameEncoder(SIZE, max_frames=max_frames, **options).eval()


def embedder(max_frames=101, **options):
    """Chunks of a second, so that a few of them are long audio."""
    return Embedder(encoder(max_frames), **options)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.1


def golden_waveform(case):
    x = load("mel_waveforms")[0]["in/speech_160000"] / 32768
    n = case.get("n", 0)
    if case["build"] == "a25":
        return torch.cat([x, 0.5 * x, x[:80000]])[None]
    if case["build"] == "batch":
        return torch.stack([x[:n], 0.01 * x[n : 2 * n]])[:, None]
    return (torch.cat([x, x[: n - 160000]]) if case["build"] == "tail" else x[:n])[None]


@pytest.mark.parametrize("case", META["cases"], ids=lambda case: case["id"])
@torch.no_grad()
def test_official_behaviour(case):
    weights = {k.removeprefix("in/w/"): v for k, v in load("embedding")[0].items() if k.startswith("in/w/")}
    official = FrameEncoder({"dim": 48, "depth": 2, "num_heads": 3}).eval()
    official.load_state_dict(weights)
    embedder, waveform, name = Embedder(official, official=True), golden_waveform(case), case["id"]
    assert_golden("embedding", f"out/{name}/scene", embedder.scene(waveform))
    embeddings, ms = embedder.timestamps(waveform)
    assert list(embeddings.shape) == META["timestamp_shapes"][name]
    rows = case.get("rows", list(range(embeddings.shape[1])))
    assert_golden("embedding", f"out/{name}/timestamp", embeddings[:, rows])
    assert_golden("embedding", f"out/{name}/t_ms", ms[:, rows])


@pytest.mark.parametrize("seconds", [10, 3600, 24 * 3600])
def test_token_i_starts_at_40_i_ms_exactly(seconds):
    e = Embedder(encoder())
    starts = [s.start + 4 * i for s in e.spans(seconds * SECOND, "timestamps") for i in range(s.tokens)]
    assert starts == list(range(0, seconds * 100, 4))
    assert e.times(len(starts)).tolist() == [40.0 * i for i in range(len(starts))]


def test_the_official_times_drift():
    """So that the test above is seen to tell the difference: 3.6 s in an hour."""
    e = Embedder(encoder(), official=True)
    starts = [s.start + 4 * i for s in e.spans(3600 * SECOND, "timestamps") for i in range(s.tokens)]
    assert starts[-1] * 10 - e.times(len(starts))[-1].item() == 3590


@torch.no_grad()
def test_what_repeats_every_second_is_heard_every_second():
    """Time and content agree: 60 chunks of the same second look alike, but for the reflection at either end."""
    second = noise(SECOND)
    embeddings, ms = embedder().timestamps(second.repeat(60)[None])
    assert embeddings.shape == (1, 1500, 64)
    chunks = embeddings[0].unflatten(0, (60, 25))
    assert ms[0].unflatten(0, (60, 25))[:, 0].tolist() == [1000.0 * i for i in range(60)]
    torch.testing.assert_close(chunks[2:-1], chunks[1].expand(57, -1, -1), rtol=0, atol=CHUNKED_FEATURES)
    assert (chunks[0] - chunks[1]).abs().max() > 1e-3  # which chunks of other content would be


@pytest.mark.parametrize("samples", [16000, 16001, 16160, 16640, 24319, 24320, 24321, 40000])
@torch.no_grad()
def test_every_sample_counts_the_same(samples):
    e, waveform = embedder(), noise(2, samples)
    embeddings, ms = e.timestamps(waveform)
    tokens = -(-samples // 640)
    assert embeddings.shape == (2, tokens, 64)
    assert e.tokens(samples) == tokens
    assert ms[0, -1] < samples / 16 <= ms[0, -1] + 40
    weights = torch.ones(tokens)
    weights[-1] = samples / 640 - (tokens - 1)
    want = (embeddings * weights[:, None]).sum(1) / weights.sum()
    torch.testing.assert_close(e.scene(waveform), want, rtol=0, atol=POOLED)


@torch.no_grad()
def test_a_padded_clip_is_embedded_as_alone():
    e = embedder(batch_size=3)
    lengths = torch.tensor([40000, 1, 600, 16001, 33333])
    waveform = noise(5, 40000)
    scenes, (embeddings, ms) = e.scene(waveform, lengths), e.timestamps(waveform, lengths)
    assert torch.equal(ms, e.times(63).expand(5, -1))
    for i, n in enumerate(lengths.tolist()):
        alone, (of, _) = e.scene(waveform[i : i + 1, :n]), e.timestamps(waveform[i : i + 1, :n])
        torch.testing.assert_close(scenes[i : i + 1], alone, rtol=0, atol=CHUNKED_FEATURES)
        assert of.shape[1] == max(1, -(-n // 640))
        torch.testing.assert_close(embeddings[i : i + 1, : of.shape[1]], of, rtol=0, atol=CHUNKED_FEATURES)
        assert not embeddings[i, of.shape[1] :].any()


@torch.no_grad()
def test_a_quiet_clip_does_not_get_the_floor_of_a_loud_one():
    e, waveform = embedder(), noise(2, SECOND)
    waveform[1] *= 1e-3
    torch.testing.assert_close(e.scene(waveform)[1:], e.scene(waveform[1:]), rtol=0, atol=CHUNKED_FEATURES)


@torch.no_grad()
def test_the_last_patch_repeats_its_last_frame():
    e = Embedder(encoder())
    mel = LogMelSpectrogram()(noise(1, 1, 16001 - 1))[:, 0]  # 101 frames; 25 patches and a frame
    (span,) = e.spans(16001, "scene")
    assert span[:3] == (0, 101, 26)
    got = e.encode([mel[0]], [span])[1]
    full = torch.cat([mel, mel[..., -1:].expand(-1, -1, 3)], dim=2)[:, None]
    torch.testing.assert_close(got, e.encoder.intermediate(full, None, 2), rtol=0, atol=CHUNKED_FEATURES)


@torch.no_grad()
def test_int16_three_axes_and_half_precision_are_read_the_same():
    e = embedder()
    pcm = (noise(2, 20000) * 32768).to(torch.int16)
    want = e.scene(pcm.float() / 32768)
    for same in (pcm, pcm[:, None], (pcm.double() / 32768)):
        torch.testing.assert_close(e.scene(same), want, rtol=0, atol=POOLED)
    assert e.bfloat16().scene(pcm).dtype == torch.float32


@torch.no_grad()
def test_the_size_of_a_batch_changes_nothing_but_rounding():
    waveform = noise(3, 55555)
    want = embedder().timestamps(waveform)[0]
    torch.testing.assert_close(embedder(batch_size=1).timestamps(waveform)[0], want, rtol=0, atol=CHUNKED_FEATURES)


@torch.no_grad()
def test_the_last_block_alone_is_the_end_of_all_blocks():
    waveform = noise(1, 20000)
    one, two = embedder(n_blocks=1), embedder()
    assert (one.scene_embedding_size, two.scene_embedding_size) == (32, 64)
    assert (one.timestamp_embedding_size, two.timestamp_embedding_size) == (32, 64)
    torch.testing.assert_close(two.scene(waveform)[:, 32:], one.scene(waveform), rtol=0, atol=POOLED)
    assert Embedder(FrameEncoder({**SIZE, "depth": 14})).n_blocks == 12


@torch.no_grad()
def test_patches_above_one_another_are_averaged():
    tall = FrameEncoder(SIZE, patch=(32, 4), max_frames=101).eval()
    waveform = noise(1, SECOND)
    got = Embedder(tall, n_blocks=1).timestamps(waveform)[0]
    mel = LogMelSpectrogram()(waveform[:, None])[..., :100]
    want = tall.intermediate(mel, None, 1).unflatten(1, (25, 2)).mean(2)
    torch.testing.assert_close(got, want, rtol=0, atol=CHUNKED_FEATURES)


@torch.no_grad()
def test_fixed_shapes_give_the_same():
    e, waveform, lengths = embedder(), noise(2, 40000), torch.tensor([40000, 20001])
    want = e.timestamps(waveform, lengths)[0]
    e.encoder.fixed_shapes = True
    torch.testing.assert_close(e.timestamps(waveform, lengths)[0], want, rtol=0, atol=CHUNKED_FEATURES)


def test_gradients_reach_the_encoder_and_the_waveform():
    e, waveform = embedder(), noise(2, 30000).requires_grad_()
    e.scene(waveform).square().sum().backward()
    assert all(p.grad is not None for n, p in e.encoder.named_parameters() if n != "mask_embed")
    assert waveform.grad.abs().sum(1).min() > 0


# errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_blocks": 3}, "n_blocks must be from 1 to 2, the encoder's depth, got int 3"),
        ({"n_blocks": 0}, "n_blocks must be from 1 to 2"),
        ({"batch_size": 0}, "batch_size must be at least 1, got int 0"),
        ({"chunk_frames": 3}, "chunk_frames must be at least 4, the frames of a token, got int 3"),
        ({"chunk_frames": 102}, "chunk_frames must be at most 101, for which the encoder has positions, got int 102"),
        ({"front_end": {"n_mels": 80}}, "front_end must make 64 mel bands, as encoder takes; got 80"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=f"^Embedder: {message}"):
        Embedder(encoder(101), **options)


def test_something_else_is_no_encoder():
    with pytest.raises(TypeError, match=r"Embedder: encoder must be a FrameEncoder or a ClipEncoder, got a Linear$"):
        Embedder(torch.nn.Linear(2, 2))


def test_a_token_stands_for_its_patch_and_the_hop_of_the_front_end():
    assert Embedder(encoder(patch=(64, 8))).hop_ms == 80
    assert Embedder(encoder(), {"hop_length": 320}).hop_ms == 80
    assert Embedder(encoder(), {"sample_rate": 32000, "hop_length": 320}).hop_ms == 40
    other = Embedder(encoder(), {"sample_rate": 22050})  # whose times are no floats: the nearest ones
    want = torch.tensor([i * 640 / 22.05 for i in range(5000)], dtype=torch.float64).float()
    assert torch.equal(other.times(5000), want)


@pytest.mark.parametrize("frames, starts", [(50, [0]), (101, [0]), (151, [0]), (152, [0, 101]), (202, [0, 101])])
def test_the_official_chunks_of_a_clip_are_more_than_half_full(frames, starts):
    spans = official_clip(frames, 4, 101)
    assert [span.start for span in spans] == starts
    assert [span.share for span in spans] == [1 / len(starts)] * len(starts)


def test_spans_of_what_is_padded_and_of_the_official_times():
    e = clip_embedder(official=True)
    assert embedder().spans(1, "scene") == embedder().spans(513, "scene")
    assert [span.tokens for span in e.spans(130 * 160, "scene")] == [25]  # less than half of a chunk is left out
    assert e.tokens(130 * 160) == 25 + 7  # but has its times


def test_longer_chunks_need_interpolated_positions():
    assert Embedder(encoder(101, pos_type="interpolate"), chunk_frames=200).chunk_frames == 200


@pytest.mark.parametrize(
    ("waveform", "lengths", "error", "message"),
    [
        (noise(100), None, ValueError, r"waveform must be \[B, N\] or \[B, 1, N\] \(clips, samples\), none of them 0"),
        (noise(2, 2, 900), None, ValueError, "waveform must be"),
        (noise(2, 0), None, ValueError, "none of them 0, got float32"),
        ([0.0], None, TypeError, "waveform must be a tensor"),
        (
            torch.zeros(1, 900, dtype=torch.int64),
            None,
            TypeError,
            "Embedder: waveform must be .* float or int16, got int64",
        ),
        (
            noise(2, 900),
            torch.tensor([900]),
            ValueError,
            r"lengths must be \[2\] \(valid samples of each clip, 1 to 900",
        ),
        (noise(2, 900), torch.tensor([0, 900]), ValueError, "lengths must be"),
        (noise(2, 900), torch.tensor([1, 901]), ValueError, "lengths must be"),
        (noise(2, 900), torch.tensor([1.0, 2.0]), TypeError, "lengths must be"),
    ],
)
def test_arguments_out_of_range_are_refused(waveform, lengths, error, message):
    with pytest.raises(error, match=message):
        embedder().scene(waveform, lengths)


# ATST-Clip


def clip_embedder(max_frames=101, **options):
    torch.manual_seed(1)
    use_cls = options.pop("use_cls", True)
    return Embedder(ClipEncoder(SIZE, max_frames=max_frames, use_cls=use_cls).eval(), **options)


@pytest.mark.parametrize("n_blocks", [1, 2])
@torch.no_grad()
def test_official_behaviour_of_clip(n_blocks):
    """Chunk by chunk, as it goes through audio of any length; the golden spectrogram is given instead of audio."""
    official = ClipEncoder({"dim": 48, "depth": 2, "num_heads": 3}).eval()
    tensors = load("embedding")[0]
    official.load_state_dict({k.removeprefix("in/wc/"): v for k, v in tensors.items() if k.startswith("in/wc/")})
    e = Embedder(official, official=True, n_blocks=n_blocks)
    mel = LogMelSpectrogram()(load("mel_waveforms")[0]["in/speech_160000"])
    scenes = []
    for frames in META["clip_len"]:
        spans = e.spans((frames - 1) * 160, "scene")
        parts = [mel[:, span.start : span.start + span.frames] for span in spans]
        scenes.append(e.pool(*e.encode(parts, spans), spans).sum(0))
    assert_golden("embedding", f"out/clip_chunks/n{n_blocks}", torch.stack(scenes))


@torch.no_grad()
def test_clip_scenes_are_class_tokens_then_means_by_length():
    e, waveform = clip_embedder(), noise(1, 40000)
    assert (e.scene_embedding_size, e.timestamp_embedding_size) == (128, 64)
    embeddings, ms = e.timestamps(waveform)
    assert embeddings.shape == (1, 63, 64)
    assert ms[0, -1] == 2480
    weights = torch.tensor([1.0] * 62 + [0.5])
    mean = (embeddings * weights[:, None]).sum(1) / 62.5
    mel = LogMelSpectrogram()(waveform[:, None])
    parts = mel[..., :100], mel[..., 100:200], torch.cat([mel[..., 200:], mel[..., -1:]], dim=3)  # 51 frames and one
    cls = [e.encoder.intermediate(part, None, 2)[0] for part in parts]
    want = torch.cat([(25 * cls[0] + 25 * cls[1] + 12.5 * cls[2]) / 62.5, mean], dim=1)
    torch.testing.assert_close(e.scene(waveform), want, rtol=0, atol=CHUNKED_FEATURES)


@torch.no_grad()
def test_without_a_class_token_a_scene_is_the_mean_alone():
    e, waveform = clip_embedder(use_cls=False), noise(2, SECOND)
    assert e.scene_embedding_size == 64
    want = e.encoder.intermediate(LogMelSpectrogram()(waveform[:, None])[..., :100], None, 2)[1].mean(1)
    torch.testing.assert_close(e.scene(waveform), want, rtol=0, atol=CHUNKED_FEATURES)


def test_clip_sees_six_seconds_at_once():
    assert clip_embedder(1001).chunk_frames == 600
    assert clip_embedder(1001, official=True).chunk_frames == 601
    assert clip_embedder(1001, chunk_frames=1000).chunk_frames == 1000
    assert Embedder(encoder()).chunk_frames == 1000
    assert Embedder(encoder(), official=True).chunk_frames == 1001


# folders


@pytest.mark.parametrize("make", [embedder, clip_embedder])
@torch.no_grad()
def test_an_embedder_comes_back_from_its_folder(make, tmp_path):
    pytest.importorskip("safetensors", reason="needs the extra train")
    front_end = {"top_db": 40.0, "minmax": (-60.0, 40.0), "f_min": 100.0, "win_length": 640}
    saved = make(n_blocks=1, batch_size=3, chunk_frames=60, front_end=front_end)
    assert saved.save_pretrained(tmp_path / "folder") == tmp_path / "folder"
    loaded, waveform = Embedder.from_pretrained(tmp_path / "folder"), noise(2, 30000)
    assert not loaded.training
    assert Embedder.from_config(make(official=True).to_config()).official
    assert loaded.to_config() == saved.to_config()
    assert torch.equal(loaded.scene(waveform), saved.scene(waveform))
    checkpoint = load_checkpoint(tmp_path / "folder")
    again = Embedder(checkpoint.encoder, checkpoint.front_end, n_blocks=1, batch_size=3, chunk_frames=60)
    assert torch.equal(again.scene(waveform), saved.scene(waveform))


def test_copies_and_pickles_give_the_same():
    e, waveform = embedder(), noise(1, 20000)
    with torch.no_grad():
        for same in (copy.deepcopy(e), pickle.loads(pickle.dumps(e))):
            assert torch.equal(same.scene(waveform), e.scene(waveform))


def test_under_autocast_means_are_float32():
    e, waveform = embedder(), noise(2, 2 * SECOND)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        scene, tokens = e.scene(waveform), e.timestamps(waveform)[0]
    assert scene.dtype == tokens.dtype == torch.float32
    torch.testing.assert_close(scene, tokens.mean(1), rtol=POOLED, atol=POOLED)


def test_the_official_code_has_no_tokens_of_less_than_a_patch():
    e = Embedder(encoder(patch=(64, 16)), official=True)
    embeddings, ms = e.timestamps(noise(2, 1600))
    assert embeddings.shape == (2, 0, e.timestamp_embedding_size)
    assert ms.shape == (2, 0)
    lengths = torch.tensor([SECOND, 1600])
    embeddings, _ = e.timestamps(noise(2, SECOND), lengths)
    assert embeddings.shape[1] == 6
    assert not embeddings[1].any()
