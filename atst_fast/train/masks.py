"""Which patches of a clip are masked: spans at random places, as in the official training."""

import torch
from torch import Tensor


def spans_to_mask(starts: list[int], lengths: list[int], num_patches: int) -> Tensor:
    """bool ``[num_patches]``: the union of spans, cut off at the end."""
    mask = torch.zeros(num_patches, dtype=torch.bool)
    for start, length in zip(starts, lengths):
        mask[start : start + length] = True
    return mask


def num_spans(u: float, num_patches: int, mask_ratio: float, mask_len: int, min_masks: int = 2) -> int:
    """How many spans: ``mask_ratio * num_patches / mask_len`` rounded at random by ``u`` in [0, 1)."""
    return max(min_masks, int(mask_ratio * num_patches / mask_len + u))


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
) -> Tensor:
    """Masks bool ``[batch, num_patches]``, True where the student sees the mask token.

    "block": spans of ``mask_len`` patches from distinct starts, which may overlap, so that with the official 0.65 and 5
    about half of 250 patches are masked, counts differ, and the last patch never is. "uniform": span lengths uniform in
    ``[other, 2 * mask_len]``. "random": exactly ``mask_ratio`` of the patches, each by itself. ``no_overlap``: spans
    keep apart (block and uniform), at random places in the room that they leave.
    Source: audiossl/methods/atstframe/random_mask.py, fairseq compute_mask_indices.

    Raises ValueError for sizes and ratios that leave no room for a span.
    """
    if mask_type not in ("block", "uniform", "random"):
        raise ValueError(f"block_mask: mask_type must be 'block', 'uniform' or 'random', got {mask_type!r}")
    if not 0 < mask_ratio < 1:
        raise ValueError(f"block_mask: mask_ratio must be between 0 and 1, got {mask_ratio}")
    if mask_len < 1 or min_masks < 0 or other < 1:
        message = f"mask_len, other and min_masks must be at least 1, 1 and 0, got {mask_len}, {other} and {min_masks}"
        raise ValueError(f"block_mask: {message}")
    if mask_type == "random":
        order = torch.stack(
            [torch.randperm(num_patches, generator=generator) for _ in range(batch)] or [torch.empty(0)]
        )
        return (order < num_patches * mask_ratio).reshape(batch, num_patches)
    masks = torch.zeros(batch, num_patches, dtype=torch.bool)
    for row in range(batch):
        u = torch.rand((), dtype=torch.float64, generator=generator).item()
        count = num_spans(u, num_patches, mask_ratio, mask_len, min_masks)
        lengths = [mask_len] * count
        if mask_type == "uniform":
            lengths = torch.randint(other, 2 * mask_len + 1, (count,), generator=generator).tolist()
        starts = (_apart if no_overlap else _anywhere)(lengths, num_patches, generator)
        masks[row] = spans_to_mask(starts, lengths, num_patches)
    return masks


def _anywhere(lengths: list[int], num_patches: int, generator: torch.Generator | None) -> list[int]:
    """Distinct starts, early enough for the shortest span; shorter room than that makes the spans' minimum shorter."""
    shortest, count = min(lengths, default=1), len(lengths)
    if num_patches - shortest <= count:
        shortest = num_patches - count - 1
    room = num_patches - shortest
    if shortest < 0 or room < count:
        raise ValueError(f"block_mask: num_patches must leave room for {count} spans, got {num_patches}")
    return torch.randperm(room, generator=generator)[:count].tolist()


def _apart(lengths: list[int], num_patches: int, generator: torch.Generator | None) -> list[int]:
    """Starts of spans that do not overlap: the free patches are shared out at random between them. The span that no
    longer fits is left out, as upstream does."""
    while sum(lengths) > num_patches:
        lengths = lengths[:-1]
    free = num_patches - sum(lengths)
    cuts = sorted(torch.randint(0, free + 1, (len(lengths),), generator=generator).tolist())
    starts, used = [], 0
    for cut, length in zip(cuts, lengths):
        starts.append(cut + used)
        used += length
    return starts
