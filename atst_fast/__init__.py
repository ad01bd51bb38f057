"""Fast kernels, drop-in modules and a training loop for Audio Teacher-Student Transformers.

``atst_fast.ops`` functions, ``atst_fast.nn`` drop-in modules, ``atst_fast.models`` ATST-Frame,
``atst_fast.optim`` AdamW + teacher update in one pass, ``load_checkpoint()`` encoders of anybody's files,
``Embedder`` embeddings of audio of any length, ``hear`` the same as HEAR calls it,
``accelerate(model)`` fused forwards for models that exist, ``accelerate_transforms`` for their data,
``build_info()`` who runs each operator here, and why.
"""

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from atst_fast import models, nn, ops, optim
    from atst_fast.ema_teacher import EMATeacher
    from atst_fast.integrations import (
        Checkpoint,
        CheckpointError,
        Embedder,
        inspect_checkpoint,
        load_checkpoint,
        save_checkpoint,
    )
    from atst_fast.integrations.accelerate import accelerate, accelerated, restore
    from atst_fast.integrations.accelerate_transforms import accelerate_transforms, restore_transforms
    from atst_fast.ops import build_info

try:
    __version__ = version("atst_fast")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "EMATeacher",
    "Embedder",
    "__version__",
    "accelerate",
    "accelerate_transforms",
    "accelerated",
    "build_info",
    "inspect_checkpoint",
    "load_checkpoint",
    "models",
    "nn",
    "ops",
    "optim",
    "restore",
    "restore_transforms",
    "save_checkpoint",
]
# name -> the module that it is imported from
_HOMES = {
    "accelerate": "integrations.accelerate",
    "accelerate_transforms": "integrations.accelerate_transforms",
    "accelerated": "integrations.accelerate",
    "build_info": "ops",
    "Checkpoint": "integrations",
    "CheckpointError": "integrations",
    "EMATeacher": "ema_teacher",
    "Embedder": "integrations",
    "inspect_checkpoint": "integrations",
    "load_checkpoint": "integrations",
    "save_checkpoint": "integrations",
    "restore": "integrations.accelerate",
    "restore_transforms": "integrations.accelerate_transforms",
}


def __getattr__(name: str) -> Any:
    """Import the parts when they are first asked for: without torch, the command line answers at once."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"atst_fast.{_HOMES[name]}"), name)
    if name in __all__:
        return importlib.import_module(f"atst_fast.{name}")
    raise AttributeError(f"module 'atst_fast' has no attribute {name!r}")
