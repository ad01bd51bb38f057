"""What downstream tasks read from an encoder: one vector per clip or per token, from audio cut into chunks of frames.

An encoder knows the positions of the length that it was trained on, so longer audio goes through it in pieces.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from atst_fast.models.clip_encoder import ClipEncoder
from atst_fast.models.frame_encoder import FrameEncoder
from atst_fast.ops import _checks

CLIP_CHUNK = 601  # frames: the 6 s that ATST-Clip is trained on, and of whose positions it has learned


class Chunks(NamedTuple):
    """``mel`` ``[number * B, 1, F, T]`` chunks of one width, those of the same place beside each other; ``left`` int64
    ``[number * B]``, how many valid frames their clips have from the first frame of the chunk on (also beyond its end);
    ``counts`` bool ``[number * B]``, whether a chunk is part of its clip's mean."""

    number: int
    mel: Tensor
    left: Tensor
    counts: Tensor

    @property
    def lengths(self) -> Tensor:
        return self.left.clamp(max=self.mel.shape[3])


def frame_features(
    encoder: FrameEncoder, mel: Tensor, lengths: Tensor | None = None, n_blocks: int = 1, chunk_frames: int = 1001
) -> Tensor:
    """One vector per clip of a ``FrameEncoder``: the mean over the valid tokens of a chunk, then over chunks.

    Args:
        mel: ``[B, 1, n_mels, T]`` float. lengths: valid frames int64 ``[B]``, None: all. n_blocks: how many of the last
            blocks, each after ``norm_frame``, ascending side by side. chunk_frames: mel frames of 10 ms.

    Returns:
        ``[B, n_blocks * D]``; zeros for a clip of less than one token.

    The first chunk counts if it has a valid frame, each other one if more than half of it is valid (all with the same
    weight); chunks of 20 frames or less are left out unless they are all there is. Differentiable in ``mel`` and the
    weights. Meets the official tensors within rounding. Upstream: audiossl/methods/atstframe/downstream/model.py.
    Raises ValueError and TypeError as the encoder does, and for ``chunk_frames`` below one token.
    """
    total: Any = 0.0
    weight: Any = 0.0
    for chunk in _chunks("frame_features", encoder, mel, lengths, chunk_frames, shortest=20):
        tokens = encoder.intermediate(chunk.mel, chunk.lengths, n_blocks)
        means = _mean(tokens, encoder.tokens(chunk.lengths), encoder.tokens(chunk.lengths))
        total, weight = _add(total, weight, means, chunk)
    return total / weight.clamp(min=1)[:, None]


def clip_features(
    encoder: ClipEncoder,
    mel: Tensor,
    lengths: Tensor | None = None,
    n_blocks: int = 1,
    chunk_frames: int = CLIP_CHUNK,
    avgpool: bool = True,
    scale_bug: bool = True,
) -> Tensor:
    """One vector per clip of a ``ClipEncoder``: class tokens and means over tokens, each averaged over chunks.

    Args: as `frame_features`. avgpool: whether the means over valid tokens are there, beside the class tokens.
    scale_bug: divide the sum over the tokens of a chunk by the number of tokens that the clip has from there on, as the
    official code does, also where they reach beyond the chunk: a first chunk of 6 s of a clip of 10 s is scaled by 0.6.
    False: by the number of tokens that were summed.

    Returns ``[B, 2 * n_blocks * D]``: the class tokens of all blocks, ascending, then the means of all blocks; without
    ``avgpool`` the first half. Chunks count as in `frame_features`, but none is left out for being short.
    Differentiable in ``mel`` and the weights. Meets the official tensors within rounding.
    Upstream: audiossl/models/atst/audio_transformer.py, get_intermediate_layers_chunks. Raises as `frame_features`.
    """
    total: Any = 0.0
    weight: Any = 0.0
    for chunk in _chunks("clip_features", encoder, mel, lengths, chunk_frames):
        features, tokens = encoder.intermediate(chunk.mel, chunk.lengths, n_blocks)
        if avgpool:
            valid = encoder.tokens(chunk.lengths)
            means = _mean(tokens, valid, encoder.tokens(chunk.left) if scale_bug else valid)
            features = torch.cat([features, means], dim=-1)
        total, weight = _add(total, weight, features, chunk)
    return total / weight.clamp(min=1)[:, None]


