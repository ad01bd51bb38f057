"""What comes before the conftest of any folder, in whatever order pytest is given them: triton chooses between its
interpreter and its compiler while it is imported, which a benchmark may do."""

import torch

from tests.triton import interpreter

if not torch.cuda.is_available():
    interpreter.enable()
