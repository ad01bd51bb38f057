"""Which tokens of a batch are read: the index lists that the last block of an encoder works with."""

from typing import NamedTuple

import torch
from torch import Tensor


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

    def offsets(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """``cu_seqlens`` of queries and keys: int32 ``[B+1]`` each."""
        both = torch.zeros(2, len(self.query_counts) + 1, dtype=torch.int32)
        torch.cumsum(torch.stack([self.query_counts, self.key_counts]), 1, dtype=torch.int32, out=both[:, 1:])
        return tuple(both.to(device, non_blocking=True))


def take(x: Tensor, rows: Tensor | None) -> Tensor:
    """Rows of ``x`` by an index list on the CPU; all of them for None."""
    return x if rows is None else x.index_select(0, rows.to(x.device, non_blocking=True))
