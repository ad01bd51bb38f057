"""Inputs and outputs of the official ATST code (audiossl, MIT licence), one .safetensors + .json pair per case.

``load("name")`` returns (tensors, meta): float16 tensors hold exact values and are cast to float32; names start with
``in/``, ``out/`` or ``grad/``; what each one means is in the JSON's ``families``.
"""

import json
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file

FOLDER = Path(__file__).parent


@cache
def load(name: str) -> tuple[dict[str, torch.Tensor], dict]:
    tensors = load_file(FOLDER / f"{name}.safetensors")
    meta = json.loads((FOLDER / f"{name}.json").read_text())["meta"]
    return {k: v.float() if v.dtype == torch.float16 else v for k, v in tensors.items()}, meta
