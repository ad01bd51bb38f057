"""What is in a checkpoint's file, whoever wrote it: tensors by name and the plain values beside them."""

import argparse
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from atst_fast.models.pretrained import WEIGHTS_FILE, parse_config, read_config, read_safetensors
from atst_fast.models.weights import CheckpointError

# keys under which files keep the state dict of one network, or of the whole module
_STATE_DICTS = ("state_dict", "model", "model_state_dict")
_NETWORKS = ("student", "teacher")
_BESIDE = ("hyper_parameters", "args", "epoch", "global_step", "pytorch-lightning_version", "atst_fast")
_DAMAGED = "is damaged or was written neither by torch.save nor by safetensors"


class Content(NamedTuple):
    """``tensors`` under the names of the file (those of nested dicts joined by dots); ``config``: what it says besides,
    in plain values; ``container``: "lightning" (a dict of a Lightning trainer), "dino" (a dict with a state dict for
    each network), "torch" (a state dict, alone or in a dict), "safetensors", "pretrained" (a folder)."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    container: str


def read(path: Path) -> Content:
    """The content of a file that ``torch.save`` or safetensors wrote, or of a folder of ``save_pretrained``.

    No code of the file runs: of what pickles can hold, tensors and plain values are accepted, and the
    ``argparse.Namespace`` in which some files keep their arguments. ``CheckpointError`` for anything else,
    ``ImportError`` where safetensors is needed and not installed.
    """
    if path.is_dir():
        return _read_folder(path)
    try:
        with open(path, "rb") as f:
            head = f.read(16)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    if len(head) < 9:
        raise CheckpointError(f"{path} is damaged: {len(head)} bytes are no checkpoint")
    if head[8:9] == b"{" and not head.startswith(b"PK"):
        return _read_safetensors(path)
    return _read_torch(path)


def _read_safetensors(path: Path) -> Content:
    """``config`` is the JSON that the file's metadata may hold under that name."""
    tensors, metadata = read_safetensors(path)
    config = parse_config(metadata["config"], path) if "config" in metadata else {}
    if (step := metadata.get("step", "")).isdecimal() and len(step) < 20:
        config = {"step": int(step), **config}
    return Content(tensors, config, "safetensors")


def _read_folder(path: Path) -> Content:
    config = read_config(path)
    return Content(read_safetensors(path / WEIGHTS_FILE)[0], config, "pretrained")


def _read_torch(path: Path) -> Content:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} {_refused(error)}") from error
    except Exception as error:  # torch raises many kinds for damaged files
        raise CheckpointError(f"{path} {_DAMAGED} ({_first_line(error)})") from error
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}, expected a dict of tensors")
    try:
        beside = {str(k): plain(loaded[k]) for k in _BESIDE if k in loaded and not isinstance(loaded[k], Tensor)}
    except RecursionError as error:
        raise CheckpointError(f"{path} {_DAMAGED} (what it says besides its tensors has no end)") from error
    ours = beside.pop("atst_fast", {})
    config = {**(ours if isinstance(ours, dict) else {}), **beside}
    networks = [n for n in _NETWORKS if isinstance(loaded.get(n), Mapping)]
    if networks:
        tensors = {f"{n}.{k}": v for n in networks for k, v in _flat(loaded[n], path).items()}
        return Content(tensors, config, "dino")
    container = "lightning" if "pytorch-lightning_version" in loaded or "hyper_parameters" in loaded else "torch"
    wrapped = next((k for k in _STATE_DICTS if isinstance(loaded.get(k), Mapping)), None)
    return Content(_flat(loaded[wrapped] if wrapped else loaded, path), config, container)


def _flat(tree: Mapping[Any, Any], path: Path) -> dict[str, Tensor]:
    """The tensors of a state dict; what else lies there (a step, a configuration) has no place in a network."""
    size = path.stat().st_size
    tensors = {str(k): v for k, v in tree.items() if isinstance(v, Tensor)}
    for name, x in tensors.items():
        # strides of 0 make any size of few bytes, and whoever reads the values would run out of memory
        if x.layout == torch.strided and not x.is_meta and x.numel() * x.element_size() > size:
            raise CheckpointError(f"{path} is damaged: {name} of shape {list(x.shape)} is larger than the file")
    return tensors


def plain(value: Any) -> Any:
    """Numbers, strings, lists and dicts; a namespace as a dict, anything else in words."""
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(v) for v in value]
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    return value if value is None or isinstance(value, bool | int | float | str) else repr(value)


def _refused(error: Exception) -> str:
    """Of torch's page of advice, which class it was."""
    text = str(error)
    for marker in ("Unsupported global: GLOBAL ", "Unsupported class ", "GLOBAL "):
        if marker in text:
            name = text.split(marker, 1)[1].split()[0].rstrip(".,")
            return f"is refused: it holds objects ({name}), and to load them would run code"
    return _DAMAGED


def _first_line(error: Exception) -> str:
    return (str(error) or repr(error)).split("\n")[0]