def token_features(
    encoder: FrameEncoder | ClipEncoder,
    mel: Tensor,
    lengths: Tensor | None = None,
    n_blocks: int = 1,
    chunk_frames: int = 1001,
) -> Tensor:
    """One vector per token: ``[B, L, n_blocks * D]``, L the tokens of T frames; of either encoder, the class token of a
    ``ClipEncoder`` left out. Rows past a clip's length are zero.

    Arguments and errors as `frame_features`, and ValueError for an encoder of more than one token at a time (patches
    less high than its mels). Chunks are whole tokens long (1000 of 1001 frames), so that token k
    always begins at frame k times the patch's width. Differentiable in ``mel`` and the weights.
    """
    if encoder.grid[0] != 1:
        raise ValueError(f"token_features: encoder must have one token at a time, got {encoder.grid[0]} of them")
    width = encoder.patch_embed.patch_width
    whole = chunk_frames // width * width
    parts = []
    for chunk in _chunks("token_features", encoder, mel, lengths, whole, shortest=width - 1, all_count=True):
        out = encoder.intermediate(chunk.mel, chunk.lengths, n_blocks)
        out = out[1] if isinstance(out, tuple) else out
        valid = torch.arange(out.shape[1], device=out.device) < encoder.tokens(chunk.lengths).to(out.device)[:, None]
        out = torch.where(valid[..., None], out, out.new_zeros(()))
        parts.append(out.unflatten(0, (chunk.number, mel.shape[0])).transpose(0, 1).flatten(1, 2))
    return torch.cat(parts, dim=1)


def _chunks(
    name: str,
    encoder: FrameEncoder | ClipEncoder,
    mel: Tensor,
    lengths: Tensor | None,
    chunk_frames: int,
    *,
    shortest: int = 0,
    all_count: bool = False,
) -> list[Chunks]:
    """The whole chunks of all clips, and what is left of them, where that can count."""
    axes = f"[B, 1, {encoder.n_mels}, T] (clips, 1, mel bins, frames)"
    _checks.tensor(name, "mel", mel, axes, dim=4)
    if chunk_frames < encoder.patch_embed.patch_width:
        wide = f"at least {encoder.patch_embed.patch_width} frames, the width of a token"
        _checks.fail(name, "chunk_frames", wide, chunk_frames)
    clips, frames = mel.shape[0], mel.shape[3]
    if lengths is None:
        lengths = torch.full((clips,), frames)
    expected = _checks.Later("[{}] (valid frames of each clip, 0 to {})", clips, frames)
    _checks.tensor(name, "lengths", lengths, expected, dim=1, dtypes=(torch.int64,))
    if lengths.shape[0] != clips:
        _checks.fail(name, "lengths", expected, lengths)
    if _checks.readable(lengths) and not ((lengths >= 0) & (lengths <= frames)).all():
        _checks.fail(name, "lengths", expected, lengths.tolist())
    whole = frames // chunk_frames
    # a remainder of at most half a chunk cannot count
    least = max(shortest, 0 if all_count or not whole else chunk_frames // 2)
    bounds = [(0, whole * chunk_frames, whole)] if whole else []
    if frames - whole * chunk_frames > least or not whole:
        bounds.append((whole * chunk_frames, frames, 1))
    chunks = []
    for first, last, number in bounds:
        parts = mel[..., first:last].unflatten(3, (number, -1)).permute(3, 0, 1, 2, 4).flatten(0, 1)
        starts = first + chunk_frames * torch.arange(number, device=lengths.device)
        left = (lengths - starts[:, None]).clamp(min=0)
        half = torch.where(starts == 0, 0, 0 if all_count else chunk_frames // 2)
        chunks.append(Chunks(number, parts, left.flatten(), (left > half[:, None]).flatten()))
    return chunks


def _mean(tokens: Tensor, valid: Tensor, divisor: Tensor) -> Tensor:
    """``[B, L, D]`` summed over the ``valid`` first ones and divided by ``divisor``, both ``[B]``: ``[B, D]``."""
    mask = torch.arange(tokens.shape[1], device=tokens.device) < valid.to(tokens.device)[:, None]
    total = torch.where(mask[..., None], tokens, tokens.new_zeros(())).sum(1)
    # the summand is the official one: a clip without tokens gives zeros
    return total / (divisor.to(tokens.device, torch.float32)[:, None] + 1e-6)


def _add(total: Any, weight: Any, values: Tensor, chunk: Chunks):
    """Running sums over chunks: values ``[number * B, D]`` of those that count, and how many these are."""
    counts = chunk.counts.to(values.device)
    kept = torch.where(counts[:, None], values, values.new_zeros(()))
    clips = values.shape[0] // chunk.number
    return tuple(
        before + each.unflatten(0, (chunk.number, clips)).sum(0) for before, each in ((total, kept), (weight, counts))
    )
