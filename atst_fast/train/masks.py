"""Which patches of a clip are masked: spans at random places, as in the official training.

Everything is drawn for a whole batch at once, on any device, and no value is asked for on the way: on a GPU the draw
can be part of a CUDA graph (its generator registered with the graph).
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

_SURE = 8  # standard deviations above the mean that a batch's masked patches stay below: one step in 10^15 does not
_PLACES = 64  # a list has a multiple of this many places


def spans_to_mask(starts: Tensor, lengths: Tensor, num_patches: int) -> Tensor:
    """bool ``[B, num_patches]``: the union of spans int64 ``[B, S]``, cut off at the end; length 0 is no span."""
    patches = torch.arange(num_patches, device=starts.device)
    starts, ends = starts[:, :, None], (starts + lengths)[:, :, None]
    return ((starts <= patches) & (patches < ends)).any(1)


def num_spans(u: Tensor, num_patches: int, mask_ratio: float, mask_len: int, min_masks: int = 2) -> Tensor:
    """How many spans int64: ``mask_ratio * num_patches / mask_len`` rounded at random by ``u`` float64 in [0, 1)."""
    count = (mask_ratio * num_patches / mask_len + u).floor().long()
    return count.clamp(min_masks, _most_spans(num_patches, mask_ratio, mask_len, min_masks))


def _most_spans(num_patches: int, mask_ratio: float, mask_len: int, min_masks: int) -> int:
    return max(min_masks, math.ceil(mask_ratio * num_patches / mask_len))


def block_mask(
    batch: int,
    num_patches: int = 250,
    *,
    mask_ratio: float = 0.65,
    mask_len: int = 5,
    min_masks: int = 2,
    mask_type: str = "block",
    other: int = 2,
    no_overlap: bool = False,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Masks bool ``[batch, num_patches]``, True where the student sees the mask token.

    "block": spans of ``mask_len`` patches from distinct starts, which may overlap, so that with the official 0.65 and 5
    about half of 250 patches are masked, counts differ, and the last patch never is. "uniform": span lengths uniform in
    ``[other, 2 * mask_len]``. "random": exactly ``mask_ratio`` of the patches, each by itself. ``no_overlap``: spans
    keep apart (block and uniform), at random places in the room that they leave.
    On the generator's device, or without one on ``device`` (by default the CPU).
    Source: audiossl/methods/atstframe/random_mask.py, fairseq compute_mask_indices.

    Raises ValueError for sizes and ratios that may leave no room for a span, and a device that is not the generator's.
    """
    _check(num_patches, mask_ratio, mask_len, min_masks, mask_type, other)
    if generator is not None:
        if device is not None and torch.device(device).type != generator.device.type:
            raise ValueError(f"block_mask: device must be the generator's ({generator.device}), got {device}")
        device = generator.device

    def uniform(*shape, dtype=torch.float32):
        return torch.rand(shape, dtype=dtype, generator=generator, device=device)

    if mask_type == "random":
        return uniform(batch, num_patches).argsort(1) < num_patches * mask_ratio
    most = _most_spans(num_patches, mask_ratio, mask_len, min_masks)
    counts = num_spans(uniform(batch, dtype=torch.float64), num_patches, mask_ratio, mask_len, min_masks)
    lengths = torch.full((batch, most), mask_len, device=device)
    if mask_type == "uniform":
        lengths = torch.randint(other, 2 * mask_len + 1, (batch, most), generator=generator, device=device)
    drawn = torch.arange(most, device=device) < counts[:, None]
    lengths = torch.where(drawn, lengths, 0)
    if no_overlap:
        # upstream leaves out the spans that no longer fit
        lengths = torch.where(lengths.cumsum(1) <= num_patches, lengths, 0)
        starts = _apart(lengths, num_patches, uniform(batch, most))
    else:
        starts = _anywhere(lengths, counts, num_patches, uniform)
    return spans_to_mask(starts, lengths, num_patches)


def _check(num_patches: int, mask_ratio: float, mask_len: int, min_masks: int, mask_type: str, other: int) -> None:
    if mask_type not in ("block", "uniform", "random"):
        raise ValueError(f"block_mask: mask_type must be 'block', 'uniform' or 'random', got {mask_type!r}")
    if not 0 < mask_ratio < 1:
        raise ValueError(f"block_mask: mask_ratio must be between 0 and 1, got {mask_ratio}")
    if mask_len < 1 or min_masks < 0 or other < 1:
        message = f"mask_len, other and min_masks must be at least 1, 1 and 0, got {mask_len}, {other} and {min_masks}"
        raise ValueError(f"block_mask: {message}")
    most = _most_spans(num_patches, mask_ratio, mask_len, min_masks)
    if mask_type != "random" and num_patches <= most:
        raise ValueError(f"block_mask: num_patches must leave room for {most} spans, got {num_patches}")


