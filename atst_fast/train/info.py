"""``atst-fast info``: what this installation consists of; and the record of it that every run keeps."""

import platform
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("atst_fast", "torch", "numpy", "soundfile", "soxr", "safetensors", "tyro", "rich", "tensorboard")


@dataclass(frozen=True)
class InfoConfig:
    """Who runs each operator on this machine, and which versions of what are installed."""


def info(config: InfoConfig) -> int:
    """Print ``build_info()`` and the environment as tables."""
    from rich.console import Console
    from rich.table import Table

    from atst_fast.ops import build_info

    build = build_info()
    operators = Table("operator", "CPU", "CUDA", title="operators")
    for name, runs in build.pop("operators").items():
        operators.add_row(name, runs["cpu"], runs["cuda"])
    rest = Table(show_header=False, title="build and environment")
    for key, value in (*build.items(), *_flat(environment())):
        rest.add_row(str(key), str(value))
    console = Console()
    console.print(operators, rest)
    return 0


def environment() -> dict[str, Any]:
    """Versions, machine and, in a source tree under git, the revision: plain values for JSON."""
    import torch

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "versions": versions | {"torch": torch.__version__, "python": platform.python_version()},
        "machine": {"system": platform.platform(), "cpu": _cpu(), "threads": torch.get_num_threads(), "gpu": gpu},
        "git": git_revision(Path(__file__).parent),
    }


def git_revision(folder: Path) -> str | None:
    """The commit of the source tree, with "+changes" where it was edited; None for an installed package."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # A package installed somewhere inside another project's repository is not tracked there.
    if git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    revision = git("rev-parse", "HEAD")
    return revision and revision + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _flat(tree: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(k, v) for value in tree.values() if isinstance(value, dict) for k, v in value.items()] + [
        (k, v) for k, v in tree.items() if not isinstance(v, dict)
    ]
