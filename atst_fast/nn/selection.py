"""Which tokens of a batch are read: the index lists that the last block of an encoder works with.

``Selection`` has lists as long as they need to be, on the CPU; ``FixedSelection`` has lists of a fixed size, made where
the mask is without asking it anything, so that a training step never waits for its GPU and can be captured in a graph.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from atst_fast import ops
from atst_fast.ops import _checks


class Selection(NamedTuple):
    """Selected tokens of a ``[B, L, D]`` batch and the tokens they attend to, as index lists.

    ``queries`` int64 ``[M]``: rows of the flat ``[B*L, D]`` batch, ascending; ``keys`` int64 ``[K]`` likewise, or None
    for all of them; ``query_counts`` and ``key_counts`` int64 ``[B]``: how many of each belong to a sample. All of them
    lie on the CPU, so that no step ever waits for a device to count; ``take`` copies a list to where it is used.
    """

    queries: Tensor
    query_counts: Tensor
    keys: Tensor | None
    key_counts: Tensor
    length: int

    @classmethod
    def build(cls, mask: Tensor, token_lengths: Tensor | None = None) -> "Selection":
        """From a bool mask ``[B, L]`` (True: read this token) and, for padded batches, the valid tokens int64 ``[B]``:
        the tokens that are masked and valid, attending to all valid ones."""
        batch, length = mask.shape
        mask = mask.cpu()
        keys, key_counts = None, torch.full((batch,), length)
        if token_lengths is not None and (token_lengths.cpu() < length).any():
            key_counts = token_lengths.cpu()
            valid = torch.arange(length) < key_counts[:, None]
            mask = mask & valid
            keys = valid.flatten().nonzero().squeeze(1)
        return cls(mask.flatten().nonzero().squeeze(1), mask.sum(1), keys, key_counts, length)

    def samples(self, kept: Tensor) -> tuple["Selection", Tensor]:
        """The selection within the sub-batch ``kept`` (int64, ascending), and which of the ``M`` queries remain."""
        new = torch.full((len(self.query_counts),), -1)
        new[kept] = torch.arange(len(kept))

        def renumber(rows):
            sample = new[rows // self.length]
            remain = (sample >= 0).nonzero().squeeze(1)
            return sample[remain] * self.length + rows[remain] % self.length, remain

        queries, remain = renumber(self.queries)
        keys = None if self.keys is None else renumber(self.keys)[0]
        return Selection(queries, self.query_counts[kept], keys, self.key_counts[kept], self.length), remain

    def take_queries(self, x: Tensor) -> Tensor:
        """The selected rows of ``[B*L, D]``."""
        return take(x, self.queries)

    def take_keys(self, x: Tensor) -> Tensor:
        """The rows that they attend to."""
        return take(x, self.keys)

    def offsets(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """``cu_seqlens`` of queries and keys: int32 ``[B+1]`` each."""
        both = torch.zeros(2, len(self.query_counts) + 1, dtype=torch.int32)
        torch.cumsum(torch.stack([self.query_counts, self.key_counts]), 1, dtype=torch.int32, out=both[:, 1:])
        return tuple(both.to(device, non_blocking=True))


class FixedSelection(NamedTuple):
    """Selected tokens of a ``[B, L, D]`` batch of which all tokens are valid, in lists of ``capacity`` C places.

    ``rows`` int64 ``[C]``: rows of the flat ``[B*L, D]`` batch, ascending, then -1 (padding). ``inverse`` int64
    ``[B*L]``: the place of each row in that list, or -1; both are what ``ops.select_rows`` takes.
    ``cu_seqlens_q``, ``cu_seqlens_k`` int32 ``[B + 1]``: where the selected tokens of each clip begin in the list, and
    where its keys begin in the batch (all L tokens of a clip are keys). ``count`` int64, a scalar: how many places are
    not padding. ``max_seqlen``: L, the most of either that a clip can have.

    All tensors lie on the mask's device. If the mask selects more than C tokens the first C are listed and ``count`` is
    -1, which makes the loss NaN: nothing is left out silently.
    """

    rows: Tensor
    inverse: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    count: Tensor  # type: ignore[assignment]  # a tuple's own count is of no use here
    max_seqlen: int

    @classmethod
    def build(cls, mask: Tensor, capacity: int) -> "FixedSelection":
        """From a bool mask ``[B, L]`` (True: read this token). ``train.masks.capacity`` says how many places do.

        Raises TypeError for another dtype, ValueError for another rank or less than one place.
        """
        expected = "[B, L] (clips, tokens), True where a token is read"
        _checks.tensor("FixedSelection", "mask", mask, expected, dim=2, dtypes=(torch.bool,))
        if not _checks.is_integer(capacity) or capacity < 1:
            _checks.fail("FixedSelection", "capacity", "an integer of at least 1", capacity)
        batch, length = mask.shape
        device = mask.device
        mask = mask.flatten()
        seen = mask.cumsum(0)  # tokens selected up to and with each row
        ends = torch.nn.functional.pad(seen, (1, 0))[::length] if length else seen.new_zeros(batch + 1)
        # the i-th selected row is the first up to which i have been seen
        rows = torch.searchsorted(seen, torch.arange(1, capacity + 1, device=device))
        rows = rows.masked_fill(rows >= mask.shape[0], -1)
        inverse = (seen - 1).masked_fill(~mask | (seen > capacity), -1)
        count = ends[-1].masked_fill(ends[-1] > capacity, -1)
        keys = torch.arange(batch + 1, dtype=torch.int32, device=device) * length
        return cls(rows, inverse, ends.clamp(max=capacity).int(), keys, count, length)

    def per_row(self, per_clip: Tensor) -> Tensor:
        """Values ``[B]`` of the clips, such as the factors of stochastic depth, for each place: ``[C]``; the padding
        gets zeros."""
        padded = self.rows < 0
        return per_clip[(self.rows // max(self.max_seqlen, 1)).masked_fill(padded, 0)].masked_fill(padded, 0)


class FixedRows(NamedTuple):
    """What `Selection` is to a step that waits for its device: the selected tokens of a batch and those they attend to,
    by lists of fixed size. ``keys`` is None where all tokens are valid."""

    queries: FixedSelection
    keys: FixedSelection | None

    @classmethod
    def build(cls, mask: Tensor, token_lengths: Tensor | None, capacity: int) -> "FixedRows":
        """From a bool mask ``[B, L]`` and the valid tokens int64 ``[B]`` on its device, or None: all. ``capacity``: how
        many tokens are masked and valid at most. A length that is not from 0 to L makes the count -1."""
        if token_lengths is None:
            return cls(FixedSelection.build(mask, capacity), None)
        length = mask.shape[1]
        valid = torch.arange(length, device=mask.device) < token_lengths[:, None]
        queries = FixedSelection.build(mask & valid, capacity)
        impossible = ((token_lengths < 0) | (token_lengths > length)).any()
        queries = queries._replace(count=queries.count.masked_fill(impossible, -1))
        return cls(queries, FixedSelection.build(valid, max(valid.numel(), 1)))

    @property
    def count(self) -> Tensor:  # type: ignore[override]
        """int64, a scalar on the device: how many rows are not padding; -1 where they did not fit."""
        return self.queries.count

    @property
    def length(self) -> int:
        """L, the most queries or keys that a sample can have."""
        return self.queries.max_seqlen

    def take_queries(self, x: Tensor) -> Tensor:
        """``[C, D]``: the selected rows of ``[B*L, D]``, then zeros."""
        return ops.select_rows(x, self.queries.rows, self.queries.inverse)

    def take_keys(self, x: Tensor) -> Tensor:
        return x if self.keys is None else ops.select_rows(x, self.keys.rows, self.keys.inverse)

    def offsets(self, device: torch.device) -> tuple[Tensor, Tensor]:
        keys = self.queries.cu_seqlens_k if self.keys is None else self.keys.cu_seqlens_q
        return self.queries.cu_seqlens_q, keys


def take(x: Tensor, rows: Tensor | None) -> Tensor:
    """Rows of ``x`` by an index list on the CPU; all of them for None."""
    return x if rows is None else x.index_select(0, rows.to(x.device, non_blocking=True))
