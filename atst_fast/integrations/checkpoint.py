"""Encoders out of checkpoints, whoever wrote them."""

from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from atst_fast.integrations.checkpoint_config import config_of, encoder_settings, front_end_settings, is_clip
from atst_fast.integrations.checkpoint_file import Content, read
from atst_fast.integrations.checkpoint_layout import STRICT, Layout, Network, recognise
from atst_fast.models import ClipEncoder, FrameEncoder
from atst_fast.models.encoder import Encoder
from atst_fast.models.weights import CheckpointError, Faults, is_finite, load_weights
from atst_fast.ops import _checks

__all__ = ["Checkpoint", "CheckpointError", "load_checkpoint"]

_NAME = "load_checkpoint"
_Encoder = TypeVar("_Encoder", bound=Encoder)


class Checkpoint(NamedTuple):
    """What `load_checkpoint` found.

    ``encoder``: in eval mode, float32, on the CPU; its parameters do not require gradients. ``front_end``: arguments of
    ``nn.LogMelSpectrogram``. ``method``: "frame" or "clip". ``layout``: a name in ``checkpoint_layout.LAYOUTS``.
    ``heads``: the other tensors of the same network by name ("projector.0.weight", "head.linear.bias"), as they are.
    ``config``: what else the file says, in plain values ("hyper_parameters", "args", "epoch", "settings", ...).
    """

    encoder: FrameEncoder | ClipEncoder
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
    encoder, front_end = load_network(content, layout, network, num_heads, path)
    if max_frames is not None and max_frames != encoder.max_frames:
        encoder = _resized(encoder, pos_embed, max_frames, path)
    heads = {name: content.tensors[full].clone() for name, full in network.heads.items()}
    method = "clip" if isinstance(encoder, ClipEncoder) else "frame"
    return Checkpoint(encoder.eval().requires_grad_(False), front_end, method, layout.name, heads, content.config)


def load_network(
    content: Content, layout: Layout, network: Network, num_heads: int | None, source: object
) -> tuple[FrameEncoder | ClipEncoder, dict[str, Any]]:
    """Encoder and front end of one network of a file; ``CheckpointError`` with the list of what does not fit."""
    networks = {n.prefix: {k: content.tensors[n.prefix + k] for k in n.keys} for n in layout.networks}
    weights = known = networks[network.prefix]
    config = config_of(content.config, network.role, layout.name, weights, networks.values())
    if layout.name in STRICT and "model" not in config:
        # student and teacher are of one shape there: what one has and the other lacks is missing
        known = {k: v for other in networks.values() for k, v in other.items()} | weights
    kind: type[FrameEncoder | ClipEncoder] = ClipEncoder if is_clip(known) else FrameEncoder
    try:
        encoder = kind.from_config({"model": encoder_settings(config, known, num_heads, source)})
    except CheckpointError:
        raise
    except (ArithmeticError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{source}: its configuration describes no encoder ({error})") from error
    words = f"{source}: {_described(network.role, encoder)}"
    extra = (*network.extra, *(layout.others if layout.name in STRICT else ()))
    load_weights(encoder, weights, words, network.prefix, extra)
    broken = tuple(full for full in network.heads.values() if not is_finite(content.tensors[full]))
    if broken:
        faults = Faults((), (), (), broken)
        raise CheckpointError(f"{words}, its heads: {faults}", faults)
    return encoder, front_end_settings(config, encoder.n_mels, source)


def _check_arguments(which: str, pos_embed: str, max_frames: int | None, num_heads: int | None) -> None:
    for name, value, allowed in (
        ("which", which, ("teacher", "student")),
        ("pos_embed", pos_embed, ("exact", "cut", "interpolate")),
    ):
        if value not in allowed:
            raise ValueError(f"{_NAME}: {name} must be one of {', '.join(allowed)}, got {value!r}")
    for name, number in (("max_frames", max_frames), ("num_heads", num_heads)):
        if number is not None and (not isinstance(number, int) or isinstance(number, bool) or number < 1):
            _checks.fail(_NAME, name, "at least 1, or None", number)
    if pos_embed != "exact" and max_frames is None:
        raise ValueError(f"{_NAME}: max_frames must be given with pos_embed={pos_embed!r}: what for?")


def _described(role: str, encoder: Encoder) -> str:
    """The network in words: the teacher (FrameEncoder of width 384, 12 blocks)."""
    size = f"{type(encoder).__name__} of width {encoder.dim}, {len(encoder.blocks)} blocks"
    return f"{f'the {role}' if role else 'it'} ({size})"


def _resized(encoder: _Encoder, how: str, max_frames: int, source: object) -> _Encoder:
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
        positions = torch.cat([old[:, :1], encoder.resized_positions(max_frames).detach()], dim=1)
    else:
        raise CheckpointError(f"{has}, max_frames is {max_frames}: choose pos_embed='cut' or 'interpolate'")
    other = encoder.from_config({"model": {**encoder.config, "max_frames": max_frames}})
    other.load_state_dict(encoder.state_dict() | {"pos_embed": positions.clone()}, assign=True)
    return other
