import io

import pytest
import torch

from atst_fast.ops import augment
from atst_fast.ops.augment import AugmentDraws, MemoryBank, augment_views
from atst_fast.train import views
from atst_fast.train.front_end import ClipFrontEnd, FrontEnd
from atst_fast.train.masks import spans_to_mask
from tests import tolerances as tol
from tests.golden import load
from tests.triton.test_atst_frame import NothingWaits


def replay(tape, augmented, banks, shape):
    """The official draws of one call, in its order: crop start, mask, then mixup and crop of each augmented view."""
    tape = list(tape)
    draw = lambda name: tape.pop(0)[1] if tape and tape[0][0] == name else None  # noqa: E731
    crop_start = draw("randint") or 0
    draw("rand")
    starts = draw("choice")
    draws = []
    for on, bank in zip(augmented, banks):
        if not on:
            draws.append(None)
            continue
        alpha = 0.4 * draw("random")
        partner = draw("randint") if bank.count else -1
        bins, frames = shape
        h = min(max(int(draw("uniform") * bins), 1), bins)
        draw("uniform")
        i = draw("randint") or 0
        draws.append(AugmentDraws(
            torch.tensor([partner]), torch.tensor([0]), torch.tensor([alpha]), torch.tensor([[i, 0, h, frames]]), shape
        ))  # fmt: skip
    assert not tape
    return crop_start, starts, draws


def replay_clip(tape, front, shape):
    """The same of ATST-Clip: two crop starts, then mixup and crop in both axes of each view."""
    tape = list(tape)
    draw = lambda name: tape.pop(0)[1] if tape and tape[0][0] == name else None  # noqa: E731
    starts, draws = [draw("randint"), draw("randint")], []
    bins, frames = shape
    canvas = (bins, int(1.5 * frames))
    for bank in front.banks:
        alpha = 0.4 * draw("random")
        partner = draw("randint") if bank.count else -1
        h = min(max(int(draw("uniform") * bins), 1), bins)
        w = min(max(int(draw("uniform") * frames), 1), canvas[1])
        i = draw("randint") if h < bins else 0
        j = draw("randint") if w < canvas[1] else 0
        crop = torch.tensor([[i, j, h, w]])
        draws.append(AugmentDraws(torch.tensor([partner]), torch.tensor([0]), torch.tensor([alpha]), crop, canvas))
    assert not tape
    return starts, draws


