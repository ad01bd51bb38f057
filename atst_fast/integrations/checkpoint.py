"""Encoders out of checkpoints, whoever wrote them."""

from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from atst_fast.integrations.checkpoint_config import encoder_settings, front_end_settings, is_clip
from atst_fast.integrations.checkpoint_file import read
from atst_fast.integrations.checkpoint_layout import STRICT, recognise
from atst_fast.models.frame_encoder import FrameEncoder
from atst_fast.models.weights import CheckpointError, Faults, is_finite, load_weights
from atst_fast.ops import _checks

__all__ = ["Checkpoint", "CheckpointError", "load_checkpoint"]

_NAME = "load_checkpoint"


class Checkpoint(NamedTuple):
    """What `load_checkpoint` found.

    ``encoder``: in eval mode, float32, on the CPU; its parameters do not require gradients. ``front_end``: arguments of
    ``nn.LogMelSpectrogram``. ``method``: "frame" or "clip". ``layout``: a name in ``checkpoint_layout.LAYOUTS``.
    ``heads``: the other tensors of the same network by name ("projector.0.weight", "head.linear.bias"), as they are.
    ``config``: what else the file says, in plain values ("hyper_parameters", "args", "epoch", "settings", ...).
    """

    encoder: FrameEncoder
    front_end: dict[str, Any]
    method: str
    layout: str
    heads: dict[str, Tensor]
    config: dict[str, Any]


def load_checkpoint(
    path: str | Path,
    which: Literal["teacher", "student"] = "teacher",
    *,
    pos_embed: Literal["exact", "cut", "interpolate"] = "exact",
    max_frames: int | None = None,
    num_heads: int | None = None,
) -> Checkpoint:
    """The encoder of a checkpoint, recognised by the names and shapes of its tensors.

    Args:
        path: a file of ``torch.save`` or safetensors, or a folder that ``save_pretrained`` wrote. No code of it runs.
        which: of a file with two networks. In one that ATST-C2F distilled, "teacher" is the fine-tuned ATST-Clip and
            "student" the ATST-Frame that is the result. A file with one encoder gives that one.
        pos_embed: "exact" takes the positions as they are; "cut" the first ones, and "interpolate" all of them resized
            (bicubic, as ``pos_type="interpolate"`` does for one input) to what ``max_frames`` mel frames of 10 ms need.
        max_frames: the longest input of the encoder, in mel frames; None: what the file has positions for.
        num_heads: of the attention, which no tensor shows; None: what the file says, else 64 channels a head as in
            every published size.

    Raises ``CheckpointError`` where the file cannot be read, would run code, or holds no such encoder, and where
    tensors are missing, extra, misshapen or not finite: with the list of them. ``ValueError`` for wrong arguments.
    """
    _check_arguments(which, pos_embed, max_frames, num_heads)
    path = Path(path)
    content = read(path)
    layout = recognise(content, path)
    network = layout.network(which, path)
    weights = {k: content.tensors[network.prefix + k] for k in network.keys}
    settings = encoder_settings(content.config, weights, num_heads, path)
    front_end = front_end_settings(content.config, settings.get("n_mels", 64), path)
    encoder = _build(is_clip(weights), settings, path)
    extra = (*network.extra, *(layout.others if layout.name in STRICT else ()))
    load_weights(encoder, weights, f"{path}: {_described(network.role, encoder)}", network.prefix, extra)
    heads = {name: content.tensors[full].clone() for name, full in network.heads.items()}
    broken = tuple(network.heads[name] for name, head in heads.items() if not is_finite(head))
    if broken:
        raise CheckpointError(f"{path}: its heads: {Faults((), (), (), broken)}", Faults((), (), (), broken))
    if max_frames is not None and max_frames != encoder.max_frames:
        encoder = _resized(encoder, pos_embed, max_frames, path)
    encoder = encoder.eval().requires_grad_(False)
    method = "clip" if is_clip(weights) else "frame"
    return Checkpoint(encoder, front_end, method, layout.name, heads, content.config)


def _check_arguments(which: str, pos_embed: str, max_frames: int | None, num_heads: int | None) -> None:
    for name, value, allowed in (
        ("which", which, ("teacher", "student")),
        ("pos_embed", pos_embed, ("exact", "cut", "interpolate")),
    ):
        if value not in allowed:
            raise ValueError(f"{_NAME}: {name} must be one of {', '.join(allowed)}, got {value!r}")
    for name, number in (("max_frames", max_frames), ("num_heads", num_heads)):
        if number is not None and (not isinstance(number, int) or number < 1):
            _checks.fail(_NAME, name, "at least 1, or None", number)
    if pos_embed != "exact" and max_frames is None:
        raise ValueError(f"{_NAME}: max_frames must be given with pos_embed={pos_embed!r}: what for?")


def _build(clip: bool, settings: dict[str, Any], source: object) -> FrameEncoder:
    """The encoder, its weights on the meta device."""
    if clip:
        raise CheckpointError(f"{source} holds an ATST-Clip encoder")
    try:
        with torch.device("meta"):
            return FrameEncoder(**settings)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"{source}: its configuration describes no encoder ({error})") from error


def _described(role: str, encoder: FrameEncoder) -> str:
    """The network in words: the teacher (FrameEncoder of width 384, 12 blocks)."""
    size = f"{type(encoder).__name__} of width {encoder.dim}, {len(encoder.blocks)} blocks"
    return f"{f'the {role}' if role else 'it'} ({size})"


def _resized(encoder: FrameEncoder, how: str, max_frames: int, source: object) -> FrameEncoder:
    """An encoder for inputs of up to ``max_frames`` with the weights of ``encoder``, its positions cut or resized."""
    width, has = encoder.patch_embed.patch_width, f"{source} has positions for {encoder.max_frames} frames"
    if max_frames < width:
        raise ValueError(f"{_NAME}: max_frames must be at least {width}, the frames of a patch, got {max_frames}")
    old = encoder.pos_embed.detach()
    rows, columns = encoder.grid[0], max_frames // width
    if columns == encoder.grid[1]:
        positions = old
    elif how == "cut":
        if columns > encoder.grid[1]:
            raise CheckpointError(f"{has}, too few to be cut to {max_frames}: use pos_embed='interpolate'")
        positions = old[:, : 1 + rows * columns]
    elif how == "interpolate":
        positions = torch.cat([old[:, :1], interpolated(old[:, 1:], encoder.grid, columns)], dim=1)
    else:
        raise CheckpointError(f"{has}, max_frames is {max_frames}: choose pos_embed='cut' or 'interpolate'")
    with torch.device("meta"):
        config: dict[str, Any] = {**encoder.config, "max_frames": max_frames}
        other = type(encoder)(**config)
    other.load_state_dict(encoder.state_dict() | {"pos_embed": positions.clone()}, assign=True)
    return other


def interpolated(positions: Tensor, grid: tuple[int, int], columns: int) -> Tensor:
    """Positions ``[1, rows * old columns, D]`` for another number of columns (bicubic), ``[1, rows * columns, D]``."""
    # by a scale factor, not to a size, as upstream: the 0.1 shifts the sampling points a little
    scale = ((grid[0] + 0.1) / grid[0], (columns + 0.1) / grid[1])
    picture = positions.unflatten(1, grid).permute(0, 3, 1, 2)
    return F.interpolate(picture, scale_factor=scale, mode="bicubic").flatten(2).transpose(1, 2)
