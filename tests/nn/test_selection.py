import pytest
import torch
from torch._subclasses import FakeTensorMode

from atst_fast.nn import FixedRows, FixedSelection, Selection


def make(batch, length, capacity, share=0.5):
    mask = torch.rand(batch, length) < share
    return mask, FixedSelection.build(mask, capacity)


@pytest.mark.parametrize("batch, length, spare", [(1, 1, 0), (3, 17, 0), (3, 17, 5), (5, 1, 2), (2, 250, 30)])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_fixed_lists_are_the_others_padded(batch, length, spare, share):
    mask = torch.rand(batch, length) < share
    count = int(mask.sum())
    capacity = max(count + spare, 1)
    fixed, free = FixedSelection.build(mask, capacity), Selection.build(mask)
    assert torch.equal(fixed.rows[:count], free.queries)
    assert (fixed.rows[count:] == -1).all()
    assert fixed.count.item() == count
    places = torch.full((batch * length,), -1)
    places[free.queries] = torch.arange(count)
    assert torch.equal(fixed.inverse, places)
    for mine, theirs in zip((fixed.cu_seqlens_q, fixed.cu_seqlens_k), free.offsets(torch.device("cpu"))):
        assert torch.equal(mine, theirs)
    shapes = {"rows": (capacity,), "inverse": (batch * length,), "count": ()}
    shapes |= {"cu_seqlens_q": (batch + 1,), "cu_seqlens_k": (batch + 1,)}
    for name, shape in shapes.items():
        made = getattr(fixed, name)
        assert made.shape == shape
        assert made.dtype == (torch.int32 if "cu_" in name else torch.int64)
    assert fixed.max_seqlen == length


def test_more_than_fits_is_said_and_stays_within_the_lists():
    mask, fixed = make(3, 40, 25, share=0.8)
    assert mask.sum() > 25
    assert fixed.count.item() == -1
    assert torch.equal(fixed.rows, mask.flatten().nonzero().squeeze(1)[:25])
    assert fixed.inverse.max() == 24
    assert (fixed.inverse >= 0).sum() == 25
    assert fixed.cu_seqlens_q.max() == 25
    assert (fixed.cu_seqlens_q.diff() >= 0).all()


@pytest.mark.parametrize("lengths, count", [([3, 7], 10), ([0, 7], 7), ([-1, 7], -1), ([3, 8], -1)])
def test_a_length_that_no_clip_has_is_no_count(lengths, count):
    rows = FixedRows.build(torch.ones(2, 7, dtype=torch.bool), torch.tensor(lengths), 14)
    assert rows.count.item() == count


def test_factors_of_the_clips_for_each_row():
    mask, fixed = make(3, 11, 30)
    factors = torch.tensor([2.0, 3.0, 5.0])
    expected = torch.cat([factors[:, None].expand(3, 11)[mask], torch.zeros(30 - int(mask.sum()))])
    assert torch.equal(fixed.per_row(factors), expected)


def test_no_value_is_asked_for():
    with FakeTensorMode():  # in which asking is an error
        _, fixed = make(3, 40, 25)
        assert fixed.per_row(torch.ones(3)).shape == (25,)


@pytest.mark.parametrize("mask, capacity, error, message", [
    (torch.ones(2, 3), 4, TypeError, r"mask must be \[B, L\] .* of dtype bool, got float32 \[2, 3\]"),
    (torch.ones(6, dtype=torch.bool), 4, ValueError, r"mask must be \[B, L\]"),
    (torch.ones(2, 3, dtype=torch.bool), 0, ValueError, "capacity must be an integer of at least 1, got int 0"),
    (torch.ones(2, 3, dtype=torch.bool), 3.5, ValueError, "capacity must be an integer of at least 1, got float 3.5"),
])  # fmt: skip
def test_errors(mask, capacity, error, message):
    with pytest.raises(error, match="FixedSelection: " + message):
        FixedSelection.build(mask, capacity)