CASES = [case for case in load("transform")[1]["cases"] if case["kind"] == "frame"]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c["id"])
def test_golden_transform(isa, case):
    """Two calls of the official transform (the second mixes with the first one), with its draws replayed."""
    t, _ = load("transform")
    wave, options = t[case["x"]], case["kw"]
    augmented = (options["aug_tea"], options["aug_stu"])
    front = FrontEnd(n_mels=options["n_mels"], win_length=options.get("win_length"))
    banks = [MemoryBank(10) if on else None for on in augmented]
    samples = int(options["anchor_len"] * 16000)
    for call, tape in enumerate(case["tape"]):
        start, spans, draws = replay(tape, augmented, banks, (options["n_mels"], samples // 160 + 1))
        clip = torch.nn.functional.pad(wave[start : start + samples], (0, max(0, samples - len(wave))))
        made = augment_views(front.log_mel(clip[None, None]), draws, banks)
        stored = [t[f"out/{case['id']}/call{call}/crop{v}"] for v in range(2)]
        for view, expected in zip(made, stored):
            torch.testing.assert_close(view[0], expected, rtol=0, atol=tol.FRONT_END)
        mask = t[f"out/{case['id']}/call{call}/mask"]
        spans = torch.tensor([spans])
        assert torch.equal(spans_to_mask(spans, torch.full_like(spans, options["mask_len"]), len(mask))[0], mask)


def test_golden_clip_transform(isa, monkeypatch):
    """Two calls of the official transform, with its draws replayed in ClipFrontEnd's own."""
    t, meta = load("transform")
    (case,) = (c for c in meta["cases"] if c["kind"] == "clip")
    samples = [int(case["kw"][name][0] * 16000) for name in ("anchor_len", "positive_len")]
    front, wave = ClipFrontEnd(samples, bank_size=10), t[case["x"]]
    for call, tape in enumerate(case["tape"]):
        starts, draws = replay_clip(tape, front, (64, samples[0] // 160 + 1))
        monkeypatch.setattr(views, "draw_augment", lambda *_, left=draws, **__: left.pop(0))
        crops = [wave[start : start + n] for start, n in zip(starts, samples)]
        batch = front(torch.cat(crops)[None])
        for k, view in enumerate(batch[:2]):
            expected = t[f"out/{case['id']}/call{call}/crop{k}"]
            torch.testing.assert_close(view[0], expected, rtol=0, atol=tol.FRONT_END)
        assert t[f"out/{case['id']}/call{call}/lengths"].tolist() == [view.shape[3] for view in batch[:2]]
        assert batch.lengths1 is batch.lengths2 is None


def test_both_views_are_drawn_as_published(monkeypatch):
    """Sizes of the crops: up to all bins, 0.6 to 1.5 of the frames on a canvas of 1.5 times as many."""
    drawn = []
    real = views.draw_augment
    monkeypatch.setattr(views, "draw_augment", lambda *a, **k: drawn.append(real(*a, **k)) or drawn[-1])
    front = ClipFrontEnd((8000, 6400), bank_size=100)
    for _ in range(20):
        front(torch.randint(-9000, 9000, (10, 14400)).to(torch.int16))
    for first, frames in ((0, 51), (1, 41)):
        crops = torch.cat([d.crop for d in drawn[first::2]])
        assert {d.canvas for d in drawn[first::2]} == {(64, int(1.5 * frames))}
        i, j, h, w = crops.unbind(1)
        assert (h.min() >= 38, h.max() == 64, (h == 64).float().mean() > 0.4) == (True, True, True)
        assert int(0.6 * frames) <= w.min() < 0.7 * frames
        assert 1.4 * frames < w.max() <= int(1.5 * frames)
        assert (i + h).max() <= 64
        assert (j + w).max() <= int(1.5 * frames)
        assert len(set(j.tolist())) > 10
    assert not torch.equal(drawn[0].crop, drawn[1].crop)


def test_the_view_of_atst_frame_is_drawn_as_published(monkeypatch):
    """0.6 to 1.5 times all bins, at most all; all frames."""
    drawn = []
    real = views.draw_augment
    monkeypatch.setattr(views, "draw_augment", lambda *a, **k: drawn.append(real(*a, **k)) or drawn[-1])
    front = FrontEnd(bank_size=100)
    for _ in range(20):
        front(torch.randint(-9000, 9000, (10, 4000)).to(torch.int16))
    i, j, h, w = torch.cat([d.crop for d in drawn]).unbind(1)
    assert 38 <= h.min() < 44
    assert (h == 64).float().mean() > 0.4
    assert ((i + h).max(), int(j.max()), set(w.tolist())) == (64, 0, {26})


def test_masks_are_as_asked_for():
    wave = torch.randint(-9000, 9000, (40, 48000)).to(torch.int16)
    few, many = FrontEnd(mask_ratio=0.1, mask_len=1)(wave), FrontEnd(mask_ratio=0.9, fixed_size=True)(wave)
    assert few.mask.shape == (40, 75)
    assert 0.05 < few.mask.float().mean() < 0.15
    runs = few.mask.long().diff(dim=1).eq(1).sum()
    assert runs > 0.7 * few.mask.sum()  # of one patch each, but for neighbours
    assert many.mask.float().mean() > 0.5
    assert many.mask.sum() <= many.capacity <= 40 * 75
    assert FrontEnd(patch_width=8)(wave).mask.shape == (40, 37)


def test_the_longer_view_may_be_the_second():
    batch = ClipFrontEnd((6000, 8000))(torch.randint(-9000, 9000, (3, 14000)).to(torch.int16))
    assert batch.view1.shape == batch.view2.shape == (3, 1, 64, 51)
    assert batch.lengths1.tolist() == [38] * 3
    assert batch.lengths2 is None


def test_the_shorter_view_is_padded_and_has_its_length():
    front = ClipFrontEnd((8000, 6000))
    wave = torch.randint(-9000, 9000, (3, 14000)).to(torch.int16)
    batch = front(wave)
    assert batch.view1.shape == batch.view2.shape == (3, 1, 64, 51)
    assert batch.lengths1 is None
    assert batch.lengths2.tolist() == [38] * 3
    assert not batch.view2[..., 38:].any()
    front.augmented = (False, False)
    plain = front(wave)
    assert torch.equal(plain.view1, front.log_mel(wave[:, None, :8000]))
    assert torch.equal(plain.view2[..., :38], front.log_mel(wave[:, None, 8000:]))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: ClipFrontEnd((8000,)), "ClipFrontEnd: samples must be two positive numbers"),
        (lambda: ClipFrontEnd((8000, 0)), "ClipFrontEnd: samples must be two positive numbers"),
        (lambda: ClipFrontEnd((8000, 800))(torch.zeros(2, 8000)), r"waveform must be \[B, 8800\]"),
        (lambda: ClipFrontEnd((8000, 800))(torch.zeros(8800)), r"waveform must be \[B, 8800\]"),
        (lambda: ClipFrontEnd((8000, 800))(torch.zeros(2, 8801)), r"waveform must be \[B, 8800\]"),
        (lambda: FrontEnd()(torch.zeros(8800)), r"FrontEnd: waveform must be \[B, N\] \(clips, samples\), got"),
        (lambda: FrontEnd()(torch.zeros(2, 1, 8800)), r"FrontEnd: waveform must be \[B, N\] \(clips, samples\), got"),
        (lambda: FrontEnd(patch_width=0), "FrontEnd: patch_width must be at least 1, got int 0"),
    ],
)
def test_crops_that_do_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_clip_continued_from_its_state_it_gives_the_same_bits():
    one, other = (ClipFrontEnd((4000, 4000), bank_size=5, seed=seed) for seed in (7, 1))
    list(batches(one, 3))
    other.load_state_dict(one.state_dict())
    for a, b in zip(batches(one, 3, seed=9), batches(other, 3, seed=9)):
        assert_same(a, b)
    with pytest.raises(ValueError, match="ClipFrontEnd: the state is of a front end that augments other views"):
        other.load_state_dict(FrontEnd().state_dict())


def test_clip_asks_for_no_value(monkeypatch):
    """As below, with views of different lengths."""
    front, other = ClipFrontEnd((4800, 3200)), ClipFrontEnd((4800, 3200))
    waves = torch.randint(-9000, 9000, (2, 3, 8000)).to(torch.int16)
    front(waves[0])
    other(waves[0])
    monkeypatch.setattr(augment, "_check_values", lambda *_: None)
    with NothingWaits():
        batch = front(waves[1])
    assert_same(batch, other(waves[1]))


def batches(front, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n):
        yield front(torch.randint(-9000, 9000, (3, 8000), generator=generator).to(torch.int16))


def assert_same(a, b):
    assert all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(a, b))


