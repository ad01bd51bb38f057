import pytest
import torch

from atst_fast.train.masks import block_mask, num_spans, spans_to_mask
from tests.golden import load


def test_golden_masks_from_the_recorded_draws():
    """Number of spans from its draw, mask from the recorded starts: all 64 official masks."""
    t, _ = load("masks")
    for u, starts, mask in zip(t["out/readme_u"].tolist(), t["out/readme_starts"], t["out/readme"]):
        starts = starts[starts >= 0].tolist()
        count = num_spans(u, 250, 0.65, 5)
        assert len(starts) == count
        assert torch.equal(spans_to_mask(starts, [5] * count, 250), mask)


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
    assert num_spans(0.0, 10, 0.65, 5, min_masks=2) == 2


@pytest.mark.parametrize("arguments, message", [
    ({"mask_type": "dots"}, "mask_type must be 'block', 'uniform' or 'random', got 'dots'"),
    ({"mask_ratio": 0.0}, "mask_ratio must be between 0 and 1, got 0.0"),
    ({"mask_ratio": 1.0}, "mask_ratio must be between 0 and 1"),
    ({"mask_len": 0}, "mask_len, other and min_masks must be at least 1, 1 and 0, got 0"),
    ({"num_patches": 1}, "num_patches must leave room for 2 spans, got 1"),
])  # fmt: skip
def test_errors(arguments, message):
    with pytest.raises(ValueError, match="block_mask: " + message):
        block_mask(1, **arguments)
