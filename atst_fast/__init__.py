"""Fast kernels, drop-in modules and a training loop for Audio Teacher-Student Transformers.

``atst_fast.ops`` functions, ``atst_fast.nn`` drop-in modules, ``atst_fast.models`` ATST-Frame,
``atst_fast.optim`` AdamW + teacher update in one pass, ``build_info()`` who runs each operator here, and why.
"""

from importlib.metadata import PackageNotFoundError, version

from atst_fast import models, nn, ops, optim
from atst_fast.ops import build_info

try:
    __version__ = version("atst_fast")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"

__all__ = ["__version__", "build_info", "models", "nn", "ops", "optim"]
