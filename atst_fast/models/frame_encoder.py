"""The encoder of ATST-Frame: mel frames to tokens to a representation every 40 ms."""

import torch
from torch import Tensor

from atst_fast.models.encoder import Encoder
from atst_fast.nn import FixedRows, Selection


class FrameEncoder(Encoder):
    """Patches, mask token, positions, pre-norm blocks and a last LayerNorm; keys of audiossl's ``FrameAST``
    (``audiossl/methods/atstframe/audio_transformer.py``). Arguments, and what holds of mel, lengths and mask: see
    ``Encoder``. Row 0 of ``pos_embed`` is never read."""

    norm_key = "norm_frame"

    def prepare_tokens(self, mel: Tensor, mask: Tensor | None = None) -> Tensor:
        """Embedded patches ``[B, L, D]``: masked ones replaced by the mask token, then positions added."""
        self._check_mel(mel)
        return self._patches(mel, mask, self._positions(mel.shape[3]))

    def forward(self, mel: Tensor, lengths: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """All tokens ``[B, L, D]`` after ``norm_frame``; tokens under ``mask`` enter as the mask token.

        Rows past a clip's length attend to its valid tokens, as in audiossl; do not read them.
        """
        x = self.prepare_tokens(mel, mask)
        return self._all_rows(x, self._valid(lengths, mel)[0])

    def masked_tokens(
        self, mel: Tensor, lengths: Tensor | None, mask: Tensor, *, replace: bool, select: FixedRows | None = None
    ) -> Tensor:
        """The tokens that are masked and valid, ``[M, D]`` after ``norm_frame``, ordered by (clip, time).

        ``replace``: whether they enter as the mask token (the student) or as they are (the teacher). The last block
        computes these rows only: all rows are keys and values there, and nothing else of them is read.

        ``select``: what `select` made of the same arguments, which student and teacher can share. Then, and wherever
        shapes are fixed, the rows are ``[C, D]``, and those from ``select.count`` on are padding.
        """
        self._check_mask(mask, mel.shape[0], self.tokens(mel.shape[-1]))
        if select is None and self._is_fixed(mel):
            select = self.select(mel, lengths, mask, mask.numel())
        x = self.prepare_tokens(mel, mask if replace else None)
        length, host_length = self._valid(lengths, mel)
        if select is not None:
            return self._selected_rows(x, length, select)
        counted = Selection.build(mask, host_length)
        if not len(counted.queries):
            raise ValueError(f"{self._name}: mask must select at least one valid token of the batch, got none")
        return self._selected_rows(x, length, counted)

    def select(
        self, mel: Tensor, lengths: Tensor | None, mask: Tensor, capacity: int | None = None
    ) -> FixedRows | None:
        """Lists for `masked_tokens` with fixed shapes, on the device of mel: the tokens of ``mask`` that are valid.

        ``capacity``: how many there are at most, C; by default B * L. If there are more, ``count`` is -1. None where
        shapes are not fixed: on a CPU, unless there is a capacity.
        """
        self._check_mask(mask, mel.shape[0], self.tokens(mel.shape[-1]))
        if capacity is None and not self._is_fixed(mel):
            return None
        valid, _ = self._valid(lengths, mel)
        places = max(mask.numel(), 1) if capacity is None else capacity
        return FixedRows.build(mask.to(mel.device, non_blocking=True), valid, places)

    def intermediate(self, mel: Tensor, lengths: Tensor | None = None, n_blocks: int = 1) -> Tensor:
        """Outputs of the last ``n_blocks`` blocks, each after ``norm_frame``, in ascending order:
        ``[B, L, n_blocks * D]``."""
        x = self.prepare_tokens(mel)
        return torch.cat(self._last_blocks(x, self._valid(lengths, mel)[0], n_blocks), dim=-1)

    def _positions(self, frames: int) -> Tensor:
        if self.pos_type == "interpolate":
            return self.resized_positions(frames)
        tokens = self.tokens(frames)
        self._check_positions(tokens, self.pos_embed.shape[1] - 1, frames)
        return self.pos_embed[:, 1 : tokens + 1]
