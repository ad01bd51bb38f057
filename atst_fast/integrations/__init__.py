"""Bridges to other code bases."""

from atst_fast.integrations.checkpoint import Checkpoint, load_checkpoint
from atst_fast.integrations.checkpoint_inspect import Inspection, inspect_checkpoint
from atst_fast.integrations.checkpoint_save import save_checkpoint
from atst_fast.integrations.embedding import Embedder
from atst_fast.models.weights import CheckpointError

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Embedder",
    "Inspection",
    "inspect_checkpoint",
    "load_checkpoint",
    "save_checkpoint",
]