def _room(shortest, count, num_patches: int):
    """Possible starts, ints or tensors: early enough for the shortest span. Where that leaves too few for distinct
    ones, upstream takes one more than there are spans."""
    room = num_patches - shortest
    if isinstance(room, int):
        return room if room > count else count + 1
    return torch.where(room > count, room, count + 1)


def _anywhere(lengths: Tensor, counts: Tensor, num_patches: int, uniform) -> Tensor:
    """Distinct starts int64 ``[B, S]``, the first ``counts`` of them drawn without replacement: those with the smallest
    of as many random keys as there are starts."""
    batch, most = lengths.shape
    shortest = lengths.masked_fill(lengths == 0, num_patches).amin(1)
    keys = uniform(batch, num_patches)
    too_late = torch.arange(num_patches, device=keys.device) >= _room(shortest, counts, num_patches)[:, None]
    return keys.masked_fill(too_late, 2.0).topk(most, dim=1, largest=False).indices


def _apart(lengths: Tensor, num_patches: int, u: Tensor) -> Tensor:
    """Starts of spans that do not overlap: the free patches are shared out at random between them."""
    free = (num_patches - lengths.sum(1))[:, None]
    cuts = (u * (free + 1)).long().minimum(free)
    # those of no span come after the others
    cuts = cuts.masked_fill(lengths == 0, num_patches).sort(1).values
    return cuts + lengths.cumsum(1) - lengths


@lru_cache
def capacity(
    batch: int,
    num_patches: int = 250,
    *,
    mask_ratio: float = 0.65,
    mask_len: int = 5,
    min_masks: int = 2,
    mask_type: str = "block",
    other: int = 2,
    no_overlap: bool = False,
) -> int:
    """How many patches `block_mask` with the same arguments masks at most in a batch, as a multiple of 64.

    The most that can happen (every span apart) or, for overlapping blocks of one length, the mean and eight standard
    deviations of the sum over the batch, if that is less: with the official arguments and 144 clips 18,816, where the
    mean is 18,113. Both are computed exactly: n distinct starts out of R miss a patch that k of them cover with
    probability C(R - k, n) / C(R, n), and two patches likewise with the starts that cover either.
    For two views that share their masks it is twice that of the clips.
    """
    _check(num_patches, mask_ratio, mask_len, min_masks, mask_type, other)
    if mask_type == "random":
        return _rounded(batch * math.ceil(num_patches * mask_ratio))
    longest = mask_len if mask_type == "block" else 2 * mask_len
    most = batch * min(_most_spans(num_patches, mask_ratio, mask_len, min_masks) * longest, num_patches)
    if mask_type == "block" and not no_overlap:
        mean, variance = moments(num_patches, mask_ratio, mask_len, min_masks)
        most = min(most, math.ceil(batch * mean + _SURE * math.sqrt(batch * variance)))
    return _rounded(most)


def _rounded(places: int) -> int:
    return max(-(-places // _PLACES), 1) * _PLACES


def moments(num_patches: int, mask_ratio: float, mask_len: int, min_masks: int) -> tuple[float, float]:
    """Mean and variance of how many patches overlapping blocks mask in one clip."""
    exact = mask_ratio * num_patches / mask_len
    few = max(min_masks, math.floor(exact))
    more = _most_spans(num_patches, mask_ratio, mask_len, min_masks)
    share = exact - math.floor(exact) if more > few else 0.0
    firsts, squares = zip(*(_moments_of(n, num_patches, mask_len) for n in (few, more)))
    mean = (1 - share) * firsts[0] + share * firsts[1]
    return mean, (1 - share) * squares[0] + share * squares[1] - mean**2


def _moments_of(count: int, num_patches: int, mask_len: int) -> tuple[float, float]:
    """Expectation of the number of masked patches and of its square, for ``count`` spans."""
    room = _room(mask_len, count, num_patches)
    patches = torch.arange(num_patches)
    first, last = (patches - mask_len + 1).clamp(min=0), patches.clamp(max=room - 1)  # the starts that cover a patch
    cover = (last - first + 1).clamp(min=0)
    both = (last[:, None].minimum(last) - first[:, None].maximum(first) + 1).clamp(min=0)
    miss = torch.tensor([math.comb(room - k, count) / math.comb(room, count) for k in range(room + 1)]).double()
    alone, neither = miss[cover], miss[cover[:, None] + cover - both]
    return (1 - alone).sum().item(), (1 - alone[:, None] - alone + neither).sum().item()
