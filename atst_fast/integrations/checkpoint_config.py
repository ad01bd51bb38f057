"""What it takes to build an encoder and its front end: from what a checkpoint says, else from its tensors' shapes."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from atst_fast.models.encoder import ARCHS
from atst_fast.models.weights import CheckpointError
from atst_fast.nn import LogMelSpectrogram

# what the official front end computes (audiossl/methods/atstframe/transform.py)
FRONT_END: dict[str, Any] = {
    "sample_rate": 16000,
    "n_fft": 1024,
    "win_length": 1024,
    "hop_length": 160,
    "f_min": 60.0,
    "f_max": 7800.0,
    "n_mels": 64,
    "top_db": 80.0,
    "minmax": (-79.6482, 50.6842),
}
_PATCH_WIDTH = 4  # frames, of every published model
_HEAD_DIM = 64  # channels, likewise
# what our configurations say of a system besides its encoder
_OF_SYSTEM = ("hidden", "out", "symmetric")


def config_of(
    config: Mapping[str, Any],
    role: str,
    layout: str,
    weights: Mapping[str, Tensor],
    networks: Iterable[Mapping[str, Tensor]],
) -> Mapping[str, Any]:
    """What a file says of the network of ``weights``, one of ``networks`` (names without prefix). ``models`` holds, by
    role, what differs from ``model``. In a file that ATST-C2F distilled ``model`` is the student's, and what a script
    said may be of either: there only what fits the network's tensors counts."""
    by_role = config.get("models")
    if isinstance(by_role, Mapping) and role in by_role:
        return {**config, "model": by_role[role]}
    if layout != "distilled" or (role == "student" and "model" in config):
        return config
    fitting = _fitting(_said(config), _shared_bands(config, networks), weights)
    return {k: v for k, v in config.items() if k not in ("model", "args")} | {"hyper_parameters": fitting}


def is_clip(weights: Mapping[str, Tensor]) -> bool:
    """Whether these are of ATST-Clip's encoder: a class token, or the last LayerNorm under its name."""
    return "cls_token" in weights or ("norm.weight" in weights and "norm_frame.weight" not in weights)


