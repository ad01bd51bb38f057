import io

import pytest
import torch

from atst_fast.ops import augment
from atst_fast.ops.augment import AugmentDraws, MemoryBank, augment_views
from atst_fast.train import front_end
from atst_fast.train.front_end import FrontEnd
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
    views = []
    for on, bank in zip(augmented, banks):
        if not on:
            views.append(None)
            continue
        alpha = 0.4 * draw("random")
        partner = draw("randint") if bank.count else -1
        bins, frames = shape
        h = min(max(int(draw("uniform") * bins), 1), bins)
        draw("uniform")
        i = draw("randint") or 0
        views.append(AugmentDraws(
            torch.tensor([partner]), torch.tensor([0]), torch.tensor([alpha]), torch.tensor([[i, 0, h, frames]]), shape
        ))  # fmt: skip
    assert not tape
    return crop_start, starts, views


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
        views = augment_views(front.log_mel(clip[None, None]), draws, banks)
        stored = [t[f"out/{case['id']}/call{call}/crop{v}"] for v in range(2)]
        for view, expected in zip(views, stored):
            torch.testing.assert_close(view[0], expected, rtol=0, atol=tol.FRONT_END)
        mask = t[f"out/{case['id']}/call{call}/mask"]
        spans = torch.tensor([spans])
        assert torch.equal(spans_to_mask(spans, torch.full_like(spans, options["mask_len"]), len(mask))[0], mask)


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
    assert not front_end.FrontEnd()(torch.randn(1, 2000, requires_grad=True)).view2.requires_grad


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
