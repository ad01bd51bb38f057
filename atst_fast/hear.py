"""The common API of HEAR (Holistic Evaluation of Audio Representations): ``--module atst_fast.hear``.

``load_model(path)``, ``get_scene_embeddings(audio, model)`` and ``get_timestamp_embeddings(audio, model)``; audiossl's
spellings in the singular are there too.
"""

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from atst_fast.integrations import Embedder, load_checkpoint


def load_model(
    model_file_path: str | Path = "", which: Literal["teacher", "student"] = "teacher", **options: Any
) -> Embedder:
    """The encoder of any checkpoint that ``atst_fast.load_checkpoint`` knows, in eval mode.

    ``options`` are those of `Embedder` (``n_blocks``, ``chunk_frames``, ``official``, ``batch_size``); what an
    ``Embedder.save_pretrained`` wrote has its own, unless they are given. The model has the attributes ``sample_rate``,
    ``scene_embedding_size`` and ``timestamp_embedding_size`` of HEAR.

    Raises ``ValueError`` without a path, for no weights come with this package, and what ``load_checkpoint`` raises.
    """
    if not str(model_file_path):
        raise ValueError("load_model: model_file_path must name a checkpoint: no weights come with this package")
    checkpoint = load_checkpoint(model_file_path, which)
    options = {**checkpoint.config.get("embedder", {}), **options}
    return Embedder(checkpoint.encoder, checkpoint.front_end, **options).eval()


def get_scene_embeddings(audio: Tensor, model: Embedder) -> Tensor:
    """Of ``audio [n, samples]`` at ``model.sample_rate``, in [-1, 1]: float32 ``[n, model.scene_embedding_size]``."""
    with torch.no_grad():
        return _embedder(model, "get_scene_embeddings").scene(audio)


def get_timestamp_embeddings(audio: Tensor, model: Embedder) -> tuple[Tensor, Tensor]:
    """Float32 ``[n, T, model.timestamp_embedding_size]`` and their times in ms ``[n, T]``: 0, 40, 80, ..."""
    with torch.no_grad():
        return _embedder(model, "get_timestamp_embeddings").timestamps(audio)


def _embedder(model: Embedder, name: str) -> Embedder:
    if not isinstance(model, Embedder):
        raise TypeError(f"{name}: model must be what load_model returns, got {type(model).__name__}")
    return model


get_scene_embedding = get_scene_embeddings
get_timestamp_embedding = get_timestamp_embeddings
