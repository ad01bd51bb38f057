"""The encoder of ATST-Clip: mel frames to tokens, and a class token that says what the whole clip is."""

import torch
from torch import Tensor, nn

from atst_fast.models.encoder import Encoder
from atst_fast.nn import FixedRows, Selection


class ClipEncoder(Encoder):
    """Class token, patches, positions, pre-norm blocks and a last LayerNorm; keys of audiossl's ``AST``
    (``audiossl/models/atst/audio_transformer.py``). Arguments, and what holds of mel and lengths: see ``Encoder``.

    ``use_cls=False`` leaves the class token out: a clip is the mean of its valid tokens then, and positions begin at
    row 0 of ``pos_embed``. ``mask_embed`` is a parameter of the official encoder that nothing reads unless a mask is
    given to ``prepare_tokens``: in training it gets no gradient.

    In every method a clip without a valid token attends to its class token alone.
    """

    tokens_learned: tuple[str, ...] = ("cls_token", "mask_embed")
    cls_token: nn.Parameter

    def __init__(self, arch="small", *, use_cls: bool = True, **options):
        if not use_cls:
            self.tokens_learned = ("mask_embed",)
        super().__init__(arch, **options)
        if self.pos_type == "interpolate" and not use_cls:
            raise ValueError("ClipEncoder: pos_type must be 'cut' without a class token (use_cls), got 'interpolate'")
        self.use_cls = use_cls
        self.config["use_cls"] = use_cls

    def prepare_tokens(self, mel: Tensor, mask: Tensor | None = None) -> Tensor:
        """``[B, 1 + L, D]``: the class token, then embedded patches (masked ones replaced by the mask token), positions
        added; ``[B, L, D]`` without a class token."""
        self._check_mel(mel)
        positions = self._positions(mel.shape[3])
        if not self.use_cls:
            return self._patches(mel, mask, positions)
        first, rest = positions[:, :1], positions[:, 1:]
        return torch.cat([(self.cls_token + first).expand(mel.shape[0], -1, -1), self._patches(mel, mask, rest)], dim=1)

    def forward(self, mel: Tensor, lengths: Tensor | None = None, *, select: FixedRows | None = None) -> Tensor:
        """One vector a clip, ``[B, D]``: its class token after ``norm``. The last block computes these rows only.
        Without a class token, the mean of the valid tokens after ``norm``; of none it is NaN, as in audiossl.

        ``select``: what `select` made of the same arguments, which student and teacher can share.
        """
        x = self.prepare_tokens(mel)
        length, host_length = self._attended(lengths, mel)
        if not self.use_cls:
            return self._mean(self._all_rows(x, length), length)
        if select is not None:  # whoever shares it reads its count too
            return self._selected_rows(x, length, select)
        select = self.select(mel, lengths)
        if select is None:
            return self._selected_rows(x, length, Selection.build(_first_of_each(x), host_length))
        return self._selected_rows(x, length, select).masked_fill(select.count < 0, torch.nan)

    def select(self, mel: Tensor, lengths: Tensor | None) -> FixedRows | None:
        """Lists of the class tokens for `forward` with fixed shapes, on the device of mel; ``count`` is -1 where a
        length is out of range. None where shapes are not fixed, on a CPU, and where there is no class token."""
        if not self.use_cls or mel.shape[0] == 0 or not self._is_fixed(mel):
            return None
        tokens = 1 + self.tokens(mel.shape[3])
        first = (torch.arange(tokens, device=mel.device) == 0).expand(mel.shape[0], -1)
        return FixedRows.build(first, self._attended(lengths, mel)[0], mel.shape[0])

    def intermediate(self, mel: Tensor, lengths: Tensor | None = None, n_blocks: int = 1) -> tuple[Tensor, Tensor]:
        """Class tokens ``[B, n_blocks * D]`` (zeros where there are none) and tokens ``[B, L, n_blocks * D]`` of the
        last ``n_blocks`` blocks, each after ``norm``, in ascending order. Do not read tokens past a clip's length."""
        x = self.prepare_tokens(mel)
        rows = torch.cat(self._last_blocks(x, self._attended(lengths, mel)[0], n_blocks), dim=-1)
        if not self.use_cls:
            return rows.new_zeros(rows.shape[0], rows.shape[2]), rows
        return rows[:, 0], rows[:, 1:]

    def _attended(self, lengths: Tensor | None, mel: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Valid tokens of each clip, the class token included, as `_valid`."""
        length, host_length = self._valid(lengths, mel)
        if length is None or host_length is None or not self.use_cls:
            return length, host_length
        # a length that is out of range stays so
        return length + (length >= 0), host_length + (host_length >= 0)

    def _mean(self, rows: Tensor, length: Tensor | None) -> Tensor:
        if length is None:
            return rows.mean(1)
        valid = torch.arange(rows.shape[1], device=rows.device) < length[:, None]
        return rows.masked_fill(~valid[:, :, None], 0).sum(1) / length.clamp(min=0)[:, None]

    def _positions(self, frames: int) -> Tensor:
        """Of the class token and all tokens, or of the tokens alone."""
        tokens = self.tokens(frames)
        if self.pos_type == "cut":
            rows = tokens + int(self.use_cls)  # a bool in a sum is not a number to a trace of torch 2.11
            self._check_positions(rows, self.pos_embed.shape[1], frames)
            return self.pos_embed[:, :rows]
        if tokens == self.pos_embed.shape[1] - 1 and frames == self.max_frames:
            return self.pos_embed  # the official encoder does not resize to the same size
        return torch.cat([self.pos_embed[:, :1], self.resized_positions(frames)], dim=1)


def _first_of_each(x: Tensor) -> Tensor:
    """bool ``[B, L]``: the first token of each clip."""
    first = torch.zeros(x.shape[:2], dtype=torch.bool)
    first[:, 0] = True
    return first