def test_batch_is_what_the_model_takes():
    batch = next(batches(FrontEnd(), 1))
    assert batch.view1.shape == batch.view2.shape == (3, 1, 64, 51)
    assert batch.lengths.tolist() == [51, 51, 51]
    assert batch.mask.shape == (3, 12)
    assert batch.mask.any(1).all()
    assert not torch.equal(batch.view1, batch.view2)


def test_flags_choose_what_is_augmented():
    plain = next(batches(FrontEnd(aug_stu=False), 1))
    assert plain.view1 is plain.view2
    warped = next(batches(FrontEnd(mixup=False, seed=3), 1))
    mixed = next(batches(FrontEnd(freq_warp=False), 1))
    neither = next(batches(FrontEnd(mixup=False, freq_warp=False), 1))
    assert torch.equal(neither.view2, plain.view1)
    assert torch.equal(warped.view1, plain.view1)
    assert torch.equal(mixed.view2[0], plain.view1[0])  # nobody came before the first clip
    assert not torch.equal(mixed.view2[1:], plain.view1[1:])
    both = next(batches(FrontEnd(aug_tea=True), 1))
    assert not torch.equal(both.view1, both.view2)


def test_continued_from_its_state_it_gives_the_same_bits():
    """Through a file that torch.load reads with weights_only; the bank has wrapped."""
    one = FrontEnd(bank_size=5, seed=7)
    list(batches(one, 3))
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    other = FrontEnd(bank_size=5, seed=1)
    other.load_state_dict(torch.load(file, weights_only=True))
    for a, b in zip(batches(one, 3, seed=9), batches(other, 3, seed=9)):
        assert_same(a, b)


