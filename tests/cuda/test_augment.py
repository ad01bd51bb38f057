"""The CUDA kernel of augment against the C++ kernel for the CPU, which its own tests hold to golden tensors."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from atst_fast.ops.augment import MemoryBank, draw_augment
from tests import tolerances as tol
from tests.golden import load

GOLDEN, META = load("augment")


def cpu(*args):
    return torch.ops.atst_fast.augment(*args)


def run(cuda_ops, *args):
    """The CUDA operator on arguments on the CPU; misaligned ones stay so on the shim."""
    return cuda_ops.ops.augment(*(cuda_ops.to(a) if isinstance(a, torch.Tensor) else a for a in args)).cpu()


def near(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=tol.AUGMENT)


def somewhere(high, generator):
    """One of 0 to ``high``, often one of the ends."""
    return int(torch.tensor([0, high, torch.randint(high + 1, (), generator=generator)])[torch.randint(3, ())])


def uniform(shape, generator, offset=0):
    """Values between -1.3 and 1, ``offset`` floats past an aligned address."""
    size = int(torch.tensor(shape).prod())
    return (torch.rand(size + offset, generator=generator)[offset:] * 2.3 - 1.3).view(shape)


def make_case(seed, clips, bins, frames, slots=3, bank_frames=None, canvas=None, offset=0):
    """Arguments of the operator with draws anywhere in their range."""
    g = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    bank_frames = bank_frames or frames
    canvas = list(canvas or (bins, frames))
    mel, bank = uniform((clips, 1, bins, frames), g, offset), uniform((slots, bins, bank_frames), g, offset)
    lengths = [1 + somewhere(bank_frames - 1, g) for _ in range(slots)]
    partner, start, crop = [], [], []
    for _ in range(clips):
        who = int(torch.randint(-1, slots + clips, (), generator=g))
        slack = abs(lengths[who] - frames) if 0 <= who < slots else 0
        h, w = (1 + somewhere(n - 1, g) for n in canvas)
        partner.append(who)
        start.append(somewhere(slack, g))
        crop.append([somewhere(canvas[0] - h, g), somewhere(canvas[1] - w, g), h, w])
    whole = [torch.tensor(x, dtype=torch.int64) for x in (lengths, partner, start)]
    crops = torch.tensor(crop, dtype=torch.int64).reshape(clips, 4)
    return [mel, bank, *whole, torch.rand(clips, generator=g), crops, canvas]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**31),
    clips=st.integers(0, 3),
    bins=st.integers(1, 40),
    frames=st.integers(1, 150),
    slots=st.integers(0, 3),
    bank_frames=st.integers(1, 180),
    scale=st.sampled_from([(1, 1), (1, 1.5), (1.3, 1.5), (3, 1), (1, 7)]),
    offset=st.integers(0, 3),
)
def test_any_shape_and_draws(cuda_ops, seed, clips, bins, frames, slots, bank_frames, scale, offset):
    canvas = [int(bins * scale[0]), int(frames * scale[1])]
    args = make_case(seed, clips, bins, frames, slots, bank_frames, canvas, offset)
    near(run(cuda_ops, *args), cpu(*args))


SHAPES = {
    "as published": (2, 64, 1001, None),
    "10 s for ATST-Clip": (1, 64, 592, (64, 888)),
    "128 bins": (1, 128, 200, (128, 300)),
    "tiles of bins": (1, 300, 67, (310, 90)),
    "one bin": (2, 1, 70, (5, 100)),
    "one frame": (2, 30, 1, (40, 9)),
    "one value": (2, 1, 1, (1, 1)),
    "a far wider canvas": (1, 3, 5, (3, 70001)),
    "a far higher canvas": (1, 5, 3, (70001, 3)),
    "the highest canvas": (2, 2, 2, (2**20, 2)),
    "the widest canvas": (2, 2, 2, (2, 2**20)),
    "the largest canvas, one value": (2, 1, 1, (2**20, 2**20)),
}


@pytest.mark.sanitize
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_sizes(cuda_ops, shape, seed):
    clips, bins, frames, canvas = SHAPES[shape]
    args = make_case(seed, clips, bins, frames, canvas=canvas)
    near(run(cuda_ops, *args), cpu(*args))


@pytest.mark.sanitize
def test_every_width_of_a_crop(cuda_ops):
    """Crops of every height and width of a small canvas, whether the view is wider, as wide or narrower."""
    bins, frames, canvas = 5, 7, [7, 10]
    crops = torch.tensor([[canvas[0] - h, 0, h, w] for h in range(1, 8) for w in range(1, 11)])
    n = len(crops)
    mel = torch.rand(n, 1, bins, frames)
    args = [mel, mel[:0, 0], crops[:0, 0], torch.full((n,), -1), torch.zeros(n).long(), torch.zeros(n), crops, canvas]
    near(run(cuda_ops, *args), cpu(*args))


def test_every_scale_over_many_tiles(cuda_ops):
    """What a tile reads may be one column more than its length times the scale: the widest reads fit into its rows."""
    bins, frames, canvas = 2, 640, [2, 960]
    crops = torch.tensor([[0, 0, 2, w] for w in range(641, 961)])
    n = len(crops)
    mel = uniform((n, 1, bins, frames), torch.Generator().manual_seed(0))
    args = [mel, mel[:0, 0], crops[:0, 0], torch.full((n,), -1), torch.zeros(n).long(), torch.zeros(n), crops, canvas]
    near(run(cuda_ops, *args), cpu(*args))


@pytest.mark.parametrize("quiet", [False, True])
@pytest.mark.parametrize("frames", [64, 128])
def test_a_partner_that_misses_one_column(cuda_ops, frames, quiet):
    """Of a group of columns that one warp mixes: the first or the last, where only the epsilon is added."""
    generator = torch.Generator().manual_seed(7)
    mel, bank = (uniform(shape, generator) - 15 * quiet for shape in ((2, 1, 3, frames), (1, 3, frames)))
    lengths, partner, start = torch.tensor([frames - 1]), torch.zeros(2).long(), torch.tensor([0, 1])
    crop = torch.tensor([[0, 0, 3, frames]] * 2)
    args = [mel, bank, lengths, partner, start, torch.tensor([0.4, 0.9]), crop, [3, frames]]
    bound = tol.AUGMENT_QUIET if quiet else tol.AUGMENT
    torch.testing.assert_close(run(cuda_ops, *args), cpu(*args), rtol=0, atol=bound)


def golden_args(x, crop, canvas, z=None, start=0, alpha=0.0):
    bank = x[:0] if z is None else z
    lengths = torch.full((len(bank),), bank.shape[2])
    who = torch.tensor([-1 if z is None else 0])
    return [x[None], bank, lengths, who, torch.tensor([start]), torch.tensor([alpha]), torch.tensor([crop]), canvas]


@pytest.mark.parametrize("case", META["rrc"], ids=lambda c: c["id"])
def test_golden_resize_crop(cuda_ops, case):
    x = GOLDEN[case["x"]]
    canvas = [int(n * scale) for n, scale in zip(x.shape[1:], case["vcs"])]
    near(run(cuda_ops, *golden_args(x, case["ijhw"], canvas))[0], GOLDEN[f"out/rrc/{case['id']}"])


@pytest.mark.parametrize("case", META["lme"], ids=lambda c: str(c["id"]))
def test_golden_log_mixup_exp(cuda_ops, case):
    x, z = GOLDEN[case["xa"]], GOLDEN[case["xb"]]
    size = list(x.shape[1:])
    y = run(cuda_ops, *golden_args(x, [0, 0, *size], size, z, case["start"] or 0, 1 - case["alpha"]))
    near(y[0], GOLDEN[f"out/lme/{case['id']}"])


BIG = 2**63 - 1
BAD = [
    ("partner", -2), ("partner", 3 + 4), ("partner", BIG), ("partner", -BIG - 1), ("partner", 2), ("start", -1),
    ("start", 4), ("start", BIG), ("start", -BIG - 1), ("crop", [-1, 0, 5, 9]), ("crop", [0, -1, 5, 9]),
    ("crop", [0, 0, 0, 9]), ("crop", [0, 0, 5, 0]), ("crop", [4, 0, 5, 9]), ("crop", [0, 1, 5, 9]),
    ("crop", [BIG, 0, BIG, 9]), ("crop", [0, BIG, 5, BIG]), ("crop", [-BIG - 1, 0, 5, 9]), ("lengths", 0),
    ("lengths", 13), ("lengths", BIG), ("lengths", -BIG - 1),
]  # fmt: skip


@pytest.mark.parametrize("name, value", BAD)
def test_a_draw_out_of_range_makes_the_view_of_its_clip_nan(cuda_ops, name, value):
    args = make_case(1, 4, 8, 9, slots=3, bank_frames=12)
    _, _, lengths, partner, start, _, crop, _ = args
    lengths[:] = torch.tensor([12, 5, 0])  # slot 2 is empty
    partner[:], start[:], crop[:] = torch.tensor([0, 1, 4, -1]), 0, torch.tensor([1, 0, 5, 9])
    clean = run(cuda_ops, *args)
    assert torch.isfinite(clean).all()
    named = {"partner": partner, "start": start, "crop": crop}
    if name == "lengths":
        lengths[0] = value
    else:
        named[name][0] = torch.tensor(value)
    y = run(cuda_ops, *args)
    assert torch.isnan(y[0]).all()
    assert torch.equal(y[1:], clean[1:])


@pytest.mark.sanitize
def test_a_nan_stays_in_its_clip_and_those_mixed_with_it(cuda_ops):
    args = make_case(3, 4, 16, 50, slots=0)
    mel, partner, crop = args[0], args[3], args[6]
    partner[:], crop[:] = torch.tensor([-1, -1, -1, 1]), torch.tensor([2, 0, 11, 50])
    clean = run(cuda_ops, *args)
    mel[1, 0, 8, 20] = float("nan")
    y = run(cuda_ops, *args)
    assert torch.isnan(y[[1, 3]]).flatten(1).any(1).all()
    assert torch.equal(y[[0, 2]], clean[[0, 2]])


@pytest.mark.sanitize
def test_where_nothing_is_mixed_or_resampled_it_is_a_copy(cuda_ops):
    args = make_case(0, 1, 8, 70, slots=0)
    args[0][0, 0, 3, :4] = torch.tensor([float("inf"), float("-inf"), float("nan"), -0.0])
    args[3][:], args[6][:] = -1, torch.tensor([0, 0, 8, 70])
    torch.testing.assert_close(run(cuda_ops, *args), args[0], rtol=0, atol=0, equal_nan=True)


def test_quiet_values_meet_the_epsilon(cuda_ops):
    args = make_case(0, 1, 4, 70, slots=1)
    args[0][:], args[1][:] = -20.0, float("-inf")
    args[2][:], args[3][:], args[4][:], args[6][:] = 70, 0, 0, torch.tensor([0, 0, 4, 70])
    torch.testing.assert_close(run(cuda_ops, *args), cpu(*args), rtol=0, atol=tol.AUGMENT_QUIET)


def test_the_same_bits_in_any_order(cuda_ops):
    args = make_case(5, 3, 64, 150, canvas=(70, 200))
    first = run(cuda_ops, *args)
    for order, seed in [("forward", 0), ("reverse", 0), ("shuffled", 1), ("shuffled", 2)]:
        cuda_ops.schedule(order, seed)
        assert torch.equal(run(cuda_ops, *args), first)


@pytest.mark.sanitize
def test_a_batch_through_a_bank(cuda_ops):
    """What draw_augment draws, with clips of two lengths in a ring that has wrapped."""
    bank = MemoryBank(5)
    for frames in (30, 70, 50):
        bank.push(uniform((3, 1, 64, frames), None))
    mel = uniform((4, 1, 64, 50), None)
    for scales in ({}, {"canvas_scale": (1.2, 1.5), "time_scale": (0.6, 1.5)}):
        drawn = draw_augment(mel.shape, bank, torch.Generator().manual_seed(1), **scales)
        args = [mel, bank.mels, bank.lengths, *drawn[:4], list(drawn.canvas)]
        near(run(cuda_ops, *args), cpu(*args))


GOOD = make_case(0, 2, 8, 9, slots=1)
ERRORS = [
    (0, GOOD[0][0], "mel must have 4 axes, got 3"),
    (0, GOOD[0].double(), "mel has the wrong dtype"),
    (0, GOOD[0].transpose(2, 3).contiguous().transpose(2, 3), "mel must be contiguous"),
    (0, GOOD[0].repeat(1, 2, 1, 1), "mel must have one channel"),
    (1, torch.zeros(1, 7, 9), "bank must have the mel bins of mel"),
    (1, GOOD[1].half(), "bank has the wrong dtype"),
    (1, GOOD[1].transpose(1, 2).contiguous().transpose(1, 2), "bank must be contiguous"),
    (1, torch.zeros(0, 8, 2**27 + 1), "bank must have at most 134217728 frames, got 134217729"),
    (2, GOOD[2].int(), "bank_lengths has the wrong dtype"),
    (2, torch.zeros(2).long(), "bank_lengths has the wrong number of values"),
    (3, torch.zeros(3).long(), "partner has the wrong number of values"),
    (4, torch.zeros(4).long()[::2], "start must be contiguous"),
    (5, GOOD[5].double(), "alpha has the wrong dtype"),
    (6, GOOD[6][:1], "crop has the wrong number of values"),
    (7, [8], "canvas must have two entries"),
    (7, [7, 9], "canvas must be at least as large as mel"),
    (7, [2**20 + 1, 9], "canvas must be at most 1048576 either way"),
]


@pytest.mark.parametrize("i, bad, message", ERRORS)
def test_errors(cuda_ops, i, bad, message):
    with pytest.raises(RuntimeError, match="augment: " + message):
        run(cuda_ops, *GOOD[:i], bad, *GOOD[i + 1 :])
