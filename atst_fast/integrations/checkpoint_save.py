"""Networks into files, in the layouts that others read."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from atst_fast.files import write_atomically
from atst_fast.integrations.checkpoint import Checkpoint
from atst_fast.integrations.checkpoint_file import Content, plain
from atst_fast.integrations.checkpoint_layout import recognise
from atst_fast.models.encoder import Encoder
from atst_fast.models.pretrained import write_pickle, write_safetensors
from atst_fast.models.weights import CheckpointError
from atst_fast.ops import _checks

_NAME = "save_checkpoint"
Layout = Literal["lightning", "safetensors", "dino", "finetuned", "distilled", "bare"]
# what comes before the names of an encoder's tensors, and of its heads'; {} is the role
_PREFIXES = {
    "lightning": ("model.{}.encoder.", "model.{}."),
    "safetensors": ("model.{}.encoder.", "model.{}."),
    "dino": ("{}.module.backbone.", "{}.module."),
    "finetuned": ("encoder.encoder.", ""),
    "distilled": ("model.{}.encoder.", "model.{}."),
    "bare": ("", ""),
}
_ONE_NETWORK = ("finetuned", "bare")
_LIGHTNING = "2.2.1"  # the version that these files say they are of: that of the official code's environment
# arguments of the official modules that have no other value in a finished checkpoint that anybody reads
_TRAINING = {"learning_rate": 5e-4, "warmup_steps": 1300, "max_steps": 39000, "ema": 0.99}


class _Network(NamedTuple):
    encoder: Encoder
    heads: Mapping[str, Tensor]


def save_checkpoint(
    path: str | Path,
    model: nn.Module | Checkpoint | Mapping[str, Encoder | Checkpoint],
    *,
    layout: Layout = "lightning",
    which: Literal["teacher", "student"] = "teacher",
    front_end: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Write weights as the official code does, so that it and `load_checkpoint` can read them; returns the path.

    Args:
        path: the file. It is replaced as a whole, or stays as it was (``OSError``).
        model: a system (``ATSTFrame``, ``ATSTClip``: modules with ``student`` and ``teacher``; the distilled one of
            ATST-C2F; a fine-tuned one with ``encoder`` and heads), an encoder, a ``Checkpoint``, or a mapping of
            "teacher" and "student" to encoders or ``Checkpoint``.
        layout: "lightning": a Lightning trainer's file (audiossl builds the archs "small" and "base", and expects both
            networks with their heads). "safetensors": the same names, as ``atst-fast pretrain`` writes them. "dino":
            that of the first ATST-Clip. "finetuned": ``encoder.encoder.*`` and heads. "distilled": ATST-C2F.
            "bare": the state dict of the encoder, and heads. A path that ends in ``.safetensors`` makes the last three
            safetensors files; everything else is written by ``torch.save``.
        which: the network of a system that "bare" or "finetuned" takes, and the role of a single one in the others.
        front_end: arguments of ``nn.LogMelSpectrogram``; default: those of a ``Checkpoint``. "bare" has no place for
            them.
        config: plain values to keep beside the weights ("hyper_parameters", "args", "epoch", "global_step", ...);
            default: those of a ``Checkpoint``.

    Raises ``ValueError`` or ``TypeError`` for what the layout has no place for.
    """
    if layout not in _PREFIXES:
        raise ValueError(f"{_NAME}: layout must be one of {', '.join(_PREFIXES)}, got {layout!r}")
    if which not in ("teacher", "student"):
        raise ValueError(f"{_NAME}: which must be one of teacher, student, got {which!r}")
    path, networks = Path(path), _networks(model, which)
    if layout in _ONE_NETWORK:
        networks = {which: networks[which]} if which in networks else networks
    known = next((m for m in (model, *_values(model)) if isinstance(m, Checkpoint)), None)
    if front_end is None and known is not None:
        front_end = known.front_end
    config = plain((known.config if known else {}) if config is None else config)
    tensors = _tensors(layout, networks)
    _check(layout, tensors, networks)
    own = _own(layout, networks, front_end, config)
    if layout == "safetensors" or (layout in ("finetuned", "distilled", "bare") and path.suffix == ".safetensors"):
        metadata = {"config": json.dumps(own)} if layout != "bare" else {}
        if isinstance(config.get("step"), int):
            metadata["step"] = str(config["step"])
        write_safetensors(path, tensors, metadata)
    else:
        content = _pickled(layout, tensors, networks, own, config)
        write_atomically(path, lambda p: write_pickle(p, content))
    return path


def _networks(model: Any, which: str) -> dict[str, _Network]:
    if isinstance(model, Checkpoint):
        return {which: _Network(model.encoder, model.heads)}
    if isinstance(model, Mapping):
        if not model or not set(model) <= {"teacher", "student"}:
            _checks.fail(_NAME, "model", "a mapping of 'teacher' and 'student'", sorted(model))
        return {role: _networks(network, role)[role] for role, network in model.items()}
    if isinstance(model, Encoder):
        return {which: _Network(model, {})}
    if not isinstance(model, nn.Module):
        _checks.fail(_NAME, "model", "a module, a Checkpoint or a mapping of them", model, TypeError)
    state = model.state_dict()
    found = {name: getattr(model, name, None) for name in ("teacher", "student", "encoder")}
    if isinstance(found["encoder"], Encoder):
        return {which: _Network(found["encoder"], _without(state, "encoder."))}
    teacher, student = found["teacher"], found["student"]
    if isinstance(student, Encoder) and isinstance(getattr(teacher, "encoder", None), Encoder):
        heads = {k: v for k, v in state.items() if not k.startswith(("teacher.", "student."))}
        return {**_networks(teacher, "teacher"), "student": _Network(student, heads)}
    if all(isinstance(getattr(network, "encoder", None), Encoder) for network in (teacher, student)):
        return {**_networks(teacher, "teacher"), **_networks(student, "student")}
    raise TypeError(f"{_NAME}: model must hold an encoder or a student and a teacher, got {type(model).__name__}")


