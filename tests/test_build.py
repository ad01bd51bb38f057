"""The build: what it contains, and that its instruction sets cannot leak into one another."""

import re
import subprocess
from pathlib import Path

import pytest

import atst_fast
from atst_fast import _C
from atst_fast.ops._registry import triton_operators

ROOT = Path(__file__).parent.parent


def test_build_info_names_who_runs_what(isa):
    info = atst_fast.build_info()
    assert info["isa"] == isa
    assert info["threads"] >= 1
    assert set(info["operators"]) >= {"log_mel", "augment", "patch_embed", "frame_attention", "ema_update_"}
    kernels = "".join(path.read_text() for path in ROOT.glob("csrc/*/*_cuda.cu"))
    for op, who in info["operators"].items():
        assert isa in who["cpu"] or who["cpu"] == "PyTorch"
        built = f'm.impl("{op}"' in kernels and not info["cuda"].startswith("none: ")
        expected = "Triton (" if op in triton_operators() else "CUDA (sm_" if built else "reference: "
        assert who["cuda"].startswith(expected), op


def test_the_tests_triton_is_the_oldest_that_is_allowed():
    (oldest,) = re.findall(r"triton>=(\d+\.\d+),<\d", (ROOT / "pyproject.toml").read_text())
    assert f"triton=={oldest}." in (ROOT / "Makefile").read_text()


def test_force_isa_refuses_what_the_machine_lacks():
    with pytest.raises(ValueError, match="force_isa: this machine cannot run 'neon'"):
        _C.force_isa("neon")


def test_no_inline_function_of_one_instruction_set_serves_another():
    """A weak symbol in an AVX-512 object could be the linker's choice for the portable path: there may be none."""
    objects = sorted(ROOT.glob("build/temp*/*_simd.*.o"))
    if not objects:
        pytest.skip("the build folder is gone")
    for path in objects:
        symbols = subprocess.run(["nm", "-C", path], capture_output=True, text=True, check=True).stdout.splitlines()
        weak = [line for line in symbols if line[17:18] in "WVu"]
        assert not weak, f"{path.name}: {weak}"
        isa = path.name.split(".")[1]
        exported = [line for line in symbols if line[17:18] == "T"]
        assert exported, path.name
        assert all(f"atst::{isa}::" in line for line in exported), f"{path.name}: {exported}"
