"""Checkpoints: weights that anybody can read, and beside them what a run needs to continue bit for bit.

``step-00000500.safetensors`` holds the weights under the keys of the official checkpoints
(``model.student.encoder...``, ``model.teacher.projector...``) and the configuration as JSON in its metadata;
``step-00000500.state.pt`` holds the rest (optimizer, front end, random numbers), and for each further process of the
run ``step-00000500.1.state.pt`` what is its own of that. The weights are written last: where they are, the checkpoint
is complete.
"""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from atst_fast.models.pretrained import write_pickle
from atst_fast.train.config import UserError
from atst_fast.train.files import TEMPORARY, write_atomically

if TYPE_CHECKING:
    from atst_fast.integrations import Checkpoint

FOLDER = "checkpoints"
PREFIX = "model."
_NAME = re.compile(r"step-(\d{8,})\.safetensors")


class Loaded(NamedTuple):
    """``weights`` by official key, ``config`` as saved (model, front_end, settings), ``step`` (steps done)."""

    weights: dict[str, Tensor]
    config: dict[str, Any]
    step: int


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted((p for p in (run / FOLDER).glob("*.safetensors") if _NAME.fullmatch(p.name)), key=step_of)


def step_of(path: Path) -> int:
    """The step in the name of a run's checkpoint."""
    return int(path.stem.removeprefix("step-"))


def state_path(weights: Path, rank: int = 0) -> Path:
    """Where the state of process ``rank`` lies that belongs to ``weights``."""
    return weights.with_suffix(f".{rank}.state.pt" if rank else ".state.pt")


def save(
    run: Path,
    step: int,
    weights: Mapping[str, Tensor],
    state: dict[str, Any],
    config: dict[str, Any],
    keep: int,
    *,
    prefix: str = PREFIX,
) -> Path:
    """Write the checkpoint of ``step`` and delete all but the last ``keep``; returns the weights' path.

    ``weights`` are the model's (keys without ``prefix``); ``state`` holds tensors, numbers, strings, lists and dicts.
    Where the disk is full or the folder cannot be written, UserError; what was there before stays.
    """
    path = _path(run, step)
    before = checkpoints(run)
    tensors = {prefix + k: v.detach().contiguous().cpu() for k, v in weights.items()}
    metadata = {"format": "pt", "step": str(step), "config": json.dumps(config)}
    with _explain(run, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(state_path(path), lambda p: write_pickle(p, {"step": step, **state}))
        write_atomically(path, lambda p: _save_weights(p, tensors, metadata, like=state_path(path)))
    for old in [p for p in before if p != path][: -(keep - 1) or None]:
        old.unlink()
    for stray in [*path.parent.glob("*" + TEMPORARY), *(p for p in path.parent.glob("*.state.pt") if _orphan(p))]:
        stray.unlink()  # what belonged to the old ones, and what a killed process left
    return path


def save_share(run: Path, step: int, rank: int, state: dict[str, Any]) -> None:
    """Write what process ``rank`` (not 0) adds to the checkpoint of ``step``, which ``save`` completes afterwards."""
    path = state_path(_path(run, step), rank)
    with _explain(run, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda p: write_pickle(p, {"step": step, **state}))


def _path(run: Path, step: int) -> Path:
    return run / FOLDER / f"step-{step:08d}.safetensors"


@contextlib.contextmanager
def _explain(run: Path, path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        before = checkpoints(run)
        stays = f"the last good checkpoint is {before[-1]}" if before else "there is no checkpoint yet"
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"cannot write the checkpoint {path}: {reason}; {stays}") from error


def load(path: Path) -> Loaded:
    """Weights, configuration and step of a checkpoint: its safetensors file, or a run's folder for its last one."""
    path = find(path)
    try:
        with safe_open(path, framework="pt") as f:
            metadata = f.metadata() or {}
            weights = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 (safe_open is no mapping)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is damaged or no safetensors file: {error}") from error
    try:
        config = json.loads(metadata["config"])
        if not isinstance(config, dict):
            raise TypeError(config)
        return Loaded(weights, config, int(metadata["step"]))
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path} was not written by atst-fast pretrain: no configuration in its metadata") from error


def load_state(path: Path, rank: int = 0) -> dict[str, Any]:
    """What ``save`` (of process ``rank`` ``save_share``) wrote beside the weights ``path``. Runs no code from it."""
    path = state_path(path, rank)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"cannot continue: {path}, the state that belongs to the weights, is missing") from None
    except Exception as error:  # torch raises many kinds for damaged files
        reason = str(error).split("\n")[0]
        raise UserError(f"{path} is damaged ({reason}); delete this checkpoint to go on from the one before") from error


def find(path: Path) -> Path:
    """The weights' file that ``path`` means: itself, or the last checkpoint of a run's folder."""
    if path.is_dir():
        run = path.parent if path.name == FOLDER else path
        found = checkpoints(run)
        if not found:
            raise UserError(f"no checkpoint in {path}: expected {FOLDER}/step-*.safetensors")
        return found[-1]
    if not path.exists():
        raise UserError(f"there is no checkpoint {path}")
    return path


def run_of(path: Path) -> Path:
    """The folder of the run that a checkpoint belongs to; of a copy elsewhere, the folder it lies in."""
    folder = path.parent if path.parent.name else path.absolute().parent
    return folder.parent if folder.name == FOLDER else folder


def load_encoder(path: Path | str, which: str = "teacher") -> "Checkpoint":
    """`atst_fast.load_checkpoint` of a file, or of the last checkpoint of a run's folder; UserError where there is no
    such encoder."""
    from atst_fast.integrations import CheckpointError, load_checkpoint

    try:
        return load_checkpoint(of_run(Path(path)), cast(Any, which))
    except CheckpointError as error:
        raise UserError(str(error)) from error


def of_run(path: Path) -> Path:
    """The last checkpoint of a run's folder; any other path as it is."""
    is_run = path.is_dir() and not (path / "model.safetensors").exists()  # save_pretrained writes that one
    return find(path) if is_run else path


def load_model(model: torch.nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load the weights of a checkpoint into the model that wrote it."""
    model.load_state_dict({k.removeprefix(PREFIX): v for k, v in weights.items()})


def _save_weights(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], like: Path) -> None:
    save_file(tensors, path, metadata)
    path.chmod(like.stat().st_mode)  # safetensors makes files that only their owner can read


def _orphan(state: Path) -> bool:
    return not state.with_name(f"{state.name.split('.')[0]}.safetensors").exists()