def encoder_settings(
    config: Mapping[str, Any], weights: Mapping[str, Tensor], num_heads: int | None, source: object
) -> dict[str, Any]:
    """Arguments of the encoder that ``weights`` (names without prefix) are of."""
    if "model" in config:
        return _own(config["model"], weights, num_heads, source)
    said = _said(config)
    dim = _most(w.shape[0] for k, w in weights.items() if k.endswith(".norm1.weight") and w.dim() == 1)
    if not dim:
        raise CheckpointError(f"{source}: blocks.*.norm1.weight has no width, which every encoder has there")
    numbers = (int(k.split(".")[1]) for k in weights if k.startswith("blocks.") and k.split(".")[1].isdecimal())
    # a number that so few tensors cannot reach is of none, and would take forever to build before that shows
    depth = 1 + max((i for i in numbers if i < len(weights)), default=0)
    hidden = _most(w.shape[0] for k, w in weights.items() if k.endswith(".mlp.fc1.weight") and w.dim() == 2)
    patch, n_mels = _patch(said, weights)
    settings = {
        "arch": _arch(dim, depth, num_heads or said.get("num_heads"), source),
        "drop_path_rate": said.get("drop_path_rate", 0.1),
        "n_mels": n_mels,
        "patch": patch,
        "max_frames": _max_frames(said, weights, n_mels // patch[0], patch[1]),
        "pos_type": said.get("pos_type", "cut"),
        "patch_embed": "CNN" if any(k.startswith("patch_embed.proj.") for k in weights) else "Linear",
        "mlp_ratio": hidden / dim if hidden else 4.0,
        "qkv_bias": any(k.endswith(".attn.qkv.bias") for k in weights),
    }
    return settings | ({"use_cls": "cls_token" in weights} if is_clip(weights) else {})


def front_end_settings(config: Mapping[str, Any], n_mels: int, source: object) -> dict[str, Any]:
    """Arguments of ``nn.LogMelSpectrogram``."""
    said = _said(config)
    known = config.get("front_end", {k: said[k] for k in ("n_mels", "win_length") if said.get(k)})
    try:
        front_end = FRONT_END | {"n_mels": n_mels} | dict(known)
        if front_end["n_mels"] != n_mels:
            bands = f"{n_mels} mel bands in the encoder, {front_end['n_mels']} in the front end"
            raise CheckpointError(f"{source}: its configuration contradicts itself: {bands}")
        if front_end["minmax"] is not None:
            front_end["minmax"] = tuple(front_end["minmax"])
        if not isinstance(front_end["hop_length"], int) or front_end["hop_length"] < 1:
            raise ValueError(f"hop_length {front_end['hop_length']!r}")
        LogMelSpectrogram(**front_end)
    except CheckpointError:
        raise
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{source}: its configuration describes no front end ({error})") from error
    return front_end


def _own(model: Any, weights: Mapping[str, Tensor], num_heads: int | None, source: object) -> dict[str, Any]:
    """From a configuration that this package wrote."""
    try:
        settings = {k: v for k, v in model.items() if k not in _OF_SYSTEM}
        settings["patch"] = tuple(settings["patch"])
        if num_heads is not None:
            arch = settings["arch"]
            settings["arch"] = {**(ARCHS[arch] if isinstance(arch, str) else arch), "num_heads": num_heads}
        # more than the file can hold would take forever to build before that shows
        depth = 0 if isinstance(settings["arch"], str) else settings["arch"]["depth"]
        if depth > len(weights):
            raise ValueError(f"{depth} blocks, and {len(weights)} tensors")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{source}: its configuration describes no encoder ({error!r})") from error
    return settings


def _said(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The arguments of the training script, as far as the file has them."""
    said = config.get("hyper_parameters") or config.get("args") or {}
    return said if isinstance(said, Mapping) else {}


def _shared_bands(config: Mapping[str, Any], networks: Iterable[Mapping[str, Tensor]]) -> int | None:
    """Mel bins of the input that both networks of a distilled file see."""
    front_end, said = config.get("front_end"), _said(config)
    known = front_end.get("n_mels") if isinstance(front_end, Mapping) else None
    known = known or said.get("n_mels") or said.get("spec_h")
    if known:
        return known if isinstance(known, int) else None
    sizes = {size for weights in networks if (size := _patch_size(weights))}
    if len(sizes) == 1:
        return max(sizes.pop() // _PATCH_WIDTH, 1)
    usual = FRONT_END["n_mels"]  # patches of several widths, but of one height
    return usual if sizes and not any(size % usual for size in sizes) else None


def _fitting(said: Mapping[str, Any], bands: int | None, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """``said`` with the patch that these tensors have: the one it names, else one as high as the input."""
    fitting = {**said} if bands is None else {**said, "n_mels": bands}
    size, count = _patch_size(weights), _positions(weights)
    if bands is None or size is None:
        return fitting
    height, width = said.get("patch_h"), said.get("patch_w")
    if isinstance(height, int) and isinstance(width, int) and height * width == size:
        rows, rest = divmod(bands, height)
        if rows and not rest and count % rows == 0:
            return fitting
    return fitting | ({"patch_h": bands, "patch_w": size // bands} if size % bands == 0 else {})


def _patch_size(weights: Mapping[str, Tensor]) -> int | None:
    """Values of a patch, where its two sides are not to be seen."""
    linear = weights.get("patch_embed.patch_embed.weight")
    return linear.shape[1] if linear is not None and linear.dim() == 2 else None


def _positions(weights: Mapping[str, Tensor]) -> int:
    """Of patches; as many as the published models have where the file has none."""
    positions = weights.get("pos_embed")
    return positions.shape[1] - 1 if positions is not None and positions.dim() == 3 else 250


def _arch(dim: int, depth: int, num_heads: int | None, source: object) -> str | dict[str, int]:
    if num_heads is None:
        if dim % _HEAD_DIM:
            raise CheckpointError(
                f"{source}: no tensor shows the number of heads, and its width {dim} is no multiple of {_HEAD_DIM}: "
                "give num_heads"
            )
        num_heads = dim // _HEAD_DIM
    size = {"dim": dim, "depth": depth, "num_heads": num_heads}
    return next((name for name, known in ARCHS.items() if known == size), size)


def _patch(said: Mapping[str, Any], weights: Mapping[str, Tensor]) -> tuple[tuple[int, int], int]:
    """(mel bins, frames) of a patch, and mel bins of the input."""
    convolution = weights.get("patch_embed.proj.weight")
    if convolution is not None and convolution.dim() == 4:
        height, width = convolution.shape[2:]
    else:
        size = _patch_size(weights) or 64 * _PATCH_WIDTH
        width = said.get("patch_w") or _PATCH_WIDTH
        height = said.get("patch_h") or max(size // width, 1)
    return (height, width), said.get("n_mels") or said.get("spec_h") or height


def _max_frames(said: Mapping[str, Any], weights: Mapping[str, Tensor], rows: int, width: int) -> int:
    count, frames = _positions(weights), said.get("spec_w")
    if isinstance(frames, int) and rows * (frames // width) == count:
        return frames
    # the frame more that a clip of whole patches has: 1001 for the 250 columns of the published models
    return max(count // max(rows, 1), 1) * width + 1


def _most(sizes: Iterable[int]) -> int:
    """The size that most tensors have; the others are those that do not fit."""
    counts = Counter(sizes).most_common(1)
    return counts[0][0] if counts else 0
