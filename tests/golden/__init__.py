"""Inputs and outputs of the official ATST code (audiossl, MIT licence), one .safetensors + .json pair per case.

``load("name")`` returns (tensors, meta): float16 tensors hold exact values and are cast to float32; names start with
``in/``, ``out/`` or ``grad/``; what each one means is in the JSON's ``families``.
"""

import json
from functools import cache
from pathlib import Path

import torch

from tests.tolerances import GOLDEN_NOISE, GOLDEN_ULPS

FOLDER = Path(__file__).parent
_DTYPES = {"F16": torch.float16, "F32": torch.float32, "F64": torch.float64, "I16": torch.int16, "I64": torch.int64}
_DTYPES |= {"BOOL": torch.bool}


def load(name: str) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors of the caller's own, to write into as it likes."""
    tensors, meta = _stored(name)
    return {k: v.clone() for k, v in tensors.items()}, dict(meta)


@cache
def _stored(name: str) -> tuple[dict[str, torch.Tensor], dict]:
    tensors = _read(FOLDER / f"{name}.safetensors")
    meta = json.loads((FOLDER / f"{name}.json").read_text())["meta"]
    return {k: v.float() if v.dtype == torch.float16 else v for k, v in tensors.items()}, meta


def _read(path: Path) -> dict[str, torch.Tensor]:
    """A .safetensors file, read here: machines with a GPU to test on may lack the package."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    tensors = {}
    for key, entry in json.loads(data[8:start]).items():
        if key != "__metadata__":
            begin, end = (start + offset for offset in entry["data_offsets"])
            values = torch.frombuffer(bytearray(data[begin:end]), dtype=_DTYPES[entry["dtype"]])
            tensors[key] = values.view(entry["shape"])
    return tensors


def assert_golden(name: str, key: str, got: torch.Tensor) -> None:
    """``got`` is the golden tensor ``key``, up to the noise of the reference itself (see tests/tolerances.py)."""
    want = _stored(name)[0][key]
    noise = json.loads((FOLDER / f"{name}.json").read_text())["tensors"][key].get("f64_diff", 0.0)
    atol = GOLDEN_NOISE * noise + GOLDEN_ULPS * want.abs().max().item()
    torch.testing.assert_close(got.detach(), want, rtol=0, atol=atol, msg=lambda m: f"{name}: {key}: {m}")