def test_the_seed_decides():
    a, b, c = (next(batches(FrontEnd(seed=seed), 1)) for seed in (1, 1, 2))
    assert_same(a, b)
    assert not torch.equal(a.mask, c.mask)


def test_state_of_another_front_end_is_refused():
    with pytest.raises(ValueError, match="FrontEnd: the state is of a front end that augments other views"):
        FrontEnd(aug_tea=True).load_state_dict(FrontEnd().state_dict())
    full = FrontEnd(bank_size=2)
    list(batches(full, 1))
    with pytest.raises(ValueError, match="another capacity"):
        FrontEnd(bank_size=9).load_state_dict(full.state_dict())


def test_the_state_of_an_older_version_is_read():
    """It had one generator, and counted in Python."""
    one, other = FrontEnd(bank_size=5, seed=7), FrontEnd(bank_size=5, seed=1)
    list(batches(one, 2))
    state = one.state_dict()
    del state["_extra_state"]["device_generator"]
    assert type(state["_extra_state"]["banks"][1]["count"]) is int
    other.load_state_dict(state)
    for a, b in zip(batches(one, 2, seed=9), batches(other, 2, seed=9)):
        assert_same(a, b)


def test_the_random_state_of_another_kind_of_device_is_refused():
    state = FrontEnd().state_dict()
    with pytest.raises(ValueError, match="FrontEnd: the state was saved on cpu and this front end is on meta: the ran"):
        FrontEnd().to("meta").load_state_dict(state)
    state["_extra_state"]["device_generator"] = torch.zeros(16, dtype=torch.uint8)
    with pytest.raises(ValueError, match="FrontEnd: the state was saved on a GPU and this front end is on cpu"):
        FrontEnd().load_state_dict(state)


def test_no_gradient_is_kept():
    wave = torch.randn(1, 2000, requires_grad=True)
    plain = FrontEnd(aug_stu=False), ClipFrontEnd((1000, 1000))
    plain[1].augmented = (False, False)
    assert not any(front(wave).view2.requires_grad for front in (FrontEnd(), *plain))


def test_no_value_is_asked_for(monkeypatch):
    """On a CPU as on a GPU, but for the checks of draws that are only made on a CPU."""
    front, other = FrontEnd(fixed_size=True), FrontEnd(fixed_size=True)
    waves = torch.randint(-9000, 9000, (2, 3, 8000)).to(torch.int16)
    front(waves[0])
    other(waves[0])
    monkeypatch.setattr(augment, "_check_values", lambda *_: None)
    with NothingWaits():
        batch = front(waves[1])
    assert_same(batch, other(waves[1]))
    assert batch.lengths is None
    assert batch.capacity == 64 >= batch.mask.sum()
