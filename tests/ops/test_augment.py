import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atst_fast.ops.augment import AugmentDraws, MemoryBank, augment_views, draw_augment
from atst_fast.reference import augment as reference
from tests import tolerances as tol
from tests.golden import load

GOLDEN, META = load("augment")


def near(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=tol.AUGMENT)


def draws(clips, bins, frames, partner=-1, start=0, alpha=0.0, crop=None, canvas=None):
    canvas = canvas or (bins, frames)
    crop = crop or (0, 0, *canvas)
    full = torch.full((clips,), 1)
    alphas = torch.full((clips,), alpha, dtype=torch.float32)
    return AugmentDraws(full * partner, full * start, alphas, torch.tensor([crop] * clips).reshape(clips, 4), canvas)


def view(mel, drawn, bank=None):
    return augment_views(mel, [drawn], [bank])[0]


@pytest.mark.parametrize("case", META["lme"], ids=lambda c: str(c["id"]))
def test_golden_log_mixup_exp(isa, case):
    x, z, expected = GOLDEN[case["xa"]], GOLDEN[case["xb"]], GOLDEN[f"out/lme/{case['id']}"]
    bank = MemoryBank(3)
    bank.push(z[None])
    drawn = draws(1, 64, x.shape[-1], 0, case["start"] or 0, 1 - case["alpha"])
    near(view(x[None], drawn, bank)[0], expected)


def test_golden_mixup_sequence(isa):
    """Six clips of two widths through one bank, in order, with the recorded draws."""
    bank = MemoryBank(2000)
    starts = [s or 0 for s in META["mix_start"]]
    for i, (u, partner, start) in enumerate(zip(META["mix_u"], META["mix_idx"], starts)):
        x = GOLDEN[f"in/mixup/{i}"][None]
        near(view(x, draws(1, 64, x.shape[-1], partner, start, 0.4 * u), bank)[0], GOLDEN[f"out/mixup/{i}"])
    assert bank.count == 6


