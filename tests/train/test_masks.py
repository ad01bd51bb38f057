import pytest
import torch
from torch._subclasses import FakeTensorMode

from atst_fast.train.masks import block_mask, capacity, moments, num_spans, spans_to_mask
from tests.golden import load


def test_golden_masks_from_the_recorded_draws():
    """Number of spans from its draw, mask from the recorded starts: all 64 official masks."""
    t, _ = load("masks")
    starts = t["out/readme_starts"]
    drawn = starts >= 0
    assert torch.equal(num_spans(t["out/readme_u"], 250, 0.65, 5), drawn.sum(1))
    assert torch.equal(spans_to_mask(starts, drawn * 5, 250), t["out/readme"])


def test_distribution_is_the_official_one():
    """Against the shares that 20,000 draws of the official function gave (golden masks: readme_20000_draws)."""
    stats = load("masks")[1]["stats"]["readme_20000_draws"]
    masks = block_mask(6000, generator=torch.Generator().manual_seed(0)).double()
    share = masks.mean(0)
    assert masks.mean().item() == pytest.approx(stats["mean_fraction"], abs=0.002)
    assert masks.mean(1).std().item() == pytest.approx(stats["std_fraction"], abs=0.002)
    torch.testing.assert_close(share[:5], torch.tensor(stats["per_position_0_4"]).double(), rtol=0, atol=0.02)
    torch.testing.assert_close(share[245:], torch.tensor(stats["per_position_245_249"]).double(), rtol=0, atol=0.02)
    assert share[249] == 0
    counts = masks.sum(1)
    assert counts.unique().numel() > 20


def test_starts_are_distinct_and_equally_likely():
    """Spans of one patch mask as many patches as there are starts, each as often as another."""
    masks = block_mask(4000, 30, mask_ratio=0.5, mask_len=1, generator=torch.Generator().manual_seed(0))
    assert (masks.sum(1) == 15).all()
    share = masks.double().mean(0)
    assert share[29] == 0
    torch.testing.assert_close(share[:29], torch.full((29,), 15 / 29).double(), rtol=0, atol=0.035)  # 4 deviations


def runs(mask):
    """Lengths of the runs of True."""
    edges = torch.diff(torch.nn.functional.pad(mask.int(), (1, 1)))
    return (edges == -1).nonzero().flatten() - (edges == 1).nonzero().flatten()


@pytest.mark.parametrize("name, options", [
    ("len2", {"mask_len": 2}),
    ("uniform", {"mask_type": "uniform"}),
    ("nooverlap", {"no_overlap": True}),
    ("random", {"mask_type": "random", "mask_ratio": 0.75}),
])  # fmt: skip
def test_other_types_mask_as_much_as_the_official_ones(name, options):
    stats = load("masks")[1]["stats"][name]
    masks = block_mask(500, generator=torch.Generator().manual_seed(1), **options)
    assert masks.double().mean().item() == pytest.approx(stats["mean_fraction"], abs=0.012)
    if name == "nooverlap":
        assert all((runs(mask) % 5 == 0).all() for mask in masks)  # whole spans, side by side at most
    if name == "random":
        assert (masks.sum(1) == stats["min_count"]).all()


def test_draws_come_from_the_generator_alone():
    a, b = (block_mask(3, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(a, b)
    state = torch.get_rng_state()
    block_mask(3, mask_type="uniform", generator=torch.Generator())
    assert torch.equal(torch.get_rng_state(), state)


def test_short_clips_and_no_clips():
    assert block_mask(0).shape == (0, 250)
    assert block_mask(0, mask_type="random").shape == (0, 250)
    assert block_mask(4, 16).any(1).all()
    assert block_mask(200, 16)[:, 15].sum() == 0
    assert num_spans(torch.zeros(1).double(), 10, 0.65, 5, min_masks=2) == 2


@pytest.mark.parametrize("mask_type", ["block", "uniform", "random"])
@pytest.mark.parametrize("no_overlap", [False, True])
def test_no_value_is_asked_for(mask_type, no_overlap):
    with FakeTensorMode():  # in which asking is an error
        assert block_mask(3, 40, mask_type=mask_type, no_overlap=no_overlap).shape == (3, 40)


def test_moments_are_the_official_ones():
    """4000 draws of the official function: mean 125.8, standard deviation 6.9."""
    mean, variance = moments(250, 0.65, 5, 2)
    assert mean == pytest.approx(125.8, abs=0.06)
    assert variance**0.5 == pytest.approx(6.9, abs=0.06)


@pytest.mark.parametrize("num_patches, mask_ratio, mask_len, min_masks", [
    (12, 0.5, 3, 2), (7, 0.65, 5, 2), (10, 0.3, 2, 0), (9, 0.2, 4, 3),
])  # fmt: skip
def test_moments_of_drawn_masks(num_patches, mask_ratio, mask_len, min_masks):
    mean, variance = moments(num_patches, mask_ratio, mask_len, min_masks)
    options = {"mask_ratio": mask_ratio, "mask_len": mask_len, "min_masks": min_masks}
    counts = block_mask(40000, num_patches, generator=torch.Generator().manual_seed(0), **options).sum(1).double()
    assert counts.mean().item() == pytest.approx(mean, abs=4 * (variance / 40000) ** 0.5 + 1e-9)
    assert counts.var().item() == pytest.approx(variance, rel=0.05, abs=1e-9)


@pytest.mark.parametrize("options", [
    {}, {"mask_len": 2}, {"mask_type": "uniform"}, {"no_overlap": True}, {"mask_type": "uniform", "no_overlap": True},
    {"mask_type": "random", "mask_ratio": 0.75}, {"num_patches": 16}, {"num_patches": 3, "mask_ratio": 0.1},
])  # fmt: skip
def test_capacity_is_enough(options):
    counts = block_mask(2000, generator=torch.Generator().manual_seed(2), **options).sum(1)
    assert counts.max() <= capacity(1, **options)
    assert counts.reshape(40, 50).sum(1).max() <= capacity(50, **options)
    assert capacity(50, **options) <= 50 * capacity(1, **options)


def test_capacity_is_exact_for_few_clips_and_near_the_mean_for_many():
    assert capacity(1) == 192  # 33 spans of 5, as a multiple of 64
    assert capacity(144) == 18816
    assert capacity(144, mask_type="random") == 23488  # 163 each
    assert capacity(0) == 64


@pytest.mark.parametrize("arguments, message", [
    ({"mask_type": "dots"}, "mask_type must be 'block', 'uniform' or 'random', got 'dots'"),
    ({"mask_ratio": 0.0}, "mask_ratio must be between 0 and 1, got 0.0"),
    ({"mask_ratio": 1.0}, "mask_ratio must be between 0 and 1"),
    ({"mask_len": 0}, "mask_len, other and min_masks must be at least 1, 1 and 0, got 0"),
    ({"generator": torch.Generator(), "device": "meta"}, r"device must be the generator's \(cpu\), got meta"),
    ({"num_patches": 1}, "num_patches must leave room for 2 spans, got 1"),
])  # fmt: skip
def test_errors(arguments, message):
    with pytest.raises(ValueError, match="block_mask: " + message):
        block_mask(1, **arguments)
