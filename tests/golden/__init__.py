"""Inputs and outputs of the official ATST code (audiossl, MIT licence), one .safetensors + .json pair per case.

``load("name")`` returns (tensors, meta): float16 tensors hold exact values and are cast to float32; names start with
``in/``, ``out/`` or ``grad/``; what each one means is in the JSON's ``families``.
"""

import json
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.tolerances import GOLDEN_NOISE, GOLDEN_ULPS

FOLDER = Path(__file__).parent


@cache
def load(name: str) -> tuple[dict[str, torch.Tensor], dict]:
    tensors = load_file(FOLDER / f"{name}.safetensors")
    meta = json.loads((FOLDER / f"{name}.json").read_text())["meta"]
    return {k: v.float() if v.dtype == torch.float16 else v for k, v in tensors.items()}, meta


def assert_golden(name: str, key: str, got: torch.Tensor) -> None:
    """``got`` is the golden tensor ``key``, up to the noise of the reference itself (see tests/tolerances.py)."""
    want = load(name)[0][key]
    noise = json.loads((FOLDER / f"{name}.json").read_text())["tensors"][key].get("f64_diff", 0.0)
    atol = GOLDEN_NOISE * noise + GOLDEN_ULPS * want.abs().max().item()
    torch.testing.assert_close(got.detach(), want, rtol=0, atol=atol, msg=lambda m: f"{name}: {key}: {m}")
