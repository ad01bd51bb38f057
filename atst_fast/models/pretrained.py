"""Modules in folders, as the Hugging Face hub keeps them: ``config.json`` and ``model.safetensors``."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, BinaryIO, TypeVar, cast

import torch
from torch import Tensor, nn

from atst_fast.files import write_atomically
from atst_fast.models.weights import CheckpointError, load_weights

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
_Module = TypeVar("_Module", bound="Pretrained")


class Pretrained(nn.Module):
    """A module that is kept in a folder; its class says in `to_config` and `from_config` how it is built again."""

    def to_config(self) -> dict[str, Any]:
        """What ``config.json`` holds besides the name of the class: plain values, the encoder's under ``model``."""
        raise NotImplementedError(f"{type(self).__name__}.to_config")

    @classmethod
    def from_config(cls: type[_Module], config: dict[str, Any]) -> _Module:
        """A module of what `to_config` gave, its weights on the meta device or of any values."""
        raise NotImplementedError(f"{cls.__name__}.from_config")

    def save_pretrained(self, folder: str | Path, *, front_end: Mapping[str, Any] | None = None) -> Path:
        """Write ``config.json`` and ``model.safetensors`` into ``folder``, which is made; returns it.

        ``front_end``: arguments of ``nn.LogMelSpectrogram``, which ``load_checkpoint`` gives back. Needs safetensors:
        ``ImportError`` without it. What was there before stays until all of its successor is on the disk.
        """
        folder = Path(folder)
        config = {"class": type(self).__name__, **self.to_config()}
        if front_end is not None:
            if "front_end" in config:
                raise ValueError(
                    f"{type(self).__name__}.save_pretrained: front_end must be None: the module has its own"
                )
            config["front_end"] = dict(front_end)
        text = json.dumps(config, indent=2) + "\n"
        folder.mkdir(parents=True, exist_ok=True)
        write_safetensors(folder / WEIGHTS_FILE, self.state_dict(), {})
        write_atomically(folder / CONFIG_FILE, lambda p: p.write_text(text, encoding="utf-8"))
        return folder

    @classmethod
    def from_pretrained(cls: type[_Module], folder: str | Path) -> _Module:
        """What `save_pretrained` wrote, in eval mode on the CPU.

        ``CheckpointError`` where the folder does not hold a module of this class, with the list of tensors that are
        missing, extra, misshapen or not finite.
        """
        folder = Path(folder)
        config = read_config(folder)
        name = config.pop("class", None)
        if name != cls.__name__:
            raise CheckpointError(f"{folder} holds a module of class {name}, not {cls.__name__}")
        try:
            module = cls.from_config(config)
        except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
            raise CheckpointError(f"{folder}: its {CONFIG_FILE} describes no {name} ({error!r})") from error
        load_weights(module, read_safetensors(folder / WEIGHTS_FILE)[0], f"{folder}: the {name}")
        return module.eval()


def read_config(folder: Path) -> dict[str, Any]:
    """The ``config.json`` of a folder that `Pretrained.save_pretrained` wrote."""
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder} has no {' and no '.join(missing)}, which save_pretrained writes")
    try:
        text = (folder / CONFIG_FILE).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {folder / CONFIG_FILE}: {error}") from error
    return parse_config(text, folder / CONFIG_FILE)


def parse_config(text: str, source: Path) -> dict[str, Any]:
    """A JSON object; ``source`` is named where it is none."""
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source}: its configuration is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{source}: its configuration is no JSON object but {text[:40]!r}")
    return config


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file."""
    safetensors = _import_safetensors(path)
    try:
        with safetensors.safe_open(path, framework="pt") as f:
            return {key: f.get_tensor(key) for key in f.keys()}, f.metadata() or {}  # noqa: SIM118 (no mapping)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file: {error}") from error


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write ``path`` as a whole or not at all. What cannot be written is an ``OSError``."""
    safetensors = _import_safetensors(path)
    from safetensors.torch import save_file

    own = {key: x.detach().to("cpu", copy=True, memory_format=torch.contiguous_format) for key, x in tensors.items()}

    def write(temporary: Path) -> None:
        try:
            save_file(own, temporary, {"format": "pt", **metadata})
        except safetensors.SafetensorError as error:
            raise OSError(f"cannot write {path}: {error}") from error
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)  # safetensors makes files that only their owner can read

    write_atomically(path, write)


def write_pickle(path: Path, content: object) -> None:
    """``torch.save``, with the ``OSError`` of what cannot be written, which torch hides behind one of its own."""
    with open(path, "wb") as f:
        sink = _Sink(f)
        try:
            torch.save(content, cast(IO[bytes], sink))
        except Exception as error:
            raise sink.error or error from None


class _Sink:
    """The least that torch.save asks of a file; keeps the error of writing."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def _import_safetensors(path: Path) -> Any:
    try:
        import safetensors
    except ModuleNotFoundError as error:
        raise ImportError(f"{path} needs the package safetensors: pip install 'atst_fast[train]'") from error
    return safetensors
