"""The rules of the layout (docs/design.md), walked over the tree, so that they stay true."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "atst_fast"
OPERATORS = sorted(p.name for p in (ROOT / "csrc").iterdir() if p.is_dir())

# layer -> what it may import of atst_fast, besides itself
ARROWS = {
    "files": set(),
    "reference": set(),
    "ops": {"reference", "kernels", "_C"},
    "nn": {"ops"},
    "optim": {"ops"},
    "ema_teacher": {"ops"},
    "models": {"ops", "nn", "files"},
    "integrations": {"ops", "nn", "models", "optim", "files"},
    "hear": {"integrations"},
    # the definition of correct checks what is measured
    "bench": {"ops", "nn", "optim", "reference", "files"},
    "train": {"ops", "nn", "models", "optim", "integrations", "files", "bench"},
}


def imported_layers(path):
    """The parts of atst_fast that a file imports anywhere, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "atst_fast" else [module]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "atst_fast" and len(parts) > 1:
                yield parts[1]


@pytest.mark.parametrize("layer", ARROWS)
def test_arrows(layer):
    files = sorted((PACKAGE / layer).rglob("*.py")) or [PACKAGE / f"{layer}.py"]
    for path in files:
        wrong = set(imported_layers(path)) - ARROWS[layer] - {layer}
        assert not wrong, (
            f"{path.relative_to(ROOT)} imports {sorted(wrong)}: {layer} may import {sorted(ARROWS[layer])}"
        )


def test_one_stem_per_operator():
    assert OPERATORS
    for op in OPERATORS:
        for path in (f"atst_fast/ops/{op}.py", f"atst_fast/reference/{op}.py", f"tests/ops/test_{op}.py"):
            assert (ROOT / path).exists(), f"operator {op}: {path} is missing"
        cases = f"atst_fast/bench/cases/{op}.py"
        assert (ROOT / cases).exists(), f"operator {op}: {cases} is missing"


def test_kernel_layer_knows_no_torch():
    for path in [*ROOT.glob("csrc/*/*.h"), *ROOT.glob("csrc/*/*.cuh"), *ROOT.glob("csrc/*/*_simd.cpp")]:
        assert not re.search(r'#include [<"](torch|ATen|c10|.*stable_shim)', path.read_text()), path


def test_nothing_below_ops_knows_autograd():
    below = [*ROOT.glob("csrc/**/*.*"), *ROOT.glob("kernels/*.py"), *PACKAGE.glob("reference/*.py")]
    for path in below:
        assert "autograd" not in path.read_text(), path


def test_importing_kernels_by_its_folder_name_fails():
    run = subprocess.run([sys.executable, "-c", "import kernels"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode != 0
    assert "atst_fast.kernels" in run.stderr


def test_kernels_is_a_part_of_the_package():
    pytest.importorskip("atst_fast.kernels", reason="mapped by an installation; this is a bare source tree")


def sources(*patterns):
    listed = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).exists()]


def test_no_file_is_two_things_in_one_room():
    long = {
        str(p.relative_to(ROOT)): n
        for p in sources("*.py", "*.cpp", "*.h", "*.cu", "*.cuh")
        if (n := len(p.read_text().splitlines())) > 420
    }
    assert not long, long


def test_no_dependency_of_the_reference_code_is_needed():
    """torchaudio and the like may be compared with in tests; the package imports none of them."""
    banned = {
        "torchaudio",
        "torchvision",
        "timm",
        "lightning",
        "pytorch_lightning",
        "fairseq",
        "transformers",
        "torchcodec",
    }
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            assert not {n.split(".")[0] for n in names} & banned, path
    assert not re.search("|".join(banned), (ROOT / "pyproject.toml").read_text())