@pytest.mark.parametrize("case", META["rrc"], ids=lambda c: c["id"])
def test_golden_resize_crop(isa, case):
    x = GOLDEN[case["x"]]
    _, bins, frames = x.shape
    canvas = (int(bins * case["vcs"][0]), int(frames * case["vcs"][1]))
    y = view(x[None], draws(1, bins, frames, crop=tuple(case["ijhw"]), canvas=canvas))
    near(y[0], GOLDEN[f"out/rrc/{case['id']}"])


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 4), st.integers(1, 70), st.integers(1, 300), st.booleans(), st.integers(1, 5), st.integers(0, 2**31)
)
def test_random_draws_against_float64(clips, bins, frames, two_axes, capacity, seed):
    generator = torch.Generator().manual_seed(seed)
    bank = MemoryBank(capacity)
    bank.push(torch.rand(2, 1, bins, max(frames // 2, 1), generator=generator))
    bank.push(torch.rand(1, 1, bins, frames + 3, generator=generator))
    mel = torch.rand(clips, 1, bins, frames, generator=generator) * 2.3 - 1.3
    scales = {"canvas_scale": (1.2, 1.5), "time_scale": (0.6, 1.5)} if two_axes else {}
    drawn = draw_augment(mel.shape, bank, generator, **scales)
    partner, lengths, mels = drawn.partner, bank.lengths, bank.mels
    expected = reference.augment(mel.double(), mels, lengths, partner, drawn.start, drawn.alpha.double(), *drawn[3:])
    y = view(mel[..., None].expand(*mel.shape, 2)[..., 0], drawn, bank)  # any strides
    assert y.shape == mel.shape
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=tol.AUGMENT_FLOAT64)
    assert bank.count == 3 + clips


def test_one_batch_is_the_same_as_clip_after_clip(isa):
    """Partners of the same batch are the unmixed clips before, and a ring that wraps gives them in the right order."""
    together, alone = MemoryBank(3), MemoryBank(3)
    for _ in range(4):
        mel = torch.rand(5, 1, 16, 40)
        drawn = draw_augment(mel.shape, together, torch.Generator().manual_seed(int(together.count)))
        batch = view(mel, drawn, together)
        for b in range(5):
            one = AugmentDraws(*(x[b : b + 1].clone() for x in drawn[:4]), drawn.canvas)
            if one.partner >= 3:  # a clip of this batch has since gone into the ring
                number = alone.count - b + int(one.partner) - 3
                assert number >= alone.count - 3
                one.partner[0] = number % 3
            elif one.partner >= 0:
                age = (alone.count - b - 1 - int(one.partner)) % 3 + b
                assert age < 3
            assert torch.equal(view(mel[b : b + 1], one, alone), batch[b : b + 1])
    assert torch.equal(together.mels, alone.mels)


def draw_clip_after_clip(shape, bank, generator, mixup_ratio, canvas_scale, freq_scale, time_scale):
    """draw_augment as the official transforms are written, in Python numbers."""
    clips, _, bins, frames = shape
    canvas = (int(bins * canvas_scale[0]), int(frames * canvas_scale[1]))
    partner, start, alpha, crop = [], [], [], []
    between = lambda bounds, u: bounds[0] + (bounds[1] - bounds[0]) * u  # noqa: E731
    for b, u in enumerate(torch.rand(clips, 7, dtype=torch.float64, generator=generator).tolist()):
        who, width = -1, frames
        if bank is not None and bank.count + b > 0:
            number = bank.count + b - 1 - int(u[1] * min(bank.count + b, bank.capacity))
            in_batch = number >= bank.count
            who = bank.capacity + number - bank.count if in_batch else number % bank.capacity
            width = frames if in_batch else int(bank.lengths[who])
        box = (0, 0, *canvas)
        if freq_scale is not None:
            h = min(max(int(between(freq_scale, u[3]) * bins), 1), canvas[0])
            w = min(max(int(between(time_scale, u[4]) * frames), 1), canvas[1])
            box = (int(u[5] * (canvas[0] - h + 1)), int(u[6] * (canvas[1] - w + 1)), h, w)
        partner.append(who)
        start.append(int(u[2] * (abs(width - frames) + 1)))
        alpha.append(mixup_ratio * u[0])
        crop.append(box)
    whole = [torch.tensor(x, dtype=torch.int64) for x in (partner, start)]
    return [*whole, torch.tensor(alpha), torch.tensor(crop, dtype=torch.int64).reshape(clips, 4)], canvas


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    clips=st.integers(0, 40),
    bins=st.integers(1, 130),
    frames=st.integers(1, 1001),
    capacity=st.integers(0, 30),
    pushes=st.lists(st.tuples(st.integers(0, 20), st.integers(1, 1500)), max_size=4),
    scales=st.sampled_from([
        {"canvas_scale": (1.0, 1.0), "freq_scale": (0.6, 1.5), "time_scale": (1.0, 1.0)},
        {"canvas_scale": (1.0, 1.5), "freq_scale": (0.6, 1.5), "time_scale": (0.6, 1.5)},
        {"canvas_scale": (1.3, 1.1), "freq_scale": None, "time_scale": (0.6, 1.5)},
    ]),
)  # fmt: skip
def test_draws_are_those_of_the_loop_over_clips(seed, clips, bins, frames, capacity, pushes, scales):
    """The same numbers from the same generator, which is then in the same state."""
    bank = MemoryBank(capacity) if capacity else None
    for n, width in pushes if bank else ():
        bank.push(torch.zeros(1, 1, 1, 1).expand(n, 1, 1, width))
    one, other = (torch.Generator().manual_seed(seed) for _ in range(2))
    drawn = draw_augment((clips, 1, bins, frames), bank, one, mixup_ratio=0.4, **scales)
    expected, canvas = draw_clip_after_clip((clips, 1, bins, frames), bank, other, 0.4, **scales)
    assert drawn.canvas == canvas
    for name, x, y in zip(drawn._fields, drawn, expected):
        assert x.dtype == y.dtype, name
        assert torch.equal(x, y), name
    assert torch.equal(one.get_state(), other.get_state())


def test_draws_have_the_official_distribution():
    generator = torch.Generator().manual_seed(1)
    bank = MemoryBank(50)
    bank.push(torch.zeros(30, 1, 64, 4))
    drawn = draw_augment((20000, 1, 64, 4), bank, generator)
    i, j, h, w = drawn.crop.T
    assert (h.min(), h.max()) == (38, 64)
    assert (h == 64).float().mean().item() == pytest.approx(0.556, abs=0.012)
    assert ((i >= 0) & (i + h <= 64) & (j == 0) & (w == 4)).all()
    assert (i[h < 50] == 0).any()
    assert ((i + h)[h < 50] == 64).any()
    assert drawn.alpha.max() < 0.4
    assert drawn.alpha.mean().item() == pytest.approx(0.2, abs=0.005)
    assert drawn.partner[:1].item() in range(30)
    # later clips choose among the 50 before them: those of the bank are soon out of reach
    assert (drawn.partner[100:] >= 50).all()
    ages = torch.arange(20000) - (drawn.partner - 50)
    assert (ages[100:].min(), ages[100:].max()) == (1, 50)
    first = draw_augment((1, 1, 64, 4), MemoryBank(5), generator)
    assert first.partner.item() == -1
    assert draw_augment((1, 1, 64, 4), None, generator, freq_scale=None).crop.tolist() == [[0, 0, 64, 4]]


def test_bank_keeps_its_state():
    bank = MemoryBank(3)
    bank.push(torch.rand(2, 1, 8, 5))
    bank.push(torch.rand(2, 1, 8, 9))  # wider: the bank grows, and the ring has wrapped
    other = MemoryBank(3)
    other.load_state_dict(bank.state_dict())
    for b in (bank, other):
        b.push(torch.full((1, 1, 8, 9), 2.0))
    assert (other.count, other.lengths.tolist()) == (5, [9, 9, 9])
    assert torch.equal(other.mels, bank.mels)
    empty = MemoryBank(3)
    empty.load_state_dict(MemoryBank(3).state_dict())
    assert empty.mels is None
    with pytest.raises(ValueError, match="another capacity than 2"):
        MemoryBank(2).load_state_dict(bank.state_dict())
    with pytest.raises(ValueError, match="capacity must be at least 1 clip, got int 0"):
        MemoryBank(0)
    with pytest.raises(ValueError, match="mel must have the 8 mel bins of the bank, got 4"):
        bank.push(torch.zeros(1, 1, 4, 5))
    big = MemoryBank(2)
    big.push(torch.arange(5.0).reshape(5, 1, 1, 1))
    assert big.mels.flatten().tolist() == [4.0, 3.0]  # clip number n in slot n % 2


def test_a_bank_keeps_nothing_past_its_clips():
    bank = MemoryBank(2)
    bank.push(torch.ones(2, 1, 8, 9))
    bank.push(torch.ones(1, 1, 8, 5))  # over a longer one
    mels = bank.state_dict()["mels"]
    assert mels[0, :, :5].all()
    assert not mels[0, :, 5:].any()
    assert mels[1].all()


def test_a_bank_counts_in_a_tensor_of_its_own():
    """A CUDA graph that pushes counts in the memory that it was captured with."""
    bank = MemoryBank(3)
    pushed, lengths = bank.pushed, bank.lengths
    for _ in range(2):
        bank.push(torch.zeros(2, 1, 4, 5))
        assert (bank.pushed is pushed, bank.lengths is lengths) == (True, True)
    assert pushed.tolist() == bank.count == bank.state_dict()["count"] == 4
    assert type(bank.count) is type(bank.state_dict()["count"]) is int
    assert bank.device == torch.device("cpu")
    assert bank.to("cpu") is bank


def test_a_loaded_bank_forgets_what_it_held():
    bank = MemoryBank(3)
    bank.push(torch.zeros(3, 1, 4, 5))
    fresh = MemoryBank(3)
    fresh.push(torch.zeros(1, 1, 4, 5))
    bank.load_state_dict(fresh.state_dict())
    assert bank.lengths.tolist() == [5, 0, 0]


def test_a_slot_of_an_empty_bank_is_refused():
    args = (MEL.new_empty(2, 8, 0), torch.zeros(2, dtype=torch.int64), *draws(2, 8, 9, partner=1)[:4], [8, 9])
    with pytest.raises(RuntimeError, match="augment: bank_lengths out of range"):
        torch.ops.atst_fast.augment(MEL, *args)
    with pytest.raises(ValueError, match=r"draws.partner\[0\] must be -1, a filled slot .* got 1"):
        view(MEL, draws(2, 8, 9, partner=1), MemoryBank(2))


def test_without_draws_the_view_is_the_mel_itself():
    mel = torch.rand(2, 1, 8, 9)
    assert augment_views(mel, [None])[0] is mel


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    mel = torch.rand(2, 1, 64, 30).to(dtype)
    drawn = draws(2, 64, 30, 1, 0, 0.3, (3, 0, 50, 30))
    assert torch.equal(view(mel, drawn), view(mel.float(), drawn).to(dtype))


def test_nan_stays_in_its_clip_and_in_those_mixed_with_it(isa):
    mel = torch.rand(4, 1, 64, 50)
    drawn = draws(4, 64, 50, -1, 0, 0.2, (2, 0, 41, 50))
    drawn.partner[3] = 1  # without a bank, clip 1 of the batch
    clean = view(mel, drawn)
    mel[1, 0, 20, 20] = float("nan")
    y = view(mel, drawn)
    assert torch.isnan(y[[1, 3]]).flatten(1).any(1).all()
    assert torch.equal(y[[0, 2]], clean[[0, 2]])


def test_outputs_are_written_in_full_with_the_same_bits_on_any_threads(isa, threads):
    mel = torch.rand(3, 1, 64, 1001)
    drawn = draw_augment(mel.shape, MemoryBank(4), torch.Generator().manual_seed(3), canvas_scale=(1, 1.5), time_scale=(0.6, 1.5))  # fmt: skip # noqa: E501
    results = []
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    try:
        for n in (1, 2):
            threads(n)
            results.append(view(mel, drawn, MemoryBank(4)))
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.isfinite(results[0]).all()
    assert torch.equal(*results)


def test_reference_gradient():
    x, z = (torch.rand(4, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda x, z: reference.log_mixup_exp(x, z[:, :3], 0.3, 1), (x, z))
    assert torch.autograd.gradcheck(lambda x: reference.resize_crop(x, (1, 2, 3, 4), (4, 8)), (x,))


def test_quiet_values_meet_the_epsilon(isa):
    """Below about -12 the epsilon inside the logarithm decides."""
    x, z = torch.full((1, 1, 4, 20), -20.0), torch.full((1, 1, 4, 20), float("-inf"))
    bank = MemoryBank(2)
    bank.push(z)
    near(view(x, draws(1, 4, 20, 0, 0, 0.3), bank)[0, 0], reference.log_mixup_exp(x[0, 0], z[0, 0], 0.3, 0))


def test_a_wider_bank_keeps_its_clips():
    bank = MemoryBank(3)
    first = torch.rand(1, 1, 4, 5)
    bank.push(first)
    bank.push(torch.rand(1, 1, 4, 9))
    assert torch.equal(bank.mels[0, :, :5], first[0, 0])
    assert bank.lengths.tolist() == [5, 9, 0]


def test_a_crop_may_be_higher_than_the_mel():
    drawn = draw_augment((500, 1, 20, 4), None, torch.Generator().manual_seed(0), canvas_scale=(2.0, 1.0))
    assert drawn.crop[:, 2].max() > 25  # up to 1.5 times 20 bins, on a canvas of 40


def test_every_start_is_drawn():
    bank = MemoryBank(1)
    bank.push(torch.zeros(1, 1, 4, 12))
    starts = {int(draw_augment((1, 1, 4, 9), bank, torch.Generator().manual_seed(i)).start) for i in range(100)}
    assert starts == {0, 1, 2, 3}


def test_draws_of_any_strides():
    mel = torch.rand(2, 1, 8, 9)
    drawn = draws(2, 8, 9, 1, 0, 0.3)
    strided = drawn._replace(alpha=torch.tensor(0.3).expand(2), start=torch.zeros(4, dtype=torch.int64)[::2])
    assert torch.equal(view(mel, strided), view(mel, drawn))


def test_a_refused_push_leaves_the_bank_as_it_was():
    bank = MemoryBank(2)
    bank.push(torch.ones(1, 1, 4, 9))
    with pytest.raises(ValueError, match="MemoryBank: mel must have the 4 mel bins of the bank, got 5"):
        bank.push(torch.zeros(1, 1, 5, 12))
    with pytest.raises(ValueError, match=r"MemoryBank: mel must be \[B, 1, F, T\]"):
        bank.push(torch.zeros(4, 9))
    assert bank.count == 1
    assert torch.equal(bank.mels[0], torch.ones(4, 9))


@pytest.mark.parametrize("mels", [None, torch.zeros(1, 4, 9), torch.zeros(2, 4, 8), torch.zeros(4, 9)])
def test_a_state_that_does_not_fit_is_refused(mels):
    state = {"count": 2, "mels": mels, "lengths": torch.tensor([9, 9])}
    with pytest.raises(ValueError, match="MemoryBank: the state's mels must be"):
        MemoryBank(2).load_state_dict(state)


def test_opcheck():
    drawn = draws(2, 8, 9, 1, 0, 0.3, (1, 0, 5, 9))
    args = (torch.rand(2, 1, 8, 9), torch.rand(3, 8, 9), torch.full((3,), 9), *drawn[:4], [8, 9])
    torch.library.opcheck(torch.ops.atst_fast.augment.default, args)


MEL = torch.zeros(2, 1, 8, 9)
ERRORS = [
    (lambda: view(MEL[0], draws(2, 8, 9)), ValueError, r"mel must be \[B, 1, F, T\].*got float32 \[1, 8, 9\]"),
    (lambda: view(MEL.expand(2, 2, 8, 9), draws(2, 8, 9)), ValueError, r"mel must be \[B, 1, F, T\]"),
    (lambda: view(MEL.double(), draws(2, 8, 9)), TypeError, "mel must be .* of dtype float32"),
    (lambda: view(MEL.clone().requires_grad_(), draws(2, 8, 9)), ValueError, "mel must not require a gradient"),
    (lambda: augment_views(MEL, [None], []), ValueError, "banks must have an entry for each of the 1 draws, got 0"),
    (
        lambda: view(MEL, draws(3, 8, 9)),
        ValueError,
        r"draws.partner must be \[2\], one entry per clip, got int64 \[3\]",
    ),
    (
        lambda: view(MEL, draws(2, 8, 9, partner=2)),
        ValueError,
        r"draws.partner\[0\] must be -1, a filled slot .* got 2",
    ),
    (lambda: view(MEL, draws(2, 8, 9, start=1)), ValueError, r"draws.start\[0\] must be from 0 to 0 frames, got 1"),
    (
        lambda: view(MEL, draws(2, 8, 9, crop=(0, 1, 8, 9))),
        ValueError,
        r"draws.crop\[0\] must be .*canvas \(8, 9\), got",
    ),
    (lambda: view(MEL, draws(2, 8, 9, crop=(0, 0, 0, 9))), ValueError, r"draws.crop\[0\] must be"),
    (lambda: view(MEL, draws(2, 8, 9, canvas=(7, 9))), ValueError, r"draws.canvas must be from \(8, 9\)"),
    (
        lambda: view(MEL, draws(2, 8, 9, canvas=(2**57, 9))),
        ValueError,
        r"draws.canvas must be .* to 1048576 either way",
    ),
]


@pytest.mark.parametrize("call, error, message", ERRORS)
def test_errors(call, error, message):
    with pytest.raises(error, match="augment_views: " + message):
        call()


def test_a_direct_call_with_bad_input_is_refused_too():
    good = [MEL, torch.zeros(1, 8, 9), torch.tensor([9]), *draws(2, 8, 9)[:4], [8, 9]]
    torch.ops.atst_fast.augment(*good)
    for i, bad in [(0, MEL.double()), (1, torch.zeros(1, 7, 9)), (3, torch.tensor([3, 0])), (4, torch.tensor([0])),
                   (6, torch.tensor([[0, 0, 9, 9]] * 2)), (6, torch.tensor([[2**63 - 1, 0, 2**63 - 1, 9]] * 2)),
                   (7, [7, 9]), (7, [8]), (7, [2**57, 9])]:  # fmt: skip
        args = [*good[:i], bad, *good[i + 1 :]]
        with pytest.raises(RuntimeError, match="augment: "):
            torch.ops.atst_fast.augment(*args)