def _values(model: Any) -> tuple[Any, ...]:
    return tuple(model.values()) if isinstance(model, Mapping) else ()


def _without(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k: v for k, v in state.items() if not k.startswith(prefix)}


def _tensors(layout: str, networks: Mapping[str, _Network]) -> dict[str, Tensor]:
    """All tensors by their names in the file, copies on the CPU."""
    tensors: dict[str, Tensor] = {}
    for role, network in networks.items():
        before, of_heads = (p.format(role) for p in _PREFIXES[layout])
        if layout == "distilled" and role == "student":
            before, of_heads = "model.student.", "model."
        tensors |= {before + k: v for k, v in network.encoder.state_dict().items()}
        for k, v in network.heads.items():
            # the projector's name in that layout
            name = "head." + k.removeprefix("projector.") if layout == "dino" and k.startswith("projector.") else k
            tensors[of_heads + name] = v
    return {k: v.detach().to("cpu", copy=True, memory_format=torch.contiguous_format) for k, v in tensors.items()}


def _check(layout: str, tensors: dict[str, Tensor], networks: Mapping[str, _Network]) -> None:
    """Whether what is going to be written would be read as what it is."""
    if layout == "distilled" and set(networks) != {"teacher", "student"}:
        raise ValueError(f"{_NAME}: layout 'distilled' holds a teacher and a student, got {', '.join(networks)} alone")
    container = layout if layout in ("lightning", "safetensors", "dino") else "torch"
    try:
        found = recognise(Content(tensors, {}, container), _NAME)
    except CheckpointError as error:
        raise ValueError(f"{_NAME}: {error}") from error
    heads = sorted(k for network in networks.values() for k in network.heads)
    kept = sorted(k for network in found.networks for k in network.heads)
    if found.others or heads != kept or any(network.extra for network in found.networks):
        lost = sorted(set(heads) - set(kept)) or heads
        raise ValueError(f"{_NAME}: layout {layout!r} has no place for heads named {', '.join(lost[:4])}")


def _own(
    layout: str, networks: Mapping[str, _Network], front_end: Mapping[str, Any] | None, config: Mapping[str, Any]
) -> dict[str, Any]:
    """What makes a file complete for us, whatever its layout says: how encoders and front end are built."""
    configs = {role: plain(network.encoder.config) for role, network in networks.items()}
    main = configs.get("student" if layout == "distilled" else "teacher") or next(iter(configs.values()))
    own = {k: v for k, v in config.items() if k not in ("hyper_parameters", "args", "model", "models", "step")}
    own["model"] = main
    if any(other != main for other in configs.values()):
        own["models"] = configs
    if front_end is not None:
        own["front_end"] = plain(front_end)
    return own


def _pickled(
    layout: str,
    tensors: dict[str, Tensor],
    networks: Mapping[str, _Network],
    own: dict[str, Any],
    config: Mapping[str, Any],
) -> dict[str, Any]:
    """What ``torch.save`` is to write."""
    if layout == "bare":
        return dict(tensors)
    numbers = {"epoch": config.get("epoch", 0), "global_step": config.get("global_step", config.get("step", 0))}
    encoder = networks["student" if layout == "distilled" else next(iter(networks))].encoder
    own = {k: v for k, v in own.items() if k not in ("epoch", "global_step", "pytorch-lightning_version")}
    if layout == "dino":
        states = {role: {k.split(".", 1)[1]: v for k, v in tensors.items() if k.startswith(role)} for role in networks}
        arguments = config.get("args") or {"arch": "ast" if encoder.config["arch"] == "small" else "ast_base"}
        return {**states, "args": argparse.Namespace(**arguments), "epoch": numbers["epoch"], "atst_fast": own}
    said = config.get("hyper_parameters") or _hyper_parameters(encoder, own.get("front_end", {}))
    version = config.get("pytorch-lightning_version", _LIGHTNING)
    return {
        **numbers,
        "pytorch-lightning_version": version,
        "state_dict": tensors,
        "hyper_parameters": said,
        "atst_fast": own,
    }


def _hyper_parameters(encoder: Encoder, front_end: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments with which audiossl's modules build this encoder."""
    config = encoder.config
    said = {
        **_TRAINING,
        "arch": config["arch"],
        "n_mels": config["n_mels"],
        "spec_h": config["n_mels"],
        "spec_w": config["max_frames"],
        "patch_h": config["patch"][0],
        "patch_w": config["patch"][1],
        "pos_type": config["pos_type"],
        "patch_embed": config["patch_embed"],
        "win_length": front_end.get("win_length", 1024),
        "nprompt": 0,
        "avg_blocks": 0,
        "symmetric": True,
    }
    defaults = {"drop_path_rate": 0.1, "mlp_ratio": 4.0}
    return plain({**said, **{k: config[k] for k, usual in defaults.items() if config[k] != usual}})
